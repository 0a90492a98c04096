"""``cnncc fleet``: who may sign for a fleet, and which release its devices take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from cnncc.cli.fleet_evidence import evidence_document, evidence_text
from cnncc.cli.fleet_options import (
    name_and_version,
    open_named,
    pointer_document,
    pointer_text,
    reach,
    reach_options,
)
from cnncc.cli.main import common
from cnncc.cli.render import Render, size_text
from cnncc.cli.trust_commands import trust


@click.group(name="fleet")
def command() -> None:
    """Say which release a fleet's devices take, and who may say so.

    A fleet is a model's releases in an OCI registry, and metadata (The Update Framework) that says which of them may be
    believed. Its devices run `cnncc-agent`.
    """


command.add_command(trust)

_CHANNEL = click.option("--channel", default="stable", show_default=True)


@command.command(name="promote")
@click.argument("release", metavar="NAME@VERSION")
@click.option("--from", "source", help="Only if this channel points to that version.")
@click.option("--to", "channel", required=True, help="The channel whose devices shall have it.")
@reach_options
@common
def promote(render: Render, *, release: str, source: str | None, channel: str, **given: Any) -> None:
    """Have a channel's devices take a release, or more of them: the same ones, and others."""
    from cnncc.fleet.rollout import point, pointer
    from cnncc_runtime.errors import UsageError

    name, version = name_and_version(release)
    fleet = open_named(name)
    with fleet.changing() as signing:
        if source is not None and (found := pointer(signing, source, fleet.name)).signed.version != version:
            raise UsageError(f"{source} points to {found.signed.version}, not to {version}")
        made = point(signing, fleet.releases, channel, fleet.name, version, reach(given))
    render.result(pointer_document(made), lambda: render.line(pointer_text(made)))


@command.command(name="status")
@click.argument("name")
@common
def status(render: Render, *, name: str) -> None:
    """Say where the channels point."""
    from cnncc.fleet.rollout import pointers

    fleet = open_named(name)
    fleet.signing.load()
    found = pointers(fleet.signing, fleet.name)

    def text() -> None:
        rows = [
            [
                each.channel,
                each.signed.version,
                f"{each.signed.share / 100:g} %",
                each.signed.selector,
                ", ".join(
                    [
                        *(["paused"] if each.signed.paused else []),
                        *([f"{each.aborted} aborted"] if each.aborted else []),
                    ]
                ),
                str(each.signed.sequence),
                each.before,
            ]
            for each in found
        ]
        render.table(["channel", "release", "devices", "selector", "", "sequence", "before"], rows)
        if not rows:
            render.line(f"{name}  has no release in any channel")

    render.result({"name": name, "channels": [pointer_document(each) for each in found]}, text)


@command.command(name="show")
@click.argument("release", metavar="NAME@VERSION")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for the bills of materials (CycloneDX) and the signed provenances (in-toto).",
)
@common
def show_release(render: Render, *, release: str, output: Path | None) -> None:
    """Say what a release holds and what is attached to its engines, once all of that is verified.

    Each engine's provenance must be signed by a key that the fleet's metadata names now, and be of this engine; its
    bill of materials, reports and model must be those that the provenance names. Exits with 30 where one is not, or
    where they were taken away. What keys signed that were rotated since is not believed either: `cnncc publish` of the
    same release attaches it anew.
    """
    from cnncc.fleet.evidence import release_evidence, write_documents
    from cnncc.fleet.rollout import pointers

    name, version = name_and_version(release)
    fleet = open_named(name)
    fleet.signing.load()
    fleet.signing.check_dates()
    found = release_evidence(fleet.releases, version, fleet.signing.attester(), pointers(fleet.signing, fleet.name))
    document = evidence_document(fleet.name, found)
    if output is not None:
        document["written"] = [str(output / file) for file in write_documents(found, output, document)]
    render.result(document, lambda: evidence_text(render, fleet.name, found))


def _pausing(name: str, *, paused: bool) -> click.Command:
    @command.command(name=name)
    @click.argument("fleet_name", metavar="NAME")
    @_CHANNEL
    @common
    def pausing(render: Render, *, fleet_name: str, channel: str) -> None:
        from cnncc.fleet.rollout import pause

        fleet = open_named(fleet_name)
        with fleet.changing() as signing:
            made = pause(signing, fleet.releases, channel, fleet.name, paused=paused)
        render.result(pointer_document(made), lambda: render.line(pointer_text(made)))

    pausing.help = (
        "Have no further device take a channel's release; those that have it keep it, until `resume` or `abort`."
        if paused
        else "Have devices take a channel's release again."
    )
    return pausing


_pausing("pause", paused=True)
_pausing("resume", paused=False)


@command.command(name="rollback")
@click.argument("name")
@_CHANNEL
@click.option("--to", "version", default="", help="An older release.  [default: the one before]")
@common
def rollback(render: Render, *, name: str, channel: str, version: str) -> None:
    """Have a channel's devices take an older release: all of them, those too that it was not for before.

    `abort` ends a rollout for those devices alone that took it.
    """
    from cnncc.fleet.rollout import go_back

    fleet = open_named(name)
    with fleet.changing() as signing:
        made = go_back(signing, fleet.releases, channel, fleet.name, version)
    render.result(pointer_document(made), lambda: render.line(pointer_text(made)))


@command.command(name="abort")
@click.argument("name")
@_CHANNEL
@common
def abort(render: Render, *, name: str, channel: str) -> None:
    """End a rollout for good: devices that took the release go back to the one before.

    For all others it is as if it had never been announced: what was said of the release before (`--percent`,
    `--selector`) holds again. `pause` keeps the release where it is; `rollback` gives an older one to every device.
    """
    from cnncc.fleet.rollout import abort as end

    fleet = open_named(name)
    with fleet.changing() as signing:
        made = end(signing, fleet.releases, channel, fleet.name)
    render.result(pointer_document(made), lambda: render.line(pointer_text(made)))


@command.command(name="export")
@click.argument("release", metavar="NAME[@VERSION]")
@click.option("--channel", help="Whose release.  [default: stable; of a VERSION, any that points to it]")
@click.option("--evidence", is_flag=True, help="With what refers to its engines: the model, reports.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The archive: release.tar")
@common
def export(render: Render, *, release: str, channel: str | None, evidence: bool, output: Path) -> None:
    """Write a channel's release, and what says that it may be believed, into one file, for devices without a network.

    `cnncc-agent install` takes it, believed, tried and trusted as any other release; `cnncc fleet import` brings it
    into another registry. It is good for as long as its timestamp: a day, unless it is signed again.
    """
    from cnncc.fleet.export import export_release

    name, version = name_and_version(release) if "@" in release else (release, "")
    fleet = open_named(name)
    render.stage("export")
    whose = channel or ("" if version else "stable")
    made = export_release(
        fleet.releases, fleet.metadata, fleet.name, output, channel=whose, version=version, evidence=evidence
    )
    render.result(
        {"archive": str(output), "digest": made.digest, "engines": made.engines, "bytes": made.size},
        lambda: render.line(f"{output}  {made.engines} engines, {size_text(made.size)}"),
    )


@command.command(name="import")
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("--registry", required=True, help="https://HOST[/PREFIX]; logins are Docker's")
@click.option("--root", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="root.json")
@click.option("--name", help="Of the model: a repository of the registry.  [default: as in the archive]")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificates, PEM.")
@common
def import_(render: Render, *, archive: Path, registry: str, root: Path, name: str | None, ca: Path | None) -> None:
    """Bring an archive of `export` into another registry: that of a site without internet.

    It is checked to the last byte first, as a device checks it, from ROOT. A registry never goes back to older
    metadata. What it has is not sent again. Devices of the site follow that registry as any other.
    """
    from cnncc.fleet.bring import import_release, name_in
    from cnncc.fleet.home import home, repositories

    releases, metadata = repositories(registry, name or name_in(archive), ca)
    render.stage("import")
    made = import_release(archive, root.read_bytes(), releases, metadata, scratch=home(), note=render.note)
    for channel in made.missing:
        render.note(f"{channel} points to a release that is not in {releases.place}: its devices stay as they are")
    document = {
        "registry": str(releases.place),
        "versions": list(made.versions),
        "channels": list(made.channels),
        "bytes_sent": made.sent,
    }
    what = f"{', '.join(made.versions)} for {', '.join(made.channels)}"
    render.result(document, lambda: render.line(f"{releases.place}  has {what}; {size_text(made.sent)} sent"))


@command.command(name="delta")
@click.argument("release", metavar="NAME@VERSION")
@click.option(
    "--from", "bases", multiple=True, required=True, metavar="VERSION", help="What devices have; may be repeated."
)
@common
def delta(render: Render, *, release: str, bases: tuple[str, ...]) -> None:
    """Make deltas to a release, so that devices with an older one fetch less.

    `cnncc publish` makes those from the releases that channels point to. Each is applied before it is stored, and is
    kept only where it is smaller than 60 % of the file. Devices check what comes of it, and fetch the whole file where
    anything is wrong.
    """
    from cnncc.cli.fleet_deltas import check_bases, make_deltas

    name, version = name_and_version(release)
    fleet = open_named(name)
    check_bases(fleet, (version, *bases))
    made, lines = make_deltas(render, fleet, version, {base: base for base in bases}, {}, asked=True)
    render.result({"name": name, "version": version, "deltas": made}, lambda: render.line("\n".join(lines)))


_COLLECTOR = click.option("--collector", required=True, help="https://HOST, where `cnncc fleet serve` runs.")
_TOKEN = click.option(
    "--token", envvar="CNNCC_FLEET_TOKEN", required=True, help="Of a viewer.  [default: $CNNCC_FLEET_TOKEN]"
)
_DATABASE = click.option(
    "--database", default="sqlite:///fleet.db", show_default=True, help="As SQLAlchemy names it: postgresql+psycopg://…"
)


@command.command(name="watch")
@click.argument("name")
@_COLLECTOR
@_TOKEN
@click.option("--every", type=click.FloatRange(1), metavar="SECONDS", help="Again and again.  [default: once]")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificates, PEM.")
@common
def watch(render: Render, *, name: str, collector: str, token: str, every: float | None, ca: Path | None) -> None:
    """Say how a fleet's rollouts go, and pause those that fail too often (`--halt-on-failure-pct`).

    The collector has no keys: whoever watches signs the pause. Exits with 1 when it paused one.
    """
    from cnncc.fleet.watch import Seen, ask, look
    from cnncc_runtime.errors import NetworkFailed

    fleet = open_named(name)

    def text(seen: tuple[Seen, ...]) -> None:
        for each in seen:
            went = each.release
            said = f"{went.installed} of {went.reports} run it, {went.failing:.1f} % fail" if went else "no reports yet"
            render.line(f"{pointer_text(each.pointer)}: {said}{'; PAUSED NOW' if each.halted else ''}")

    while True:
        try:
            seen = look(fleet, ask(collector, token, ca))
        except NetworkFailed as exc:
            if every is None:
                raise
            render.note(exc.message)
            seen = ()
        if every is None:
            break
        text(seen)
        time.sleep(every)
    document = [
        {"pointer": pointer_document(each.pointer), "release": to_builtins(each.release), "halted": each.halted}
        for each in seen
    ]
    render.result({"channels": document}, lambda: text(seen))
    if any(each.halted for each in seen):
        raise click.exceptions.Exit(1)


@command.command(name="token")
@click.argument("kind", type=click.Choice(["device", "viewer"]))
@click.argument("holder")
@_DATABASE
@common
def token(render: Render, *, kind: str, holder: str, database: str) -> None:
    """Make a token for the collector: a device may report as HOLDER (`*`: as any), a viewer may look.

    It is shown once; the database keeps its digest alone.
    """
    from cnncc.fleet.collector.store import Store

    store = Store(database)
    made = store.issue(kind, holder)
    store.close()
    render.result({"kind": kind, "holder": holder, "token": made}, lambda: render.line(made))


@command.command(name="serve")
@_DATABASE
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8380, show_default=True)
@click.option("--certificate", type=click.Path(exists=True, dir_okay=False), help="PEM, with its chain.")
@click.option("--private-key", type=click.Path(exists=True, dir_okay=False), help="Of the certificate, PEM.")
@click.option("--behind-proxy", is_flag=True, help="A proxy before it speaks TLS.")
@common
def serve(
    render: Render,
    *,
    database: str,
    host: str,
    port: int,
    certificate: str | None,
    private_key: str | None,
    behind_proxy: bool,
) -> None:
    """Take devices' reports and show how rollouts go, until it is stopped."""
    import uvicorn

    from cnncc.fleet.collector.app import make_app
    from cnncc.fleet.collector.store import Store
    from cnncc_runtime.errors import UsageError
    from cnncc_runtime.oci.place import is_loopback

    if not (is_loopback(host) or certificate or behind_proxy):
        raise UsageError(
            f"{host} is reached from other machines, and tokens would pass unencrypted",
            hint="--certificate and --private-key, or --behind-proxy where a proxy speaks TLS",
        )
    store = Store(database)
    scheme = "https" if certificate else "http"
    render.err.print(f"collector at {scheme}://{host}:{port}; reports go to {scheme}://{host}:{port}/reports")
    try:
        uvicorn.run(
            make_app(store), host=host, port=port, ssl_certfile=certificate, ssl_keyfile=private_key,
            log_level="warning", lifespan="off",
        )  # fmt: skip
    finally:
        store.close()
