"""What is quantized: layers, and the tensors that must share a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cnncc.calibration.plan import QUANTIZATION, is_mover, layers_of, plan_for, unsupported
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import ModelRefused
from tests.calibration.graphs import Net, classifier
from tests.graph.graphs import graph_of, one_node


def groups_of(graph: OnnxGraph, *names: str) -> set[frozenset[str]]:
    layers = [layer for layer in layers_of(graph) if not names or layer.node in names]
    return {frozenset(group.tensors) for group in plan_for(graph, layers).groups}


# ---- layers


@pytest.mark.parametrize(
    ("op", "shape", "weight", "axis", "attributes"),
    [
        ("Conv", (1, 4, 6, 6), (8, 4, 3, 3), 0, {}),
        ("Conv", (1, 4, 6, 6), (4, 1, 3, 3), 0, {"group": 4}),
        ("Conv", (1, 4, 6), (8, 4, 3), 0, {}),
        ("Gemm", (2, 4), (8, 4), 0, {"transB": 1}),
        ("Gemm", (2, 4), (4, 8), 1, {}),
        ("MatMul", (2, 5, 4), (4, 8), 1, {}),
        # these stay in float: targets have no int8 for them, or the product is scaled
        ("ConvTranspose", (1, 4, 6, 6), (4, 8, 3, 3), None, {}),
        ("ConvTranspose", (1, 4, 6, 6), (4, 8, 3, 3), None, {"group": 2}),
        ("Gemm", (4, 2), (8, 4), None, {"transA": 1, "transB": 1}),
        ("Gemm", (2, 4), (4, 8), None, {"alpha": 0.5}),
        ("MatMul", (2, 5, 4), (2, 4, 8), None, {}),
    ],
)
def test_a_product_with_constant_weights_is_a_layer(
    op: str, shape: tuple[int, ...], weight: tuple[int, ...], axis: int | None, attributes: dict[str, Any]
) -> None:
    graph = one_node(op, {"x": shape}, constants={"w": np.ones(weight, np.float32)}, **attributes)
    found = [(layer.node, layer.op, layer.tensor, layer.output, layer.weight, layer.axis) for layer in layers_of(graph)]
    assert found == ([] if axis is None else [("node", op, "x", "y", "w", axis)])


def test_products_that_are_no_layers_are_told() -> None:
    net = Net(1, 4, 6, 6)
    up = net.node("ConvTranspose", [net.conv("x", 4, "conv"), net.constant("w", net.weights(4, 4, 2, 2))], "up")
    net.node("MatMul", [up, up], "square")
    graph = net.graph()
    layers = layers_of(graph)
    assert [layer.node for layer in layers] == ["conv"]
    assert [node.name for node in unsupported(graph, layers)] == ["up", "square"]


def test_products_of_two_activations_or_of_two_constants_are_no_layers() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "z"], ["a"], name="activations"),
        helper.make_node("MatMul", ["k", "w"], ["b"], name="constants"),
        helper.make_node("MatMul", ["w", "a"], ["c"], name="left"),
        helper.make_node("Add", ["b", "c"], ["y"], name="add"),
    ]
    constants = {"w": np.ones((3, 3), np.float32), "k": np.ones((3, 3), np.float32)}
    assert layers_of(graph_of(nodes, {"x": (3, 3), "z": (3, 3)}, constants)) == ()


def test_weights_of_another_element_type_are_no_layers() -> None:
    graph = graph_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="node")],
        {"x": (2, 3)},
        {"w": np.ones((3, 3), np.float64)},
        dtypes={"x": onnx.TensorProto.DOUBLE},
    )
    assert layers_of(graph) == ()


def test_a_layer_knows_its_module_and_its_constant_bias() -> None:
    net = Net()
    net.conv(net.conv("x", 4, "first"), 4, "second", bias=False)
    first, second = layers_of(net.graph())
    assert (first.module, first.bias) == ("net.first", "first.bias")
    assert (second.module, second.bias) == ("net.second", "")


def test_a_layer_whose_bias_is_computed_stays_in_float() -> None:
    """A correction could not be added to it."""
    net = Net()
    bias = net.node("ReduceMean", ["x", net.constant("axes", np.int64([0, 2, 3]))], "bias", keepdims=0)
    net.node("Conv", ["x", net.constant("w", net.weights(3, 3, 1, 1)), bias], "conv")
    assert layers_of(net.graph()) == ()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_scales_its_bias_stays_in_float(bias: bool) -> None:
    """What a correction added would be scaled as well."""
    net = Net(2, 4)
    net.gemm("x", 3, beta=0.5, bias=bias)
    assert layers_of(net.graph()) == ()


@pytest.mark.parametrize("op", sorted(QUANTIZATION))
def test_a_model_that_is_quantized_already_is_refused(op: str) -> None:
    node = helper.make_node(op, ["x"], ["y"], name="quantizer")
    node.metadata_props.add(key="cnncc.module", value="net.stem")
    graph = OnnxGraph(helper.make_model(helper.make_graph([node], "g", [], [])))
    with pytest.raises(ModelRefused, match="quantized already: it has 1") as caught:
        layers_of(graph)
    assert "net.stem" in caught.value.where[0]
    assert "float32 model" in caught.value.hint


def test_a_float16_model_is_refused_by_its_input() -> None:
    graph = graph_of(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        {"x": (1, 3)},
        {},
        dtypes={"x": onnx.TensorProto.FLOAT16},
    )
    with pytest.raises(ModelRefused, match="'x' is float16"):
        layers_of(graph)


# ---- groups


def test_a_chain_quantizes_what_each_layer_reads_and_nothing_else() -> None:
    graph = classifier()
    plan = plan_for(graph, layers_of(graph))
    assert [group.tensors for group in plan.groups] == [
        ("x",),
        ("relu_1",),
        ("relu_3",),
        ("globalaveragepool_6", "flatten_7"),
    ]
    assert [group.read for group in plan.groups] == [("x",), ("relu_1",), ("relu_3",), ("flatten_7",)]


def test_layers_that_read_one_tensor_share_its_scale() -> None:
    net = Net()
    net.node("Add", [net.conv("x", 4, "a"), net.conv("x", 4, "b", kernel=1)])
    assert groups_of(net.graph()) == {frozenset({"x"})}


def test_the_skip_of_a_residual_add_asks_for_no_scale_of_its_own() -> None:
    net = Net()
    stem = net.node("Relu", [net.conv("x", 4, "stem")], "trunk")
    net.node("Relu", [net.node("Add", [net.conv(stem, 4, "branch"), stem], "sum")])
    assert groups_of(net.graph()) == {frozenset({"x"}), frozenset({"trunk"})}


def test_additions_of_two_tensors_read_float_where_that_is_wanted() -> None:
    net = Net()
    stem = net.node("Relu", [net.conv("x", 4, "stem")], "trunk")
    total = net.node("Add", [net.conv(stem, 4, "branch"), stem], "sum")
    net.conv(net.node("Add", [total, net.constant("offset", np.float32(1.0))], "moved"), 4, "kept")
    graph = net.graph()
    layers = [layer for layer in layers_of(graph) if layer.node != "kept"]
    assert plan_for(graph, layers).floating == {"kept"}
    assert plan_for(graph, layers, float_adds=True).floating == {"kept", "sum"}


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Transpose", {"perm": [0, 1, 3, 2]}),
        ("Identity", {}),
        ("SpaceToDepth", {"blocksize": 2}),
    ],
)
def test_a_mover_has_one_scale_before_and_after(op: str, attributes: dict[str, Any]) -> None:
    net = Net()
    moved = net.node(op, [net.conv("x", 4, "before")], "moved", 16 if op == "SpaceToDepth" else 0, **attributes)
    net.conv(moved, 4, "after")
    plan = plan_for(net.graph(), layers_of(net.graph()))
    assert [(group.tensors, group.read) for group in plan.groups] == [
        (("x",), ("x",)),
        (("before", "moved"), ("moved",)),
    ]


def test_all_terms_of_a_concat_and_its_result_share_one_scale() -> None:
    net = Net()
    a, b = net.conv("x", 4, "a"), net.node("MaxPool", [net.conv("x", 4, "b")], "pooled", kernel_shape=[1, 1])
    joined = net.node("Concat", [a, b, net.constant("k", np.ones((1, 2, 8, 8), np.float32))], "joined", 10, axis=1)
    net.conv(joined, 4, "after")
    assert groups_of(net.graph()) == {frozenset({"x"}), frozenset({"a", "b", "pooled", "joined"})}


def test_branches_that_meet_in_two_concats_share_one_scale() -> None:
    net = Net()
    a, b, c = (net.conv("x", 4, name) for name in "abc")
    net.conv(net.node("Concat", [a, b], "ab", 8, axis=1), 4, "first")
    net.conv(net.node("Concat", [b, c], "bc", 8, axis=1), 4, "second")
    assert groups_of(net.graph("first", "second")) == {frozenset({"x"}), frozenset({"a", "b", "c", "ab", "bc"})}


def test_the_parts_of_a_split_that_layers_read_share_the_scale_of_the_whole() -> None:
    net = Net()
    whole = net.conv("x", 6, "whole")
    split = helper.make_node("Split", [whole], ["left", "right", "idle"], name="split", num_outputs=3, axis=1)
    net.nodes.append(split)
    for name in ("left", "right"):
        net._sizes[name] = 2
        net.conv(name, 2, f"after_{name}")
    graph = net.graph("after_left", "after_right", "idle")
    assert groups_of(graph) == {frozenset({"x"}), frozenset({"whole", "left", "right"})}


def test_a_mover_that_no_layer_reads_is_left_alone() -> None:
    net = Net()
    net.node("MaxPool", [net.node("Relu", [net.conv("x", 4, "only")])], kernel_shape=[2, 2])
    assert groups_of(net.graph()) == {frozenset({"x"})}


def test_layers_that_stay_in_float_ask_for_no_scales() -> None:
    graph = classifier()
    assert groups_of(graph, "second") == {frozenset({"relu_1"})}
    assert plan_for(graph, []).groups == ()


def test_groups_are_disjoint_and_in_the_graph_s_order() -> None:
    net = Net()
    a = net.conv("x", 4, "a")
    pooled = net.node("MaxPool", [a], "pooled", kernel_shape=[1, 1])
    net.node("Add", [net.conv(pooled, 4, "b"), net.conv(a, 4, "c")])
    plan = plan_for(net.graph(), layers_of(net.graph()))
    assert [group.tensors for group in plan.groups] == [("x",), ("a", "pooled")]
    assert plan.groups[1].read == ("a", "pooled")


@pytest.mark.parametrize(
    ("op", "outputs", "attributes", "expected"),
    [
        ("MaxPool", ["y"], {"kernel_shape": [2, 2]}, True),
        ("MaxPool", ["y", "indices"], {"kernel_shape": [2, 2]}, False),
        ("MaxPool", ["y", ""], {"kernel_shape": [2, 2]}, True),
        ("Resize", ["y"], {"mode": "nearest"}, True),
        ("Resize", ["y"], {}, True),
        ("Resize", ["y"], {"mode": "linear"}, False),
        ("AveragePool", ["y"], {"kernel_shape": [2, 2]}, False),
        ("Relu", ["y"], {}, False),
        ("Add", ["y"], {}, False),
    ],
)
def test_movers_choose_or_move_elements_only(
    op: str, outputs: list[str], attributes: dict[str, Any], expected: bool
) -> None:
    assert is_mover(helper.make_node(op, ["x"], outputs, **attributes)) is expected


def test_an_operator_of_another_domain_is_no_mover() -> None:
    assert not is_mover(helper.make_node("Concat", ["x"], ["y"], domain="com.example"))
