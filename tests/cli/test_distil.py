"""``cnncc distil`` as a user runs it: a teacher, a student, layers by name, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.harness import call
from tests.compression.sets import bars

NETS = """
import torch
from torch import nn

def _net(width, classes=4, size=12):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 36, classes)
    )

def large(): return _net(16)
def small(): return _net(4)
def other(): return _net(16, classes=5)
def lame():
    made = _net(16)
    made[0].weight.data *= 1e20
    made[4].weight.data *= 1e30
    return made
"""
SHAPE = ("--input-shape", "N,3,12,12")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks, a trained teacher and data, to be in."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    for name, seed in (("train", 0), ("held", 1)):
        x, y = bars(64, seed)
        np.savez(f"{name}.npz", x=x, y=y)
    return tmp_path


def arguments(*more: str, teacher: str = "large") -> tuple[str, ...]:
    """Return a command line."""
    return ("distil", "--teacher", f"nets.py:{teacher}", "--student", "nets.py:small", *SHAPE, "--data", "train.npz",
            "--epochs", "3", "--lr", "0.01", *more)  # fmt: skip


def test_a_student_is_taught_and_its_weights_are_those_of_its_factory(folder: Path) -> None:
    call("train", "nets.py:large", *SHAPE, "--data", "train.npz", "--epochs", "6", "-o", "teacher.safetensors", "-q")
    before = Path("teacher.safetensors").read_bytes()
    made = call(*arguments("--teacher-weights", "teacher.safetensors", "--val", "held.npz", "--features", "0",
                           "--attention", "2=2", "--attention-weight", "2", "--json"))  # fmt: skip
    assert made.document["weights"] == "small.safetensors"
    assert made.document["best"] > 0.6
    found = load_file("small.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "0.weight": (4, 3, 3, 3), "0.bias": (4,), "4.weight": (4, 144), "4.bias": (4,)
    }  # fmt: skip
    with safe_open("small.safetensors", framework="pt") as file:
        assert file.metadata()["teacher"].startswith("sha256:")
    assert Path("teacher.safetensors").read_bytes() == before
    assert not list(folder.glob("*.checkpoint"))
    call("export", "nets.py:small", *SHAPE, "--weights", "small.safetensors", "-o", "small.onnx", "-q")


def test_a_checkpoint_of_another_teacher_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnncc.compression import training

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        patch.setattr(training._Fit, "_end_epoch", cut)
        call(*arguments(), code=130)
    torch.manual_seed(5)
    save_file({"0.weight": torch.randn(16, 3, 3, 3), "0.bias": torch.zeros(16),
               "4.weight": torch.randn(4, 576), "4.bias": torch.zeros(4)}, "teacher.safetensors")  # fmt: skip
    told = call(*arguments("--teacher-weights", "teacher.safetensors"), code=2)
    assert "another training: it differs in teacher" in told.stderr
    told = call(*arguments("--temperature", "2"), code=2)
    assert "it differs in distilled by temperature" in told.stderr
    assert "goes on from" in call(*arguments()).stderr


@pytest.mark.parametrize(
    ("teacher", "more", "code", "said"),
    [
        ("other", (), 4, "the student gives [32, 4], the teacher [32, 5]"),
        ("lame", (), 4, "the teacher gives NaN or infinity"),
        ("large", ("--alpha", "2"), 2, "an alpha of 2"),
        ("large", ("--features", "conv1"), 2, "the student has no layer 'conv1'"),
        ("large", ("--features", "0=feat"), 2, "the teacher has no layer 'feat'"),
        ("large", ("--features", "0="), 2, "--features 0= names no pair"),
        ("large", ("--attention", "0", "--attention", "0=1"), 2, "or one again"),
        ("large", ("--attention", "0=2"), 4, "'2' of the teacher"),
        ("large", ("--teacher-weights", "none.safetensors"), 4, "none.safetensors"),
    ],
)
def test_what_cannot_be_taught_is_refused(
    folder: Path, teacher: str, more: tuple[str, ...], code: int, said: str
) -> None:
    told = call(*arguments(*more, teacher=teacher), code=code)
    assert said in told.stderr
    assert not Path("small.safetensors").exists()


def test_a_graph_is_no_teacher(folder: Path) -> None:
    call("export", "nets.py:large", *SHAPE, "-o", "large.onnx", "-q")
    told = call(
        "distil", "--teacher", "large.onnx", "--student", "nets.py:small", *SHAPE, "--data", "train.npz", code=2
    )
    assert "large.onnx is no teacher" in told.stderr
