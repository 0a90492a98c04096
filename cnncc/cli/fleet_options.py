"""What the commands of fleets share: the fleet's name, whose release, who shall have it, and passphrases."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cnncc.cli.main import RENDER
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.fleet.home import Fleet
    from cnncc.fleet.rollout import Pointer, Reach

F = TypeVar("F", bound=Callable[..., Any])

PASSPHRASE = "CNNCC_FLEET_PASSPHRASE"
"""Environment variable: what keys are encrypted with; ``…_ROOT`` and the like are for one role alone."""
PIN = "CNNCC_FLEET_PIN"
"""Environment variable: of a token that keeps keys (PKCS #11)."""


def reach_options(function: F) -> F:
    """Add the flags that say who shall have a release."""
    for decorate in (
        click.option(
            "--halt-after", type=click.IntRange(1), metavar="DEVICES", help="…once so many reported.  [default: 20]"
        ),
        click.option(
            "--halt-on-failure-pct",
            type=click.FloatRange(0, 100),
            metavar="PERCENT",
            help="Pause the rollout where more devices fail (`cnncc fleet watch`).  [default: never]",
        ),
        click.option(
            "--slowdown",
            type=float,
            metavar="TIMES",
            help="How many times as long as the engine before it the new one may take on a device.  [default: 2]",
        ),
        click.option("--selector", help="Conditions that a device must meet: sm>=87, machine=aarch64, cpu.dotprod=yes"),
        click.option("--percent", type=click.FloatRange(0, 100), help="Of devices, how many take it.  [default: 100]"),
    ):
        function = decorate(function)
    return function


REACH = ("percent", "selector", "slowdown", "halt_on_failure_pct", "halt_after")
"""The parameters of `reach_options`."""


def reach(given: dict[str, Any]) -> Reach:
    """Return what those flags say, and take them out of a command's parameters."""
    from cnncc.fleet.rollout import Reach

    return Reach(*(given.pop(name) for name in REACH))


def passphrase(role: str) -> str:
    """Return what a role's keys are encrypted with, or a token's PIN: from the environment, else asked for.

    Raises:
        UsageError: It is in neither.
    """
    from cnncc.fleet.signers import TOKEN

    what = "the token's PIN" if role == TOKEN else f"the passphrase of {role}"
    names = (PIN,) if role == TOKEN else (f"{PASSPHRASE}_{role.upper().replace('-', '_')}", PASSPHRASE)
    for name in names:
        if found := os.environ.get(name):
            return found
    if not sys.stdin.isatty():
        raise UsageError(f"{what} is needed, and there is no terminal to ask at", hint=f"export {names[-1]}=…")
    return getpass.getpass(f"{what[0].upper()}{what[1:]}: ")


def open_named(name: str) -> Fleet:
    """Return the fleet of a name; what is worth knowing of it is a note of the command's."""
    from cnncc.fleet.home import open_fleet

    return open_fleet(name, passphrase, note=click.get_current_context().meta[RENDER].note)


def name_and_version(text: str) -> tuple[str, str]:
    """Split ``NAME@VERSION``.

    Raises:
        UsageError: It is not of that form.
    """
    name, at, version = text.partition("@")
    if not (name and at and version):
        raise UsageError(f"'{text}' names no release", hint="as in vision@1.4.0")
    return name, version


def pointer_text(pointer: Pointer) -> str:
    """Return a line about where a channel points."""
    signed = pointer.signed
    who = f"{signed.share / 100:g} %" + (f" of devices with {signed.selector}" if signed.selector else "")
    ended = f"; {pointer.aborted} was aborted" if pointer.aborted else ""
    return f"{pointer.channel}/{pointer.name}  {signed.version}, {who}{', paused' if signed.paused else ''}{ended}"


def pointer_document(pointer: Pointer) -> dict[str, Any]:
    """Return the same for ``--json``."""
    import msgspec

    signed = msgspec.to_builtins(pointer.signed)
    return {
        "channel": pointer.channel,
        "name": pointer.name,
        "digest": pointer.digest,
        "before": pointer.before,
        "aborted": pointer.aborted,
        **signed,
    }
