"""Jitter: how far float32's own rounding moves a quantized graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from onnx import helper

from cnncc.graph.jitter import JITTER, is_quantized, jittered
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from tests.graph.graphs import graph_of, one_node

SHAPE = (2, 50)


def pair(x: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [x, "s", "z"], [f"{name}_q"], name=f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [name], name=name),
    ]


def quantized(scale: float = 0.125) -> OnnxGraph:
    """Two pairs in a row, a bend between them; the first tensor is read in float as well."""
    nodes = [*pair("x", "a"), helper.make_node("Relu", ["a"], ["r"], name="r"), *pair("r", "b")]
    nodes.append(helper.make_node("Add", ["b", "x"], ["y"], name="y"))
    return graph_of(nodes, {"x": SHAPE}, {"s": np.float32(scale), "z": np.int8(0)})


def moved_values(graph: OnnxGraph, x: NDArray[np.float32], seed: int) -> dict[str, NDArray[Any]]:
    """What each QuantizeLinear of the jittered graph reads."""
    found = jittered(graph, seed)
    read = [node.input[0] for node in found.nodes if node.op_type == "QuantizeLinear"]
    proto = found.copy_proto()
    proto.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, SHAPE) for n in read)
    values = Reference(OnnxGraph(proto)).run({"x": x})
    return {name: values[name] for name in read}


def test_a_graph_that_rounds_to_integers_is_quantized() -> None:
    assert is_quantized(quantized())
    assert not is_quantized(one_node("Relu", {"x": SHAPE}))


def test_a_graph_that_only_dequantizes_is_not_quantized() -> None:
    """Weights stored in int8 round nothing on the way."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="d"),
        helper.make_node("Add", ["x", "d"], ["y"], name="y"),
    ]
    constants = {"w": np.ones(SHAPE, np.int8), "s": np.float32(0.5), "z": np.int8(0)}
    assert not is_quantized(graph_of(nodes, {"x": SHAPE}, constants))


@settings(max_examples=30, deadline=None)
@given(
    arrays_of.arrays(np.float32, SHAPE, elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)),
    st.integers(0, 3),
)
def test_what_is_rounded_moves_by_the_stated_amount_at_most(x: NDArray[np.float32], seed: int) -> None:
    first, _second = moved_values(quantized(), x, seed).values()
    wide = x.astype(np.float64)
    assert (np.abs(first - wide) <= 0.125 * JITTER + np.abs(wide) * 2.0**-23 + 2.0**-149).all()


def test_it_does_move_both_ways_and_every_seed_differently() -> None:
    x = np.random.default_rng(0).uniform(1, 2, SHAPE).astype(np.float32)
    moves = []
    for seed in range(3):
        first, second = moved_values(quantized(), x, seed).values()
        move = (first.astype(np.float64) - x) / 0.125
        assert move.min() < -0.5 * JITTER
        assert move.max() > 0.5 * JITTER
        assert not np.array_equal(first, second)
        moves.append(move)
    assert not np.array_equal(moves[0], moves[1])
    assert not np.array_equal(moves[1], moves[2])


def test_the_same_seed_moves_the_same_way() -> None:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    assert jittered(quantized(), 1).serialized == jittered(quantized(), 1).serialized
    one, other = (moved_values(quantized(), x, 1) for _ in range(2))
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)


def test_values_near_a_tie_go_one_step_up_or_down_and_others_stay() -> None:
    """Half a step above a whole number, and a quarter."""
    near = np.full(SHAPE, 64.5 * 0.125, np.float32)
    far = np.full(SHAPE, 64.25 * 0.125, np.float32)
    nodes = [*pair("x", "y")]
    graph = graph_of(nodes, {"x": SHAPE}, {"s": np.float32(0.125), "z": np.int8(0)})
    reference = Reference(jittered(graph, 0))
    assert set(np.unique(reference.run({"x": near})["y"])) == {8.0, 8.125}
    assert set(np.unique(reference.run({"x": far})["y"])) == {8.0}


def test_only_what_quantizers_read_is_moved() -> None:
    graph = quantized()
    before = graph.serialized
    found = jittered(graph, 0)
    onnx.checker.check_model(found.proto, full_check=True)
    assert graph.serialized == before
    assert (found.inputs, found.outputs) == (graph.inputs, graph.outputs)
    [add] = [node for node in found.nodes if node.name == "y"]
    assert list(add.input) == ["b", "x"]
    kinds = [node.op_type for node in found.nodes]
    assert kinds.count("Mul") == kinds.count("RandomUniformLike") == 2


def test_a_scale_per_channel_moves_values_by_a_share_of_themselves() -> None:
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], name="q", axis=0)]
    constants = {"s": np.float32([0.1, 0.2]), "z": np.zeros(2, np.int8)}
    x = np.random.default_rng(0).uniform(1, 2, SHAPE).astype(np.float32)
    [moved] = moved_values(graph_of(nodes, {"x": SHAPE}, constants), x, 0).values()
    share = np.abs(moved.astype(np.float64) / x - 1)
    assert 0.5 * JITTER < share.max() <= JITTER + 2.0**-22


def test_a_float_graph_stays_as_it_is() -> None:
    graph = one_node("Relu", {"x": SHAPE})
    assert [node.op_type for node in jittered(graph, 0).nodes] == ["Relu"]


@pytest.mark.parametrize("symbol", ["N", "?"])
def test_a_free_batch_is_moved_too(symbol: str) -> None:
    graph = graph_of(pair("x", "y"), {"x": (symbol, 3)}, {"s": np.float32(0.1), "z": np.int8(0)})
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_allclose(Reference(jittered(graph, 0)).run({"x": x})["y"], x, atol=0.051)
