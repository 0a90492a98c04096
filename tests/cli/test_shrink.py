"""``cnncc shrink`` as a user runs it: smaller engines, measured; cut short, it goes on; and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cnncc.calibration.table import table_from_bytes
from cnncc.compiler.calibration import Calibration
from cnncc.compression import shrink, training
from cnncc_runtime.bundle import read_bundle
from tests.cli.harness import DIGITS, call
from tests.compression.sets import bars

MODEL = f"{DIGITS}:build"
UNEVEN = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(16, 16, 1), nn.ReLU(), OWN,
        nn.Flatten(), nn.Linear(256, 4),
    )

class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)
"""
"""A network whose int8 is only as good as its calibration, by ranges alone, which its channels are too uneven for."""


@pytest.mark.slow
def test_a_model_shrinks_and_a_run_that_was_cut_short_goes_on(digit_data: Path, tmp_path: Path) -> None:
    weights, folder = tmp_path / "digits.safetensors", tmp_path / "shrunk"
    call("train", MODEL, "--data", digit_data / "train.npz", "--epochs", "5", "-o", weights)
    common = ("shrink", MODEL, "--weights", weights, "--data", digit_data / "train.npz", "--val",
              digit_data / "held.npz", "--epochs", "3", "--max-accuracy-drop", "6", "-o", folder)  # fmt: skip
    first = call(*common, "--shares", "0.4", "--precisions", "fp32", "--json").document
    assert [(each["share"], each["precision"]) for each in first["points"]] == [(0.0, "fp32"), (0.4, "fp32")]
    assert first["points"][1]["ratio"][2] < 1, "faster, by the upper end of the interval"
    assert first["points"][1]["parameters"] < first["points"][0]["parameters"]
    assert read_bundle(Path(first["best"]["bundle"])).manifest.parity == "passed"
    assert Path(first["plot"]).exists()
    before = (folder / "0.40.safetensors").stat().st_mtime_ns

    longer = call(*common, "--shares", "0.4,0.6", "--precisions", "fp32")
    assert (folder / "0.40.safetensors").stat().st_mtime_ns == before, "what was made is not made again"
    assert re.findall("^(.) engine.*  (.*), fp32", longer.stderr, re.MULTILINE) == [
        ("=", "whole"), ("=", "40% gone"), ("✓", "60% gone"),
    ]  # fmt: skip
    assert json.loads((folder / "shrink.json").read_text())["best"]
    assert len(json.loads((folder / "shrink.json").read_text())["points"]) == 3

    other = call(*common, "--shares", "0.4", "--precisions", "fp32", "--lr", "0.01", code=2)
    assert "holds another run: it differs in recipe" in other.stderr
    missed = call(*common, "--shares", "0.4,0.6", "--precisions", "fp32", "--latency", "0.01us", code=1)
    assert "no variant holds to 1e-05 ms, 6 points lost; nearest is" in missed.stderr
    call("compile", MODEL, "--weights", folder / "0.60.safetensors", "-o", tmp_path / "small.cnncc")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shares", "0.5,0.2"], "no growing shares"),
        (["--shares", "a"], "no list of shares"),
        (["--precisions", "fp8"], "precisions are fp32 and int8"),
        (["--size", "much"], "'much' is no size"),
        (["--latency", "4"], "'4' is no time"),
        (["--epochs", "0"], "0 epochs"),
        (["--qat", "-1"], "are not negative"),
        ([], "judged on validation data"),
    ],
)
def test_what_makes_no_sense_is_refused(digit_data: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    told = call("shrink", MODEL, "--data", digit_data / "train.npz", "-o", tmp_path / "out", *arguments, code=2)
    assert said in told.stderr
    assert not (tmp_path / "out").exists()


def uneven(folder: Path, patch: pytest.MonkeyPatch, own: str = "nn.Identity()") -> tuple[str | Path, ...]:
    """Train a network, make its channels uneven, leave equalization out; return what shrinks it in the folder."""
    patch.chdir(folder)
    Path("nets.py").write_text(UNEVEN.replace("OWN", own))
    for name, count, seed in (("train", 128, 0), ("held", 200, 1)):
        x, y = bars(count, seed)
        np.savez(f"{name}.npz", x=x, y=y)
    data = ("--input-shape", "1,3,12,12", "--data", "train.npz", "--val", "held.npz", "--accelerator", "cpu")
    call("train", "nets.py:build", *data, "--epochs", "4", "--lr", "0.005", "-o", "even.safetensors", "-q")
    state = load_file("even.safetensors")
    factors = torch.exp(torch.linspace(0.0, 12.0, 16))
    state["0.weight"] *= factors.view(-1, 1, 1, 1)
    state["0.bias"] *= factors
    state["3.weight"] /= factors.view(1, -1, 1, 1)
    save_file(state, "uneven.safetensors")
    calibration = Calibration("train.npz", "held.npz", method="max", equalize=False)
    patch.setattr(shrink._Work, "_calibration", lambda _: calibration)
    return ("shrink", "nets.py:build", "--weights", "uneven.safetensors", *data, "--epochs", "1", "--shares", "0.5",
            "--max-accuracy-drop", "10", "-o", "shrunk")  # fmt: skip


@pytest.mark.slow
def test_int8_is_trained_where_calibration_alone_loses_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = uneven(tmp_path, monkeypatch)

    def points() -> list[tuple[float, str, int]]:
        found = json.loads(Path("shrunk/shrink.json").read_text())["points"]
        return [(each["share"], each["precision"], each["qat"]) for each in found]

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        patch.setattr(training._Fit, "_end_epoch", cut)
        told = call(*command, "--qat", "4", code=130)
    assert "whole: int8 loses more than may be lost, and is trained (4 epochs)" in told.stderr
    assert points() == [(0.0, "fp32", 0), (0.0, "int8", 0)]

    told = call(*command, "--qat", "4", "--json")
    assert "goes on from" in told.stderr
    first, calibrated, trained = told.document["points"][:3]
    assert points()[:3] == [(0.0, "fp32", 0), (0.0, "int8", 0), (0.0, "int8", 4)]
    assert calibrated["metric"] < first["metric"] - 0.2
    assert trained["metric"] > (first["metric"] + calibrated["metric"]) / 2
    assert trained["bundle"] == "0.00-int8-qat4.cnncc"
    bundle = read_bundle(Path("shrunk") / trained["bundle"])
    assert (bundle.manifest.precision, bundle.manifest.parity) == ("int8", "passed")
    table = table_from_bytes(bundle.file("calibration.json").read_bytes(), "the bundle's table")
    assert {group.method for group in table.groups} == {"trained"}
    before = points()
    again = call(*command, "--qat", "0")
    assert "is trained" not in again.stderr
    assert points() == before, "what was trained stays"
    assert "whole     int8 qat" in again.stdout
    assert "int8 qat" in Path("shrunk/pareto.svg").read_text()


@pytest.mark.slow
def test_int8_that_cannot_be_trained_is_told_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = uneven(tmp_path, monkeypatch, own="Sine()")
    told = call(*command, "--precisions", "int8", "--json")
    assert (
        "int8 was not trained, and is as calibration made it: 1 operators cannot be trained through: Sin" in told.stderr
    )
    assert not any(each["qat"] for each in told.document["points"])
    never = call(*command, "--precisions", "int8", "--qat", "0")
    assert "trained" not in never.stderr
