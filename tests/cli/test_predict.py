"""``cnncc bench --predict``: inner loops beside a CPU's peak, without the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cnncc.compiler.doctor import examine
from cnncc_runtime.bundle import read_bundle
from tests.cli.conftest import Digits
from tests.cli.harness import DIGITS, apart, call, leftovers, tree
from tests.runtime.engine_files import make_bundle
from tests.targets.llvm.mca import require

LAYER = {"kernel", "modules", "precision", "schedule", "loop", "cpus", "problems"}


@pytest.fixture(scope="session")
def for_a_board(tmp_path_factory: pytest.TempPathFactory, weights: Path, _own_cache: None) -> Path:
    """The digits CNN in int8 for a Raspberry Pi 5, which is not here."""
    bundle = tmp_path_factory.mktemp("board") / "board.cnncc"
    options = ["--weights", weights, "--precision", "int8", "--data", "random", "--allow-slow"]
    apart("compile", f"{DIGITS}:build", *options, "--device", "raspberry-pi-5", "-o", bundle)
    return bundle


@pytest.mark.slow
def test_an_engine_for_a_board_is_predicted_here(for_a_board: Path, tmp_path: Path) -> None:
    require()
    before = tree(for_a_board)
    output = tmp_path / "prediction.json"
    outcome = call("bench", for_a_board, "--predict", "--json", "-o", output)
    found = outcome.document
    assert json.loads(output.read_bytes()) == found
    assert found["schema"] == "cnncc.prediction/1"
    assert found["built_for"] == "cortex-a76"
    assert [(cpu["name"], cpu["by"], cpu["units"]) for cpu in found["cpus"]] == [
        ("cortex-a76", "neoverse-n1", "N1"),
        ("neoverse-v1", "neoverse-v1", "V1"),
    ]
    assert all(set(layer) == LAYER for layer in found["layers"])
    assert [layer["modules"][0] for layer in found["layers"]] == [
        "features.0", "features.3", "classifier.1", "classifier.3", "classifier.3",
    ]  # fmt: skip
    second = found["layers"][1]
    assert set(second["loop"]) == {"type", "products", "instructions", "mix"}
    assert second["loop"]["products"] == 16 * second["loop"]["mix"]["sdot"]
    cycles = second["cpus"]["cortex-a76"]
    assert cycles["rate"] == pytest.approx(second["loop"]["products"] / cycles["cycles"])
    assert cycles["share"] == pytest.approx(cycles["rate"] / found["cpus"][0]["peaks"]["int8"])
    assert tree(for_a_board) == before, "a bundle's digest must not change by predicting"
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_the_text_shows_layers_by_their_modules_for_each_cpu(for_a_board: Path) -> None:
    require()
    text = call("bench", for_a_board, "--predict").stdout
    assert "cortex-a76, by the model of neoverse-n1  peak of products a cycle: 32 int8" in text
    [row] = [
        line for line in text.partition("neoverse-v1")[0].splitlines() if line.startswith("features.3, features.4")
    ]
    assert " sdot " in row
    assert int(row.split()[-1]) >= 60
    assert "not predicted for cortex-a72: cortex-a72 cannot run this engine: it lacks dotprod" in text
    assert "no caches" in text


@pytest.mark.slow
def test_cpus_that_are_named_take_the_place_of_the_usual_ones(for_a_board: Path) -> None:
    require()
    found = call("bench", for_a_board, "--predict", "--json", "--cpu", "neoverse-n2", "--cpu", "cortex-x1").document
    assert [(cpu["name"], cpu["units"]) for cpu in found["cpus"]] == [("neoverse-n2", "N2"), ("cortex-x1", "V1")]
    refused = call("bench", for_a_board, "--predict", "--cpu", "cortex-a72", code=2).stderr
    assert "cortex-a72 cannot run this engine: it lacks dotprod" in refused
    assert "--mcpu cortex-a72" in refused
    assert "or cortex-a76" in call("bench", for_a_board, "--predict", "--cpu", "cortex-a7x", code=2).stderr


@pytest.mark.slow
def test_timing_an_engine_for_a_board_stays_refused(for_a_board: Path) -> None:
    assert "built for" in call("bench", for_a_board, code=3).stderr


def test_options_of_measurements_do_not_go_with_predictions(digits: Digits) -> None:
    refused = call("bench", digits.bundle, "--predict", "--rounds", "3", "--against", "ort", code=2).stderr
    assert "--against, --rounds" in refused
    assert "--remote" in call("bench", digits.bundle, "--predict", "--remote", "127.0.0.1:1", code=2).stderr
    assert "add --predict" in call("bench", digits.bundle, "--cpu", "cortex-a72", code=2).stderr


def test_without_llvm_it_is_said_how_to_get_it(digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = call("bench", digits.bundle, "--predict", "--json", code=3)
    assert refused.document["error"] == "DependencyMissing"
    assert "apt-get install llvm" in refused.document["hint"]
    [finding] = [one for one in examine(tmp_path) if one.name == "llvm-mca"]
    assert finding.state == "optional"
    assert "apt-get install llvm" in finding.fix


def test_engines_for_gpus_are_refused(digits: Digits, tmp_path: Path) -> None:
    described = read_bundle(digits.bundle).manifest
    target = replace(described.target, name="cuda", triple="", cpu="", gpu="8.9")
    engine = replace(described.engine, weights=None)
    bundle = make_bundle(tmp_path / "gpu.cnncc", replace(described, target=target, engine=engine, files={}), b"plan")
    assert "this one is for sm89" in call("bench", bundle, "--predict", code=2).stderr


def test_a_changed_engine_is_refused(digits: Digits, tmp_path: Path) -> None:
    require()
    described = replace(read_bundle(digits.bundle).manifest, files={})
    engine = (digits.bundle / "engine.so").read_bytes()
    cut = make_bundle(tmp_path / "cut.cnncc", described, engine[:-100], digits.bundle / "weights.bin")
    assert "truncated" in call("bench", cut, "--predict", code=4).stderr
    layers = tuple(replace(layer, kernel=f"other_{layer.kernel}") for layer in described.layers)
    other = replace(described, layers=layers)
    renamed = make_bundle(tmp_path / "renamed.cnncc", other, engine, digits.bundle / "weights.bin")
    assert "holds none of the kernels" in call("bench", renamed, "--predict", code=4).stderr
