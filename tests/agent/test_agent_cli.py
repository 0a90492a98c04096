"""``cnncc-agent`` as a device's service calls it: exit codes, words, JSON, reports, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cnncc_runtime.agent import cli as agent_cli
from cnncc_runtime.agent.cli import cli, parse_window
from cnncc_runtime.agent.reports import Report, Spool
from cnncc_runtime.errors import NetworkFailed, UsageError
from tests.agent.test_update import Fleet, engine, fleet, own, runs
from tests.fleet.test_export import export
from tests.oci import registries

__all__ = ["engine", "fleet", "own"]


@dataclass
class Collector:
    """Takes reports, as a fleet's collector does.

    Attributes:
        url: Where.
        heard: What it was told, with the token of each.
        answer: Its status.
    """

    url: str = ""
    heard: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answer: int = 204


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if made.answer == 204:
                made.heard.append((self.headers["Authorization"], body))
            self.send_response(made.answer)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}/reports"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Device:
    folder: Path

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """Call the agent; return what it said on both streams."""
        result = CliRunner().invoke(cli, ["--folder", str(self.folder), *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output


def enrolled(fleet: Fleet, *more: str | Path) -> Device:
    device = Device(fleet.folder / "cli-device")
    root = fleet.folder / "root.json"
    root.write_bytes(fleet.root)
    said = device(
        "enroll", "--root", root, "--registry", fleet.registry.url, "--name", fleet.name, "--device", "lab-1", *more
    )
    assert "lab-1 follows stable/vision" in said
    return device


def test_a_devices_life(fleet: Fleet, tmp_path: Path) -> None:
    device = enrolled(fleet)
    assert "nothing is announced in stable" in device("once", code=10)
    fleet.release("1.0.0")
    assert "✓ runs release 1.0.0" in device("once")
    assert json.loads(device("once", "--json", code=10))["why"] == "the device has had it"
    fleet.release("1.1.0")
    assert json.loads(device("once", "--json"))["version"] == "1.1.0"
    status = json.loads(device("status", "--json"))
    assert status["whole"] is True
    assert status["state"]["sequence"] == 2
    assert "runs      " + status["state"]["good"][:12] in device("status")
    assert "✓ runs " + status["state"]["previous"][:12] in device("rollback")
    assert runs(fleet.device("cli-device")) == "1.0.0"
    assert "refused   " + status["state"]["good"][:12] in device("status")
    assert "no engine to go back to" in device("rollback", code=2)
    assert "removed" in device("gc")
    fleet.release("1.2.0")
    archive = export(fleet, tmp_path / "release.tar")
    assert "✓ runs release 1.2.0" in device("install", archive)


def test_what_goes_wrong_has_its_exit_code(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    registries.impatient(monkeypatch)
    device = enrolled(fleet)
    assert "is enrolled already" in device(
        "enroll", "--root", fleet.folder / "root.json", "--registry", fleet.registry.url, "--name", "vision", code=2
    )
    fleet.release("1.0.0", fleet.bundle("1.0.0", wrong=True))
    said = device("once", code=50)
    assert "✗ release 1.0.0 failed on this device: output 'y'" in said
    assert "try: there was none before it" in said
    fleet.release("1.1.0", fleet.bundle("1.1.0", machine="riscv64"))
    assert "the release has no engine for this" in device("once", code=40)
    fleet.registry.process.kill()
    fleet.registry.process.wait()
    assert "could not be reached" in device("once", code=20)
    assert "is not enrolled" in Device(fleet.folder / "nobody")("once", code=2)


def test_outcomes_are_reported_and_wait_for_somebody_who_hears_them(
    fleet: Fleet, collector: Collector, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret-of-lab-1\n")
    device = enrolled(fleet, "--report", collector.url, "--report-token", tmp_path / "token")
    fleet.release("1.0.0")
    device("once")
    [(token, report)] = collector.heard
    assert token == "Bearer secret-of-lab-1"
    assert (report["device"], report["outcome"], report["version"]) == ("lab-1", "installed", "1.0.0")
    assert report["latency"] > 0
    collector.heard.clear()
    collector.answer = 503
    fleet.release("1.1.0", fleet.bundle("1.1.0", wrong=True))
    assert "reports wait" in device("once", code=50)
    assert "secret" not in device("once", code=10)
    collector.answer = 204
    device("once", code=10)
    [(_, report)] = collector.heard
    assert (report["outcome"], report["error"], report["sequence"]) == ("failed", "HealthCheckFailed", 2)
    assert report["version"] == "1.1.0"
    assert "output 'y'" in report["message"]
    collector.heard.clear()
    fleet.point("1.0.0")
    assert "the device runs that engine already" in device("once", code=10)
    [(_, report)] = collector.heard
    assert (report["outcome"], report["version"], report["sequence"]) == ("installed", "1.0.0", 3)
    device("once", code=10)
    assert len(collector.heard) == 1


def test_reports_wait_in_order_and_the_oldest_give_way(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnncc_runtime.agent.reports._MOST", 3)
    spool = Spool(tmp_path / "reports")
    assert spool.send(collector.url, "t") == 0
    for number in range(5):
        spool.add(Report("d", "n", "stable", "installed", f"{number}", number, "", 0.0))
    collector.answer = 500
    with pytest.raises(NetworkFailed, match="answered 500"):
        spool.send(collector.url, "t")
    collector.answer = 204
    assert spool.send(collector.url, "t") == 3
    assert [report["version"] for _, report in collector.heard] == ["2", "3", "4"]
    spool.add(Report("d", "n", "stable", "installed", "5", 5, "", 0.0))
    collector.answer = 422
    assert spool.send(collector.url, "t") == 0
    assert spool.send(collector.url, "t") == 0
    assert list((tmp_path / "reports").iterdir()) == [], "what nobody will ever take is gone"


@pytest.mark.parametrize("url", ["ftp://x", "x", "http://fleet.example.com/reports", "https://"])
def test_reports_go_nowhere_where_everybody_reads_the_token(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError):
        Spool(tmp_path).send(url, "token")


def test_a_window_of_time_is_kept_over_midnight_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(hour: int, text: str) -> bool:
        class Then(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime(2030, 1, 1, hour, 30)

        monkeypatch.setattr(agent_cli, "datetime", Then)
        return parse_window(text)()

    assert [at(hour, "02:00-05:00") for hour in (1, 2, 4, 5)] == [False, True, True, False]
    assert [at(hour, "22:00-05:00") for hour in (21, 22, 3, 5)] == [False, True, True, False]
    assert at(12, "")
    for wrong in ("2", "02:00", "02:00-", "25:00-26:00", "a-b-c"):
        with pytest.raises(UsageError, match="no window of time"):
            parse_window(wrong)


def test_the_service_polls_until_it_is_stopped(fleet: Fleet) -> None:
    device = enrolled(fleet)
    fleet.release("1.0.0")
    command = [sys.executable, "-c", "from cnncc_runtime.agent.cli import main; main()", "--folder", device.folder]
    process = subprocess.Popen([*command, "run", "--interval", "1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert "✓ runs release 1.0.0" in process.stderr.readline()
        fleet.release("1.1.0")
        said = ""
        until = time.monotonic() + 60
        while "1.1.0" not in said and time.monotonic() < until:
            said = process.stderr.readline()
        assert "✓ runs release 1.1.0" in said
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
