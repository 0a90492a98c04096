"""The Q/DQ writer: the graph's structure, what it computes, and that onnx and ONNX Runtime take it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from cnncc.calibration.lint import lint
from cnncc.calibration.plan import Plan, layers_of, plan_for, unsupported
from cnncc.calibration.qdq import insert_qdq, quantize_weight
from cnncc.calibration.shift import Shift, shiftable
from cnncc.calibration.thresholds import SMALLEST_SCALE
from cnncc.compiler.export import export
from cnncc.compiler.ingest import Model
from cnncc.compiler.passes.pipeline import clean
from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc_runtime.specs import TensorSpec
from tests.calibration.graphs import (
    Net,
    array_of,
    check,
    classifier,
    fake,
    fake_quantized,
    fake_weight,
    feeds_of,
    images,
    maker_of,
    node_of,
    quantized_value,
    run,
    scale_read,
    scales_for,
)
from tests.graph.graphs import graph_of, one_node

# ---- weights


@settings(deadline=None)
@given(
    arrays_of.arrays(
        np.float32,
        arrays_of.array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.one_of(st.sampled_from([0.0, 2.0**-149, -(2.0**-126), 1e-38, 3e38]), st.floats(-10, 10, width=32)),
    ),
    st.integers(0, 1),
)
def test_a_weight_errs_by_half_its_channel_s_scale_at_most(weight: NDArray[np.float32], axis: int) -> None:
    integers, scales = quantize_weight(weight, axis)
    assert (integers.dtype, scales.dtype) == (np.int8, np.float32)
    assert integers.shape == weight.shape
    assert scales.shape == (weight.shape[axis],)
    assert np.isfinite(scales).all()
    assert (scales >= SMALLEST_SCALE).all()
    assert (np.abs(integers.astype(int)) <= 127).all()
    wide = np.moveaxis(weight, axis, 0).astype(np.float64)
    back = np.moveaxis(integers, axis, 0) * scales.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    assert (np.abs(back - wide) <= scales.reshape(-1, *[1] * (weight.ndim - 1)) * (0.5 + 2.0**-16)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_each_channel_uses_its_whole_range(axis: int) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 5, 3, 3)).astype(np.float32)
    weight *= np.float32(10.0) ** np.arange(weight.shape[axis]).reshape([-1 if i == axis else 1 for i in range(4)])
    integers, _scales = quantize_weight(weight, axis)
    others = tuple(index for index in range(4) if index != axis)
    np.testing.assert_array_equal(np.abs(integers.astype(int)).max(axis=others), 127)
    np.testing.assert_array_equal(fake_weight(weight, axis), _dequantized(weight, axis))


def _dequantized(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    integers, scales = quantize_weight(weight, axis)
    return integers * scales.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])


def test_a_channel_of_zeros_has_a_positive_normal_scale() -> None:
    weight = np.zeros((2, 3), np.float32)
    weight[1] = 1.0
    integers, scales = quantize_weight(weight, 0)
    assert scales[0] == np.float32(SMALLEST_SCALE) > 0
    assert not integers[0].any()


@settings(max_examples=25, deadline=None)
@given(
    arrays_of.arrays(np.float32, (1, 40), elements=st.floats(-100, 100, width=32)),
    st.floats(2.0**-7, 2.0, width=32),
)
def test_onnx_runtime_quantizes_activations_as_the_tests_reference(x: NDArray[np.float32], scale: float) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"),
    ]
    graph = graph_of(nodes, {"x": (1, 40)}, {"s": np.float32(scale), "z": np.int8(0)})
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], fake(x, scale))


# ---- whole graphs


def residual() -> OnnxGraph:
    net = Net()
    trunk = net.node("Relu", [net.conv("x", 4, "stem")], "trunk")
    inner = net.node("Relu", [net.conv(trunk, 4, "branch_1")])
    total = net.node("Relu", [net.node("Add", [net.conv(inner, 4, "branch_2"), trunk], "sum")])
    net.conv(total, 2, "last")
    return net.graph()


def pooled() -> OnnxGraph:
    net = Net()
    before = net.node("Relu", [net.conv("x", 4)], "before")
    net.conv(net.node("MaxPool", [before], "after", kernel_shape=[2, 2], strides=[2, 2]), 4, "last")
    return net.graph()


def concat() -> OnnxGraph:
    net = Net()
    a, b = net.node("Relu", [net.conv("x", 3)], "a"), net.conv("x", 5, "b", kernel=1)
    net.conv(net.node("Concat", [a, b], "joined", 8, axis=1), 4, "last")
    return net.graph()


def depthwise() -> OnnxGraph:
    net = Net()
    net.conv(net.node("Relu", [net.conv("x", 6, "expand", kernel=1)]), 6, "depthwise", group=6)
    return net.graph()


def products() -> OnnxGraph:
    net = Net(2, 6)
    a = net.node("Relu", [net.gemm("x", 5, "transposed")])
    b = net.node("Relu", [net.gemm(a, 4, "plain", trans=0)])
    net.node("MatMul", [b, net.constant("m", net.weights(4, 3))], "product", 3)
    return net.graph()


def transposed() -> OnnxGraph:
    """A transposed convolution, which stays in float, between two that are quantized."""
    net = Net()
    weight = net.constant("w", net.weights(4, 5, 2, 2))
    up = net.node("ConvTranspose", [net.conv("x", 4, "before"), weight], "up", 5, strides=[2, 2])
    net.node("Add", [net.conv(up, 4, "after"), net.conv(up, 4, "beside", kernel=1)])
    return net.graph()


def shared() -> OnnxGraph:
    """One weight for two convolutions."""
    net = Net(1, 4, 6, 6)
    weight = net.constant("w", net.weights(4, 4, 3, 3))
    a = net.node("Conv", ["x", weight], "first", pads=[1] * 4)
    net.node("Conv", [net.node("Relu", [a]), weight], "second", pads=[1] * 4)
    return net.graph()


def two_axes() -> OnnxGraph:
    """One weight for two products, as it is and transposed."""
    net = Net(2, 4)
    weight = net.constant("w", net.weights(4, 4))
    a = net.node("Gemm", ["x", weight], "forward", transB=1)
    net.node("Gemm", [a, weight], "backward")
    return net.graph()


def output_read() -> OnnxGraph:
    """A graph output that a layer reads."""
    net = Net()
    middle = net.node("Relu", [net.conv("x", 4)], "middle")
    net.conv(middle, 2, "last")
    return net.graph("middle", "last")


GRAPHS: dict[str, Callable[[], OnnxGraph]] = {
    make.__name__: make
    for make in (
        *(residual, pooled, concat, depthwise, products, transposed, shared, two_axes, output_read, classifier),
    )
}


def quantized(graph: OnnxGraph, *names: str) -> tuple[OnnxGraph, Plan, dict[str, float]]:
    """Quantize layers, or all of them."""
    plan = plan_for(graph, [layer for layer in layers_of(graph) if not names or layer.node in names])
    scales = scales_for(graph, plan, inputs_of(graph))
    return insert_qdq(graph, plan, scales), plan, scales


def inputs_of(graph: OnnxGraph) -> list[dict[str, NDArray[np.float32]]]:
    shape = graph.inputs[0].shape
    sizes = tuple(size for size in shape if isinstance(size, int))
    assert len(sizes) == len(shape)
    return feeds_of(images(3 * sizes[0], shape=sizes[1:]), sizes[0])


def assert_computes(found: OnnxGraph, graph: OnnxGraph, plan: Plan, scales: dict[str, float]) -> None:
    for feeds in inputs_of(graph):
        expected = fake_quantized(graph, plan, scales, feeds)
        for name, value in run(found, feeds).items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6 * float(np.abs(value).max()))


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_a_quantized_graph_computes_what_fake_quantization_in_numpy_computes(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    before = graph.serialized
    found, plan, scales = quantized(graph)
    check(found)
    assert graph.serialized == before
    assert found.inputs == graph.inputs
    assert found.outputs == graph.outputs
    assert_computes(found, graph, plan, scales)
    feeds = inputs_of(graph)[0]
    exact, rough = run(graph, feeds), run(found, feeds)
    assert any(not np.array_equal(exact[name], rough[name]) for name in exact)


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_with_any_one_layer_in_float_the_rest_computes_the_same(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    names = [layer.node for layer in layers_of(graph)]
    for kept in names:
        if len(names) > 1:
            found, plan, scales = quantized(graph, *(name for name in names if name != kept))
            check(found)
            assert_computes(found, graph, plan, scales)


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_quantizing_is_a_pure_function(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    found, plan, scales = quantized(graph)
    assert insert_qdq(graph, plan, scales).serialized == found.serialized
    assert insert_qdq(make(), plan, dict(reversed(scales.items()))).serialized == found.serialized


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_the_lint_finds_nothing_that_a_target_refuses_or_computes_in_float(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    layers = layers_of(graph)
    floats = [node.name for node in unsupported(graph, layers)]
    for kept in ("", *(layer.node for layer in layers if len(layers) > 1)):
        found, _plan, _scales = quantized(graph, *(layer.node for layer in layers if layer.node != kept))
        problems = [
            str(each) for each in lint(with_shapes(found), floats=[*floats, kept]) if each.rule != "narrow-groups"
        ]
        assert problems == []


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_every_layer_keeps_the_contract(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    found, plan, scales = quantized(graph)
    for layer in plan.layers:
        node = node_of(found, layer.node)
        assert scale_read(found, node.input[0]) == scales[layer.tensor]
        assert quantized_value(found, node.input[0]) == layer.tensor
        dequantize = maker_of(found, node.input[1])
        assert dequantize is not None
        assert dequantize.op_type == "DequantizeLinear"
        [axis] = [entry.i for entry in dequantize.attribute if entry.name == "axis"]
        weight, scale, zero = (found.constant(name) for name in dequantize.input)
        float_weight = graph.constant(layer.weight)
        assert weight is not None
        assert scale is not None
        assert zero is not None
        assert float_weight is not None
        assert (weight.dtype, scale.dtype, zero.dtype) == (np.int8, np.float32, np.int8)
        assert scale.shape == zero.shape == (float_weight.shape[axis],)
        assert axis == layer.axis
        assert not zero.any()
        assert list(node.input[2:]) == list(node_of(graph, layer.node).input[2:])
    assert not {tensor.name for tensor in found.proto.graph.initializer} & {layer.weight for layer in plan.layers}


def test_the_skip_of_a_residual_add_reads_the_pair_of_its_branch() -> None:
    found, _plan, _scales = quantized(residual())
    skip = node_of(found, "sum").input[1]
    assert skip == node_of(found, "branch_1").input[0]
    assert quantized_value(found, skip) == "trunk"
    assert node_of(found, "sum").input[0] == "branch_2"
    quantizers = [node for node in found.nodes if node.op_type == "QuantizeLinear"]
    assert [node.input[0] for node in quantizers].count("trunk") == 1


def test_the_skip_of_a_residual_add_reads_the_float_tensor_where_that_is_wanted() -> None:
    graph = residual()
    plan = plan_for(graph, layers_of(graph), float_adds=True)
    found = insert_qdq(graph, plan, scales_for(graph, plan, feeds_of(images(4))))
    check(found)
    assert list(node_of(found, "sum").input) == ["branch_2", "trunk"]
    assert quantized_value(found, node_of(found, "branch_1").input[0]) == "trunk"
    assert {finding.rule for finding in lint(found)} == {"skip-unquantized"}


def test_a_max_pool_reads_a_pair_and_makes_one_of_the_same_scale() -> None:
    found, _plan, _scales = quantized(pooled())
    pool, last = node_of(found, "after"), node_of(found, "last")
    assert quantized_value(found, pool.input[0]) == "before"
    assert quantized_value(found, last.input[0]) == "after"
    assert scale_read(found, pool.input[0]) == scale_read(found, last.input[0])


def test_a_concat_reads_pairs_and_makes_one_all_of_one_scale() -> None:
    found, _plan, _scales = quantized(concat())
    joined = node_of(found, "joined")
    scales = {scale_read(found, name) for name in (*joined.input, node_of(found, "last").input[0])}
    assert len(scales) == 1
    assert None not in scales


def test_a_transposed_convolution_stays_in_float() -> None:
    graph = transposed()
    found, _plan, _scales = quantized(graph)
    assert list(node_of(found, "up").input) == ["before", "w"]
    assert quantized_value(found, node_of(found, "after").input[0]) == "up"


def test_a_shared_weight_is_stored_once() -> None:
    found, _plan, _scales = quantized(shared())
    assert node_of(found, "first").input[1] == node_of(found, "second").input[1]
    assert [t.name for t in found.proto.graph.initializer if array_of(t).ndim == 4] == ["w_quantized"]


def test_a_weight_read_along_two_axes_is_quantized_along_each() -> None:
    found, _plan, _scales = quantized(two_axes())
    assert node_of(found, "forward").input[1] != node_of(found, "backward").input[1]


def test_a_weight_that_a_float_layer_reads_too_stays() -> None:
    found, _plan, _scales = quantized(shared(), "second")
    assert node_of(found, "first").input[1] == "w"
    assert found.constant("w") is not None


def test_an_output_stays_float_while_its_reader_reads_the_pair() -> None:
    graph = output_read()
    found, _plan, _scales = quantized(graph)
    assert [spec.name for spec in found.outputs] == ["middle", "last"]
    assert quantized_value(found, node_of(found, "last").input[0]) == "middle"
    feeds = inputs_of(graph)[0]
    steps = run(found, feeds)["middle"] / scale_read(found, node_of(found, "last").input[0])
    assert np.abs(steps - np.rint(steps)).max() > 0.1


def test_layers_in_float_read_the_float_tensor_even_where_others_read_the_pair() -> None:
    graph = residual()
    found, _plan, _scales = quantized(graph, "branch_1")
    assert list(node_of(found, "stem").input) == list(node_of(graph, "stem").input)
    net = Net()
    a = net.node("Relu", [net.conv("x", 4, "stem")], "a")
    net.node("Add", [net.conv(a, 4, "int8"), net.conv(a, 4, "fp32")])
    both, _plan, _scales = quantized(net.graph(), "int8")
    assert node_of(both, "fp32").input[0] == "a"
    assert quantized_value(both, node_of(both, "int8").input[0]) == "a"


def test_the_shape_of_a_tensor_is_read_from_the_float_tensor() -> None:
    net = Net(1, 4, 6, 6)
    a = net.node("Relu", [net.conv("x", 4)], "a")
    net.node("Shape", [a], "shape")
    net.conv(a, 4, "last")
    found, _plan, _scales = quantized(net.graph("last", "shape"))
    assert node_of(found, "shape").input[0] == "a"


def test_new_nodes_belong_to_the_module_of_what_they_quantize() -> None:
    found, _plan, _scales = quantized(residual())
    places = {node.name: module_path(node) for node in found.nodes}
    pair = maker_of(found, node_of(found, "branch_1").input[0])
    weight = maker_of(found, node_of(found, "branch_1").input[1])
    assert pair is not None
    assert weight is not None
    assert places[pair.name] == "net.trunk"
    assert places[weight.name] == "net.branch_1"


def test_names_that_the_graph_has_already_are_not_taken_twice() -> None:
    net = Net()
    net.conv(net.conv("x", 3, "x_quantized"), 3, "x_scale")
    found, plan, scales = quantized(net.graph())
    check(found)
    assert_computes(found, net.graph(), plan, scales)


def test_constants_that_only_a_subgraph_reads_stay() -> None:
    """A branch of an If reads values of the graph around it."""
    branches = [
        helper.make_graph(
            [helper.make_node("Mul", ["c", factor], [f"out_{factor}"], name=f"mul_{factor}")],
            factor,
            [],
            [helper.make_tensor_value_info(f"out_{factor}", TensorProto.FLOAT, (1, 2, 4, 4))],
        )
        for factor in ("k1", "k2")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("If", ["choice"], ["y"], name="if", then_branch=branches[0], else_branch=branches[1]),
    ]
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((2, 3, 1, 1)).astype(np.float32),
        "choice": np.array(True),
        "k1": np.float32(3.0),
        "k2": np.float32(5.0),
    }
    graph = graph_of(nodes, {"x": (1, 3, 4, 4)}, constants)
    plan = plan_for(graph, layers_of(graph))
    found = insert_qdq(graph, plan, {"x": 0.02})
    check(found)
    feeds = {"x": images(1, shape=(3, 4, 4))}
    np.testing.assert_allclose(run(found, feeds)["y"], run(graph, feeds)["y"], atol=0.3)


def test_a_plan_without_layers_changes_nothing_that_is_computed() -> None:
    graph = classifier()
    found = insert_qdq(graph, plan_for(graph, []), {})
    assert [node.op_type for node in found.nodes] == [node.op_type for node in graph.nodes]
    feeds = feeds_of(images(1))[0]
    np.testing.assert_array_equal(run(found, feeds)["head"], run(graph, feeds)["head"])


def test_a_tensor_without_elements_beyond_zero_survives() -> None:
    graph = one_node("MatMul", {"x": (2, 3)}, constants={"w": np.zeros((3, 2), np.float32)})
    found = insert_qdq(graph, plan_for(graph, layers_of(graph)), {"x": SMALLEST_SCALE})
    check(found)
    assert not run(found, {"x": np.zeros((2, 3), np.float32)})["y"].any()


# ---- shifts


def shifted_chain() -> OnnxGraph:
    """Layers without padding, that can take a shift up."""
    net = Net(1, 3, 8, 8)
    a = net.node("Relu", [net.conv("x", 6, "first", kernel=1)])
    b = net.node("Relu", [net.conv(a, 4, "second", kernel=1, bias=False)])
    net.gemm(net.flat(b), 3, "head")
    return net.graph()


def shifted_pool(*outputs: str) -> OnnxGraph:
    """Two layers read what a pool makes, another what it reads."""
    net = Net(1, 3, 8, 8)
    before = net.node("Relu", [net.conv("x", 6, "first", kernel=1)], "before")
    after = net.node("MaxPool", [before], "after", kernel_shape=[2, 2], strides=[2, 2])
    made = [net.conv(after, 4, "one", kernel=1), net.conv(after, 4, "two", kernel=1)]
    net.conv(net.node("Add", made), 2, "last", kernel=1)
    net.conv(before, 3, "beside", kernel=1)
    return net.graph("last", "beside", *outputs)


def shifted_output() -> OnnxGraph:
    """What the pool makes is an output of the graph as well."""
    return shifted_pool("after")


def shifted_concat() -> OnnxGraph:
    net = Net(1, 3, 8, 8)
    a, b = (net.node("Relu", [net.conv("x", 4, name, kernel=1)]) for name in ("a", "b"))
    net.conv(net.node("Concat", [a, b], "joined", 8, axis=1), 4, "last", kernel=1)
    return net.graph()


def shifted_up() -> OnnxGraph:
    """A transposed convolution, which stays in float, reads what a pool makes."""
    net = Net(1, 3, 8, 8)
    before = net.node("Relu", [net.conv("x", 4, "first", kernel=1)], "before")
    after = net.node("MaxPool", [before], "after", kernel_shape=[2, 2], strides=[2, 2])
    up = net.node("ConvTranspose", [after, net.constant("w", net.weights(4, 2, 2, 2))], "up", 2, strides=[2, 2])
    net.conv(after, 4, "last", kernel=1)
    return net.graph(up, "last")


@pytest.mark.parametrize("make", [shifted_chain, shifted_pool, shifted_output, shifted_concat, shifted_up])
def test_a_shifted_graph_computes_what_fake_quantization_in_numpy_computes(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    names = [layer.node for layer in layers_of(graph)]
    for kept in ("", *names):
        plan = plan_for(graph, [layer for layer in layers_of(graph) if layer.node != kept])
        scales = scales_for(graph, plan, inputs_of(graph))
        able = shiftable(graph, plan)
        shifts = {
            tensor: Shift(32 * scales[tensor], scales[tensor] / 2)
            for group in plan.groups
            if group.tensors[0] in able
            for tensor in group.tensors
        }
        found = insert_qdq(graph, plan, scales, dict.fromkeys(scales, Shift(1.0, 0.01)) | shifts)
        check(found)
        for feeds in inputs_of(graph):
            expected = fake_quantized(graph, plan, scales, feeds, shifts)
            for name, value in run(found, feeds).items():
                np.testing.assert_allclose(value, expected[name], rtol=0, atol=4e-6 * float(np.abs(value).max()))


# ---- exported modules


class Residual(nn.Module):
    """A ResNet's block between stem and head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class Mobile(nn.Module):
    """Depthwise layers, ReLU6, a concatenation and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.side = nn.Conv2d(3, 4, 3, padding=1)
        self.project = nn.Conv2d(12, 6, 1)
        self.up = nn.ConvTranspose2d(6, 2, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        main = torch.nn.functional.relu6(self.depthwise(torch.nn.functional.relu6(self.expand(x))))
        return self.up(torch.relu(self.project(torch.cat([main, torch.relu(self.side(x))], 1))))


@pytest.fixture(scope="module", params=[Residual, Mobile])
def exported(request: pytest.FixtureRequest) -> OnnxGraph:
    torch.manual_seed(0)
    module = request.param().eval()
    model = Model("net", "net", (TensorSpec("x", (1, 3, 8, 8)),), "", module=module)
    return clean(export(model).graph)[0]


def test_an_exported_module_is_quantized_whole(exported: OnnxGraph) -> None:
    found, plan, scales = quantized(exported)
    check(found)
    assert {layer.module for layer in plan.layers} in (
        {"stem.0", "conv1", "conv2", "head"},
        {"expand", "depthwise", "side", "project"},
    )
    assert_computes(found, exported, plan, scales)


def test_an_exported_module_shares_pairs_and_scales(exported: OnnxGraph) -> None:
    found, plan, _scales = quantized(exported)
    modules = {layer.module: node_of(found, layer.node) for layer in plan.layers}
    quantizers = [node.input[0] for node in found.nodes if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(set(quantizers))
    if "conv1" in modules:
        [add] = [node for node in found.nodes if node.op_type == "Add"]
        [pool] = [node for node in found.nodes if node.op_type == "MaxPool"]
        assert modules["conv1"].input[0] in add.input
        assert scale_read(found, pool.input[0]) == scale_read(found, modules["conv1"].input[0])
    else:
        [concat] = [node for node in found.nodes if node.op_type == "Concat"]
        assert {scale_read(found, name) for name in concat.input} == {scale_read(found, modules["project"].input[0])}
