"""``cnncc prune`` as a user runs it: smaller weights that compile, faster engines, zeros where they must be."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from cnncc.targets.cuda.sparse import is_sparse
from tests.cli.harness import DIGITS, call

MODEL = f"{DIGITS}:build"


@pytest.fixture(scope="module")
def trained(digit_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits CNN that knows most digits."""
    path = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    call("train", MODEL, "--data", digit_data / "train.npz", "--epochs", "4", "-o", path)
    return path


def base(data: Path, weights: Path) -> tuple[str | Path, ...]:
    return ("prune", MODEL, "--weights", weights, "--data", data / "train.npz", "--val", data / "held.npz")


def test_channels_go_and_the_smaller_weights_are_taken_by_every_command(
    digit_data: Path, trained: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.safetensors"
    told = call(*base(digit_data, trained), "--amount", "0.5", "--finetune", "3", "-o", small, "--json").document
    before, cut, after = told["states"]
    assert after["parameters"] == cut["parameters"] < 0.5 * before["parameters"]
    assert after["metric"] > before["metric"] - 0.05
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(small).items()}
    assert shapes["features.0.weight"][0] % 8 == 0
    assert shapes["classifier.3.weight"][0] == 10

    exported = call("export", MODEL, "--weights", small, "-o", tmp_path / "small.onnx")
    assert "small.safetensors is pruned" in exported.stderr
    again = tmp_path / "again.safetensors"
    call("train", MODEL, "--weights", small, "--data", digit_data / "train.npz", "--epochs", "1", "-o", again)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(again).items()} == shapes
    call("export", MODEL, "--weights", again, "-o", tmp_path / "again.onnx")


@pytest.mark.slow
def test_a_budget_of_latency_is_met_by_the_measured_engine(digit_data: Path, trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    first = call(*base(digit_data, trained), "--amount", "0.1", "--finetune", "0", "--target", "llvm", "-o", small,
                 "--json").document  # fmt: skip
    whole = first["states"][0]["engine"]["seconds"]
    told = call(*base(digit_data, trained), "--latency", f"{0.7 * whole * 1e6:.1f}us", "--finetune", "1", "--target",
                "llvm", "-o", small, "--json")  # fmt: skip
    states = told.document["states"]
    assert states[-1]["engine"]["seconds"] < states[0]["engine"]["seconds"]
    assert "  90.0% gone: " in told.stderr, "the least that can be had is tried first"
    call("compile", MODEL, "--weights", small, "-o", tmp_path / "small.cnncc")

    missed = call(*base(digit_data, trained), "--latency", "0.1us", "--finetune", "0", "--target", "llvm", "-o",
                  tmp_path / "best.safetensors", code=1)  # fmt: skip
    assert "no share of channels takes the engine to 0.0001 ms" in missed.stderr
    assert (tmp_path / "best.safetensors").exists()


def test_two_of_four_weights_are_zero_after_fine_tuning(digit_data: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    told = call(*base(digit_data, trained), "--method", "2:4", "--finetune", "1", "-o", path, "--json").document
    assert told["dense"] == ["features.0"]
    state = load_file(path)
    for layer in ("features.3", "classifier.1", "classifier.3"):
        assert is_sparse(state[f"{layer}.weight"].numpy()), layer
    call("export", MODEL, "--weights", path, "-o", tmp_path / "sparse.onnx")


def test_unstructured_zeros_are_said_to_gain_nothing(digit_data: Path, trained: Path, tmp_path: Path) -> None:
    told = call(*base(digit_data, trained), "--method", "unstructured", "--amount", "0.8", "--finetune", "2", "--steps",
                "2", "-o", tmp_path / "zeros.safetensors")  # fmt: skip
    assert "dense engines gain nothing" in told.stderr
    assert "80.0%" in told.stdout


@pytest.mark.parametrize("importance", ["batchnorm", "taylor"])
def test_importance_is_asked_of_the_model(digit_data: Path, trained: Path, tmp_path: Path, importance: str) -> None:
    arguments = (*base(digit_data, trained), "--amount", "0.3", "--finetune", "0", "--importance", importance, "-o",
                 tmp_path / "w.safetensors")  # fmt: skip
    if importance == "batchnorm":
        assert "no BatchNorm" in call(*arguments, code=4).stderr
    else:
        assert "30% gone" in call(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing says how much is pruned"),
        (["--amount", "0"], 2, "0 is no share"),
        (["--amount", "1.5"], 2, "1.5 is no share"),
        (["--method", "2:4", "--amount", "0.3"], 2, "2:4 takes half"),
        (["--latency", "4ms"], 2, "needs an engine"),
        (["--latency", "4ms", "--amount", "0.5", "--target", "llvm"], 2, "--latency says how much"),
        (["--latency", "soon", "--target", "llvm"], 2, "'soon' is no time"),
        (["--amount", "0.5", "-o", "w.pt"], 2, "is no safetensors file"),
        (["--amount", "0.5", "--steps", "0"], 2, "positive numbers"),
        (["--amount", "0.5", "--target", "llvm", "--device", "raspberry-pi-5"], 2, "do not run on this machine"),
    ],
)
def test_what_makes_no_sense_is_refused(
    digit_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in call(*base(digit_data, trained), *arguments, code=code).stderr
    assert not list(tmp_path.iterdir())
