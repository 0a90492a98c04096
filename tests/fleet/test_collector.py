"""The status collector over HTTP: who may report, who may look, and what is shown."""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import requests
import uvicorn

from cnncc.fleet.collector.app import make_app
from cnncc.fleet.collector.store import DEVICE, VIEWER, Store
from cnncc_runtime.agent.reports import FAILED, INSTALLED, WENT_BACK, Report, Spool
from cnncc_runtime.errors import DependencyMissing, EnvironmentMissing, NetworkFailed, UsageError
from tests.fleet.databases import Postgres, postgres

NUMBERS = itertools.count()


@dataclass
class Running:
    url: str
    store: Store


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fleet.db'}"
    server: Postgres = request.getfixturevalue("server")
    name = f"test{next(NUMBERS)}"
    server.call("createdb", "-h", str(server.folder), "-U", "postgres", name)
    return server.address.replace("/postgres?", f"/{name}?")


@pytest.fixture
def collector(address: str) -> Iterator[Running]:
    store = Store(address)
    with serving(store) as running:
        yield running
    store.close()


@contextlib.contextmanager
def serving(store: Store) -> Iterator[Running]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(store), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", store)
        server.should_exit = True
        thread.join()


def report(device: str = "lab-1", outcome: str = INSTALLED, **changes: object) -> Report:
    made = Report(device, "vision", "stable", outcome, "1.0.0", 1, "ab" * 32, 1e9, 0.004, machine="aarch64")
    return msgspec.structs.replace(made, **changes)


def post(collector: Running, token: str, body: Report | bytes) -> int:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    answer = requests.post(
        f"{collector.url}/reports", data=data, headers={"Authorization": f"Bearer {token}"}, timeout=10
    )
    return answer.status_code


def test_reports_are_taken_and_shown(collector: Running, tmp_path: Path) -> None:
    token = collector.store.issue(DEVICE, "*")
    spool = Spool(tmp_path / "reports")
    for number in range(8):
        spool.add(report(f"lab-{number}", latency=0.001 * (number + 1)))
    spool.add(report("lab-8", FAILED, latency=0.0, error="HealthCheckFailed", message="output <b>y</b> is off"))
    spool.add(report("lab-9", WENT_BACK))
    assert spool.send(f"{collector.url}/reports", token) == 10
    viewer = collector.store.issue(VIEWER, "engineer")
    told = requests.get(
        f"{collector.url}/status.json", headers={"Authorization": f"Bearer {viewer}"}, timeout=10
    ).json()
    [release] = told["releases"]
    assert (release["installed"], release["failed"], release["back"], release["failing"]) == (8, 1, 1, 20.0)
    assert release["latency"] == pytest.approx(0.0045)
    assert release["problems"] == [["output <b>y</b> is off", 1]]
    assert len(told["devices"]) == 10
    page = requests.get(collector.url, auth=("anybody", viewer), timeout=10)
    assert "10 devices reported" in page.text
    assert "output &lt;b&gt;y&lt;/b&gt; is off" in page.text, "what devices say is text, never markup"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_a_device_counts_by_its_last_word(collector: Running) -> None:
    token = collector.store.issue(DEVICE, "*")
    for number, outcome in enumerate((FAILED, INSTALLED, INSTALLED)):
        assert post(collector, token, report(outcome=outcome, time=1e9 + number)) == 204
    assert post(collector, token, report(outcome=INSTALLED, time=1e9 + 2)) == 204  # again: its answer was lost
    assert post(collector, token, report(version="1.1.0", sequence=2, outcome=FAILED, time=2e9)) == 204
    newer, older = collector.store.progress()
    assert (newer.version, newer.installed, newer.failed) == ("1.1.0", 0, 1)
    assert (older.version, older.installed, older.failed) == ("1.0.0", 1, 0)
    [device] = collector.store.devices()
    assert (device.version, device.outcome) == ("1.1.0", FAILED)


def test_who_has_no_token_neither_reports_nor_looks(collector: Running) -> None:
    device, viewer = collector.store.issue(DEVICE, "lab-1"), collector.store.issue(VIEWER, "engineer")
    for token in ("", "wrong", viewer):
        assert post(collector, token, report()) == 401
    assert post(collector, device, report("lab-2")) == 403, "a device speaks for itself alone"
    assert post(collector, device, report("lab-1")) == 204
    for path in ("/", "/status.json"):
        for headers in ({}, {"Authorization": f"Bearer {device}"}, {"Authorization": "Basic %%%"}):
            answer = requests.get(collector.url + path, headers=headers, timeout=10)
            assert answer.status_code == 401
            assert "lab-1" not in answer.text
    assert requests.get(f"{collector.url}/healthz", timeout=10).text == "ok"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"[" * 60_000, 400),
        (b"\xff", 400),
        (b"x" * 70_000, 413),
        (msgspec.json.encode(report(outcome="fine")), 422),
        (msgspec.json.encode(report(device="")), 422),
        (msgspec.json.encode(report(device="x" * 300)), 422),
        (msgspec.json.encode(report(message="a\nb")), 422),
        (msgspec.json.encode(report(sequence=-1)), 422),
        (msgspec.json.encode(report(latency=-1.0)), 422),
        (msgspec.json.encode(report(fetched=-1)), 422),
        (msgspec.json.encode(report(deltas=1 << 40)), 422),
        (msgspec.json.encode(report(time=1e300)), 422),
    ],
)
def test_what_is_no_report_is_refused(collector: Running, body: bytes, status: int) -> None:
    assert post(collector, collector.store.issue(DEVICE, "*"), body) == status
    assert collector.store.devices() == ()


def test_a_database_holds_no_token_and_is_found_again(address: str, tmp_path: Path) -> None:
    store = Store(address)
    token = store.issue(DEVICE, "lab-1")
    store.add(report())
    store.close()
    if address.startswith("sqlite"):
        assert token.encode() not in (tmp_path / "fleet.db").read_bytes()
    again = Store(address)
    assert again.holder(DEVICE, token) == "lab-1"
    assert len(again.devices()) == 1
    again.close()
    for wrong in ("", "fleet.db", "nonsense://x"):
        with pytest.raises(UsageError, match="is no database"):
            Store(wrong)


def test_a_report_that_comes_many_times_at_once_is_kept_once(collector: Running) -> None:
    token = collector.store.issue(DEVICE, "*")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: post(collector, token, report()), range(40))) == {204}
        assert set(pool.map(lambda number: post(collector, token, report(f"lab-{number}")), range(200))) == {204}
    [release] = collector.store.progress()
    assert release.installed == 200
    with collector.store._engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM reports").scalar() == 200


def test_the_longest_of_everything_fits(collector: Running) -> None:
    token = collector.store.issue(DEVICE, "ü" * 253)
    longest = report(
        "ü" * 253, FAILED, name="n" * 255, channel="c" * 64, version="v" * 64, slot="a" * 64, error="e" * 64,
        message="ü" * 500, machine="m" * 32, agent="a" * 32, sequence=(1 << 31) - 1, time=999999999999.0,
        latency=5e-324,
    )  # fmt: skip
    assert post(collector, token, longest) == 204
    [device] = collector.store.devices()
    assert (device.device, device.message) == (longest.device, longest.message)
    for nobody in ("", "x" * 254, "a\0b"):
        with pytest.raises(UsageError, match="is no name"):
            collector.store.issue(DEVICE, nobody)


def test_a_database_that_goes_away_loses_nothing(tmp_path: Path) -> None:
    with postgres() as own:
        store = Store(own.address)
        token = store.issue(DEVICE, "*")
        spool = Spool(tmp_path / "reports")
        for number in range(3):
            spool.add(report(f"lab-{number}"))
        with serving(store) as running:
            own.stop()
            assert post(running, token, report()) == 503
            with pytest.raises(NetworkFailed, match="answered 503"):
                spool.send(f"{running.url}/reports", token)
            with pytest.raises(EnvironmentMissing, match="the database failed"):
                Store(own.address)
            own.start()
            assert spool.send(f"{running.url}/reports", token) == 3
        assert len(store.devices()) == 3
        store.close()


def test_a_password_is_not_said_and_a_driver_that_lacks_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("postgresql+psycopg://me:s3cret@host:port/fleet", "nonsense://me:s3cret@host/x"):
        with pytest.raises(UsageError) as caught:
            Store(address)
        assert "s3cret" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DependencyMissing, match="psycopg") as missing:
        Store("postgresql+psycopg://me:s3cret@host/fleet")
    assert missing.value.hint == "pip install 'psycopg[binary]'"
    assert "s3cret" not in str(missing.value)
