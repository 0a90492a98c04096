"""Bias correction: it gives back a shift that quantizing causes, in order, and only where that helps."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from cnncc.calibration.bias_correction import add_to_biases, bias_deltas
from cnncc.calibration.judge import Judge
from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.graph.onnx_graph import OnnxGraph
from tests.calibration.graphs import Array, Net, check, classifier, feeds_of, images, node_of, run, scales_for
from tests.graph.graphs import graph_of


def biased(batch: int = 1, *, bias: bool = True, seed: int = 0, depth: int = 1) -> OnnxGraph:
    """Layers that read positive activations by weights much smaller than their channel's largest.

    The small weights are rounded to zero: what they add up to is missing on every sample.
    """
    net = Net(batch, 4, 6, 6, seed=seed)
    x = "x"
    for number in range(depth):
        weight = net.random.uniform(0.1, 0.3, (4, 4, 3, 3)).astype(np.float32)
        weight[:, 0, 0, 0] = 100.0
        extra = [net.constant(f"b{number}", net.weights(4) + 1)] if bias else []
        conv = net.node("Conv", [x, net.constant(f"w{number}", weight), *extra], f"conv{number}", 4, pads=[1] * 4)
        x = net.node("Relu", [conv], f"relu{number}")
    return net.graph()


def positive(count: int, *, shape: tuple[int, ...] = (4, 6, 6)) -> Array:
    x = np.abs(images(count, shape=shape))
    x[:, 0] *= 0.01
    return x


def quantized(graph: OnnxGraph, feeds: list[dict[str, Array]]) -> OnnxGraph:
    plan = plan_for(graph, layers_of(graph))
    return insert_qdq(graph, plan, scales_for(graph, plan, feeds))


def corrected(graph: OnnxGraph, feeds: list[dict[str, Array]]) -> OnnxGraph:
    deltas = bias_deltas(graph, quantized(graph, feeds), layers_of(graph), feeds)
    plan = plan_for(graph, layers_of(graph))
    scales = scales_for(graph, plan, feeds)
    return insert_qdq(add_to_biases(graph, plan.layers, deltas), plan, scales)


def shift(graph: OnnxGraph, other: OnnxGraph, name: str, feeds: list[dict[str, Array]]) -> Array:
    """Mean difference of each channel, over samples."""
    difference = [run(other, f)[name] - run(graph, f)[name] for f in feeds]
    return np.concatenate(difference).mean(axis=(0, 2, 3))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_of_the_mean_is_given_back(batch: int, bias: bool) -> None:
    graph, feeds = biased(batch, bias=bias), feeds_of(positive(8), batch)
    before, after = quantized(graph, feeds), corrected(graph, feeds)
    check(after)
    lost = np.abs(shift(graph, before, "relu0", feeds))
    assert lost.max() > 0.3
    assert np.abs(shift(graph, after, "relu0", feeds)).max() < 0.05 * lost.max()
    judge = Judge(graph, feeds)
    assert judge.sqnr(after) > judge.sqnr(before) + 4


def test_a_layer_s_delta_is_the_mean_error_of_its_channels() -> None:
    graph, feeds = biased(), feeds_of(positive(8))
    rough = quantized(graph, feeds)
    deltas = bias_deltas(graph, rough, layers_of(graph), feeds)
    exact = graph.with_outputs(["conv0"])
    errors = [run(exact, f)["conv0"] - run(_with_output(rough, "conv0"), f)["conv0"] for f in feeds]
    np.testing.assert_allclose(deltas["conv0"], np.concatenate(errors).mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert deltas["conv0"].dtype == np.float32


def _with_output(graph: OnnxGraph, name: str) -> OnnxGraph:
    proto = graph.copy_proto()
    del proto.graph.output[:]
    proto.graph.output.add().CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 6]))
    return OnnxGraph(proto)


def test_a_layer_without_a_bias_gets_one() -> None:
    graph, feeds = biased(bias=False), feeds_of(positive(4))
    assert len(node_of(graph, "conv0").input) == 2
    after = corrected(graph, feeds)
    node = node_of(after, "conv0")
    added = after.constant(node.input[2])
    assert added is not None
    assert added.shape == (4,)
    assert added.dtype == np.float32


def test_the_second_layer_is_measured_on_what_the_corrected_first_gives() -> None:
    graph, feeds = biased(depth=2), feeds_of(positive(8))
    rough = quantized(graph, feeds)
    layers = layers_of(graph)
    deltas = bias_deltas(graph, rough, layers, feeds)
    assert set(deltas) == {"conv0", "conv1"}
    # by hand: the first layer corrected, the second's error measured on that graph
    plan = plan_for(graph, layers)
    half = insert_qdq(add_to_biases(graph, layers, {"conv0": deltas["conv0"]}), plan, scales_for(graph, plan, feeds))
    errors = [
        run(graph.with_outputs(["conv1"]), f)["conv1"] - run(_with_output(half, "conv1"), f)["conv1"] for f in feeds
    ]
    by_hand = np.concatenate(errors).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(deltas["conv1"], by_hand, rtol=1e-3, atol=1e-3)
    at_once = bias_deltas(graph, rough, layers[1:], feeds)
    assert np.abs(at_once["conv1"] - by_hand).max() > 20 * np.abs(deltas["conv1"] - by_hand).max()


def test_no_correction_is_made_where_errors_have_no_mean() -> None:
    graph, feeds = biased(), feeds_of(positive(8))
    assert bias_deltas(graph, graph, layers_of(graph), feeds) == {}


def test_no_correction_is_made_of_what_half_of_the_samples_contradicts() -> None:
    """The quantized graph errs to one side on the first samples, to the other on the rest."""
    net = Net(1, 2, 4, 4)
    net.node("Conv", ["x", net.constant("w", net.weights(2, 2, 1, 1))], "conv", 2)
    graph = net.graph()
    sign = Net(1, 2, 4, 4)
    sign.constants, sign._sizes = dict(net.constants), dict(net._sizes)
    moved = sign.node("Add", ["x", sign.node("Sign", ["x"])], "moved")
    sign.node("Conv", [moved, "w"], "conv", 2)
    x = np.ones((8, 2, 4, 4), np.float32)
    layers = layers_of(graph)
    assert bias_deltas(graph, sign.graph(), layers, feeds_of(x)) != {}
    x[4:] = -1.0
    assert bias_deltas(graph, sign.graph(), layers, feeds_of(x)) == {}


def test_one_sample_says_nothing() -> None:
    """There is no other half to confirm what it shows."""
    graph, feeds = biased(), feeds_of(positive(1))
    assert bias_deltas(graph, quantized(graph, feeds), layers_of(graph), feeds) == {}


def test_the_graphs_given_stay_as_they_are() -> None:
    graph, feeds = classifier(), feeds_of(images(4))
    rough = quantized(graph, feeds)
    before = graph.serialized, rough.serialized
    deltas = bias_deltas(graph, rough, layers_of(graph), feeds)
    add_to_biases(graph, layers_of(graph), deltas)
    assert (graph.serialized, rough.serialized) == before
    again = bias_deltas(graph, rough, layers_of(graph), feeds)
    assert deltas.keys() == again.keys()
    assert all(np.array_equal(deltas[name], again[name]) for name in deltas)


@pytest.mark.parametrize("batch", [1, 2, "N"])
def test_branches_joins_and_several_outputs_are_carried_from_piece_to_piece(batch: int | str) -> None:
    net = Net(batch, 3, 6, 6)
    trunk = net.node("Relu", [net.conv("x", 4, "stem")], "trunk")
    inner = net.node("Relu", [net.conv(trunk, 4, "a")])
    total = net.node("Relu", [net.node("Add", [net.conv(inner, 4, "b"), trunk], "sum")], "total")
    side = net.conv("x", 4, "side", kernel=1)
    joined = net.node("Concat", [total, net.node("MaxPool", [side], kernel_shape=[1, 1])], "joined", 8, axis=1)
    net.gemm(net.flat(joined), 3, "head")
    net.node("Softmax", ["head"], "share")
    graph = net.graph("share", "trunk", "side")
    feeds = feeds_of(images(6, shape=(3, 6, 6)), 2 if batch == 2 else 1)
    deltas = bias_deltas(graph, quantized(graph, feeds), layers_of(graph), feeds)
    assert set(deltas) <= {"stem", "a", "b", "side", "head"}
    for name, delta in deltas.items():
        assert delta.shape == ((3,) if name == "head" else (4,))
        assert np.isfinite(delta).all()


def test_a_product_that_has_no_place_for_a_bias_is_left_alone() -> None:
    net = Net(2, 4)
    net.gemm(net.node("MatMul", ["x", net.constant("m", net.weights(4, 4))], "product"), 3, "head")
    graph, feeds = net.graph(), feeds_of(images(8, shape=(4,)), 2)
    assert "product" not in bias_deltas(graph, quantized(graph, feeds), layers_of(graph), feeds)


def test_a_bias_that_two_layers_share_is_corrected_for_each() -> None:
    net = Net(1, 3, 4, 4)
    bias = net.constant("b", net.weights(3))
    for name in ("one", "two"):
        net.node("Conv", ["x", net.constant(f"w_{name}", net.weights(3, 3, 1, 1)), bias], name)
    graph = net.graph("one", "two")
    layers = layers_of(graph)
    found = add_to_biases(graph, layers, {"one": np.float32([1, 2, 3])})
    feeds = {"x": images(1, shape=(3, 4, 4))}
    before, after = run(graph, feeds), run(found, feeds)
    np.testing.assert_allclose(
        after["one"] - before["one"],
        np.broadcast_to(np.float32([1, 2, 3]).reshape(1, 3, 1, 1), (1, 3, 4, 4)),
        atol=1e-6,
    )
    np.testing.assert_array_equal(after["two"], before["two"])


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1,), (2, 1)])
def test_a_bias_of_any_shape_that_a_gemm_takes_can_be_added_to(shape: tuple[int, ...]) -> None:
    net = Net(2, 4)
    bias = net.constant("c", np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    net.node("Gemm", ["x", net.constant("w", net.weights(3, 4)), bias], "y", 3, transB=1)
    graph = net.graph()
    delta = np.float32([1, -2, 3])
    found = add_to_biases(graph, layers_of(graph), {"y": delta})
    check(found)
    feeds = {"x": images(2, shape=(4,))}
    np.testing.assert_allclose(run(found, feeds)["y"] - run(graph, feeds)["y"], np.tile(delta, (2, 1)), atol=1e-6)


def test_no_deltas_change_nothing() -> None:
    graph = classifier()
    assert [t.name for t in add_to_biases(graph, layers_of(graph), {}).proto.graph.initializer] == [
        t.name for t in graph.proto.graph.initializer
    ]


def test_a_subgraph_s_own_values_are_no_inputs_of_a_piece() -> None:
    """A branch of an If computes in two steps on what a layer made."""
    branches = [
        helper.make_graph(
            [
                helper.make_node("Mul", ["c", "k"], [f"inner_{name}"], name=f"mul_{name}"),
                helper.make_node("Add", [f"inner_{name}", "k"], [f"out_{name}"], name=f"add_{name}"),
            ],
            name,
            [],
            [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, (1, 3, 4, 4))],
        )
        for name in ("yes", "no")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("If", ["choice"], ["i"], name="if", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Conv", ["i", "w"], ["y"], name="last"),
    ]
    weight = np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)
    graph = graph_of(nodes, {"x": (1, 3, 4, 4)}, {"w": weight, "choice": np.array(True), "k": np.float32(2.0)})
    feeds = feeds_of(images(4, shape=(3, 4, 4)))
    plan = plan_for(graph, layers_of(graph))
    rough = insert_qdq(graph, plan, {"x": 0.05, "i": 0.1})
    assert set(bias_deltas(graph, rough, plan.layers, feeds)) <= {"conv", "last"}
