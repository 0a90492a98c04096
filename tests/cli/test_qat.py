"""``cnncc quantize --qat`` as a user runs it, and what becomes of the file: engines for CPUs and for GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from cnncc_runtime.session import load
from tests.calibration.rtx import rtx_executed_types
from tests.cli.harness import call
from tests.compression.sets import bars

NETS = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 4),
    )
"""
SHAPE = ("--input-shape", "1,3,12,12")
MODEL = ("nets.py:build", "--weights", "uneven.safetensors", *SHAPE)
TRAINING = ("--data", "train.npz", "--val", "held.npz", "--accelerator", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that knows bars, of uneven channels, and its table by ranges alone."""
    folder = tmp_path_factory.mktemp("qat")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("nets.py").write_text(NETS)
        for name, count, seed in (("train", 128, 0), ("held", 200, 1)):
            x, y = bars(count, seed)
            np.savez(f"{name}.npz", x=x, y=y)
        call("train", "nets.py:build", *SHAPE, *TRAINING, "--epochs", "4", "--lr", "0.005", "-o", "w.safetensors", "-q")
        state = load_file("w.safetensors")
        factors = torch.exp(torch.linspace(0.0, 12.0, 16))
        state["0.weight"] *= factors.view(-1, 1, 1, 1)
        state["0.bias"] *= factors
        state["3.weight"] /= factors.view(1, -1, 1, 1)
        save_file(state, "uneven.safetensors")
        call("calibrate", *MODEL, "--data", "train.npz", "--method", "max", "--no-equalize", "-o", "calib.json", "-q")
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be in."""
    monkeypatch.chdir(made)
    return made


def test_what_calibration_lost_is_won_back_from_a_model_of_one_image(folder: Path) -> None:
    told = call("quantize", *MODEL, "--calib", "calib.json", "--qat", "4", *TRAINING, "-o", "trained.onnx", "--json")
    found = told.document["qat"]
    assert found["fp32"] > 0.95
    assert found["calibrated"] < found["fp32"] - 0.2
    assert found["reached"] > (found["fp32"] + found["calibrated"]) / 2
    assert found["epochs"] == 4
    assert told.document["layers"] == 3
    assert "float top-1" in told.stderr
    assert not list(folder.glob("*.checkpoint"))
    dims = onnx.load("trained.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [1, 3, 12, 12]
    call("quantize", *MODEL, "--calib", "calib.json", "-o", "calibrated.onnx", "-q")
    spoken = call("quantize", *MODEL, "--calib", "calib.json", "--qat", "1", *TRAINING, "--freeze-scales",
                  "--alpha", "0", "-o", "frozen.onnx")  # fmt: skip
    assert "3 of 3 layers int8" in spoken.stdout
    assert "trained top-1" in spoken.stdout
    ops = [[node.op_type for node in onnx.load(f"{name}.onnx").graph.node] for name in ("trained", "calibrated")]
    assert ops[0] == ops[1]


@pytest.mark.slow
def test_the_file_becomes_engines_that_keep_what_was_won(folder: Path) -> None:
    found = call(
        "quantize", *MODEL, "--calib", "calib.json", "--qat", "4", *TRAINING, "-o", "t.onnx", "--json"
    ).document
    compiled = call("compile", "t.onnx", "--target", "llvm", "--data", "held.npz", "-o", "t.cnncc", "--json").document
    [bundle] = compiled["bundles"]
    assert (bundle["precision"], bundle["parity"]) == ("int8", "passed")
    with np.load("held.npz") as held, load("t.cnncc") as engine:
        classes = [int(np.argmax(engine(image[None]))) for image in held["x"]]
        reached = float((np.array(classes) == held["y"]).mean())
    assert reached == pytest.approx(found["qat"]["reached"], abs=0.011)
    assert set(rtx_executed_types(Path("t.onnx")).values()) == {"int8"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--data", "train.npz"), 2, "--data says nothing without --qat"),
        (("--alpha", "0.1"), 2, "--alpha says nothing without --qat"),
        (("--fresh",), 2, "--fresh says nothing without --qat"),
        (("--qat", "2"), 2, "--qat needs labelled data"),
        (("--qat", "2", *TRAINING, "--method", "mse"), 2, "--method says nothing with --qat"),
        (("--qat", "2", *TRAINING, "--amp", "bf16"), 2, "is trained in float32"),
        (("--qat", "2", *TRAINING, "--temperature", "0"), 2, "a temperature of 0"),
        (("--qat", "2", "--data", "plain.npz"), 4, "has no label"),
        (("--qat", "2", *TRAINING, "-o", "no/such/t.onnx"), 3, "no such file"),
        (("--qat", "2", *TRAINING, "--weights", "w.safetensors"), 4, "calibrated for other weights"),
        (("--qat", "1", *TRAINING, "--lr", "1e30", "--optimizer", "sgd"), 1, "the loss became"),
    ],
)
def test_what_cannot_be_done_is_refused(folder: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    np.savez("plain.npz", x=bars(8, 0)[0])
    told = call("quantize", *MODEL, "--calib", "calib.json", "-o", "refused.onnx", *arguments, code=code)
    assert said in told.stderr
    assert not Path("refused.onnx").exists()
