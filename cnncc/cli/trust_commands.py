"""``cnncc fleet trust``: the keys of a fleet, and what they may sign."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from msgspec import to_builtins

from cnncc.cli.fleet_options import open_named, passphrase
from cnncc.cli.main import common
from cnncc.cli.render import Render

if TYPE_CHECKING:
    from cnncc.fleet.ceremony import Proposal

F = TypeVar("F", bound=Callable[..., Any])


@click.group(name="trust")
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
    fleet = begin_fleet(registry, name, passphrase, channels=names, ca=ca, note=render.note)
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


def _proposal_option(function: F) -> F:
    return click.option(
        "-o",
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Publish nothing; write the new root into this file, for holders of its keys to sign (`trust sign`).",
    )(function)


def _told(render: Render, document: dict[str, Any], output: Path | None, done: str) -> None:
    """Say that a change is published, or proposed."""
    proposed = f"{output}  is for the holders of root keys to sign; nothing is published yet"
    render.result(
        {**document, **({"proposal": str(output)} if output else {})},
        lambda: render.line(proposed if output else f"{document['name']}  {done}"),
    )


@trust.command(name="refresh")
@click.argument("name")
@click.argument("roles", nargs=-1)
@_proposal_option
@common
def refresh(render: Render, *, name: str, roles: tuple[str, ...], output: Path | None) -> None:
    """Sign ROLES again, with a new date; by default snapshot and timestamp, which a job should do every few hours."""
    with open_named(name).changing(output) as signing:
        signing.renew(*(roles or ("snapshot", "timestamp")))
    _told(render, {"name": name, "roles": list(roles)}, output, "signed again")


@trust.command(name="rotate")
@click.argument("name")
@click.argument("role")
@_proposal_option
@common
def rotate(render: Render, *, name: str, role: str, output: Path | None) -> None:
    """Give ROLE new keys instead of its old ones; devices follow. What old keys sign is not believed any more.

    After a rotation of `provenance`, publish the releases that are in use again: that attaches statements signed anew.
    """
    with open_named(name).changing(output) as signing:
        signing.rotate(role)
    _told(render, {"name": name, "role": role}, output, f"{role} has new keys")


@trust.command(name="adopt")
@click.argument("name")
@click.argument("role")
@click.argument("key")
@click.option("--instead-of", "old", default="", metavar="KEYID", help="Its first digits will do.")
@_proposal_option
@common
def adopt(render: Render, *, name: str, role: str, key: str, old: str, output: Path | None) -> None:
    """Give ROLE a KEY that was made elsewhere, instead of one of its own.

    KEY is the address of a key that signs from here: awskms:KEY, azurekms:VAULT/KEY, gcpkms:VERSION,
    hsm:ID?label=TOKEN (PKCS #11: $PYKCS11LIB names its library, $CNNCC_FLEET_PIN is the PIN, or it is asked for),
    hv:KEY (Vault).
    Or it is a file with the public half of a key that stays with its holder, who signs new roots with it
    (`trust sign`): openssl genpkey -algorithm ed25519 -aes256 makes one, openssl pkey -pubout its public half.
    """
    with open_named(name).changing(output) as signing:
        keyid = signing.adopt(role, key, old)
    _told(render, {"name": name, "role": role, "key": keyid}, output, f"{role} has the key {keyid}")


@trust.command(name="sign")
@click.argument("proposal", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--root", "anchor", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="A root.json of the fleet that you trust: what devices are enrolled with.",
)  # fmt: skip
@click.option("--key", "keys", multiple=True, help="Your private key: a file, or an address.  [default: only look]")
@common
def sign(render: Render, *, proposal: Path, anchor: Path, keys: tuple[str, ...]) -> None:
    """Say what a new root in FILE changes, and sign it there with --key, without a network.

    `trust refresh`, `rotate` and `adopt` write such a FILE with -o; `trust publish` publishes it.
    """
    from cnncc.fleet.ceremony import read_proposal
    from cnncc.fleet.signers import holders
    from cnncc_runtime.files import storage_errors

    found = read_proposal(proposal)
    with storage_errors(anchor):
        trusted = anchor.read_bytes()
    found.check(trusted)
    if keys:
        found = found.sign(holders(keys, passphrase))
        found.write(proposal)
    render.result(_proposal_document(found), lambda: _proposal_text(render, found))


@trust.command(name="publish")
@click.argument("name")
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE…", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@common
def publish(render: Render, *, name: str, files: tuple[Path, ...]) -> None:
    """Publish the new root that holders of its keys signed in FILE, or in copies of it, and what its new keys sign."""
    from cnncc.fleet.ceremony import read_proposal, together

    found = together([read_proposal(file) for file in files])
    open_named(name).agree(found)
    render.result(
        {"name": name, **_proposal_document(found)},
        lambda: render.line(f"{name}  has root {found.new.signed.version}"),
    )


def _proposal_document(proposal: Proposal) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "version": proposal.new.signed.version,
        "expires": proposal.expires.isoformat(),
        "changes": [asdict(change) for change in proposal.changes()],
        "signatures": [{**asdict(each), "enough": each.enough} for each in proposal.signatures()],
    }


def _proposal_text(render: Render, proposal: Proposal) -> None:
    render.line(f"root {proposal.new.signed.version}, good until {proposal.expires:%Y-%m-%d}")
    for change in proposal.changes():
        before, after = change.threshold
        needs = f"needs {after}" if before == after else f"needs {after} instead of {before}"
        render.line(f"  {change.role}, which {needs} to sign")
        for sign, keyids in (("+", change.added), ("-", change.removed)):
            for keyid in keyids:
                render.line(f"    {sign} {keyid}")
    if not proposal.changes():
        render.line("  the same keys, a new date")
    for each in proposal.signatures():
        enough = "enough" if each.enough else f"{each.threshold - len(each.signed)} more must"
        render.line(f"  of the keys of root {each.version}, {len(each.signed)} signed: {enough}")


@trust.command(name="unlock")
@click.argument("name")
@common
def unlock(render: Render, *, name: str) -> None:
    """Take the lock on a fleet from a publisher that died, before it expires by itself (10 minutes).

    A publisher that is at work after all notices, and publishes nothing.
    """
    holder = open_named(name).lock.unlock()
    document = {"name": name, "holder": to_builtins(holder) if holder else None}
    said = f"the lock was held by {holder}" if holder else "nobody held the lock"
    render.result(document, lambda: render.line(f"{name}  {said}; it is free"))
