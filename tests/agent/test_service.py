"""The agent as a service: its unit by systemd's own tools, what applications may read, signals, and ``--on-change``."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnncc_runtime.agent import cli as agent_cli
from cnncc_runtime.agent.activation import current
from cnncc_runtime.agent.hook import tell
from cnncc_runtime.agent.unit import STATE, unit_text
from cnncc_runtime.errors import RunFailed, UsageError
from tests.agent.test_agent_cli import Collector, Device, collector, enrolled
from tests.agent.test_update import Fleet, engine, fleet, own, runs
from tests.oci.registries import Fault, FaultProxy

__all__ = ["collector", "engine", "fleet", "own"]

AGENT = [sys.executable, "-m", "cnncc_runtime.agent", "--folder"]
ANALYZE = "systemd-analyze"
MOST_EXPOSED = 20
"""Tenths: systemd calls 2.0 and less "OK"; a service without walls has 9.6."""


def analyze(*arguments: str | Path, home: Path) -> str:
    """Ask systemd of a unit; skipped where it is not installed, which fails in CI."""
    if shutil.which(ANALYZE) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{ANALYZE} not found: apt-get install systemd")
    variables = {**os.environ, "XDG_RUNTIME_DIR": str(home), "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
    done = subprocess.run(
        [ANALYZE, *map(str, arguments)], capture_output=True, text=True, env=variables, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("user", [False, True])
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, user: bool) -> None:
    folder = tmp_path / "agent" if user else STATE
    path = tmp_path / "cnncc-agent.service"
    path.write_text(unit_text(folder, ["--window=02:00-05:00", "--on-change=touch '/tmp/a b' $X %h;"], user=user))
    said = analyze(*(["--user"] if user else []), "verify", "--man=no", "--recursive-errors=yes", path, home=tmp_path)
    assert said == "", "systemd warns of what it does not know, and goes on without it"


def test_the_service_is_walled_in(tmp_path: Path) -> None:
    path = tmp_path / "cnncc-agent.service"
    path.write_text(unit_text(STATE))
    said = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", path, home=tmp_path)
    assert "Overall exposure level for cnncc-agent.service" in said
    open_to_all = path.with_name("open.service")
    open_to_all.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(AssertionError):
        analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", open_to_all, home=tmp_path)


def test_a_unit_is_printed_with_what_run_is_to_do(tmp_path: Path) -> None:
    printed = Device(STATE)("unit", "--interval", "60", "--rate", "1.5", "--on-change", 'notify "50%" $CNNCC_BUNDLE')
    [line] = [line for line in printed.splitlines() if line.startswith("ExecStart=")]
    assert line == (
        f"ExecStart={sys.executable} -m cnncc_runtime.agent --folder {STATE} run --interval=60 --rate=1.5 "
        '"--on-change=notify \\"50%%\\" $$CNNCC_BUNDLE"'
    )
    assert "StateDirectory=cnncc-agent" in printed
    elsewhere = Device(tmp_path)("unit")
    assert f"ReadWritePaths={tmp_path}" in elsewhere
    assert "StateDirectory" not in elsewhere
    assert "no window of time" in Device(tmp_path)("unit", "--window", "noon", code=2)
    assert "is the machine's agent's" in Device(STATE)("unit", "--user", code=2)
    assert "User=" not in Device(tmp_path)("unit", "--user")


def test_what_the_service_would_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="in a home folder"):
        unit_text(Path("/home/engineer/agent"))
    assert unit_text(Path("/home/engineer/agent"), user=True)
    monkeypatch.setattr(sys, "executable", "/root/venv/bin/python")
    with pytest.raises(UsageError, match="in a home folder") as caught:
        unit_text(STATE)
    assert "/opt/cnncc" in caught.value.hint


def test_the_help_of_the_program_is_that_of_the_module() -> None:
    said = subprocess.run([*AGENT[:-1], "--help"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("Usage: cnncc-agent ")


def test_applications_of_other_users_read_engines_whatever_the_umask(fleet: Fleet, tmp_path: Path) -> None:
    fleet.release("1.0.0")
    (tmp_path / "token").write_text("secret-of-lab-1")
    folder = fleet.folder / "cli-device"
    (fleet.folder / "root.json").write_bytes(fleet.root)
    for arguments in (
        ["enroll", "--root", str(fleet.folder / "root.json"), "--registry", fleet.registry.url, "--name", "vision",
         "--report", "http://localhost:9/reports", "--report-token", str(tmp_path / "token")],
        ["once"],
    ):  # fmt: skip
        subprocess.run([*AGENT, str(folder), *arguments], umask=0o077, check=True, capture_output=True)
    bundle = (folder / "state/current/bundle.cnncc").resolve()
    wanted = [folder, folder / "state", *list(bundle.parents)[: bundle.parents.index(folder)], bundle]
    for path in wanted:
        assert path.stat().st_mode & 0o777 == 0o755, path
    for path in bundle.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path
    for path in folder.rglob("*"):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), f"others may write {path}"
        assert path.is_dir() or b"secret" not in path.read_bytes(), f"{path} holds the token"


def test_root_does_not_leave_files_among_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, -1)
    monkeypatch.setattr(agent_cli.os, "geteuid", lambda: 0)
    said = Device(tmp_path)("once", code=2)
    assert "belongs to another user" in said
    assert f"sudo -u '#{tmp_path.stat().st_uid}'" in said
    assert list(tmp_path.iterdir()) == []
    assert "belongs" not in Device(tmp_path)("status", code=2)
    assert Device(tmp_path)("unit")


@pytest.fixture
def slow_device(fleet: Fleet) -> Iterator[Callable[[FaultProxy, str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(proxy: FaultProxy, *options: str) -> subprocess.Popen[str]:
        agent = fleet.device("slow", port=proxy.port)
        process = subprocess.Popen([*AGENT, str(agent.root), "run", *options], stderr=subprocess.PIPE, text=True)
        started.append(process)
        until = time.monotonic() + 60
        while not part_of(fleet) and time.monotonic() < until:
            time.sleep(0.02)
        assert part_of(fleet), "no download began"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def part_of(fleet: Fleet) -> int:
    """Return how many bytes of blobs that are not whole the slow device has."""
    return sum(path.stat().st_size for path in (fleet.folder / "slow/incoming").glob("*.part"))


@pytest.mark.parametrize("options", [("--rate", "0.05"), ()])
def test_sigterm_ends_a_download_that_goes_on_later(
    fleet: Fleet, slow_device: Callable[..., subprocess.Popen[str]], options: tuple[str, ...]
) -> None:
    fleet.release("1.0.0")
    # by a rate, or by a network that says no more once it has begun with the weights
    with FaultProxy(fleet.registry.port, always=None if options else Fault("stall", 600_000)) as proxy:
        process = slow_device(proxy, *options)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert part_of(fleet) > 0
    agent = fleet.device("slow")
    left = part_of(fleet) + sum(path.stat().st_size for path in (agent.root / "blobs").iterdir())
    (agent.root / "agent.json").write_text(
        (agent.root / "agent.json").read_text().replace(str(proxy.port), str(fleet.registry.port))
    )
    told: list[int] = []
    agent.progress = told.append
    assert agent.once().changed
    assert sum(told) == sum(path.stat().st_size for path in (agent.root / "blobs").iterdir()) - left
    assert runs(agent) == "1.0.0"


def test_an_application_is_told_of_every_engine_once(fleet: Fleet, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    device = enrolled(fleet)
    hook = f'echo "$CNNCC_BUNDLE" >> {heard}; test -f "$CNNCC_BUNDLE/engine.so"'
    assert "nothing is announced" in device("once", "--on-change", hook, code=10)
    assert not heard.exists()
    fleet.release("1.0.0")
    device("once", "--on-change", hook)
    device("once", "--on-change", hook, code=10)
    fleet.release("1.1.0", fleet.bundle("1.1.0", wrong=True))
    device("once", "--on-change", hook, code=50)
    fleet.release("1.2.0")
    device("once", "--on-change", hook)
    device("rollback", "--on-change", hook)
    slots = [Path(line).parent.name for line in heard.read_text().splitlines()]
    assert len(slots) == 3
    assert slots[0] == slots[2] == current(fleet.device("cli-device").disk())


def test_an_application_is_told_although_the_power_was_cut_before(fleet: Fleet, tmp_path: Path) -> None:
    device = enrolled(fleet)
    fleet.release("1.0.0")
    device("once")  # as if it had lost power when the new engine was trusted, and nobody had been told
    device("once", "--on-change", f"touch {tmp_path / 'told'}", code=10)
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize("command", ["exit 3", "no-such-program", "kill -9 $$"])
def test_an_application_that_cannot_be_told_is_reported_and_the_engine_stays(
    fleet: Fleet, collector: Collector, tmp_path: Path, command: str
) -> None:
    (tmp_path / "token").write_text("t")
    device = enrolled(fleet, "--report", collector.url, "--report-token", tmp_path / "token")
    fleet.release("1.0.0")
    assert "! --on-change ended with exit code" in device("once", "--on-change", command)
    assert runs(fleet.device("cli-device")) == "1.0.0"
    [(_, report)] = collector.heard
    assert (report["outcome"], report["error"]) == ("installed", "RunFailed")
    assert "--on-change ended with exit code" in report["message"]
    assert "on-change" not in device("once", "--on-change", command, code=10), "it is not tried for ever"


def test_a_command_that_does_not_end_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "slots/s/bundle.cnncc").mkdir(parents=True)
    with pytest.raises(RunFailed, match="did not end within"):
        tell(tmp_path, "s", "sleep 600 & sleep 600", patience=0.5)
    assert not tell(tmp_path, "s", "exit 1")
