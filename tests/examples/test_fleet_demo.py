"""``make fleet-demo`` as a whole: what its devices run in the end; and that nothing of it stays behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.demos import processes_in, start
from tests.oci import registries
from tests.qemu import board, device

pytestmark = pytest.mark.slow


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo, started in a folder of its own, where it finds the AArch64 device."""
    registries.require()
    device.require()
    board.require()
    for program in ("chromium", "skopeo"):
        if shutil.which(program) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} not found: apt-get install {program}")
    (tmp_path / "build/aarch64").mkdir(parents=True)
    (tmp_path / "build/aarch64/device").symlink_to(device.DEVICE)
    with start("fleet", tmp_path) as process:
        yield process


@pytest.mark.timeout(1800)
def test_a_fleets_life(started: subprocess.Popen[str], tmp_path: Path) -> None:
    said, _ = started.communicate(timeout=1700)
    assert started.returncode == 0, said
    rows = re.findall(r"^(lab|hall-\d) +(\w+) +(\w+) +([\d.]+) +(\d) +\d+ / 360$", said, re.MULTILINE)
    assert rows == [
        ("lab", "x86_64", "canary", "1.2.0", "0"),
        ("hall-1", "x86_64", "stable", "1.1.0", "1"),
        ("hall-2", "aarch64", "stable", "1.1.0", "1"),
    ]
    assert re.findall(r"^\(exit code (\d+)\)$", said, re.MULTILINE).count("50") == 2
    assert (tmp_path / "build/fleet-demo/status.png").read_bytes().startswith(b"\x89PNG")
    assert processes_in(tmp_path) == []


def test_a_demo_that_is_interrupted_leaves_no_processes(started: subprocess.Popen[str], tmp_path: Path) -> None:
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("$ python"):
            break
    assert len(processes_in(tmp_path)) >= 3, "the demo, a registry, a collector"
    started.send_signal(signal.SIGINT)
    said = started.stdout.read()
    assert started.wait(timeout=120) != 0, said
    end = time.monotonic() + 30
    while processes_in(tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_in(tmp_path) == []
