"""Kills and Ctrl-C in the middle of an epoch, and full disks: nothing is half-written, and the run goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.harness import Outcome, finish, start
from tests.cli.test_faults import CODES, DEFAULT_SIGINT, check_refused_for_space, file_limit, small_disk
from tests.compression.sets import bars, check_same_weights

pytestmark = pytest.mark.slow

NETS = """
import torch
from torch import nn

def net(width):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3),
        nn.Conv2d(width, width, 1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 4),
    )

def large(): return net(32)
def small(): return net(16)
"""
LOSS = """
import itertools, os
from torch.nn import functional

calls = itertools.count(1)
last, number = map(int, os.environ.get("SIGNAL_AT", "0,0").split(","))

def loss(outputs, targets):
    if next(calls) == last:
        os.kill(os.getpid(), number)
    return functional.cross_entropy(outputs, targets)
"""
"""Sends its own process a signal in a batch that the environment names: a point that no clock moves."""
BATCHES = 4
"""Of an epoch."""
DATA = ("--input-shape", "1,3,12,12", "--data", "train.npz", "--val", "held.npz", "--batch", "16",
        "--accelerator", "cpu", "--loss", "loss.py:loss")  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks and data, to be in."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("loss.py").write_text(LOSS)
    for name, seed in (("train", 0), ("held", 1)):
        x, y = bars(16 * BATCHES, seed)
        np.savez(f"{name}.npz", x=x, y=y)
    return tmp_path


def run(*command: str, code: int = 0, batch: int = 0, number: int = 0) -> Outcome:
    """Run a command in a process of its own, which gets a signal in a batch."""
    process = start(*command, env={"SIGNAL_AT": f"{batch},{number}"}, prefix=DEFAULT_SIGINT)
    return finish(process, code=code)


def killed(*command: str, batch: int, number: signal.Signals, kept: set[str]) -> Outcome:
    """Run a command that gets a signal in a batch, and check what it leaves beside what was there."""
    before = {path.name for path in Path().iterdir()}
    told = run(*command, code=CODES[number], batch=batch, number=number)
    assert "Traceback" not in told.stderr
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == (before | kept) - {"__pycache__"}
    return told


def test_a_pruning_goes_on_after_a_kill_and_after_ctrl_c(place: Path) -> None:
    def command(output: str) -> tuple[str, ...]:
        return ("prune", "nets.py:large", *DATA, "--amount", "0.5", "--steps", "2", "--finetune", "4", "--distil", "-o",
                output)  # fmt: skip

    run(*command("whole.safetensors"))
    # a pass over the data says what channels are worth, and each step has two epochs
    kept = {"cut.safetensors.checkpoint", "cut.safetensors.finetune.checkpoint"}
    killed(*command("cut.safetensors"), batch=2 * BATCHES + 2, number=signal.SIGKILL, kept=kept)
    told = killed(*command("cut.safetensors"), batch=3 * BATCHES + 2, number=signal.SIGINT, kept=kept)
    assert "goes on from cut.safetensors.finetune.checkpoint: epoch 2" in told.stderr
    assert "the same command goes on from cut.safetensors.checkpoint" in told.stderr
    told = run(*command("cut.safetensors"))
    assert "goes on from cut.safetensors.checkpoint: step 2, fine-tuning" in told.stderr
    check_same_weights(Path("whole.safetensors"), Path("cut.safetensors"))
    assert not list(place.glob("*.checkpoint"))


def test_a_distillation_goes_on_after_a_kill_and_after_ctrl_c(place: Path) -> None:
    def command(output: str) -> tuple[str, ...]:
        return ("distil", "--teacher", "nets.py:large", "--student", "nets.py:small", *DATA, "--epochs", "3",
                "--features", "0", "-o", output)  # fmt: skip

    run(*command("whole.safetensors"))
    kept = {"cut.safetensors.checkpoint"}
    killed(*command("cut.safetensors"), batch=BATCHES + 2, number=signal.SIGKILL, kept=kept)
    told = killed(*command("cut.safetensors"), batch=BATCHES + 2, number=signal.SIGINT, kept=kept)
    assert "the same command goes on from cut.safetensors.checkpoint" in told.stderr
    assert "goes on from cut.safetensors.checkpoint: epoch 3" in run(*command("cut.safetensors")).stderr
    check_same_weights(Path("whole.safetensors"), Path("cut.safetensors"))
    assert not list(place.glob("*.checkpoint"))


def test_a_shrinking_goes_on_after_a_kill_and_after_ctrl_c(place: Path) -> None:
    def command(folder: str) -> tuple[str, ...]:
        return ("shrink", "nets.py:large", *DATA, "--epochs", "3", "--shares", "0.5", "--precisions", "fp32",
                "--max-accuracy-drop", "99", "-o", folder)  # fmt: skip

    run(*command("whole"))
    # what layers take decides which channels go: the run that is cut short has the same measurements
    shutil.copytree("whole/0.00-fp32.cnncc", "cut/0.00-fp32.cnncc")
    state = json.loads(Path("whole/shrink.json").read_text())
    state["points"] = state["points"][:1]
    Path("cut/shrink.json").write_text(json.dumps(state))
    killed(*command("cut"), batch=2 * BATCHES + 2, number=signal.SIGKILL, kept=set())
    made = {"0.00-fp32.cnncc", "0.50.safetensors.checkpoint", "shrink.json"}
    assert {path.name for path in Path("cut").iterdir()} == made
    told = killed(*command("cut"), batch=2 * BATCHES + 2, number=signal.SIGINT, kept=set())
    assert {path.name for path in Path("cut").iterdir()} == made
    assert "the same command goes on from cut/shrink.json" in told.stderr
    told = run(*command("cut"))
    assert "goes on from cut/0.50.safetensors.checkpoint: epoch 3" in told.stderr
    check_same_weights(Path("whole/0.50.safetensors"), Path("cut/0.50.safetensors"))
    points = json.loads(Path("cut/shrink.json").read_text())["points"]
    assert [(each["share"], each["precision"]) for each in points] == [(0.0, "fp32"), (0.5, "fp32")]
    assert not list(Path("cut").glob("*.checkpoint"))
    missed = run(*command("cut")[:-4], "--max-accuracy-drop", "0", "--latency", "1us", "-o", "cut", code=1)
    assert "no variant holds to 0.001 ms, 0 points lost; nearest is" in missed.stderr
    assert "cut/0." in missed.stderr


@pytest.mark.parametrize(
    ("command", "more", "left"),
    [("train", ("--epochs", "1"), []), ("prune", ("--amount", "0.5"), ["w.safetensors.checkpoint"])],
    ids=["train", "prune"],
)
def test_a_checkpoint_on_a_full_disk_is_refused_and_leaves_no_part_of_it(
    place: Path, command: str, more: tuple[str, ...], left: list[str]
) -> None:
    """That of a pruning has room, and stays; that of its fine-tuning has not."""
    disk = place / "disk"
    with small_disk(disk, 16 << 10) as prefix:
        told = finish(
            start(command, "nets.py:large", *DATA, *more, "-o", disk / "w.safetensors", prefix=prefix), code=None
        )
        check_refused_for_space(told)
        assert [path.name for path in disk.iterdir()] == left


def test_weights_on_a_full_disk_are_refused_and_leave_nothing(place: Path) -> None:
    script = (
        "from pathlib import Path; import nets; from cnncc.compression.weights_file import save_weights; "
        "from cnncc_runtime.errors import StorageFailed\n"
        "try: save_weights(nets.large(), Path('w.safetensors'))\n"
        "except StorageFailed as exc: print(exc.message)"
    )
    done = subprocess.run([*file_limit(4096), sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "file too large" in done.stdout
    assert not list(place.glob("w.*")), "nor a part of it"
