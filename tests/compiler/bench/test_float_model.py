"""The float32 model behind a Q/DQ one computes what was there before it was quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.calibration.shift import Shift
from cnncc.compiler.bench.float_model import float_model
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from tests.targets import conformance
from tests.targets.conformance import feeds_of

ROUNDING = 1e-5
"""Relative; a bias that was shifted and shifted back."""


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
    constants: dict[str, Any],
) -> OnnxGraph:
    """A graph of float32 shapes and arrays."""
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    shapes = [{name: list(shape) for name, shape in values.items()} for values in (inputs, outputs)]
    return conformance.graph_of(nodes, *shapes, weights)


def steps(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Weights that int8 holds exactly: every channel has a largest of 127 steps."""
    integers = np.random.default_rng(seed).integers(-127, 128, shape)
    integers.reshape(shape[0], -1)[:, 0] = 127
    return (integers / 256).astype(np.float32)


def network() -> OnnxGraph:
    """Two branches of different form that are concatenated, pooled and classified."""
    return graph_of(
        [
            helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c0"], ["r0"], name="r0"),
            helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="one"),
            helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
            helper.make_node("Conv", ["r0", "w2"], ["c2"], name="two", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c2"], ["r2"], name="r2"),
            helper.make_node("Concat", ["r1", "r2"], ["joined"], name="joined", axis=1),
            helper.make_node("MaxPool", ["joined"], ["pooled"], name="pooled", kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Conv", ["pooled", "w3"], ["c3"], name="last"),
            helper.make_node("Relu", ["c3"], ["r3"], name="r3"),
            helper.make_node("Flatten", ["r3"], ["flat"], name="flat"),
            helper.make_node("Gemm", ["flat", "w4", "b4"], ["y"], name="scores", transB=1),
        ],
        {"x": (1, 3, 8, 8)},
        {"y": (1, 5)},
        {
            "w0": steps(8, 3, 3, 3), "b0": np.linspace(-1, 1, 8, dtype=np.float32), "w1": steps(4, 8, 1, 1),
            "b1": np.ones(4, np.float32), "w2": steps(6, 8, 3, 3), "w3": steps(7, 10, 1, 1), "w4": steps(5, 7 * 16),
            "b4": np.ones(5, np.float32),
        },
    )  # fmt: skip


def quantized(graph: OnnxGraph, shifts: dict[str, Shift]) -> OnnxGraph:
    plan = plan_for(graph, layers_of(graph))
    scales = {name: 0.125 for group in plan.groups for name in group.tensors}
    return insert_qdq(graph, plan, scales, shifts)


def assert_same(found: OnnxGraph, expected: OnnxGraph) -> None:
    onnx.checker.check_model(found.proto, full_check=True)
    feeds = feeds_of(expected)
    results = [Reference(graph).run(feeds) for graph in (found, expected)]
    for name, value in results[1].items():
        assert np.abs(results[0][name] - value).max() <= ROUNDING * np.abs(value).max()


SHIFT = Shift(2.0, 0.125)


@pytest.mark.parametrize(
    "shifted",
    [(), ("r1", "r2", "joined", "pooled"), ("r3", "flat")],
    ids=["unshifted", "shifted before a concatenation", "shifted before a flatten"],
)
def test_it_computes_what_was_there_before(shifted: tuple[str, ...]) -> None:
    graph = network()
    made = quantized(graph, dict.fromkeys(shifted, SHIFT))
    assert Counter(node.op_type for node in made.nodes)["Sub"] == {0: 0, 4: 2, 2: 1}[len(shifted)]
    found = float_model(made)
    assert Counter(node.op_type for node in found.nodes) == Counter(node.op_type for node in graph.nodes)
    assert_same(found, graph)


def test_a_graph_without_q_dq_comes_back_as_it_is() -> None:
    graph = network()
    assert float_model(graph) is graph


def _rounded(nodes: list[onnx.NodeProto], outputs: dict[str, tuple[int, ...]], **constants: Any) -> OnnxGraph:
    """A graph that begins with x − 2, Q and DQ."""
    begin = [
        helper.make_node("Sub", ["x", "c"], ["less"], name="less"),
        helper.make_node("QuantizeLinear", ["less", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
    ]
    known = {"c": np.float32(2).reshape(()), "s": np.float32(0.125).reshape(()), "z": np.int8(0).reshape(())}
    return graph_of([*begin, *nodes], {"x": (1, 4, 6, 6)}, outputs, {**known, **constants})


def _plain(nodes: list[onnx.NodeProto], outputs: dict[str, tuple[int, ...]], **constants: Any) -> OnnxGraph:
    begin = [helper.make_node("Sub", ["x", "c"], ["d"], name="less")]
    return graph_of([*begin, *nodes], {"x": (1, 4, 6, 6)}, outputs, {"c": np.float32(2).reshape(()), **constants})


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([helper.make_node("Conv", ["d", "w"], ["y"], name="y", pads=[1, 1, 1, 1])], {"y": (1, 5, 6, 6)}),
        ([helper.make_node("Sigmoid", ["d"], ["y"], name="y")], {"y": (1, 4, 6, 6)}),
        ([helper.make_node("Concat", ["d", "x"], ["y"], name="y", axis=1)], {"y": (1, 8, 6, 6)}),
        ([helper.make_node("MaxPool", ["d"], ["y"], name="y", kernel_shape=[2, 2])], {"y": (1, 4, 5, 5)}),
        ([helper.make_node("Relu", ["d"], ["y"], name="y")], {"y": (1, 4, 6, 6), "d": (1, 4, 6, 6)}),
    ],
    ids=["a padded layer", "an activation", "a concatenation with what is not shifted", "an output", "both"],
)
def test_whoever_cannot_make_up_for_a_shift_reads_the_difference(
    nodes: list[onnx.NodeProto], outputs: dict[str, tuple[int, ...]]
) -> None:
    weights = {"w": steps(5, 4, 3, 3)} if nodes[0].op_type == "Conv" else {}
    assert_same(float_model(_rounded(nodes, outputs, **weights)), _plain(nodes, outputs, **weights))


def test_weights_and_biases_of_other_quantizers_become_floats() -> None:
    """Unsigned weights with a zero-point for each channel, and a bias in int32."""
    rng = np.random.default_rng(1)
    integers, zeros = rng.integers(0, 256, (5, 4, 1, 1)).astype(np.uint8), rng.integers(0, 256, 5).astype(np.uint8)
    scales = rng.uniform(0.1, 1, 5).astype(np.float32)
    bias = rng.integers(-99, 99, 5).astype(np.int32)
    nodes = [
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], name="w", axis=0),
        helper.make_node("DequantizeLinear", ["bq", "ws"], ["b"], name="b", axis=0),
        helper.make_node("Conv", ["d", "w", "b"], ["y"], name="y"),
    ]
    found = float_model(_rounded(nodes, {"y": (1, 5, 6, 6)}, wq=integers, ws=scales, wz=zeros, bq=bias))
    assert [node.op_type for node in found.nodes] == ["Conv"]
    floats = ((integers - zeros.astype(np.float32).reshape(-1, 1, 1, 1)) * scales.reshape(-1, 1, 1, 1)).astype(
        "float32"
    )
    constants = {"w": floats, "b": (bias * scales).astype(np.float32)}
    assert_same(found, _plain(nodes[2:], {"y": (1, 5, 6, 6)}, **constants))


def test_integers_that_something_else_reads_stay() -> None:
    nodes = [
        helper.make_node("Cast", ["q"], ["f"], name="f", to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["f", "d"], ["y"], name="y"),
    ]
    found = float_model(_rounded(nodes, {"y": (1, 4, 6, 6)}))
    assert Counter(node.op_type for node in found.nodes)["QuantizeLinear"] == 1
    onnx.checker.check_model(found.proto, full_check=True)


def test_a_pair_of_different_scales_stays() -> None:
    nodes = [helper.make_node("DequantizeLinear", ["q", "other", "z"], ["y"], name="y")]
    graph = _rounded(nodes, {"y": (1, 4, 6, 6)}, other=np.float32(0.5).reshape(()))
    assert_same(float_model(graph), graph)
