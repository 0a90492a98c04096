"""Graphs in half precision: what stays in float32, and what rounding costs."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnncc.compiler.half import narrow, overflowing, rounding_sqnr
from cnncc.graph.half import emulated
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import ModelRefused
from tests.targets.conformance import feeds_of, graph_of, small_graph

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def of(*nodes: tuple[str, str, str], scale: float = 1.0) -> OnnxGraph:
    """Return operators of one input and one output behind a product with weights of this size."""
    weights = numpy_helper.from_array(np.full((4, 4), scale, np.float32), "w")
    made = [helper.make_node("MatMul", ["x", "w"], ["m"], "product")]
    made += [helper.make_node(op, [source], [result], result) for op, source, result in nodes]
    last = made[-1].output[0]
    return with_shapes(graph_of(made, {"x": [2, 4]}, {last: [2, 4]}, [weights]))


def kinds(graph: OnnxGraph) -> dict[str, int]:
    """Return node → element type of its result."""
    values = (*graph.proto.graph.value_info, *graph.proto.graph.output)
    known = {value.name: value.type.tensor_type.elem_type for value in values}
    return {node.name: known[node.output[0]] for node in graph.nodes if node.output[0] in known}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_computes_is_narrow_and_the_interface_is_not(precision: str) -> None:
    graph = with_shapes(small_graph("N"))
    found = narrow(graph, precision)
    assert (found.wide, found.nodes) == ((), len(graph.nodes))
    assert found.graph.inputs == graph.inputs
    assert found.graph.outputs == graph.outputs
    made = kinds(found.graph)
    assert {made[node.name] for node in graph.nodes} == {KINDS[precision]}
    assert {tensor.data_type for tensor in found.graph.proto.graph.initializer} == {KINDS[precision]}
    assert [node.op_type for node in found.graph.nodes].count("Cast") == 2


def test_float16_computes_what_its_emulation_says() -> None:
    graph = with_shapes(small_graph())
    feeds = [feeds_of(graph)]
    emulation, real = emulated(narrow(graph, "fp16").graph), narrow(graph, "fp16").graph
    assert 50 < rounding_sqnr(graph, emulation, feeds) < 80
    assert 50 < rounding_sqnr(graph, real, feeds) < 80
    assert rounding_sqnr(graph, emulated(narrow(graph, "bf16").graph), feeds) < rounding_sqnr(graph, emulation, feeds)


def test_operators_that_overflow_stay_wide_between_narrow_ones() -> None:
    graph = of(("Exp", "m", "e"), ("Relu", "e", "r"), ("Neg", "r", "y"))
    found = narrow(graph, "fp16")
    assert found.wide == ("e (e)",)
    made = kinds(found.graph)
    assert made["e"] == TensorProto.FLOAT
    assert made["r"] == made["y"] == made["product"] == TensorProto.FLOAT16
    np.testing.assert_allclose(
        Reference(found.graph).run(feeds_of(graph))["y"], Reference(graph).run(feeds_of(graph))["y"], rtol=1e-1
    )


def test_values_near_the_largest_keep_their_readers_and_makers_wide() -> None:
    graph = of(("Relu", "m", "r"), ("Sigmoid", "r", "s"), ("Neg", "s", "y"), scale=9000.0)
    feeds = [{"x": np.ones((2, 4), np.float32)}]
    prone = overflowing(graph, feeds)
    assert prone == ("product", "r", "s")
    assert narrow(graph, "fp16", prone).wide == ("product (product)", "r (r)", "s (s)")
    assert rounding_sqnr(graph, emulated(narrow(graph, "fp16", prone).graph), feeds) > 60
    small = of(("Relu", "m", "y"), scale=0.1)
    assert overflowing(small, feeds) == ()


def test_what_is_not_finite_has_no_quality() -> None:
    graph = of(("Relu", "m", "y"), scale=60000.0)
    assert (
        rounding_sqnr(graph, emulated(narrow(graph, "fp16").graph), [{"x": np.ones((2, 4), np.float32)}]) == -math.inf
    )


def test_one_tensor_is_cast_once_and_an_output_in_the_middle_keeps_its_name() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "r"),
        helper.make_node("Exp", ["r"], ["a"], "a"),
        helper.make_node("Log", ["r"], ["b"], "b"),
        helper.make_node("Neg", ["r"], ["c"], "c"),
    ]
    graph = with_shapes(graph_of(nodes, {"x": [2]}, {"r": [2], "a": [2], "b": [2], "c": [2]}))
    found = narrow(graph, "fp16").graph
    casts = [(node.input[0], node.output[0]) for node in found.nodes if node.op_type == "Cast"]
    assert casts == [("x", "x_fp16"), ("r_fp16", "r"), ("c_fp16", "c")]
    assert set(Reference(found).run({"x": np.ones(2, np.float32)})) == {"r", "a", "b", "c"}


def test_scales_of_a_resize_stay_float32() -> None:
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], "up", mode="nearest")
    graph = with_shapes(graph_of([node], {"x": [1, 2, 4, 4]}, {"y": [1, 2, 8, 8]}, [scales]))
    found = narrow(graph, "fp16").graph
    assert {tensor.name: tensor.data_type for tensor in found.proto.graph.initializer} == {"scales": TensorProto.FLOAT}
    assert rounding_sqnr(graph, found, [feeds_of(graph)]) > 60


# ---- the float part of a quantized graph


def quantized_graph(scale: float = 0.05) -> OnnxGraph:
    """Return two int8 products and an addition of their input; one channel of the first has no weights."""
    rng = np.random.default_rng(0)
    scales = np.full(8, scale / 100, np.float32)
    scales[3] = np.finfo(np.float32).tiny
    constants = {
        "s": np.float32(scale), "z": np.int8(0), "ws": scales, "wz": np.zeros(8, np.int8),
        "w1": rng.integers(-127, 128, (8, 8)).astype(np.int8), "w2": rng.integers(-127, 128, (8, 8)).astype(np.int8),
    }  # fmt: skip
    nodes, value = [], "x"
    for layer in ("1", "2"):
        nodes += [
            helper.make_node("QuantizeLinear", [value, "s", "z"], [f"q{layer}"], f"q{layer}"),
            helper.make_node("DequantizeLinear", [f"q{layer}", "s", "z"], [f"d{layer}"], f"d{layer}"),
            helper.make_node("DequantizeLinear", [f"w{layer}", "ws", "wz"], [f"v{layer}"], f"v{layer}", axis=1),
            helper.make_node("MatMul", [f"d{layer}", f"v{layer}"], [f"m{layer}"], f"m{layer}"),
            helper.make_node("Add", [f"m{layer}", f"d{layer}"], [f"a{layer}"], f"a{layer}"),
        ]
        value = f"a{layer}"
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    return with_shapes(graph_of(nodes, {"x": [4, 8]}, {"a2": [4, 8]}, weights, opset=18))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_of_a_quantized_graph_the_float_part_is_narrowed(precision: str) -> None:
    graph = quantized_graph()
    found = narrow(graph, precision).graph
    onnx.checker.check_model(found.proto, full_check=True)
    made = kinds(found)
    assert {made[name] for name in ("d1", "v1", "m1", "a1", "d2", "m2")} == {KINDS[precision]}
    assert {made["q1"], made["q2"]} == {TensorProto.INT8}
    casts = [node for node in found.nodes if node.op_type == "Cast"]
    assert len(casts) == 2, "at the input and the output, and nothing between an int8 layer and its Q/DQ"
    scales = [numpy_helper.to_array(tensor) for name, tensor in found.constants.items() if name.startswith("ws")]
    assert [(array > 0).all() for array in scales] == [True]
    assert rounding_sqnr(graph, emulated(found), [{"x": np.random.default_rng(1).standard_normal((4, 8), "f")}]) > 20


def test_a_product_in_float32_has_what_it_dequantizes_in_float32() -> None:
    found = narrow(quantized_graph(), "fp16", ["m1"]).graph
    made = kinds(found)
    assert made["d1"] == made["v1"] == made["m1"] == TensorProto.FLOAT
    assert made["a1"] == made["d2"] == made["m2"] == TensorProto.FLOAT16
    [product] = [node for node in found.nodes if node.name == "m1"]
    makers = {node.output[0]: node.op_type for node in found.nodes}
    assert [makers[name] for name in product.input] == ["DequantizeLinear", "DequantizeLinear"]


def test_what_is_not_built_in_bfloat16_stays_wide() -> None:
    weights = numpy_helper.from_array(np.ones((4, 2, 2, 2), np.float32), "w")
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["u"], "up", strides=[2, 2]),
        helper.make_node("HardSwish", ["u"], ["y"], "swish"),
    ]
    graph = with_shapes(graph_of(nodes, {"x": [1, 4, 4, 4]}, {"y": [1, 2, 8, 8]}, [weights]))
    assert narrow(graph, "bf16").wide == ("up (up)", "swish (swish)")
    assert narrow(graph, "fp16").wide == ()


def test_an_opset_that_changes_an_operator_is_not_raised() -> None:
    """GroupNormalization has a scale a group until opset 20, a scale a channel from 21 on."""
    weights = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in "sb"]
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], "norm", num_groups=2)
    proto = graph_of([node], {"x": [2, 4, 5, 5]}, {"y": None}, weights, opset=18).copy_proto()
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 5, 5]))
    graph = with_shapes(OnnxGraph(proto))
    assert narrow(graph, "fp16").graph.opset == 18
    with pytest.raises(ModelRefused, match="a scale for each channel from 21 on"):
        narrow(graph, "bf16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("graph", [small_graph(), quantized_graph()], ids=["float", "quantized"])
def test_a_graph_is_narrowed_once(graph: OnnxGraph, precision: str) -> None:
    once = narrow(with_shapes(graph), precision).graph
    assert narrow(once, precision).graph.serialized == once.serialized
