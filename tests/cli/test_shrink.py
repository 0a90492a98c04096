"""``cnncc shrink`` as a user runs it: smaller engines, measured; cut short, it goes on; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cnncc_runtime.bundle import read_bundle
from tests.cli.harness import DIGITS, call

MODEL = f"{DIGITS}:build"


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
    assert "40% gone" not in longer.stderr
    assert "60% gone" in longer.stderr
    assert len(json.loads((folder / "shrink.json").read_text())["points"]) == 3

    other = call(*common, "--shares", "0.4", "--precisions", "fp32", "--lr", "0.01", code=2)
    assert "holds another run: it differs in recipe" in other.stderr
    missed = call(*common, "--shares", "0.4,0.6", "--precisions", "fp32", "--latency", "0.01us", code=1)
    assert "no variant holds to the budget; nearest is" in missed.stderr
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
        ([], "judged on validation data"),
    ],
)
def test_what_makes_no_sense_is_refused(digit_data: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    told = call("shrink", MODEL, "--data", digit_data / "train.npz", "-o", tmp_path / "out", *arguments, code=2)
    assert said in told.stderr
    assert not (tmp_path / "out").exists()
