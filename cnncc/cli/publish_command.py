"""``cnncc publish``: bundles become a release in a fleet's registry."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnncc.cli.fleet_options import open_named, pointer_document, pointer_text, reach, reach_options
from cnncc.cli.main import common
from cnncc.cli.render import Render, size_text
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc_runtime.bundle import Manifest


@click.command(name="publish")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The fleet: see `cnncc fleet trust init`.")
@click.option("--version", "version", required=True, help="The release's, for good: 1.4.0")
@click.option("--channel", help="Have this channel's devices take it.  [default: none takes it before `promote`]")
@reach_options
@click.option(
    "--unproven",
    multiple=True,
    metavar="BUNDLE",
    help="Publish this one although its parity is not passed; who did so is noted in it.",
)
@click.option(
    "--delta-from",
    multiple=True,
    metavar="VERSION",
    help="Make deltas from this release for devices that have it.  [default: from those that channels point to]",
)
@click.option("--no-delta", is_flag=True, help="Make none: devices fetch whole files.")
@click.option("--dry-run", is_flag=True, help="Check everything, send nothing.")
@common
def command(
    render: Render,
    *,
    bundles: tuple[Path, ...],
    name: str,
    version: str,
    channel: str | None,
    unproven: tuple[str, ...],
    delta_from: tuple[str, ...],
    no_delta: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Publish BUNDLES as one release: an engine for each kind of device.

    Bundles are checked to the last byte, and those whose parity nobody proved are refused. What the registry has
    already is not sent again, so a publisher that was interrupted begins again where it was: of a large file at the
    last part (16 MiB) that the registry confirmed, where it still knows of it.

    Devices that have an older release fetch deltas, which are made here and applied once before they are stored.

    A bill of materials and a provenance, signed by the fleet's key for that, are attached to each engine; `cnncc fleet
    show` verifies them. Publishing a release again attaches what is missing, and signs anew what was signed by keys
    that were rotated since.
    """
    from cnncc.cli.fleet_deltas import check_bases, make_deltas, pointed_to
    from cnncc.fleet.publish import check_bundles, publish
    from cnncc.fleet.rollout import Reach, point

    whose = reach(given)
    if channel is None and whose != Reach():
        raise UsageError("who shall have a release is said of a channel's devices", hint="add --channel")
    allowed = dict.fromkeys((Path(each).name for each in unproven), getpass.getuser())
    if unknown := allowed.keys() - {path.name for path in bundles}:
        raise UsageError(f"--unproven names bundles that are not published: {', '.join(sorted(unknown))}")
    if no_delta and delta_from:
        raise UsageError("--no-delta makes none, --delta-from some", hint="give one of them")
    fleet = open_named(name)
    check_bases(fleet, delta_from)
    checked = check_bundles(bundles, unproven=allowed)
    engines = [_engine(bundle.manifest) for bundle in checked]
    if dry_run:
        render.result(
            {"dry_run": True, "name": name, "version": version, "engines": engines},
            lambda: render.line(f"{name}@{version}  would be sent to {fleet.releases.place}: {', '.join(engines)}"),
        )
        return
    render.stage("publish")
    sizes: dict[str, int] = {}

    def told(file: str, went: int, size: int) -> None:
        sizes[file] = sizes.get(file, 0) + went
        render.progress(file, sizes[file] / size if size else 1.0)

    fleet.signing.load()
    made = publish(
        checked,
        fleet.releases,
        version,
        attester=fleet.signing.attester(),
        unproven=allowed,
        sessions=fleet.uploads,
        progress=told,
    )
    for bundle, lacking in made.unrecorded.items():
        render.note(f"{bundle} does not record {' or '.join(lacking)}, so its provenance cannot say it")
    document: dict[str, Any] = {
        "name": name,
        "version": version,
        "digest": made.digest,
        "engines": engines,
        "bytes_sent": made.sent,
    }
    lines = [
        f"{name}@{version}  published to {fleet.releases.place}: {', '.join(engines)}; {size_text(made.sent)} sent",
    ]
    if not no_delta:
        # before a channel points to the release: devices that come at once would fetch it whole
        bases = {base: base for base in delta_from} or pointed_to(fleet, made.digest)
        local = {record.sha256: each.path / file for each in checked for file, record in each.manifest.files.items()}
        document["deltas"], said = make_deltas(render, fleet, version, bases, local, asked=bool(delta_from))
        lines += said
    if channel is None:
        lines.append(f"  no device takes it before `cnncc fleet promote {name}@{version} --to CHANNEL`")
    else:
        with fleet.changing() as signing:
            found = point(signing, fleet.releases, channel, fleet.name, version, whose)
        document["pointer"] = pointer_document(found)
        lines.append(pointer_text(found))
    render.result(document, lambda: render.line("\n".join(lines)))


def _engine(manifest: Manifest) -> str:
    """Return what an engine is for, and its precision; which machine the host was, a fleet cannot know."""
    from cnncc.targets.devices import HOST

    target = manifest.target
    return f"{target.processor if target.device == HOST else target.device} {manifest.precision}"
