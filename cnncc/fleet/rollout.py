"""Rollouts: which release a channel points to, and how many of its devices take it.

What is signed of a release (`cnncc_runtime.agent.rollout.Signed`) says who shall have it. The sequence grows when a
channel points to another release, an older one too; how far a release goes may change without that, and devices that
have it do not try it again.

    pause     no further device takes the release; those that have it keep it, and `resume` goes on
    rollback  all of the channel's devices take an older release, those too that it was not for before
    abort     devices that took the release go back to the one before; for all others nothing was ever announced
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cnncc.fleet.signing import Signing
from cnncc_runtime.agent.rollout import ALL, Signed, matches, read_signed
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import UsageError, VerificationFailed
from cnncc_runtime.oci.registry import Repository


@dataclass(frozen=True)
class Reach:
    """Who shall have a release; None leaves what was said before.

    Attributes:
        percent: Of the devices, to a hundredth.
        selector: Conditions that a device must meet.
        slowdown: How many times as long as the engine before it may take.
        halt: Percent of failing devices above which the rollout is paused (`cnncc.fleet.watch`).
        least: Devices that must have reported before it is.
    """

    percent: float | None = None
    selector: str | None = None
    slowdown: float | None = None
    halt: float | None = None
    least: int | None = None


class Halt(msgspec.Struct, frozen=True):
    """When a rollout is paused; signed with the release, and for its publisher alone.

    Attributes:
        failing: Devices that fail, of ten thousand: more pause it.
        least: Devices that must have reported.
    """

    failing: int
    least: int = 20


class Earlier(msgspec.Struct, frozen=True):
    """Where a channel pointed before; signed with the release, and for its publisher alone.

    Attributes:
        digest: Of the release's index.
        signed: What was signed with it.
    """

    digest: str
    signed: Signed


@dataclass(frozen=True)
class Pointer:
    """Where a channel points.

    Attributes:
        channel: Which.
        name: Of the model.
        digest: Of the release's index.
        signed: What is signed with it.
        earlier: Where the channel pointed before; None where there is nothing to go back to.
        halt: When the rollout is paused; None for never.
        aborted: The version of the rollout that was aborted, and undone by this one; empty for none.
    """

    channel: str
    name: str
    digest: str
    signed: Signed
    earlier: Earlier | None = None
    halt: Halt | None = None
    aborted: str = ""

    @property
    def before(self) -> str:
        """The version that the channel pointed to before; empty for none."""
        return self.earlier.signed.version if self.earlier else ""


class _Own(msgspec.Struct, omit_defaults=True):
    """What is signed for the publisher, beside `Signed`."""

    earlier: Earlier | None = None
    halt: Halt | None = None
    aborted: str = ""


def pointers(signing: Signing, name: str) -> tuple[Pointer, ...]:
    """Return where the channels point, after `Signing.load`.

    Args:
        signing: The fleet's metadata.
        name: Of the model.

    Raises:
        VerificationFailed: What is signed is not by the rules.
    """
    found = []
    for channel in signing.channels:
        target = signing.released(channel).get(f"{channel}/{name}")
        if target is not None:
            signed, own = read_signed(target.custom or {}), _own(target.custom or {})
            digest = f"sha256:{target.hashes['sha256']}"
            found.append(Pointer(channel, name, digest, signed, own.earlier, own.halt, own.aborted))
    return tuple(found)


def pointer(signing: Signing, channel: str, name: str) -> Pointer:
    """Return where a channel points, after `Signing.load`.

    Raises:
        UsageError: There is no such channel, or it points to nothing.
    """
    signing.released(channel)
    found = next((each for each in pointers(signing, name) if each.channel == channel), None)
    if found is None:
        raise UsageError(f"{channel} has no release of {name}", hint="cnncc publish, or cnncc fleet promote")
    return found


def point(
    signing: Signing, repository: Repository, channel: str, name: str, version: str, reach: Reach | None = None
) -> Pointer:
    """Have a channel point to a release that is stored, after `Signing.load`; `Signing.publish` makes it known.

    Args:
        signing: The fleet's metadata.
        repository: Where the release is.
        channel: Which.
        name: Of the model.
        version: The release's.
        reach: Who shall have it: by default every device; of the release that the channel points to, the same as now.

    Raises:
        NotInRegistry: There is no such release.
        UsageError: There is no such channel, or nobody could have it so.
    """
    index = repository.manifest(version)
    before = next((each for each in pointers(signing, name) if each.channel == channel), None)
    same = before is not None and before.digest == digest_bytes(index)
    old = (
        before.signed
        if same and before
        else Signed(version, 1 + (before.signed.sequence if before else 0), salt=version)
    )
    reach = reach or Reach()
    signed = _reached(msgspec.structs.replace(old, repository=str(repository.place)), reach)
    if before is not None and same:
        made = replace(before, signed=signed, halt=_halt(before.halt, reach))
    else:
        earlier = Earlier(before.digest, before.signed) if before else None
        made = Pointer(channel, name, digest_bytes(index), signed, earlier, _halt(None, reach))
    _sign(signing, made, index)
    return made


def pause(signing: Signing, repository: Repository, channel: str, name: str, *, paused: bool) -> Pointer:
    """Have no further device take a channel's release, or again; `Signing.publish` makes it known.

    Raises:
        UsageError: The channel points to nothing, or that is so already.
    """
    found = pointer(signing, channel, name)
    if found.signed.paused == paused:
        raise UsageError(f"{channel}/{name} is {'paused' if paused else 'not paused'}")
    made = replace(found, signed=msgspec.structs.replace(found.signed, paused=paused))
    _sign(signing, made, repository.manifest(found.digest))
    return made


def go_back(signing: Signing, repository: Repository, channel: str, name: str, version: str = "") -> Pointer:
    """Have a channel point to an older release, for all of its devices; `Signing.publish` makes it known.

    Args:
        signing: The fleet's metadata.
        repository: Where the releases are.
        channel: Which.
        name: Of the model.
        version: Of the older release; by default what the channel pointed to before.

    Raises:
        UsageError: There was none before, or that is what it points to.
        NotInRegistry: There is no such release.
    """
    found = pointer(signing, channel, name)
    version = version or found.before
    if not version or version == found.signed.version:
        raise UsageError(
            f"{channel}/{name} has nothing else than {found.signed.version} to go back to", hint="--to names a version"
        )
    return point(signing, repository, channel, name, version)


def abort(signing: Signing, repository: Repository, channel: str, name: str) -> Pointer:
    """End a rollout for good: devices that took the release go back; `Signing.publish` makes it known.

    For all others it is as if the release had never been announced: what was said of the one before holds again.

    Args:
        signing: The fleet's metadata.
        repository: Where the releases are.
        channel: Which.
        name: Of the model.

    Raises:
        UsageError: The channel points to nothing, or pointed to nothing before.
        NotInRegistry: The release before is not there any more.
    """
    found = pointer(signing, channel, name)
    if found.earlier is None:
        raise UsageError(
            f"{channel}/{name} has no release before {found.signed.version} that devices could go back to",
            hint=f"cnncc fleet pause {name} stops the rollout; cnncc fleet rollback {name} --to VERSION",
        )
    sequence = found.signed.sequence
    signed = msgspec.structs.replace(found.earlier.signed, sequence=sequence + 1, undoes=sequence)
    made = Pointer(channel, name, found.earlier.digest, signed, aborted=found.signed.version)
    _sign(signing, made, repository.manifest(made.digest))
    return made


def _reached(signed: Signed, reach: Reach) -> Signed:
    changes: dict[str, Any] = {}
    if reach.percent is not None:
        if not 0 <= reach.percent <= 100:
            raise UsageError(f"{reach.percent:g} % of the devices is no share", hint="--percent 0 to 100")
        changes["share"] = round(reach.percent * ALL / 100)
    if reach.selector is not None:
        try:
            matches(reach.selector or "x!=x", {})
        except VerificationFailed as exc:
            raise UsageError(exc.message, hint="as in --selector 'sm>=87, machine=aarch64'") from exc
        changes["selector"] = reach.selector
    if reach.slowdown is not None:
        if not 0.01 <= reach.slowdown <= 1000:
            raise UsageError(f"{reach.slowdown:g} times as long is no bound", hint="--slowdown 1.5")
        changes["slowdown"] = round(reach.slowdown * 100)
    return msgspec.structs.replace(signed, **changes)


def _halt(old: Halt | None, reach: Reach) -> Halt | None:
    if reach.halt is None:
        if reach.least is not None:
            raise UsageError("--halt-after says nothing without --halt-on-failure-pct")
        return old
    if not 0 <= reach.halt <= 100 or (reach.least is not None and reach.least < 1):
        raise UsageError("a rollout is halted above 0 to 100 % of at least one device")
    return Halt(round(reach.halt * 100), reach.least or Halt(0).least)


def _own(custom: Mapping[str, Any]) -> _Own:
    try:
        return msgspec.convert(dict(custom), _Own)
    except msgspec.ValidationError as exc:
        raise VerificationFailed(f"what is signed with the release is not by the rules: {exc}") from exc


def _sign(signing: Signing, made: Pointer, index: bytes) -> None:
    own = msgspec.to_builtins(_Own(made.earlier, made.halt, made.aborted))
    signing.release(made.channel, made.name, index, {**msgspec.to_builtins(made.signed), **own})
