"""int8 that does not pay is refused, or goes back to float: measured here, predicted for elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from cnncc.calibration.table import read_table
from cnncc.compiler.bench.report import Interval
from cnncc.compiler.payoff import Contender, LayerTime, Payoff, decided
from cnncc_runtime.bundle import Bundle, read_bundle
from cnncc_runtime.cpu import host_cpu
from tests.cli.harness import call, leftovers
from tests.targets.conformance import graph_of

SLOW = ("--mcpu", "x86-64-v3", "--mattr", "-avx2")
"""AVX for float32, and no instruction for products of int8: these take several times as long, whatever else runs."""

here = pytest.mark.skipif("avx" not in host_cpu().features, reason="this machine does not run x86-64-v3")

FOREIGN = ("--mcpu", "diamondrapids")
"""A processor that no machine of ours is: engines for it are built and not run."""


def convolution(name: str, data: str, kernel: int, channels: tuple[int, int]) -> tuple[NodeProto, TensorProto]:
    """Return a padded convolution and its weights."""
    outputs, inputs = channels
    values = np.random.default_rng(kernel).standard_normal((outputs, inputs, kernel, kernel)).astype(np.float32)
    weight = numpy_helper.from_array(values / np.float32(kernel * inputs**0.5), f"{name}.weight")
    window = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4}
    return helper.make_node("Conv", [data, f"{name}.weight"], [f"{name}.out"], name, **window), weight


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a network of two 3 × 3 convolutions and one of 1 × 1."""
    made = [
        convolution("first", "x", 3, (64, 64)),
        convolution("second", "first.out", 3, (64, 64)),
        convolution("last", "second.out", 1, (256, 64)),
    ]
    nodes, weights = [node for node, _ in made], [weight for _, weight in made]
    graph = graph_of(nodes, {"x": [1, 64, 28, 28]}, {"last.out": [1, 256, 28, 28]}, weights)
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    path.write_bytes(graph.serialized)
    return path


def arguments(model: Path, precision: str, *flags: str) -> tuple[str | Path, ...]:
    fast = ("--data", "random", "--calibration-samples", "4", "--samples", "2", "--no-equalize", "--no-shift")
    return ("compile", model, "--precision", precision, *fast, *flags)


def payoff(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bundle.file("payoff.json").read_bytes())
    return found


@here
@pytest.mark.slow
def test_int8_that_is_slower_is_refused_unless_it_is_allowed(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.cnncc"
    outcome = call(*arguments(model, "int8", *SLOW), "-o", bundle, code=1)
    assert "int8 is slower than fp32: int8 takes " in outcome.stderr
    assert "of fp32's time, measured on " in outcome.stderr
    assert re.search(r"at (first|second|last): fp32 \d+\.\d+ ms, int8 \d+\.\d+ ms", outcome.stderr), "which layers"
    assert "try: --precision auto takes what is faster, layer by layer; --allow-slow" in outcome.stderr
    assert not bundle.exists()
    assert leftovers(tmp_path) == []
    allowed = call(*arguments(model, "int8", *SLOW), "--allow-slow", "-o", bundle)
    assert "payoff" not in allowed.stderr
    made = read_bundle(bundle)
    assert made.manifest.precision == "int8"
    assert not made.has("payoff.json")


@here
@pytest.mark.slow
def test_auto_takes_fp32_where_all_of_int8_is_slower_and_says_so(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.cnncc"
    outcome = call(*arguments(model, "auto", *SLOW), "-o", bundle)
    assert "fp32 is the fastest and was taken: int8 takes " in outcome.stderr
    made = read_bundle(bundle)
    assert made.manifest.precision == "fp32"
    assert not made.has("calibration.json")
    found = payoff(made)
    assert (found["basis"], found["chosen"]) == ("measured", "fp32")
    assert [layer["module"] for layer in found["layers"]] == ["first", "second", "last"]
    assert all(layer["int8"] > layer["fp32"] > 0 for layer in found["layers"])
    shown = call("inspect", bundle).stdout
    assert "fp32 was taken: int8 takes " in shown
    assert "int8 / fp32" in shown
    again = call(*arguments(model, "auto", *SLOW), "-o", bundle)
    assert "unchanged" in again.stdout, "a decision is kept"


@pytest.mark.slow
def test_auto_leaves_the_layers_in_float_that_int8_slows_down(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose times are given here: which layer of a network is slower depends on the machine that tests run on."""
    asked: list[set[str]] = []

    def times(bundles: Mapping[str, Path], *_rest: object) -> Payoff:
        asked.append(set(bundles))
        ratios = {"int8": Interval(1.2, 1.1, 1.3), "mixed": Interval(0.8, 0.7, 0.9)}
        contenders = [Contender(name, 1e-3, ratios.get(name)) for name in ("fp32", "int8", "mixed") if name in bundles]
        layers = [LayerTime("first", "first", 1e-4, 3e-4), LayerTime("second", "second", 1e-4, 3e-4),
                  LayerTime("last", "last", 3e-4, 1e-4)]  # fmt: skip
        return decided("measured", "a CPU", 1, contenders, layers)

    monkeypatch.setattr("cnncc.compiler.engine_stages.measure", times)
    bundle = tmp_path / "m.cnncc"
    outcome = call(*arguments(model, "auto"), "--cache-dir", tmp_path / "cache", "-o", bundle)
    assert asked == [{"fp32", "int8"}, {"fp32", "int8", "mixed"}]
    assert "mixed is the fastest and was taken, with 2 layers in float: int8 takes 1.20" in outcome.stderr
    made = read_bundle(bundle)
    assert (made.manifest.precision, made.manifest.parity) == ("int8", "passed")
    kept = {layer.node: layer.why for layer in read_table(made.file("calibration.json")).kept}
    assert kept == {"first": "speed", "second": "speed"}
    assert payoff(made)["chosen"] == "mixed"
    assert "float32 in 2 layers, int8 in 1 layers executed" in call("inspect", bundle).stdout


@pytest.mark.slow
def test_what_cannot_be_measured_here_is_predicted_and_marked_so(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.cnncc"
    outcome = call(*arguments(model, "int8", *FOREIGN), "-o", bundle)
    assert "of fp32's time, predicted for " in outcome.stderr
    made = read_bundle(bundle)
    assert made.manifest.parity == "pending"
    found = payoff(made)
    assert (found["basis"], found["chosen"], found["threads"], found["layers"]) == ("predicted", "int8", 0, [])
    without = "-avx512vnni,-avxvnni,-avx512f,-avx2"
    refused = call(*arguments(model, "int8", *FOREIGN, "--mattr", without), "-o", tmp_path / "n.cnncc", code=1)
    assert "int8 is slower than fp32" in refused.stderr
    assert "predicted for" in refused.stderr
