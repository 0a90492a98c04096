"""The Q/DQ lint against TensorRT-RTX's builder, TVM's importer and ONNX Runtime."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from cnncc.calibration.lint import RULES, Finding, lint, require_clean
from cnncc.graph.feeds import random_feeds
from cnncc.graph.names import set_module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import load_trusted
from cnncc.graph.reference import Reference
from cnncc.targets.llvm.importer import unconvertible
from cnncc_runtime.errors import UnsupportedGraph
from tests.calibration.patterns import CLEAN, FLOAT, PATTERNS, REFUSED, SLOW, Pattern
from tests.calibration.qdq_builder import SCALE, QdqBuilder
from tests.calibration.rtx import RtxRefused, rtx_executed_types, tensorrt_rtx
from tests.calibration.tvm_import import tvm_run

ROOT = Path(__file__).resolve().parents[2]


def named(pattern: Pattern) -> str:
    return pattern.name


every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=named)


# ---- what the lint says


@every_pattern
def test_the_lint_knows_the_pattern(pattern: Pattern) -> None:
    findings = lint(pattern.graph())
    assert {finding.rule for finding in findings} == pattern.rules, [str(finding) for finding in findings]


def test_every_rule_has_a_pattern_of_its_own_severity() -> None:
    shown = {
        finding.rule: finding.severity
        for severity, patterns in (("refused", REFUSED), ("float", FLOAT), ("slow", SLOW))
        for pattern in patterns
        for finding in lint(pattern.graph())
        if finding.severity == severity
    }
    elsewhere = ("per-channel-opset", "one-pixel")
    assert shown == {rule.name: rule.severity for rule in RULES if rule.name not in elsewhere}


def test_scales_per_channel_need_opset_13() -> None:
    graph = Pattern("old", lambda b, x: b.conv(b.qdq(x), b.weight(16, 16, 3, 3)), opset=12).graph()
    assert [finding.rule for finding in lint(graph)] == ["per-channel-opset"]
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(graph.proto)


# ---- what TensorRT-RTX does


def verdict(findings: tuple[Finding, ...]) -> str:
    """Return the worst that is foretold of TensorRT-RTX."""
    of_rtx = {finding.severity for finding in findings if "tensorrt-rtx" in finding.targets}
    return next((severity for severity in ("refused", "float") if severity in of_rtx), "int8")


def outcome(graph: OnnxGraph) -> str:
    """Return what TensorRT-RTX makes of a graph's convolutions and products, in the words of `Pattern.rtx`."""
    try:
        types = set(rtx_executed_types(graph.proto).values())
    except RtxRefused:
        return "refused"
    return "int8" if types <= {"int8"} else next((kind for kind in ("float",) if kind in types), "×".join(types))


@every_pattern
def test_tensorrt_rtx_does_what_the_lint_says(pattern: Pattern, tmp_path: Path) -> None:
    tensorrt_rtx()
    graph = pattern.graph()
    if pattern.rtx == "crash":
        onnx.save(graph.proto, tmp_path / "model.onnx")
        command = [sys.executable, "-m", "tests.calibration.rtx", str(tmp_path / "model.onnx")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == -signal.SIGSEGV
        assert verdict(lint(graph)) == "refused"
        return
    assert outcome(graph) == pattern.rtx
    if pattern.miscomputed:
        assert verdict(lint(graph)) == "refused"
    else:
        assert verdict(lint(graph)) == (pattern.rtx if pattern.rtx in ("refused", "float") else "int8")


# ---- what TVM does


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*CLEAN, *SLOW], ids=named)
def test_tvm_computes_what_onnx_runtime_computes(pattern: Pattern) -> None:
    graph = pattern.graph()
    assert unconvertible(graph) == ()
    feeds = random_feeds(graph.inputs, seed=0)
    reference, made = Reference(graph).run(feeds), tvm_run(graph, feeds)
    assert all(np.unique(array).size > 1 for array in reference.values())
    for name, array in reference.items():
        if pattern.exact:
            np.testing.assert_array_equal(made[name], array)
        else:
            np.testing.assert_allclose(made[name], array, rtol=0, atol=0.01 * np.abs(array).max())


def test_unsigned_activations_taken_for_signed_ones_are_other_numbers() -> None:
    """What `miscomputed` means: TensorRT-RTX types uint8 with zero-point 0 as int8, so it computes the second graph."""
    unsigned, signed = (
        Pattern("", lambda b, x, dtype=dtype: b.conv(b.qdq(x, dtype=dtype), b.weight(16, 16, 3, 3), 16)).graph()
        for dtype in (np.uint8, np.int8)
    )
    feeds = {"x": np.abs(random_feeds(unsigned.inputs)["x"]) * 3}
    [wanted], [made] = (list(Reference(graph).run(feeds).values()) for graph in (unsigned, signed))
    assert np.abs(wanted - made).max() > 0.1 * np.abs(wanted).max()


# ---- graphs at random


def _conv(draw: st.DrawFn, b: QdqBuilder, x: str) -> str:
    width = draw(st.sampled_from([16, 16, 4, 1]))
    axis = draw(st.sampled_from([0, 0, 0, None, 1]))
    quantized = draw(st.sampled_from([True, True, True, False]))
    weight = b.weight(16, width, 3, 3, axis=axis) if quantized else b.floats(16, width, 3, 3)
    return b.conv(x, weight, 16, name=draw(st.uuids()).hex, group=16 // width)


UNARY: dict[str, Callable[[QdqBuilder, str], str]] = {
    "one scale": lambda b, x: b.qdq(x),
    "another scale": lambda b, x: b.qdq(x, 2 * SCALE),
    "relu": lambda b, x: b.op("Relu", x),
    "pool": lambda b, x: b.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "transpose": lambda b, x: b.op("Transpose", x, perm=[0, 1, 3, 2]),
    "pad": lambda b, x: b.rows(b.op("Pad", x, b.constant(np.array([0, 0, 1, 0, 0, 0, 0, 0])))),
}
BINARY: dict[str, Callable[[QdqBuilder, str, str], str]] = {
    "add": lambda b, x, y: b.op("Add", x, y),
    "max": lambda b, x, y: b.op("Max", x, y),
    "concat": lambda b, x, y: b.rows(b.op("Concat", x, y, axis=2)),
}
STEPS = [*UNARY, *BINARY, "one scale", "one scale", "conv", "conv", "conv"]
"""Each keeps the shape [1, 16, 8, 8]."""


@st.composite
def placements(draw: st.DrawFn) -> OnnxGraph:
    """Draw a network of a few layers whose Q/DQ may stand anywhere; nothing is computed twice."""
    b = QdqBuilder()
    values = [b.input("x", 1, 16, 8, 8)]
    made: dict[tuple[str, ...], str] = {}
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=3, max_size=12)):
        x, y = (draw(st.sampled_from(values[-3:])) for _ in range(2))
        if step == "conv":
            values.append(_conv(draw, b, x))
        elif step in UNARY:
            made[step, x] = made.get((step, x)) or UNARY[step](b, x)
            values.append(made[step, x])
        else:
            made[step, x, y] = made.get((step, x, y)) or BINARY[step](b, x, y)
            values.append(made[step, x, y])
    b.conv(b.qdq(values[-1]), b.weight(16, 16, 3, 3), 16, "last")
    return b.graph(*b.unread())


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=placements())
def test_wherever_q_and_dq_stand_the_lint_names_the_layers_that_are_float(graph: OnnxGraph) -> None:
    executed = rtx_executed_types(graph.proto)
    told = {finding.node for finding in lint(graph) if finding.severity == "float"}
    assert {name for name in told if name in executed} == {name for name, kind in executed.items() if kind != "int8"}


# ---- what users see


def _branchy(*, module: str = "") -> OnnxGraph:
    """Return two convolutions: one quantized whole, with an int32 bias, the other not at all."""
    b = QdqBuilder()
    x = b.input("x", 1, 16, 8, 8)
    scales = b.constant(np.full(16, 2.0**-16, np.float32))
    bias = b.op("DequantizeLinear", b.constant(np.ones(16, np.int32)), scales, axis=0)
    y = b.op("Conv", b.qdq(x), b.weight(16, 16, 1, 1), bias, name="node_conv2d")
    graph = b.graph(b.conv(y, b.floats(16, 16, 3, 3), name="node_conv2d_1"))
    proto = graph.copy_proto()
    for node in proto.graph.node:
        if node.op_type == "Conv" and module:
            set_module_path(node, module + ("" if node.name == "node_conv2d" else ".inner"))
    return OnnxGraph(proto)


def test_findings_speak_of_the_users_modules() -> None:
    refused, left = lint(_branchy(module="layer1"))
    assert (refused.rule, refused.module, refused.op) == ("bias-int32", "layer1", "DequantizeLinear")
    assert (left.rule, left.module, left.node) == ("not-quantized", "layer1.inner", "node_conv2d_1")
    assert str(left) == (
        "layer1.inner (Conv 'node_conv2d_1'): neither its activations nor its weights are quantized [not-quantized]"
    )


@pytest.mark.parametrize("name", ["layer1", "layer1.inner", "node_conv2d_1"])
def test_layers_that_stay_in_float_on_purpose_are_not_reported_by_node_module_or_what_holds_it(name: str) -> None:
    graph = _branchy(module="layer1")
    assert [finding.rule for finding in lint(graph, floats=[name])] == ["bias-int32"], "refusals are never silenced"


@pytest.mark.parametrize("name", ["layer", "layer1.inner.conv", "inner"])
def test_other_names_silence_nothing(name: str) -> None:
    assert len(lint(_branchy(module="layer1"), floats=[name])) == 2


def test_refusals_are_raised_together_and_name_the_modules() -> None:
    findings = lint(_branchy(module="layer1"))
    with pytest.raises(UnsupportedGraph) as raised:
        require_clean(findings)
    assert [place.split(" ")[0] for place in raised.value.where] == ["layer1"]
    assert "QuantizeBias=False" in raised.value.hint
    with pytest.raises(UnsupportedGraph) as raised:
        require_clean(findings, also=("float",))
    assert [place.split(" ")[0] for place in raised.value.where] == ["layer1", "layer1.inner"]


def test_what_only_costs_time_is_not_raised() -> None:
    for pattern in (*CLEAN, *SLOW, *FLOAT):
        require_clean(lint(pattern.graph()))


def test_a_float_graph_has_nothing_to_find() -> None:
    graph = Pattern("float", lambda b, x: b.conv(b.op("Relu", x), b.floats(16, 16, 3, 3))).graph()
    assert lint(graph) == ()


def test_onnx_runtimes_default_quantization_is_refused_and_its_fit_settings_are_not(tmp_path: Path) -> None:
    plain = Pattern("float", lambda b, x: b.conv(b.op("Relu", x), b.floats(16, 16, 3, 3), 16)).graph()
    onnx.save(plain.proto, tmp_path / "float.onnx")

    def quantized(**options: Any) -> tuple[Finding, ...]:
        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._feeds = iter([random_feeds(plain.inputs, seed) for seed in range(2)])

            def get_next(self) -> Any:
                return next(self._feeds, None)

        path = tmp_path / "quantized.onnx"
        quantize_static(tmp_path / "float.onnx", path, Reader(), op_types_to_quantize=["Conv"], **options)
        return lint(load_trusted(path))

    assert {finding.rule for finding in quantized()} >= {"zero-point", "bias-int32"}
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    fit = quantized(per_channel=True, activation_type=QuantType.QInt8, extra_options=symmetric)
    assert {finding.severity for finding in fit} <= {"slow"}, fit


# ---- the documentation


def test_the_documented_rules_are_the_rules() -> None:
    text = (ROOT / "docs" / "qdq.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (refused|float|slow) \| ([a-z, -]+) \|", text, re.MULTILINE)
    assert rows == [(rule.name, rule.severity, ", ".join(rule.targets)) for rule in RULES]
