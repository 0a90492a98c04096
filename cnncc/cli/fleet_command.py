"""``cnncc fleet``: who may sign for a fleet, and which release its devices take."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from cnncc.cli.fleet_options import (
    name_and_version,
    open_named,
    passphrase,
    pointer_document,
    pointer_text,
    reach,
    reach_options,
)
from cnncc.cli.main import common
from cnncc.cli.render import Render, size_text


@click.group(name="fleet")
def command() -> None:
    """Say which release a fleet's devices take, and who may say so.

    A fleet is a model's releases in an OCI registry, and metadata (The Update Framework) that says which of them may be
    believed. Its devices run `cnncc-agent`.
    """


_CHANNEL = click.option("--channel", default="stable", show_default=True)


@command.group(name="trust")
def trust() -> None:
    """Keys, and what they may sign."""


@trust.command(name="init")
@click.option("--registry", required=True, help="https://HOST[/PREFIX]; logins are Docker's")
@click.option("--name", required=True, help="Of the model: a repository of the registry.")
@click.option("--channels", default="stable,canary", show_default=True, help="Where releases go.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Certificates, PEM.")
@common
def init(render: Render, *, registry: str, name: str, channels: str, ca: Path | None) -> None:
    """Make a fleet: keys for each role, encrypted, and its first metadata.

    Devices are enrolled with the root.json that this writes. Two of three root keys sign a new root; keep them apart.
    """
    from cnncc.fleet.home import ROOT, begin_fleet

    names = tuple(dict.fromkeys(channel.strip() for channel in channels.split(",") if channel.strip()))
    fleet = begin_fleet(registry, name, passphrase, channels=names, ca=ca)
    document = {"name": fleet.name, "registry": str(fleet.releases.place), "root": str(fleet.folder / ROOT)}
    render.result(
        document,
        lambda: render.line(
            f"{fleet.name}  is a fleet of {fleet.releases.place}; keys are in {fleet.folder}\n"
            f"  enroll devices with {fleet.folder / ROOT}; keep two of the three root-*.pem somewhere else, offline"
        ),
    )


@trust.command(name="show")
@click.argument("name")
@common
def show(render: Render, *, name: str) -> None:
    """Say which roles there are, how many keys each has and needs, and when its metadata expires."""
    fleet = open_named(name)
    fleet.signing.load()
    roles = fleet.signing.overview()
    now = datetime.now(timezone.utc)

    def text() -> None:
        rows = [
            [
                role.name,
                f"{role.threshold} of {len(role.keyids)}",
                str(role.here),
                str(role.version),
                _left(role.expires, now),
            ]
            for role in roles
        ]
        render.table(["role", "keys that sign", "of them here", "version", "good for"], rows)

    render.result(
        {
            "roles": [
                {
                    "name": role.name,
                    "threshold": role.threshold,
                    "keys": list(role.keyids),
                    "here": role.here,
                    "version": role.version,
                    "expires": role.expires.isoformat(),
                }
                for role in roles
            ]
        },
        text,
    )


def _left(expires: datetime, now: datetime) -> str:
    days = (expires - now).total_seconds() / 86400
    return "expired" if days <= 0 else f"{days:.1f} days"


@trust.command(name="refresh")
@click.argument("name")
@click.argument("roles", nargs=-1)
@common
def refresh(render: Render, *, name: str, roles: tuple[str, ...]) -> None:
    """Sign ROLES again, with a new date; by default snapshot and timestamp, which a job should do every few hours."""
    with open_named(name).changing() as signing:
        signing.renew(*(roles or ("snapshot", "timestamp")))
    render.result({"name": name, "roles": list(roles)}, lambda: render.line(f"{name}  signed again"))


@trust.command(name="rotate")
@click.argument("name")
@click.argument("role")
@common
def rotate(render: Render, *, name: str, role: str) -> None:
    """Give ROLE new keys instead of its old ones; devices follow. What old keys sign is not believed any more."""
    with open_named(name).changing() as signing:
        signing.rotate(role)
    render.result({"name": name, "role": role}, lambda: render.line(f"{name}  {role} has new keys"))


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
                "paused" if each.signed.paused else "",
                str(each.signed.sequence),
                each.before,
            ]
            for each in found
        ]
        render.table(["channel", "release", "devices", "selector", "", "sequence", "before"], rows)
        if not rows:
            render.line(f"{name}  has no release in any channel")

    render.result({"name": name, "channels": [pointer_document(each) for each in found]}, text)


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
        "Have no further device take a channel's release; those that have it keep it."
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
    """Have a channel's devices go back to an older release: all of them, those that have the newer one too."""
    from cnncc.fleet.rollout import go_back

    fleet = open_named(name)
    with fleet.changing() as signing:
        made = go_back(signing, fleet.releases, channel, fleet.name, version)
    render.result(pointer_document(made), lambda: render.line(pointer_text(made)))


@command.command(name="export")
@click.argument("name")
@_CHANNEL
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The archive: release.tar")
@common
def export(render: Render, *, name: str, channel: str, output: Path) -> None:
    """Write a channel's release, and what says that it may be believed, into one file, for devices without a network.

    `cnncc-agent install` takes it: believed, tried and trusted as any other release. It is good for as long as its
    timestamp: a day, unless it is signed again.
    """
    from cnncc.fleet.export import export_release

    fleet = open_named(name)
    render.stage("export")
    made = export_release(fleet.releases, fleet.metadata, channel, fleet.name, output)
    render.result(
        {"archive": str(output), "digest": made.digest, "engines": made.engines, "bytes": made.size},
        lambda: render.line(f"{output}  {made.engines} engines, {size_text(made.size)}"),
    )


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
