"""The update agent on an AArch64 machine that qemu emulates: what it takes the machine for, how it tries engines."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cnncc.targets.devices import find_device
from tests.qemu import device

pytestmark = pytest.mark.slow

ASK = """
import json, sys
from pathlib import Path
from cnncc_runtime.agent.trial import try_engine
from cnncc_runtime.agent.update import host_hardware
found = host_hardware(Path(sys.argv[1]))
tried = try_engine(Path(sys.argv[1]) / "nothing.cnncc")
print(json.dumps([found.machine, sorted(found.features), tried.problems]))
"""


def test_the_device_is_what_qemu_emulates_and_tries_engines_in_processes_of_its_own(tmp_path: Path) -> None:
    device.require()
    done = subprocess.run(
        [device.DEVICE / "python", "-c", ASK, tmp_path], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    machine, features, problems = json.loads(done.stdout)
    assert machine == "aarch64"
    assert set(find_device("raspberry-pi-5").profile.features) <= set(features)
    assert not {"avx2", "sse4.2", "x87"} & set(features), "the features are this machine's"
    [problem] = problems
    assert "nothing.cnncc" in problem, "the trial's own words, not those of a process that did not start"


def test_an_agent_that_is_not_enrolled_says_so_there_too(tmp_path: Path) -> None:
    device.require()
    done = subprocess.run(
        [device.DEVICE / "cnncc-agent", "--folder", tmp_path, "status"], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"✗ {tmp_path} is not enrolled")
