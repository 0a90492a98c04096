"""Roots whose keys lie on several machines: proposed, signed one by one, published; and every proposal to refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from cnncc.fleet.ceremony import Proposal, read_proposal, together
from cnncc.fleet.signers import from_file, read_public
from cnncc_runtime.errors import StorageFailed, UsageError, VerificationFailed
from cnncc_runtime.metadata import store_metadata
from cnncc_runtime.oci.registry import Repository
from tests.fleet.test_trust import World
from tests.oci import registries
from tests.oci.registries import Registry

SECRET = b"of a holder"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def world(registry: Registry, tmp_path: Path) -> World:
    """A fleet whose root keys its publisher does not have any more."""
    world = World(registry, tmp_path)
    world.release("1")
    (tmp_path / "away").mkdir()
    for path in (tmp_path / "keys").glob("root-*.pem"):
        path.rename(tmp_path / "away" / path.name)
    return world


def holders(world: World) -> list[CryptoSigner]:
    """Return what the holders of root keys sign with, each on a machine of his own."""
    return [from_file(path, "root", lambda: "of root") for path in sorted((world.folder / "away").glob("*.pem"))]


def proposed(world: World, change: Callable[[], object]) -> Proposal:
    """Return a change, as it comes to a holder: in a file."""
    world.publisher.load()
    change()
    path = world.folder / "proposal.json"
    world.publisher.propose().write(path)
    return read_proposal(path)


def renewed(world: World) -> Proposal:
    return proposed(world, lambda: world.publisher.renew("root"))


def held_key(folder: Path, name: str, private: Any = None) -> tuple[Path, Path]:
    """Make a key as a holder does; return the files of its halves."""
    private = private or ed25519.Ed25519PrivateKey.generate()
    own, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    own.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(SECRET)))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return own, public


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_keys_are_rotated_by_holders_who_lie_apart(world: World, role: str) -> None:
    device = world.device()
    assert device.version() == "1"
    first, second, _ = holders(world)
    proposal = proposed(world, lambda: world.publisher.rotate(role))
    assert [change.role for change in proposal.changes()] == [role]
    assert not any(each.enough for each in proposal.signatures()) or role == "root"

    world.refresh()  # the old keys do meanwhile what they do every day
    for holder in (first, second):
        proposal.check(world.publisher.anchor)
        proposal = proposal.sign([holder])
    assert all(each.enough for each in proposal.signatures())
    world.publisher.agree(proposal)
    world.publisher.publish()
    assert device.version() == "1"
    world.release("2")
    assert device.version() == "2"
    assert world.device("new").version() == "2"


def test_holders_may_sign_copies_at_the_same_time(world: World) -> None:
    proposal = renewed(world)
    first, second, third = holders(world)
    copies = [proposal.sign([first]), proposal.sign([second]), proposal]
    broken = proposal.sign([third])
    broken.new.signatures[third.public_key.keyid].signature = "00" * 64
    world.publisher.agree(together([*copies, broken]))
    world.publisher.publish()
    world.publisher.load()
    assert world.publisher.root.version == 2
    assert world.device().version() == "1"
    with pytest.raises(UsageError, match="different roots"):
        together([proposal, renewed(world)])


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_a_holder_makes_a_key_that_nobody_else_ever_has(world: World, kind: str) -> None:
    private = ec.generate_private_key(ec.SECP256R1()) if kind == "p256" else None
    own, public = held_key(world.folder, "alice", private)
    first, second, third = holders(world)
    leaving = third.public_key.keyid
    proposal = proposed(world, lambda: world.publisher.adopt("root", str(public), leaving[:10]))
    [change] = proposal.changes()
    assert (change.added, change.removed) == ((read_public(public).keyid,), (leaving,))
    world.publisher.agree(proposal.sign([first, second]))
    world.publisher.publish()

    alice = from_file(own, "root", SECRET.decode)
    again = renewed(world)
    with pytest.raises(UsageError, match="signs no root"):
        again.sign([third])
    again = again.sign([alice, second])
    again.check(world.publisher.anchor)
    world.publisher.agree(again)
    world.publisher.publish()
    world.publisher.load()
    assert world.publisher.root.version == 3
    assert world.device().version() == "1"


def test_too_few_signatures_publish_nothing(world: World) -> None:
    device = world.device()
    first, second, _ = holders(world)
    before = world.saved()
    proposal = proposed(world, lambda: world.publisher.rotate("root")).sign([first])
    with pytest.raises(UsageError, match="needs 2 keys of root 1 to sign, 1 did") as caught:
        world.publisher.agree(proposal)
    assert second.public_key.keyid in caught.value.where
    assert world.saved() == before
    assert device.version() == "1"
    # of old keys alone, new ones that nobody has would take over
    stranger = Metadata[Root].from_bytes(proposal.sign([second]).new.to_bytes())
    for keyid in stranger.signed.roles["root"].keyids:
        stranger.signatures.pop(keyid)
    with pytest.raises(UsageError, match="needs 2 keys of root 2 to sign, 0 did"):
        world.publisher.agree(Proposal(proposal.roots, stranger))


def test_a_proposal_that_was_overtaken_or_is_too_old_or_done_is_refused(world: World) -> None:
    signers = holders(world)
    slow, quick = (renewed(world).sign(signers) for _ in range(2))
    world.publisher.agree(quick)
    world.publisher.publish()
    with pytest.raises(UsageError, match="is published already"):
        world.publisher.agree(quick)
    slow.new.signed.expires += timedelta(days=1)
    with pytest.raises(UsageError, match="another one was published meanwhile"):
        world.publisher.agree(slow.sign(signers))
    old = renewed(world).sign(signers)
    world.now += timedelta(days=366)
    with pytest.raises(UsageError, match="was good until"):
        world.publisher.agree(old)


@pytest.mark.parametrize(("role", "at"), [("timestamp", 0), ("timestamp", 1), *(("targets", at) for at in range(4))])
def test_a_publisher_that_dies_publishes_it_again(
    world: World, role: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = world.device()
    assert device.version() == "1"
    proposal = proposed(world, lambda: world.publisher.rotate(role)).sign(holders(world))
    left = at

    def store(repository: Repository, name: str, data: bytes) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        store_metadata(repository, name, data)

    with monkeypatch.context() as patch:
        patch.setattr("cnncc.fleet.lock.store_metadata", store)
        world.publisher.agree(proposal)
        with pytest.raises(KeyboardInterrupt):
            world.publisher.publish()
    world.publisher.agree(proposal)
    world.publisher.publish()
    assert device.version() == "1"
    world.release("2")
    assert device.version() == "2"


def change_root(change: Callable[[Root, World], object]) -> Callable[[Proposal, World], Proposal]:
    def changed(proposal: Proposal, world: World) -> Proposal:
        new: Metadata[Root] = Metadata.from_bytes(proposal.new.to_bytes())
        change(new.signed, world)
        return Proposal(proposal.roots, new)

    return changed


def alias(root: Root, world: World) -> None:
    """Have another key go by the name of one that everybody knows."""
    root.keys[root.roles["timestamp"].keyids[0]].keyval = CryptoSigner.generate_ed25519().public_key.keyval


def strangers(proposal: Proposal, world: World) -> Proposal:
    (world.folder / "other").mkdir()
    other = World(world.registry, world.folder / "other")
    return proposed(other, lambda: other.publisher.renew("root"))


def forged(proposal: Proposal, world: World) -> Proposal:
    """Have a root between that its holders never signed, and the new one follow that."""
    false: Metadata[Root] = Metadata.from_bytes(proposal.new.to_bytes())
    false.sign(CryptoSigner.generate_ed25519())
    new: Metadata[Root] = Metadata.from_bytes(proposal.new.to_bytes())
    new.signed.version += 1
    return Proposal((*proposal.roots, false), new)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (change_root(alias), "a name that is not its own"),
        (change_root(lambda root, _: setattr(root, "consistent_snapshot", False)), "more than keys and dates"),
        (change_root(lambda root, _: root.unrecognized_fields.update(more=1)), "more than keys and dates"),
        (change_root(lambda root, _: setattr(root, "version", 3)), "version 3, after 1"),
        (strangers, "is not that of this fleet"),
        (forged, "signed by 0/2 keys"),
    ],
)
def test_a_holder_signs_nothing_that_he_was_not_told(
    world: World, attack: Callable[[Proposal, World], Proposal], said: str
) -> None:
    proposal = renewed(world)
    proposal.check(world.publisher.anchor)
    with pytest.raises(VerificationFailed, match=said):
        attack(proposal, world).check(world.publisher.anchor)


def test_a_holder_follows_the_roots_from_the_one_that_he_trusts(world: World) -> None:
    for _ in range(2):
        world.publisher.agree(renewed(world).sign(holders(world)))
        world.publisher.publish()
    proposal = renewed(world)
    assert [root.signed.version for root in proposal.roots] == [1, 2, 3]
    for root in proposal.roots:
        proposal.check(root.to_bytes())
    with pytest.raises(VerificationFailed, match="root 2 is missing"):
        Proposal(proposal.roots[2:], proposal.new).check(world.publisher.anchor)
    for rubbish in (b"", b"{}", world.saved()["timestamp.json"]):
        with pytest.raises(VerificationFailed, match="not to be signed"):
            proposal.check(rubbish)


def test_what_is_no_proposal_is_refused(world: World, tmp_path: Path) -> None:
    good = json.loads(renewed(world).to_bytes())
    path = tmp_path / "it.json"
    timestamp = json.loads(world.saved()["timestamp.json"])
    others: list[Any] = [{}, [], {**good, "roots": []}, {**good, "new": 1}, {**good, "new": timestamp}]
    for content in (b"", b"\xff", b'{"a":' * 100_000, *(json.dumps(each).encode() for each in others)):
        path.write_bytes(content)
        with pytest.raises(VerificationFailed, match="no proposal of a root"):
            read_proposal(path)
    with pytest.raises(StorageFailed):
        read_proposal(tmp_path)


def test_what_is_not_the_root_is_not_proposed(world: World) -> None:
    for change in (
        lambda: world.publisher.renew("timestamp"),
        lambda: world.publisher.renew("root", "snapshot"),
        lambda: world.publisher.rotate("stable"),
    ):
        with pytest.raises(UsageError, match="would change without the root"):
            proposed(world, change)


def test_keys_that_cannot_be_adopted_are_named(world: World, tmp_path: Path) -> None:
    own, public = held_key(tmp_path, "bob")
    world.publisher.load()
    some = holders(world)[0].public_key.keyid
    for where, old, said in (
        (public, "", "root has several keys"),
        (public, "xyz", "0 keys whose name begins with 'xyz'"),
        (own, some, "stays with its holder"),
        (tmp_path / "keys" / "keys.json", some, "no public key"),
        (tmp_path / "absent", some, "neither a file nor an address"),
    ):
        with pytest.raises(UsageError, match=said):
            world.publisher.adopt("root", str(where), old)
    with pytest.raises(UsageError, match="no role 'boss'"):
        world.publisher.adopt("boss", str(public))
    world.publisher.adopt("stable", str(public))
    with pytest.raises(UsageError, match="stable has the key"):
        world.publisher.adopt("stable", str(public))
    with pytest.raises(UsageError, match="stable needs 1 keys to sign, 0 of its 1 are here"):
        world.publisher.publish()


def test_a_file_that_holds_another_key_is_not_signed_with(world: World) -> None:
    [path] = (world.folder / "keys").glob("timestamp-*.pem")
    other = ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"of timestamp")))
    with pytest.raises(VerificationFailed, match="another key than"):
        world.refresh()
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(UsageError, match="does not open"):
        world.refresh()
