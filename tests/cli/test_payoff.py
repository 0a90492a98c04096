"""int8 that does not pay is refused, or goes back to float: measured here, predicted for elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from cnncc.calibration.table import read_table
from cnncc_runtime.bundle import Bundle, read_bundle
from cnncc_runtime.cpu import host_cpu
from tests.cli.harness import call, leftovers
from tests.targets.conformance import graph_of

SLOW = ("--mcpu", "x86-64-v3")
"""Without VNNI, int8 takes as long as a direct convolution in float32 or little less; Winograd's takes half of that."""

here = pytest.mark.skipif("avx2" not in host_cpu().features, reason="this machine does not run x86-64-v3")

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
    """Return a network of two 3 × 3 convolutions, where Winograd shines, and one of 1 × 1 with many channels.

    What lies between them may be negative: int8 that is not, `vpmaddubsw` multiplies faster.
    """
    made = [
        convolution("first", "x", 3, (64, 64)),
        convolution("second", "first.out", 3, (64, 64)),
        convolution("last", "second.out", 1, (256, 64)),
    ]
    nodes, weights = [node for node, _ in made], [weight for _, weight in made]
    graph = graph_of(nodes, {"x": [1, 64, 56, 56]}, {"last.out": [1, 256, 56, 56]}, weights)
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
    assert "int8 is slower than fp32: int8 takes 1." in outcome.stderr
    assert "of fp32's time, measured on " in outcome.stderr
    assert "first: fp32 " in outcome.stderr, "which layers"
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
def test_auto_takes_back_what_int8_slows_down_and_says_so(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.cnncc"
    outcome = call(*arguments(model, "auto", *SLOW), "-o", bundle)
    made = read_bundle(bundle)
    found = payoff(made)
    assert found["basis"] == "measured"
    assert found["chosen"] in {"fp32", "mixed"}
    assert f"{found['chosen']} is the fastest and was taken" in outcome.stderr
    layers = {layer["module"]: layer for layer in found["layers"]}
    assert set(layers) == {"first", "second", "last"}
    assert layers["first"]["int8"] > layers["first"]["fp32"]
    if found["chosen"] == "mixed":
        kept = {layer.node for layer in read_table(made.file("calibration.json")).kept if layer.why == "speed"}
        assert {"first", "second"} <= kept
    else:
        assert made.manifest.precision == "fp32"
        assert not made.has("calibration.json")
    shown = call("inspect", bundle).stdout
    assert f"{found['chosen']} was taken: int8 takes 1." in shown
    assert "int8 / fp32" in shown
    again = call(*arguments(model, "auto", *SLOW), "-o", bundle)
    assert "unchanged" in again.stdout, "a decision is kept"


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
