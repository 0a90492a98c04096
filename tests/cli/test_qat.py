"""``cnncc quantize --qat`` as a user runs it, and what becomes of the file: engines for CPUs and for GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from cnncc.calibration.table import table_from_bytes
from cnncc.compression import training
from cnncc_runtime.bundle import read_bundle
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


def test_a_training_that_was_interrupted_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", *MODEL, "--calib", "calib.json", "--qat", "2", *TRAINING, "-o", "cut.onnx")

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        patch.setattr(training._Fit, "_end_epoch", cut)
        assert "goes on from cut.onnx.checkpoint" in call(*command, code=130).stderr
    assert not Path("cut.onnx").exists()
    told = call(*command, "--lr", "0.01", code=2)
    assert "another training: it differs in rate" in told.stderr
    assert "goes on from cut.onnx.checkpoint: epoch 1" in call(*command).stderr
    whole = Path("cut.onnx").read_bytes()
    call(*command, "-q")
    assert Path("cut.onnx").read_bytes() == whole
    assert not Path("cut.onnx.checkpoint").exists()


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


@pytest.mark.slow
def test_a_compile_trains_what_calibration_loses_and_only_that(folder: Path) -> None:
    flags = ("compile", *MODEL, "--precision", "int8", "--method", "max", "--no-equalize", "--allow-slow", "--data",
             "train.npz", "--val", "held.npz", "--qat", "4")  # fmt: skip
    made = call(*flags, "--max-accuracy-drop", "10", "-o", "won.cnncc")
    assert "qat" in made.stderr
    assert "3 of 3 layers int8" in made.stderr
    bundle = read_bundle(Path("won.cnncc"))
    assert (bundle.manifest.precision, bundle.manifest.parity) == ("int8", "passed")
    table = table_from_bytes(bundle.file("calibration.json").read_bytes(), "the bundle's table")
    assert table.accuracy is not None
    assert table.accuracy.fp32 - table.accuracy.int8 <= 10
    assert {group.method for group in table.groups} == {"trained"}
    again = call(*flags, "--max-accuracy-drop", "10", "-o", "won.cnncc")
    assert re.search(r"= qat +reused", again.stderr)
    assert "unchanged" in again.stdout

    missed = call(*flags, "--qat-lr", "1e-9", "--max-accuracy-drop", "10", "-o", "missed.cnncc", code=1)
    assert "points of top-1 after training, and 10 may be lost" in missed.stderr
    assert not Path("missed.cnncc").exists()
    spared = call(*flags, "--max-accuracy-drop", "90", "-o", "spared.cnncc")
    assert "nothing was trained: calibration alone loses" in spared.stderr
    assert "epochs" not in spared.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precision", "auto", "--val", "held.npz"), "--qat does not go with --precision auto"),
        (("--precision", "int8", "--min-sqnr", "20"), "--qat does not go with --min-sqnr"),
        (("--precision", "int8", "--qat-lr", "-1"), "a learning rate of -1"),
        ((), "--qat does not go with --precision fp32"),
    ],
)
def test_what_training_in_a_compile_does_not_go_with_is_refused(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    told = call("compile", *MODEL, "--data", "train.npz", "--qat", "1", *arguments, "-o", "refused.cnncc", code=2)
    assert said in told.stderr
    told = call("compile", *MODEL, "--qat-lr", "0.1", "-o", "refused.cnncc", code=2)
    assert "--qat-lr says nothing without --qat" in told.stderr
    told = call("compile", *MODEL, "--precision", "int8", "--calib", "calib.json", "--qat", "1", "--qat-data",
                "train.npz", "-o", "refused.cnncc", code=2)  # fmt: skip
    assert "--qat does not go with --calib" in told.stderr
    assert not Path("refused.cnncc").exists()


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
