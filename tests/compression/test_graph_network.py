"""A graph as a module of torch: it computes what ONNX Runtime does, has gradients, and takes batches of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from cnncc.compression.graph_network import GraphNetwork, check_batches
from cnncc.graph.exact import Exact
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import ModelRefused, UnsupportedGraph
from tests.calibration.graphs import Net
from tests.graph.graphs import graph_of, one_node
from tests.graph.test_exact import CONV, ELEMENTWISE, POOLING, RESIZE, TRANSPOSED

UNKNOWN = ("LRN", "Softsign", "ThresholdedRelu", "Selu", "Celu")
"""Operators of the lists that are not trained through."""


def agree(graph: OnnxGraph, tolerance: float = 1e-5) -> None:
    """See that a graph computes in torch what it does in ONNX Runtime, and that inputs and weights get gradients."""
    feeds = random_feeds(graph.inputs, 3)
    network = GraphNetwork(graph)
    tensors = [torch.from_numpy(feeds[spec.name].copy()) for spec in graph.inputs]
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    made = network(*tensors)
    outputs = made if isinstance(made, tuple) else (made,)
    for found, wanted in zip(outputs, Reference(graph).run(feeds).values(), strict=True):
        assert found.dtype == torch.from_numpy(wanted).dtype
        scale = max(float(np.abs(wanted).max()), 1e-3)
        np.testing.assert_allclose(found.detach().numpy() / scale, wanted / scale, atol=tolerance)
    sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
    assert all(tensor.grad is not None for tensor in (*tensors, *network.parameters()) if tensor.requires_grad)


def weighted(operator: str, x: Sequence[int], w: Sequence[int], bias: int, **attributes: Any) -> OnnxGraph:
    """Return a product with constant weights."""
    random = np.random.default_rng(1)
    constants = {"w": random.normal(size=w).astype(np.float32), "b": random.normal(size=bias).astype(np.float32)}
    return one_node(operator, {"x": x}, constants=constants, **attributes)


@pytest.mark.parametrize(("x", "w", "attributes"), CONV)
def test_convolutions_are_onnxs(x: Sequence[int], w: Sequence[int], attributes: Mapping[str, Any]) -> None:
    agree(weighted("Conv", x, w, w[0], **attributes))


@pytest.mark.parametrize(("x", "w", "attributes"), TRANSPOSED)
def test_transposed_convolutions_are_onnxs_or_refused_by_name(
    x: Sequence[int], w: Sequence[int], attributes: Mapping[str, Any]
) -> None:
    graph = weighted("ConvTranspose", x, w, w[1] * attributes.get("group", 1), **attributes)
    pads = attributes.get("pads", [0, 0])
    if {"auto_pad", "output_shape"} & set(attributes) or pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        with pytest.raises(ModelRefused, match=r"'node'.*symmetric padding"):
            agree(graph)
    else:
        agree(graph)


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(("x", "attributes"), POOLING)
def test_pools_are_onnxs(operator: str, x: Sequence[int], attributes: Mapping[str, Any]) -> None:
    counts = {"count_include_pad": 1} if operator == "AveragePool" else {}
    agree(one_node(operator, {"x": x}, **attributes, **counts))
    agree(one_node(operator, {"x": x}, **attributes))


@pytest.mark.parametrize(("operator", "attributes"), ELEMENTWISE, ids=str)
def test_operators_of_one_tensor_are_onnxs_or_refused(operator: str, attributes: Mapping[str, Any]) -> None:
    graph = one_node(operator, {"x": (2, 8, 6, 4)}, **attributes)
    if operator in UNKNOWN:
        with pytest.raises(UnsupportedGraph, match=operator):
            GraphNetwork(graph)
    else:
        agree(graph)


@pytest.mark.parametrize(("mode", "coordinates", "scales"), RESIZE)
def test_images_are_resized_as_onnx_does(mode: str, coordinates: str, scales: Sequence[float]) -> None:
    constants = {"roi": np.float32([]), "scales": np.float32(scales)}
    agree(
        one_node("Resize", {"x": (1, 2, 7, 9)}, constants=constants, mode=mode,
                 coordinate_transformation_mode=coordinates, nearest_mode="floor")
    )  # fmt: skip


def test_products_and_normalizations_are_onnxs() -> None:
    x, c = (2, 6, 5, 4), (6,)
    moments = {"m": np.float32([0.1, 0.2, -0.3, 0.4, 0, 1]), "v": np.float32([0.5, 1, 2, 0.1, 1, 3])}
    agree(one_node("Gemm", {"a": (3, 4), "b": (4, 5), "c": (5,)}, alpha=0.5, beta=2.0))
    agree(one_node("Gemm", {"a": (4, 3), "b": (5, 4)}, transA=1, transB=1))
    agree(one_node("MatMul", {"a": (2, 3, 4), "b": (4, 5)}))
    agree(one_node("BatchNormalization", {"x": x, "s": c, "b": c}, constants=moments, epsilon=1e-3))
    agree(one_node("InstanceNormalization", {"x": x, "s": c, "b": c}))
    agree(one_node("LayerNormalization", {"x": x, "s": (5, 4), "b": (5, 4)}, axis=-2))
    nodes = [
        helper.make_node("GroupNormalization", ["x", "s", "b"], ["n"], num_groups=3),
        helper.make_node("Reshape", ["n", "shape"], ["y"]),  # ONNX infers no shape behind the other
    ]
    agree(graph_of(nodes, {"x": x, "s": c, "b": c}, {"shape": np.int64(x)}, opset=21))
    agree(one_node("Gelu", {"x": x}, opset=20, approximate="tanh"))
    agree(one_node("PRelu", {"x": x}, constants={"slope": np.float32([0.25]).reshape(1, 1, 1)}))


def test_operators_of_several_tensors_are_onnxs() -> None:
    a, b = (2, 3, 4), (3, 1)
    for operator in ("Add", "Sub", "Mul", "Div", "Min", "Max"):
        agree(one_node(operator, {"a": a, "b": b}))
    agree(one_node("Concat", {"a": a, "b": (2, 5, 4)}, axis=1))
    agree(one_node("Clip", {"x": a}, constants={"low": np.float32(-0.5), "high": np.float32(0.25)}))
    agree(one_node("Pow", {"x": a}, constants={"two": np.float32(2.0)}))


@pytest.mark.parametrize(
    ("operator", "constants", "attributes"),
    [
        ("Reshape", {"s": np.int64([0, -1, 2])}, {}),
        ("Squeeze", {"s": np.int64([1])}, {}),
        ("Unsqueeze", {"s": np.int64([0, -1])}, {}),
        ("Expand", {"s": np.int64([1, 3, 1, 1])}, {}),
        ("Slice", {"a": np.int64([1, -3]), "b": np.int64([6, 99]), "along": np.int64([2, 3])}, {}),
        ("Slice", {"a": np.int64([-1]), "b": np.int64([-99]), "along": np.int64([2]), "s": np.int64([-2])}, {}),
        ("Pad", {"p": np.int64([0, 0, 1, 0, 0, 0, 2, 3]), "v": np.float32(0.5)}, {}),
        ("Pad", {"p": np.int64([0, 0, 1, 0, 0, 0, 2, 3])}, {"mode": "reflect"}),
        ("Pad", {"p": np.int64([1, 2]), "v": np.float32(0), "a": np.int64([3])}, {"mode": "edge"}),
        ("Gather", {"i": np.int64([[3, -1], [0, 0]])}, {"axis": 2}),
        ("ReduceMean", {"a": np.int64([2, 3])}, {"keepdims": 0}),
        ("ReduceMax", {"a": np.int64([-1])}, {}),
        ("ReduceSum", {}, {"noop_with_empty_axes": 1}),
        ("Transpose", {}, {"perm": [0, 2, 3, 1]}),
        ("Split", {"s": np.int64([2, 4])}, {"axis": 2}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)  # fmt: skip
def test_shapes_are_onnxs(operator: str, constants: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    outputs = ("y", "z") if operator == "Split" else ("y",)
    agree(one_node(operator, {"x": (2, 1, 6, 4)}, constants=constants, outputs=outputs, **attributes))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space_are_onnxs(mode: str) -> None:
    agree(one_node("DepthToSpace", {"x": (2, 8, 3, 5)}, blocksize=2, mode=mode))
    agree(one_node("SpaceToDepth", {"x": (2, 3, 4, 6)}, blocksize=2))


def test_shapes_that_are_computed_are_followed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=0, end=1),
        helper.make_node("Concat", ["shape", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    agree(graph_of(nodes, {"x": (2, 3, 4)}, {"rest": np.int64([-1])}))


def network_of(batch: Any = 1) -> OnnxGraph:
    """Return a network that flattens by a shape with its batch in it."""
    net = Net(batch, 3, 8, 8)
    x = net.node("MaxPool", [net.node("Relu", [net.conv("x", 4, "first")])], kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Reshape", [x, net.constant("shape", np.int64([1, 64]))], size=64)
    net.gemm(x, 5, "head")
    return net.graph()


def test_a_graph_of_one_image_takes_batches() -> None:
    graph = network_of()
    network, x = GraphNetwork(graph), torch.randn(3, 3, 8, 8)
    check_batches(network, (x,))
    for image, row in zip(x, network(x), strict=True):
        [wanted] = Exact(graph).run({"x": image[None].numpy()}).values()
        np.testing.assert_allclose(row.detach().numpy(), wanted[0], atol=1e-5)


def test_values_are_let_go_of_after_their_last_reader() -> None:
    held: list[int] = []

    class Watched(GraphNetwork):
        def forget(self, name: str, values: dict[str, torch.Tensor]) -> None:
            super().forget(name, values)
            held.append(len(values.keys() - set(self.names)))

    net = Net(1, 3, 8, 8)
    x = skip = net.node("Relu", ["x"])
    for _ in range(6):
        x = net.node("Relu", [net.conv(x, 3)])
    net.node("Add", [x, skip])
    network = Watched(net.graph())
    network(torch.zeros(2, 3, 8, 8))
    assert max(held) <= 3


def test_a_graph_that_mixes_images_is_refused() -> None:
    net = Net(1, 3, 8, 8)
    net.node("Sub", ["x", net.node("ReduceMean", ["x", net.constant("axes", np.int64([0]))])])
    with pytest.raises(ModelRefused, match="something else for a batch") as caught:
        check_batches(GraphNetwork(net.graph()), (torch.randn(2, 3, 8, 8),))
    assert "--input-shape N" in caught.value.hint
    net = Net(1, 3, 8, 8)
    net.node("Reshape", ["x", net.constant("shape", np.int64([3, 64]))])
    with pytest.raises(ModelRefused, match=r"takes no batches: .*'reshape_0'"):
        check_batches(GraphNetwork(net.graph()), (torch.randn(2, 3, 8, 8),))


def test_what_cannot_be_trained_is_listed_by_module() -> None:
    net = Net(1, 3, 8, 8)
    net.node("LRN", [net.node("Round", ["x"], "rounded")], "normal", size=3)
    with pytest.raises(UnsupportedGraph, match="2 operators cannot be trained through: LRN, Round") as caught:
        GraphNetwork(net.graph())
    assert caught.value.where == ("net.rounded (Round)", "net.normal (LRN)")


def test_weights_that_two_layers_share_are_one_parameter_and_come_back_as_one() -> None:
    net = Net(1, 4, 8, 8)
    weight = net.constant("w", net.weights(4, 4, 3, 3))
    x = net.node("Conv", ["x", weight], "one", pads=[1] * 4)
    net.node("Conv", [x, weight], "two", pads=[1] * 4)
    network = GraphNetwork(net.graph())
    assert network.names == ("w",)
    with torch.no_grad():
        network.weights[0].mul_(2.0)
    np.testing.assert_array_equal(network.trained_graph().constant("w"), 2 * net.constants["w"])
    np.testing.assert_array_equal(network.graph.constant("w"), net.constants["w"])
