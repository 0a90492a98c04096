"""What devices believe of a registry: a fleet's life, and every attack on it that we know."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, TargetFile

from cnncc.fleet.keys import Keys
from cnncc.fleet.signing import Signing
from cnncc_runtime.agent.clock import Clock
from cnncc_runtime.agent.trust import ANCHOR, FLOOR, Announced, Trust
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import NetworkFailed, UsageError, VerificationFailed
from cnncc_runtime.metadata import fetch_metadata, store_metadata
from cnncc_runtime.oci.registry import Repository
from tests.oci import registries
from tests.oci.registries import Fault, FaultProxy, Registry

TARGET = "stable/vision"
START = datetime(2030, 1, 1, tzinfo=timezone.utc)
NAMES = itertools.count()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@dataclass
class World:
    """A registry, a publisher, and devices, at one time.

    Attributes:
        registry: The registry.
        folder: Of the publisher and the devices.
        now: What time it is everywhere, unless a device's clock is wrong.
    """

    registry: Registry
    folder: Path
    now: datetime = START
    name: str = field(default_factory=lambda: f"fleet{next(NAMES)}-tuf")
    publisher: Signing = field(init=False)

    def __post_init__(self) -> None:
        keys = Keys(self.folder / "keys", lambda role: f"of {role}")
        self.publisher = Signing(self.repository, keys, now=lambda: self.now)
        self.publisher.begin()
        self.publisher.publish()

    @functools.cached_property
    def repository(self) -> Repository:
        return self.registry.repository(self.name)

    def release(self, version: str, *, channel: str = "stable") -> None:
        """Publish a release, as a publisher does who starts with what the registry has."""
        self.publisher.load()
        self.publisher.release(channel, "vision", version.encode(), {"version": version})
        self.publisher.publish()

    def refresh(self) -> None:
        self.publisher.load()
        self.publisher.renew("timestamp")
        self.publisher.publish()

    def device(self, name: str = "device", *, port: int = 0) -> Device:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            (folder / ANCHOR).write_bytes(self.publisher.anchor)
        return Device(self, folder, self.registry.repository(self.name, port=port))

    def saved(self) -> dict[str, bytes]:
        """Return the registry's state."""
        return {name: fetch_metadata(self.repository, name) for name in self.repository.tags()}

    def restore(self, state: dict[str, bytes]) -> None:
        """Bring a state of the registry back; whoever may write to it can."""
        for name, data in state.items():
            store_metadata(self.repository, name, data)


@dataclass
class Device:
    world: World
    folder: Path
    repository: Repository
    clock: timedelta = timedelta()
    ran: float = 0.0

    def poll(self) -> Announced | None:
        wall = (self.world.now + self.clock).timestamp
        clock = Clock(wall=wall, ran=lambda: self.ran, boot=lambda: "this boot")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", _Dates(wall()))
            return Trust(self.folder, self.repository, clock).announced(TARGET)

    def version(self) -> str:
        found = self.poll()
        assert found is not None
        assert found.digest == digest_bytes(found.custom["version"].encode())
        return str(found.custom["version"])


class _Dates:
    """The module `datetime`, at another time: `python-tuf` asks it."""

    def __init__(self, seconds: float) -> None:
        class At(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.fromtimestamp(seconds, tz)

        self.datetime = At
        self.timezone = timezone


@pytest.fixture
def world(registry: Registry, tmp_path: Path) -> World:
    return World(registry, tmp_path)


def test_a_device_follows_its_channel(world: World) -> None:
    device = world.device()
    assert device.poll() is None
    world.release("1")
    world.release("99", channel="canary")
    assert device.version() == "1"
    world.now += timedelta(hours=20)
    world.refresh()
    assert device.version() == "1"
    world.release("2")
    assert device.version() == "2"


def test_a_poll_without_news_is_three_small_requests_at_most(world: World) -> None:
    world.release("1")
    with FaultProxy(world.registry.port) as proxy:
        device = world.device(port=proxy.port)
        device.version()
        requests: list[str] = []
        send = device.repository.connection._send
        device.repository.connection._send = lambda *args: (requests.append(args[1]), send(*args))[1]  # type: ignore
        device.version()
    assert [url.rpartition("/")[2] for url in requests] == ["2.root.json", "timestamp.json"]


def test_no_device_fetches_metadata_of_the_role_that_signs_provenance(world: World) -> None:
    world.release("1")
    device = world.device()
    requests: list[str] = []
    send = device.repository.connection._send
    device.repository.connection._send = lambda *args: (requests.append(args[1]), send(*args))[1]  # type: ignore
    assert device.version() == "1"
    names = [url.rpartition("/")[2] for url in requests]
    assert names == ["2.root.json", "timestamp.json", "2.snapshot.json", "1.targets.json", "2.stable.json"]
    assert fetch_metadata(world.repository, "1.provenance.json"), "which is there all the same"
    world.publisher.load()
    world.publisher.rotate("provenance")
    world.publisher.publish()
    requests.clear()
    assert device.version() == "1"
    names = [url.rpartition("/")[2] for url in requests]
    assert names == ["2.root.json", "timestamp.json", "3.snapshot.json", "2.targets.json"], "who has the key, no more"


@pytest.mark.parametrize("what", ["all", "timestamp.json"])
def test_an_old_state_of_the_registry_is_refused(world: World, what: str) -> None:
    world.release("1")
    old = world.saved()
    world.release("2")
    device = world.device()
    assert device.version() == "2"
    world.restore(old if what == "all" else {what: old[what]})
    with pytest.raises(VerificationFailed, match="older than what this device has seen"):
        device.version()
    assert (device.folder / FLOOR).exists()


def test_an_old_state_is_refused_by_a_device_whose_metadata_was_wiped(world: World) -> None:
    world.release("1")
    old = world.saved()
    world.release("2")
    device = world.device()
    assert device.version() == "2"
    for path in (device.folder / "known").glob("*.json"):
        path.unlink()
    world.restore(old)
    with pytest.raises(VerificationFailed, match="this device has seen version"):
        device.version()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{}", b"[1"])
def test_a_damaged_floor_is_never_taken_for_none(world: World, content: bytes) -> None:
    world.release("1")
    device = world.device()
    device.version()
    (device.folder / FLOOR).write_bytes(content)
    if content == b"{}":
        assert device.version() == "1"  # nothing is below it, and nothing was damaged
        return
    with pytest.raises(VerificationFailed, match="is damaged"):
        device.version()


def test_metadata_that_was_zeroed_on_the_device_is_fetched_again(world: World) -> None:
    world.release("1")
    device = world.device()
    device.version()
    for path in (device.folder / "known").glob("*.json"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert device.version() == "1"


def test_a_registry_that_is_frozen_is_noticed_when_its_timestamp_expires(world: World) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    world.now += timedelta(days=1, hours=1)
    with pytest.raises(VerificationFailed, match="expired") as caught:
        device.version()
    assert "trust refresh" in caught.value.hint
    world.refresh()
    assert device.version() == "1"


def test_a_clock_that_was_set_back_does_not_hide_that_it_is_frozen(world: World) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    device.clock = timedelta(days=-3650)
    assert device.version() == "1", "a device whose clock lost its battery still gets news"
    # the registry's timestamp is that of two days ago; the device has run for two days
    device.ran += timedelta(days=2).total_seconds()
    with pytest.raises(VerificationFailed, match="clock was set back"):
        device.version()


def test_a_clock_that_runs_ahead_does_not_lock_a_device_out_for_ever(world: World) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    device.clock = timedelta(days=3650)
    with pytest.raises(VerificationFailed, match="expired"):
        device.version()
    device.clock = timedelta()
    world.release("2")
    assert device.version() == "2"


def test_files_of_two_states_do_not_mix(world: World) -> None:
    world.release("1")
    old = world.saved()
    world.release("2")
    new = world.saved()
    device = world.device()
    newest = max(name for name in new if name.endswith(".stable.json"))
    world.restore({newest: old["2.stable.json"]})
    with pytest.raises((VerificationFailed, NetworkFailed)):
        device.version()
    world.restore({newest: new[newest]})
    assert device.version() == "2"


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot", "targets", "stable"])
def test_metadata_that_was_changed_is_refused(world: World, name: str) -> None:
    world.release("1")
    state = world.saved()
    name = max((each for each in state if each.endswith(f"{name}.json")), default=name) if "." not in name else name
    plain = json.loads(state[name])
    plain["signed"]["expires"] = "2040-01-01T00:00:00Z"
    world.restore({name: json.dumps(plain).encode()})
    with pytest.raises(VerificationFailed, match="cannot be believed"):
        world.device().version()
    for rubbish in (b"", b"{}", b"[" * 50_000, b"\xff" * 10):
        world.restore({name: rubbish})
        with pytest.raises(VerificationFailed):
            world.device().version()


def test_one_channels_key_says_nothing_of_another_channel(world: World) -> None:
    world.release("1")
    world.publisher.load()
    canary: Metadata[Any] = world.publisher._roles["canary"]
    evil = TargetFile.from_data(TARGET, b"evil", ["sha256"])
    evil.unrecognized_fields["custom"] = {"version": "evil"}
    canary.signed.targets[TARGET] = evil
    world.publisher.renew("canary")
    world.publisher.publish()
    assert world.device().version() == "1"


def test_a_strangers_fleet_is_not_ours(world: World, registry: Registry, tmp_path: Path) -> None:
    world.release("1")
    (tmp_path / "evil").mkdir()
    other = World(registry, tmp_path / "evil")
    other.release("evil")
    device = world.device()
    world.restore({name: data for name, data in other.saved().items() if not name.endswith("root.json")})
    with pytest.raises(VerificationFailed, match="cannot be believed"):
        device.version()


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "stable", "provenance"])
def test_keys_are_rotated_and_devices_follow(world: World, role: str) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    before = {key.keyid for key in world.publisher.keys.roles()[role]}
    world.publisher.load()
    world.publisher.rotate(role)
    world.publisher.publish()
    assert device.version() == "1"
    world.release("2")
    assert device.version() == "2"
    assert world.device("new").version() == "2", "a device that was enrolled with the first root follows, too"
    world.publisher.load()
    keys = {**world.publisher.root.keys, **world.publisher._delegations().keys}
    assert not before & keys.keys()


def test_a_root_below_its_threshold_is_refused_here_and_there(world: World) -> None:
    world.release("1")
    device = world.device()
    for path in sorted((world.folder / "keys").glob("root-*.pem"))[:2]:
        path.rename(path.with_suffix(".away"))
    known = world.folder / "keys" / "keys.json"
    plain = json.loads(known.read_bytes())
    plain["root"] = [
        key for key in plain["root"] if (world.folder / "keys" / key["private"].partition(":")[2]).exists()
    ]
    known.write_text(json.dumps(plain))
    world.publisher.load()
    world.publisher.renew("root")
    with pytest.raises(UsageError, match="root needs 2 keys to sign, 1 of its 3 are here"):
        world.publisher.publish()
    root: Metadata[Any] = Metadata.from_bytes(world.publisher._published[-1].to_bytes())
    root.signed.version += 1
    root.signatures.clear()
    root.sign(world.publisher.keys.signers("root", root.signed.keys)[0], append=True)
    store_metadata(world.repository, "2.root.json", root.to_bytes())
    with pytest.raises(VerificationFailed, match="cannot be believed"):
        device.version()


def test_after_stolen_keys_signed_the_highest_versions_a_rotation_recovers(world: World) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    stolen = Signing(world.repository, world.publisher.keys, world.publisher.anchor, now=lambda: world.now)
    stolen.load()
    good = world.saved()
    for role in ("snapshot", "timestamp"):
        stolen._roles[role].signed.version = 1_000_000
    stolen.renew("snapshot")
    stolen.publish()
    assert device.version() == "1"
    world.restore(good)
    with pytest.raises(VerificationFailed, match="older than"):
        device.version()
    world.publisher.load()
    for role in ("snapshot", "timestamp"):
        world.publisher.rotate(role)
    world.publisher.publish()
    assert device.version() == "1"
    world.release("2")
    assert device.version() == "2"


@pytest.mark.parametrize("at", range(4))
def test_a_publisher_that_dies_leaves_devices_where_they_were(
    world: World, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    left = at

    def store(repository: Repository, name: str, data: bytes) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        store_metadata(repository, name, data)

    monkeypatch.setattr("cnncc.fleet.lock.store_metadata", store)
    if at < 3:
        with pytest.raises(KeyboardInterrupt):
            world.release("2")
        assert device.version() == "1"
        monkeypatch.undo()
        world.release("2")
    else:
        world.release("2")
    assert device.version() == "2"
    assert world.device("new").version() == "2"


@pytest.mark.parametrize("kind", ["cut", "reset", "refuse"])
def test_a_network_that_breaks_is_said_and_changes_nothing(world: World, kind: str) -> None:
    world.release("1")
    device = world.device()
    device.version()
    world.release("2")
    before = (device.folder / FLOOR).read_bytes()
    with FaultProxy(world.registry.port, always=Fault(kind)) as proxy:
        away = world.device(port=proxy.port)
        with pytest.raises(NetworkFailed, match="localhost"):
            away.poll()
    assert (device.folder / FLOOR).read_bytes() == before
    assert device.version() == "2"


def test_a_second_beginning_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="holds a fleet's metadata already"):
        world.publisher.begin()


def test_a_wrong_passphrase_and_lost_keys_are_named(world: World) -> None:
    world.publisher.keys = Keys(world.folder / "keys", lambda _: "wrong")
    with pytest.raises(UsageError, match="does not open"):
        world.release("1")
    world.publisher.keys = Keys(world.folder / "none", lambda _: "wrong")
    with pytest.raises(UsageError, match="stable needs 1 keys to sign, 0 of its 1 are here"):
        world.release("1")


def test_private_keys_are_encrypted_and_their_owners_alone(world: World) -> None:
    files = sorted((world.folder / "keys").glob("*.pem"))
    assert len(files) == 9
    for path in files:
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert path.stat().st_mode & 0o777 == 0o600


def test_names_that_are_not_there_are_named(world: World) -> None:
    world.publisher.load()
    with pytest.raises(UsageError, match="no channel 'beta'"):
        world.publisher.release("beta", "vision", b"", {})
    for change in (world.publisher.renew, world.publisher.rotate):
        with pytest.raises(UsageError, match="no role 'boss'"):
            change("boss")
