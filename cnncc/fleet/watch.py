"""Watching a rollout: it is paused when too many devices fail.

The collector only counts; it has no keys. Whoever watches has the channel's, and what they sign is what stops devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import requests

from cnncc.fleet.home import Fleet
from cnncc.fleet.rollout import Pointer, pause, pointers
from cnncc_runtime.agent.reports import check_address
from cnncc_runtime.errors import NetworkFailed, RegistryRefused
from cnncc_runtime.oci.http import network_errors, whole

_TIMEOUT = (5.0, 30.0)
_LARGEST = 64 << 20


class Release(msgspec.Struct, frozen=True):
    """How a release goes, as the collector counts.

    Attributes:
        name: Of the model.
        channel: Which.
        sequence: The release's place in it.
        version: The release's.
        reports: Devices that reported.
        installed: Those that run it.
        failing: Percent of them that do not.
    """

    name: str
    channel: str
    sequence: int
    version: str
    reports: int
    installed: int
    failing: float


class _Status(msgspec.Struct):
    releases: tuple[Release, ...]


@dataclass(frozen=True)
class Seen:
    """A channel, and how its release goes.

    Attributes:
        pointer: Where it points.
        release: What devices reported; None where none did.
        halted: Whether its rollout was paused now.
    """

    pointer: Pointer
    release: Release | None
    halted: bool = False


def ask(url: str, token: str, ca: Path | None = None) -> tuple[Release, ...]:
    """Return what a collector counts.

    Raises:
        NetworkFailed: It does not answer.
        RegistryRefused: It does not know the token, or says something else.
    """
    host = check_address(url)
    with network_errors(host):
        answer = requests.get(
            f"{url.rstrip('/')}/status.json",
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT,
            stream=True,
            allow_redirects=False,
            verify=str(ca) if ca else None,
        )
    with answer:
        if answer.status_code == 401:
            raise RegistryRefused(f"{host} does not know the token", hint="cnncc fleet token viewer NAME makes one")
        if answer.status_code != 200:
            raise NetworkFailed(f"{host} answered {answer.status_code}")
        try:
            return msgspec.json.decode(whole(answer, most=_LARGEST), type=_Status).releases
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RegistryRefused(f"{host} is no collector: {exc}") from exc


def must_halt(pointer: Pointer, release: Release | None) -> bool:
    """Tell whether a rollout is to be paused."""
    halt = pointer.halt
    if halt is None or release is None or pointer.signed.paused or release.sequence != pointer.signed.sequence:
        return False
    return release.reports >= halt.least and release.failing * 100 > halt.failing


def look(fleet: Fleet, releases: Sequence[Release]) -> tuple[Seen, ...]:
    """Hold what devices reported against what was signed, and pause what fails too often.

    Args:
        fleet: Its metadata is fetched anew.
        releases: From `ask`.

    Raises:
        UsageError: A channel's keys are not here.
        VerificationFailed: The fleet's metadata cannot be believed.
        NetworkFailed: The registry does not answer.
    """
    fleet.signing.load()
    seen = []
    for pointer in pointers(fleet.signing, fleet.name):
        key = (pointer.name, pointer.channel, pointer.signed.sequence)
        release = next((each for each in releases if (each.name, each.channel, each.sequence) == key), None)
        halted = must_halt(pointer, release)
        if halted:
            with fleet.changing() as signing:
                pause(signing, fleet.releases, pointer.channel, pointer.name, paused=True)
        seen.append(Seen(pointer, release, halted))
    return tuple(seen)
