"""What `cnncc publish` and `cnncc fleet delta` share: which releases deltas are made from, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnncc.cli.render import Render, size_text
from cnncc_runtime.errors import DependencyMissing, NotInRegistry, UsageError, VerificationFailed

if TYPE_CHECKING:
    from cnncc.fleet.delta import EngineDelta
    from cnncc.fleet.home import Fleet


def check_bases(fleet: Fleet, versions: Sequence[str]) -> None:
    """See, before any work, that releases which deltas were asked for are there.

    Raises:
        UsageError: One is not.
        DependencyMissing: Deltas cannot be made here.
    """
    from cnncc_runtime.agent.delta import require_zstandard

    if versions:
        require_zstandard()
    for version in versions:
        if not fleet.releases.has(version):
            raise UsageError(
                f"{fleet.releases.place} has no release {version}", hint=f"cnncc fleet status {fleet.name}"
            )


def pointed_to(fleet: Fleet, digest: str) -> dict[str, str]:
    """Return what devices have by the channels' word, but for the release of a digest: version → digest."""
    from cnncc.fleet.rollout import pointers

    fleet.signing.load()
    found = pointers(fleet.signing, fleet.name)
    return {each.signed.version: each.digest for each in found if each.digest != digest}


def make_deltas(
    render: Render, fleet: Fleet, version: str, bases: Mapping[str, str], local: Mapping[str, Path], *, asked: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Make and store deltas, and return what is said of them: for ``--json``, and lines.

    Args:
        render: Shows progress.
        fleet: Whose releases.
        version: The newer release.
        bases: Older ones: version → version or digest.
        local: See `cnncc.fleet.delta.add_deltas`.
        asked: Whether the user named the older releases: then what cannot be is an error, else a note.

    Raises:
        CnnccError: As `cnncc.fleet.delta.add_deltas`.
    """
    from cnncc.fleet.delta import add_deltas

    document: list[dict[str, Any]] = []
    lines: list[str] = []
    for base, reference in bases.items():
        render.stage("delta")
        done: dict[str, int] = {}

        def told(what: str, went: int, size: int, done: dict[str, int] = done) -> None:
            done[what] = done.get(what, 0) + went
            render.progress(what, done[what] / size)

        try:
            made = add_deltas(fleet.releases, version, reference, local=local, progress=told)
        except (UsageError, DependencyMissing, NotInRegistry, VerificationFailed) as exc:
            if asked:
                raise
            render.note(f"no delta from {base}: {exc.message}")
            continue
        finally:
            render.close()
        document += [
            {"from": base, "device": each.device, "bytes": each.size, "whole": each.whole, "there": each.there}
            for each in made
        ]
        lines += [f"  delta from {base} for {each.device}: {_text(each)}" for each in made]
        if not made:
            lines.append(f"  no delta from {base}: its engines are the same")
    return document, lines


def _text(delta: EngineDelta) -> str:
    if delta.there:
        return "there already"
    if not delta.files:
        return "none, since no file's is much smaller than the file"
    return f"{size_text(delta.size)} instead of {size_text(delta.whole)}"
