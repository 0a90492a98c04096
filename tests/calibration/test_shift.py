"""Shifts: which tensors can be shifted, by how much, and that the network computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from cnncc.calibration.bias_correction import add_to_biases
from cnncc.calibration.histogram import Histogram
from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq, quantize_weight
from cnncc.calibration.quantize import write
from cnncc.calibration.shift import Shift, shift_of, shiftable
from cnncc.calibration.thresholds import mean_squared_error, scale_of
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference

C = 8


def network(*nodes: onnx.NodeProto, output: str = "y", shape: tuple[int, ...] = (1, C, 6, 6)) -> OnnxGraph:
    """Return a graph: x, a ReLU of it called ``r``, then these nodes; weights ``w1`` (1×1), ``w3`` (3×3), ``b``."""
    generator = np.random.default_rng(5)
    weights = {
        "w1": generator.normal(0, 0.3, (C, C, 1, 1)),
        "w3": generator.normal(0, 0.2, (C, C, 3, 3)),
        "b": generator.normal(0, 0.5, C),
        "k": np.full((1, C, 6, 6), 0.5),
    }
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"], name="relu"), *nodes],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return with_shapes(OnnxGraph(model))


def conv(source: str, name: str = "y", weight: str = "w1", **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight, "b"], [name], name=name, **attributes)


def able(graph: OnnxGraph, kept: tuple[str, ...] = ()) -> set[str]:
    return shiftable(graph, plan_for(graph, [layer for layer in layers_of(graph) if layer.node not in kept]))


CASES = {
    "a layer without padding": ([conv("r")], {"r"}),
    "a strided one": ([conv("r", strides=[2, 2])], {"r"}),
    "two of them": ([conv("r", "a"), conv("r", "b2"), helper.make_node("Add", ["a", "b2"], ["y"])], {"r"}),
    "a 3×3 layer without padding": ([conv("r", weight="w3")], {"r"}),
    "a layer with padding": ([conv("r", weight="w3", pads=[1, 1, 1, 1])], set()),
    "padding by SAME_UPPER": ([conv("r", weight="w3", auto_pad="SAME_UPPER")], set()),
    "one with and one without": (
        [
            conv("r", "a"),
            conv("r", "b2", "w3", pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["a", "b2"], ["y"]),
        ],
        set(),
    ),
    "the skip of an addition": ([conv("r", "a"), helper.make_node("Add", ["a", "r"], ["y"])], set()),
    "behind a pool": (
        [helper.make_node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]), conv("p")],
        {"r"},
    ),
    "a pool that something else reads": (
        [
            helper.make_node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[1, 1]),
            conv("p", "a"),
            helper.make_node("Mul", ["p", "a"], ["y"]),
        ],
        set(),
    ),
    "a concatenation with what something else reads": (
        # x is read by the ReLU too, which would read it shifted
        [helper.make_node("Concat", ["r", "x"], ["c"], axis=0, name="cat"), conv("c")],
        set(),
    ),
    "a concatenation with a constant": (
        [helper.make_node("Concat", ["r", "k"], ["c"], axis=0, name="cat"), conv("c")],
        set(),
    ),
}


@pytest.mark.parametrize(("nodes", "expected"), CASES.values(), ids=CASES)
def test_only_what_layers_without_padding_read_is_shifted(nodes: list[onnx.NodeProto], expected: set[str]) -> None:
    graph = network(*nodes)
    assert able(graph) == expected


def test_a_layer_in_float_reads_the_float_tensor_and_does_not_hinder() -> None:
    graph = network(
        conv("r", "a"),
        conv("r", "b2", "w3", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b2"], ["y"]),
    )
    assert able(graph, kept=("b2",)) == {"r"}


def test_an_addition_in_float_does_not_hinder_either() -> None:
    graph = network(conv("r", "a"), helper.make_node("Add", ["a", "r"], ["y"], name="sum"))
    assert shiftable(graph, plan_for(graph, layers_of(graph))) == set()
    assert shiftable(graph, plan_for(graph, layers_of(graph), float_adds=True)) == {"r"}


@given(seed=st.integers(0, 2**32 - 1), amount=st.integers(1, 127), pooled=st.booleans())
def test_a_shifted_layer_computes_what_its_formula_says(seed: int, amount: int, pooled: bool) -> None:
    pool = helper.make_node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2])
    graph = network(*([pool] if pooled else []), conv("p" if pooled else "r"))
    x = np.random.default_rng(seed).normal(0, 1, (1, C, 6, 6)).astype(np.float32)
    scale = np.float32(2.0**-6)
    shift = Shift(float(scale * amount), float(scale))
    plan = plan_for(graph, layers_of(graph))
    tensors = [tensor for group in plan.groups for tensor in group.tensors]
    quantized = insert_qdq(graph, plan, dict.fromkeys(tensors, 1.0), dict.fromkeys(tensors, shift))
    found = Reference(quantized).run({"x": x})["y"]
    r = np.maximum(x, 0)
    if pooled:
        r = r.reshape(1, C, 3, 2, 3, 2).max(axis=(3, 5))
    steps = np.clip(np.rint((r - np.float32(shift.amount)) / scale), -128, 127)
    weight, bias = graph.constant("w1"), graph.constant("b")
    assert weight is not None
    assert bias is not None
    integers, scales = quantize_weight(weight, 0)
    w = integers[:, :, 0, 0] * scales[:, None].astype(np.float64)
    want = np.einsum("oi,nihw->nohw", w, steps * scale + shift.amount) + bias[:, None, None]
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_shifted_keeps_what_corrected_its_bias(bias: bool) -> None:
    node = conv("r")
    if not bias:
        del node.input[2]
    graph = network(node)
    layers, delta = layers_of(graph), np.linspace(-1, 1, C, dtype=np.float32)
    shifts = {"r": Shift(0.5, 1 / 128)}
    plain, corrected = (
        write(each, layers, {"r": 1 / 64}, shifts) for each in (graph, add_to_biases(graph, layers, {"y": delta}))
    )
    x = {"x": np.random.default_rng(3).normal(0, 1, (1, C, 6, 6)).astype(np.float32)}
    gained = Reference(corrected).run(x)["y"] - Reference(plain).run(x)["y"]
    np.testing.assert_allclose(gained, np.broadcast_to(delta[:, None, None], gained.shape), atol=1e-5)


def test_a_shift_halves_the_step_of_what_a_relu_gives() -> None:
    r = np.maximum(np.random.default_rng(1).normal(0, 1, (1, C, 64, 64)), 0).astype(np.float32)
    histogram = Histogram.of(r)
    scale = scale_of(mean_squared_error(histogram))
    shift = shift_of(histogram, scale)
    assert shift is not None
    assert 0.45 < shift.scale / scale < 0.6
    plain = np.clip(np.rint(r / scale), -128, 127) * scale
    moved = np.clip(np.rint((r - shift.amount) / shift.scale), -128, 127) * shift.scale + shift.amount
    gain = 10 * np.log10(((r - plain) ** 2).sum() / ((r - moved) ** 2).sum())
    assert gain > 4.5
    # zero is what a ReLU gives most: it stays exact
    assert np.abs(moved[r == 0]).max() < 1e-6


def test_what_is_as_often_negative_is_not_shifted() -> None:
    x = np.random.default_rng(1).normal(0, 1, (1, C, 64, 64)).astype(np.float32)
    assert shift_of(Histogram.of(x), scale_of(3.0)) is None
    zeros = Histogram.of(np.zeros((1, C, 2, 2), np.float32))
    assert shift_of(zeros, scale_of(0.0)) is None


def test_what_a_silu_gives_is_shifted_by_its_lowest_value_too() -> None:
    x = np.random.default_rng(1).normal(1, 2, (1, C, 64, 64))
    silu = (x / (1 + np.exp(-x))).astype(np.float32)
    histogram = Histogram.of(silu)
    shift = shift_of(histogram, scale_of(mean_squared_error(histogram)))
    assert shift is not None
    assert shift.amount - 128.5 * shift.scale <= silu.min()
