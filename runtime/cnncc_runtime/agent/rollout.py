"""Whether a release is for this device yet: what its publisher signed of how far it may go."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.releases import Hardware

ALL = 10_000
"""All devices: what is signed has no fractions (TUF specification, 4.2), so that shares are of ten thousand."""
_CONDITION = re.compile(r"\s*([a-z][a-z0-9_.-]*)\s*(>=|<=|!=|=|<|>)\s*([A-Za-z0-9_.+-]+)\s*")


class Signed(msgspec.Struct, frozen=True):
    """What is signed with a release.

    Attributes:
        version: As its publisher calls it.
        sequence: Its place in the channel: it grows whenever the channel points elsewhere, to an older version too.
        repository: Where it is; told to people, not followed.
        share: Of ten thousand devices, how many take it.
        salt: Chooses which: the same salt chooses the same ones, and more of them with a larger share.
        selector: Conditions that a device must meet, joined by commas.
        paused: Whether no further device takes it.
        slowdown: How long it may take, in percent of what the engine before it takes.
        undoes: The sequence of a rollout that was aborted: devices that have had it go back to this release, whomever
            else it is for; 0 for none.
    """

    version: str
    sequence: int
    repository: str = ""
    share: int = ALL
    salt: str = ""
    selector: str = ""
    paused: bool = False
    slowdown: int = 200
    undoes: int = 0


def read_signed(custom: Mapping[str, Any]) -> Signed:
    """Return what is signed with a release.

    Raises:
        VerificationFailed: It is not by the rules.
    """
    try:
        signed = msgspec.convert(dict(custom), Signed)
    except msgspec.ValidationError as exc:
        raise VerificationFailed(f"what is signed with the release is not by the rules: {exc}") from exc
    if not 0 <= signed.share <= ALL or not 0 <= signed.undoes < signed.sequence or signed.slowdown < 1:
        raise VerificationFailed("what is signed with the release is not by the rules: numbers out of bounds")
    return signed


def why_not(signed: Signed, device: str, hardware: Hardware, had: int = 0) -> str:
    """Return why a release is not for a device yet, or an empty text.

    Args:
        signed: What is signed with it.
        device: The device's name.
        hardware: What it is.
        had: The sequence of the release that the device took last; 0 for none.

    Raises:
        VerificationFailed: The selector is not by the rules.
    """
    if 0 < signed.undoes <= had:
        return ""
    if signed.paused:
        return "its rollout is paused"
    if signed.selector and not matches(signed.selector, facts_of(device, hardware)):
        return f"it is for devices with {signed.selector}"
    place = place_of_device(signed.salt, device)
    if place >= signed.share:
        return f"it is for {signed.share / 100:g} % of the devices, and this one comes at {place / 100:g} %"
    return ""


def place_of_device(salt: str, device: str) -> int:
    """Return a device's place among ten thousand: it takes a release whose share is larger."""
    digest = hashlib.sha256(f"{salt}\0{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % ALL


def facts_of(device: str, hardware: Hardware) -> dict[str, str]:
    """Return what selectors may ask of a device: name → value."""
    newest = max((gpu.capability for gpu in hardware.gpus), key=_number, default="")
    return {
        "device": device,
        "machine": hardware.machine,
        "profile": hardware.name,
        "sm": newest.replace(".", ""),
        **{f"cpu.{feature}": "yes" for feature in hardware.features},
    }


def matches(selector: str, facts: Mapping[str, str]) -> bool:
    """Tell whether a device meets all conditions of a selector: ``sm>=87, machine=aarch64, cpu.dotprod=yes``.

    Numbers are compared as numbers; what a device does not have meets only ``!=``.

    Raises:
        VerificationFailed: The selector is not by the rules.
    """
    return all(_meets(condition, facts) for condition in selector.split(","))


def _meets(condition: str, facts: Mapping[str, str]) -> bool:
    parts = _CONDITION.fullmatch(condition)
    if parts is None:
        raise VerificationFailed(
            f"the selector {condition.strip()[:80]!r} is not by the rules: name, = != < > <= >=, value"
        )
    name, relation, wanted = parts.groups()
    found = facts.get(name, "")
    if relation in ("=", "!="):
        return (found == wanted) == (relation == "=")
    try:
        left, right = _number(found), _number(wanted)
    except ValueError:
        return False
    return {"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[relation]


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
