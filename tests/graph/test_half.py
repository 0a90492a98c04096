"""Half precision emulated: which values are rounded, how, and which stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cnncc.graph.exact import Exact
from cnncc.graph.half import emulated, half_types, is_half, with_float_outputs
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from tests.graph.graphs import graph_of, one_node

KINDS = [TensorProto.FLOAT16, TensorProto.BFLOAT16]
SHAPE = (2, 50)

values = arrays_of.arrays(
    np.float32, SHAPE, elements=st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
)


def dtype_of(kind: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def rounded(x: NDArray[np.float32], kind: int) -> NDArray[np.float32]:
    return x.astype(dtype_of(kind)).astype(np.float32)


def cast(x: str, y: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [x], [y], name=f"{y}_cast", to=kind)


def half_graph(kind: int, *nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **constants: Any) -> OnnxGraph:
    """Return nodes from ``h``, the input in half precision, to ``r``, and the output in float32."""
    made = [cast("x", "h", kind), *nodes, cast("r" if nodes else "h", "y", TensorProto.FLOAT)]
    return graph_of(made, {"x": SHAPE}, constants, outputs, opset=22)


def sum_graph(kind: int) -> OnnxGraph:
    """Return x + w, rounded: the weights are no numbers of that type before they are rounded."""
    weights = np.linspace(1, 2, 50, dtype=np.float32).astype(dtype_of(kind))
    return half_graph(kind, helper.make_node("Add", ["h", "w"], ["r"], name="add"), w=weights)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_that_hold_half_values_are_found(kind: int) -> None:
    assert half_types(sum_graph(kind)) == {kind}
    assert not is_half(one_node("Relu", {"x": SHAPE}))


@settings(max_examples=30, deadline=None)
@given(values, st.sampled_from(KINDS))
def test_values_are_rounded_once_a_node(x: NDArray[np.float32], kind: int) -> None:
    graph = sum_graph(kind)
    weights = rounded(np.linspace(1, 2, 50, dtype=np.float32), kind)
    expected = rounded(rounded(x, kind) + weights, kind)
    np.testing.assert_array_equal(Reference(emulated(graph)).run({"x": x})["y"], expected)


@settings(max_examples=30, deadline=None)
@given(values, st.sampled_from(KINDS))
def test_the_truth_is_not_rounded(x: NDArray[np.float32], kind: int) -> None:
    weights = rounded(np.linspace(1, 2, 50, dtype=np.float32), kind).astype(np.float64)
    np.testing.assert_array_equal(Exact(sum_graph(kind)).run({"x": x})["y"], x.astype(np.float64) + weights)


@settings(max_examples=30, deadline=None)
@given(values, st.sampled_from(KINDS), st.integers(0, 3))
def test_jitter_rounds_to_a_neighbour_and_keeps_what_is_representable(
    x: NDArray[np.float32], kind: int, seed: int
) -> None:
    run = Reference(emulated(half_graph(kind), seed)).run
    found = run({"x": x})["y"]
    unit = {TensorProto.FLOAT16: 2.0**-10, TensorProto.BFLOAT16: 2.0**-7}[TensorProto.DataType.ValueType(kind)]
    assert (np.abs(found.astype(np.float64) - x) <= np.abs(x.astype(np.float64)) * unit).all()
    np.testing.assert_array_equal(rounded(found, kind), found)
    np.testing.assert_array_equal(run({"x": found})["y"], found)


@pytest.mark.parametrize("kind", KINDS)
def test_values_between_two_neighbours_become_either_and_every_seed_draws_anew(kind: int) -> None:
    low = dtype_of(kind).type(1.5)
    high = np.nextafter(low, dtype_of(kind).type(2))
    x = np.full(SHAPE, (np.float32(low) + np.float32(high)) / 2, np.float32)
    one, other = (Reference(emulated(half_graph(kind), seed)).run({"x": x})["y"] for seed in (0, 1))
    assert set(np.unique(one)) == {np.float32(low), np.float32(high)}
    assert not np.array_equal(one, other)


def test_infinite_values_stay() -> None:
    graph = half_graph(TensorProto.FLOAT16, helper.make_node("Neg", ["h"], ["r"], name="neg"))
    x = np.full(SHAPE, 1e9, np.float32)
    assert (Reference(emulated(graph, 0)).run({"x": x})["y"] == -np.inf).all()


def test_the_interface_stays_where_it_is_in_half_precision_itself() -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"], name="a"), helper.make_node("Neg", ["y"], ["z"], name="n")]
    graph = graph_of(nodes, {"x": SHAPE}, {}, ("y", "z"), dtypes={"x": TensorProto.FLOAT16})
    made = emulated(graph)
    assert (made.inputs, made.outputs) == (graph.inputs, graph.outputs)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    found = Reference(made).run({"x": x})
    np.testing.assert_array_equal(found["y"], x + x)
    np.testing.assert_array_equal(found["z"], -(x + x))


def test_types_that_attributes_name_are_float32_too() -> None:
    value = helper.make_tensor("v", TensorProto.FLOAT16, [1], np.float16([0.1]).tobytes(), raw=True)
    fill = helper.make_node("ConstantOfShape", ["s"], ["f"], name="fill", value=value)
    graph = half_graph(
        TensorProto.FLOAT16, fill, helper.make_node("Add", ["h", "f"], ["r"], name="add"), s=np.int64([50])
    )
    x = np.zeros(SHAPE, np.float32)
    assert (Reference(emulated(graph)).run({"x": x})["y"] == np.float32(np.float16(0.1))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_values_inside_are_given_out_as_float32(kind: int) -> None:
    graph = sum_graph(kind)
    part, names = with_float_outputs(graph, ["h", "r", "y"])
    assert [spec.dtype for spec in part.outputs] == ["float32"] * 3
    assert names["y"] == "y"
    assert half_types(part) == {kind}
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    found = Reference(emulated(part)).run({"x": x})
    np.testing.assert_array_equal(found[names["h"]], rounded(x, kind))
    np.testing.assert_array_equal(found[names["r"]], found["y"])
    onnx.checker.check_model(part.proto, full_check=True)
