"""``cnncc train`` as a user runs it: digits, killed and run again, the user's own loss, and what is refused."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

from tests.cli.harness import DIGITS, call, start

MODEL = f"{DIGITS}:build"


def weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return what a file holds."""
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def test_a_model_is_trained_and_its_weights_compile(digit_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    made = call("train", MODEL, "--data", digit_data / "train.npz", "--val", digit_data / "held.npz", "--epochs", "4",
                "--augment", "shift:1", "-o", path, "--json")  # fmt: skip
    assert made.document["best"] > 0.8
    assert made.document["best"] == max(each["metric"] for each in made.document["history"])
    assert "4 of 4: loss" in made.stderr
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["metric"].startswith("top-1 ")
    network = load_file(path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in network.values())
    assert [found.name for found in tmp_path.iterdir()] == ["digits.safetensors"]
    call("export", MODEL, "--weights", path, "-o", tmp_path / "digits.onnx")


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_weights(digit_data: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> tuple[str | Path, ...]:
        return (
            "train",
            MODEL,
            "--data",
            digit_data / "train.npz",
            "--epochs",
            "6",
            "--ema",
            "0.9",
            "-o",
            tmp_path / name,
        )

    call(*arguments("whole.safetensors"))
    cut = tmp_path / "cut.safetensors"
    for _ in range(2):
        process = start(*arguments(cut.name))
        checkpoint = tmp_path / "cut.safetensors.checkpoint"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        end = time.monotonic() + 120
        while not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not cut.exists()
    finished = call(*arguments(cut.name))
    assert "goes on from" in finished.stderr
    for (name, one), other in zip(weights(tmp_path / "whole.safetensors").items(), weights(cut).values(), strict=True):
        assert np.array_equal(one, other), name
    assert not checkpoint.exists()


def test_the_users_own_loss_and_metric_are_taken(digit_data: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch, torchmetrics\n"
        "def loss(outputs, targets):\n"
        "    return torch.nn.functional.multi_margin_loss(outputs, targets)\n"
        "class Wrong(torchmetrics.Metric):\n"
        "    higher_is_better = False\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_state('wrong', torch.tensor(0.0), dist_reduce_fx='sum')\n"
        "    def update(self, outputs, targets):\n"
        "        self.wrong += (outputs.argmax(1) != targets).sum()\n"
        "    def compute(self):\n"
        "        return self.wrong\n"
    )
    own = tmp_path / "own.py"
    made = call("train", MODEL, "--data", digit_data / "train.npz", "--val", digit_data / "held.npz", "--epochs", "2",
                "--loss", f"{own}:loss", "--metric", f"{own}:Wrong", "-o", tmp_path / "w.safetensors",
                "--json")  # fmt: skip
    assert made.document["metric"] == "Wrong"
    assert made.document["best"] == min(each["metric"] for each in made.document["history"])
    assert made.document["best"] == int(made.document["best"])


def test_logs_for_tensorboard_are_written(digit_data: Path, tmp_path: Path) -> None:
    call("train", MODEL, "--data", digit_data / "held.npz", "--epochs", "1", "--log", tmp_path / "log", "-o",
         tmp_path / "w.safetensors", "-q")  # fmt: skip
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "nowhere.npz"], 2, "is not data that cnncc reads"),
        (["--data", "{train}", "--epochs", "0"], 2, "0 epochs"),
        (["--data", "{train}", "--augment", "spin"], 2, "'spin' is no augmentation"),
        (["--data", "{train}", "--loss", "none.py:loss"], 4, "none.py does not exist"),
        (["--data", "{train}", "-o", "weights.pt"], 2, "is no safetensors file"),
        (["--data", "{train}", "-o", "no/such/w.safetensors"], 3, "no such file"),
        (["--data", "{plain}"], 4, "has no label"),
        (["--data", "{train}", "--task", "segmentation"], 4, "the task is segmentation"),
        (["--data", "{train}", "--lr", "1e9", "--optimizer", "sgd", "--epochs", "2"], 1, "the loss became"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    digit_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("plain.npz", x=np.zeros((4, 3, 28, 28), np.float32))
    told = call("train", MODEL, *(each.format(train=digit_data / "train.npz", plain="plain.npz") for each in arguments),
                code=code)  # fmt: skip
    assert said in told.stderr
    assert not (tmp_path / "build.safetensors").exists()


def test_a_graph_is_refused(tmp_path: Path, digit_data: Path) -> None:
    call("export", MODEL, "-o", tmp_path / "digits.onnx")
    told = call("train", tmp_path / "digits.onnx", "--data", digit_data / "train.npz", code=2)
    assert "cannot be trained" in told.stderr
