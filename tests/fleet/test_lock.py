"""Two publishers on two machines, and a registry that cannot tell them apart: delays at every step, and kill -9."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest

from cnncc.fleet.home import Fleet, begin_fleet, open_fleet
from cnncc.fleet.lock import LOCK, TAG, Holder
from cnncc_runtime.errors import FleetBusy, NetworkFailed, UsageError, VerificationFailed
from cnncc_runtime.metadata import store_metadata
from cnncc_runtime.oci.formats import EMPTY, EMPTY_BYTES, MANIFEST, Manifest, describe
from cnncc_runtime.oci.http import Connection
from tests.oci import registries
from tests.oci.registries import Registry

_PATIENCE = 60.0
PUT = "PUT /v2/{name}-tuf/manifests/"
SLOW = pytest.mark.slow
STEPS = [
    pytest.param(r"\d+\.stable\.json", marks=SLOW),
    r"\d+\.snapshot\.json",
    pytest.param("timestamp.json", marks=SLOW),
]

PUBLISH = """
import sys, time
from pathlib import Path
from cnncc.fleet.home import open_fleet
from cnncc_runtime.errors import CnnccError, FleetBusy
folder, channel, version, tries = sys.argv[1:]
fleet = open_fleet("", lambda role: role, folder=Path(folder), note=lambda text: print("note:", text))
for left in reversed(range(int(tries))):
    try:
        with fleet.changing() as signing:
            signing.release(channel, fleet.name, version.encode(), {"version": version, "sequence": 1})
        break
    except CnnccError as exc:
        print(exc, flush=True)
        if not (isinstance(exc, FleetBusy) and left):
            sys.exit(exc.exit_code)
        time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


class Gate:
    """A proxy that keeps what begins with some bytes until it is opened; all else passes.

    Args:
        upstream: The port of the registry.
        held: What is kept: a regular expression.
    """

    def __init__(self, upstream: int, held: str) -> None:
        self._upstream, self._held = upstream, re.compile(held.encode())
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port: int = self._listener.getsockname()[1]
        self.met, self.opened = threading.Event(), threading.Event()

    def __enter__(self) -> Gate:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._held.search(data):
                    self.met.set()
                    self.opened.wait(_PATIENCE)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@dataclass
class Two:
    """Two machines that publish one fleet.

    Attributes:
        registry: The registry.
        folder: Holds both machines' folders.
        name: Of the fleet.
        notes: What was said to whoever is at ``here``.
    """

    registry: Registry
    folder: Path
    name: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        begin_fleet(self.registry.url, self.name, lambda role: role, folder=self.folder / "here", connect=_at_once)
        shutil.copytree(self.folder / "here", self.folder / "there")

    def here(self, machine: str = "here") -> Fleet:
        folder = self.folder / machine
        return open_fleet("", lambda role: role, folder=folder, connect=_at_once, note=self.notes.append)

    def publish(self, version: str, *, machine: str = "here", channel: str = "canary") -> None:
        fleet = self.here(machine)
        with fleet.changing() as signing:
            signing.release(channel, fleet.name, version.encode(), {"version": version, "sequence": 1})

    def there(self, version: str, *, port: int = 0, channel: str = "stable", tries: int = 1) -> subprocess.Popen[str]:
        """Start another machine's publisher, by way of a proxy."""
        folder = self.folder / "there"
        if port:
            record = (folder / "fleet.json").read_text()
            (folder / "fleet.json").write_text(record.replace(f":{self.registry.port}", f":{port}"))
        arguments = [sys.executable, "-c", PUBLISH, str(folder), channel, version, str(tries)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    def released(self) -> dict[str, str]:
        """Return what a new device would be told, channel by channel; all of it belongs together, and is signed."""
        signing = self.here().signing
        signing.load()
        found = {channel: signing.released(channel).get(f"{channel}/{self.name}") for channel in signing.channels}
        return {channel: target.custom["version"] for channel, target in found.items() if target and target.custom}


def _at_once(host: str, ca: Path | None) -> Connection:
    return Connection(host, ca, sleep=lambda _: None)


@pytest.fixture
def two(registry: Registry, tmp_path: Path, request: pytest.FixtureRequest) -> Two:
    return Two(registry, tmp_path, f"f{abs(hash(request.node.nodeid)):x}")


@contextlib.contextmanager
def held_at(two: Two, step: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Yield another machine's publisher that stands before a step, and what lets it go on and returns what it said."""
    with Gate(two.registry.port, PUT.format(name=two.name) + step) as gate:
        process = two.there("theirs", port=gate.port)

        def go_on() -> str:
            gate.opened.set()
            said, _ = process.communicate(timeout=_PATIENCE)
            return said

        try:
            assert gate.met.wait(_PATIENCE)
            yield process, go_on
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_one_whose_lock_comes_late_builds_upon_what_the_other_published(two: Two) -> None:
    with held_at(two, TAG) as (process, go_on):
        two.publish("ours")
        go_on()
        assert process.returncode == 0
    assert two.released() == {"stable": "theirs", "canary": "ours"}


@pytest.mark.parametrize("step", STEPS)
def test_while_one_publishes_the_other_is_told_who_it_is_and_until_when(two: Two, step: str) -> None:
    with held_at(two, step) as (process, go_on):
        with pytest.raises(FleetBusy) as caught:
            two.publish("ours")
        assert f"process {process.pid}, since 20" in caught.value.message
        assert "until 20" in caught.value.message
        assert "trust unlock" in caught.value.hint
        assert caught.value.exit_code == 20
        assert "theirs" not in two.released().values()
        go_on()
        assert process.returncode == 0
    two.publish("ours")
    assert two.released() == {"stable": "theirs", "canary": "ours"}


@pytest.mark.parametrize("step", STEPS[:-1])
@pytest.mark.parametrize("channel", ["stable", pytest.param("canary", marks=SLOW)])
def test_one_whose_lock_was_taken_away_publishes_nothing(two: Two, step: str, channel: str) -> None:
    with held_at(two, step) as (process, go_on):
        holder = two.here().lock.unlock()
        assert holder is not None
        assert f"process {process.pid}" in holder.who
        two.publish("ours", channel=channel)
        said = go_on()
        assert process.returncode == FleetBusy.exit_code
    assert "the lock on the fleet was taken away" in said
    assert two.released() == {channel: "ours"}
    shutil.copy(two.folder / "here/fleet.json", two.folder / "there")
    two.publish("again", machine="there", channel=channel)
    assert two.released() == {channel: "again"}


def test_a_timestamp_that_comes_too_late_is_told_to_the_one_who_sent_it(two: Two) -> None:
    with held_at(two, "timestamp.json") as (process, go_on):
        two.here().lock.unlock()
        two.publish("ours")
        assert two.released() == {"canary": "ours"}
        said = go_on()
        assert process.returncode == FleetBusy.exit_code
    assert "one of the two changes is lost: see `cnncc fleet status" in said
    assert two.released() == {"stable": "theirs"}, "what cannot be prevented without compare-and-swap"
    two.publish("again")
    assert two.released() == {"stable": "theirs", "canary": "again"}


@pytest.mark.parametrize("step", STEPS)
def test_the_lock_of_one_who_was_killed_holds_until_it_expires_but_not_on_his_own_machine(two: Two, step: str) -> None:
    with held_at(two, step) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(FleetBusy, match=f"process {process.pid}"):
            two.publish("ours")
    # what he sent may arrive now; nobody is there to hear of it
    shutil.copy(two.folder / "here/fleet.json", two.folder / "there")
    two.publish("again", machine="there", channel="canary")
    assert len(two.notes) == 1
    assert "took over the lock of" in two.notes[0]
    assert f"process {process.pid}" in two.notes[0]
    assert two.released()["canary"] == "again"
    two.publish("ours", channel="stable")
    assert two.released() == {"canary": "again", "stable": "ours"}


def test_a_lock_that_expired_is_taken_over_with_a_note(two: Two) -> None:
    lock = two.here().lock
    lock._write(Holder("a" * 32, "ada@lab, process 7", int(time.time()) - 700, int(time.time()) - 100, 41))
    two.publish("ours")
    assert len(two.notes) == 1
    assert "took over the lock of ada@lab, process 7, since 20" in two.notes[0]
    assert two.released() == {"canary": "ours"}
    assert lock.holder() is None
    signing = two.here().signing
    signing.load()
    assert all(role.version >= 42 for role in signing.overview() if role.name in ("canary", "timestamp"))


def test_a_change_that_takes_longer_than_its_lock_publishes_nothing(two: Two) -> None:
    fleet = two.here()
    fleet = replace(fleet, lock=replace(fleet.lock, lifetime=timedelta(seconds=2)))
    with pytest.raises(FleetBusy, match="took longer than its lock"), fleet.changing() as signing:
        signing.renew("canary")
        time.sleep(2.1)
    assert two.released() == {}


def test_what_is_no_lock_is_refused_until_it_is_unlocked(two: Two) -> None:
    store_metadata(two.here().metadata, TAG, b"{}")
    with pytest.raises(VerificationFailed, match="is no lock") as caught:
        two.publish("ours")
    assert "trust unlock" in caught.value.hint
    assert two.here().lock.unlock() is None
    two.publish("ours")
    assert two.released() == {"canary": "ours"}


def test_a_registry_that_answers_more_slowly_than_the_others_wait_is_not_locked(two: Two) -> None:
    fleet = two.here()
    seconds = iter(range(0, 300, 3))
    slow = replace(fleet, lock=replace(fleet.lock, clock=lambda: float(next(seconds))))
    with pytest.raises(NetworkFailed, match="too slow to be locked"), slow.changing():
        pass
    two.publish("ours", machine="there")
    assert two.notes == [], "it let go"


@pytest.mark.parametrize("said", ["", "{}", '{"id":"a","who":"b","since":1e99,"until":1,"turn":1}', "[" * 9999])
def test_a_lock_that_says_nothing_is_refused(two: Two, said: str) -> None:
    lock = two.here().lock
    config = describe(EMPTY_BYTES, EMPTY, inline=True)
    made = Manifest(LOCK, config, (config,), annotations={"dev.cnncc.lock": said})
    lock.repository.put_manifest(made.to_bytes(), MANIFEST, tag=TAG)
    with pytest.raises(VerificationFailed, match="is no lock"):
        two.publish("ours")


def test_a_change_that_fails_lets_go_of_the_lock(two: Two) -> None:
    with pytest.raises(UsageError, match="no role 'boss'"), two.here().changing() as signing:
        signing.renew("boss")
    assert two.here().lock.holder() is None


def test_two_of_one_machine_do_not_change_it_at_once(two: Two) -> None:
    with two.here().changing(), pytest.raises(FleetBusy, match="on this machine"):
        two.publish("ours")


@pytest.mark.slow
def test_of_many_publishers_none_loses_anothers_change(registry: Registry, tmp_path: Path) -> None:
    channels = [f"c{number}" for number in range(4)]
    home = tmp_path / "home"
    fleet = begin_fleet(registry.url, "many", lambda role: role, folder=home, channels=tuple(channels))
    for channel in channels:
        shutil.copytree(home, tmp_path / channel)
    running = [
        subprocess.Popen([sys.executable, "-c", PUBLISH, str(tmp_path / channel), channel, f"{turn}", "60"])
        for turn in range(3)
        for channel in channels
    ]
    assert [process.wait(300) for process in running] == [0] * len(running)
    fleet.signing.load()
    for channel in channels:
        target = fleet.signing.released(channel)[f"{channel}/many"]
        assert target.custom is not None
        assert target.custom["version"] in ("0", "1", "2")
    names = fleet.metadata.tags()
    for channel in channels:
        assert sum(name.endswith(f".{channel}.json") for name in names) == 4, "the first, and one for each change"
    assert sum(name.endswith(".snapshot.json") for name in names) == 13
