"""``auto``: the threshold by whose int8 the layers that read a tensor compute best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.calibration.choose import choose
from cnncc.calibration.histogram import Histogram
from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.calibration.thresholds import scale_of
from cnncc.graph.onnx_graph import OnnxGraph
from tests.calibration.graphs import Array, Net, classifier, feeds_of, images, run


def one_layer(weight: Array) -> OnnxGraph:
    net = Net(1, *weight.shape[1:2], 6, 6)
    net.node("Conv", ["x", net.constant("w", weight)], "conv", weight.shape[0])
    return net.graph()


def noise(graph: OnnxGraph, scale: float, x: Array) -> float:
    """Squared error of a quantized graph's output."""
    quantized = insert_qdq(graph, plan_for(graph, layers_of(graph)), {"x": scale})
    return sum(float(((run(quantized, f)["conv"] - run(graph, f)["conv"]) ** 2).sum()) for f in feeds_of(x))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.floats(0.02, 1.5), min_size=1, max_size=4, unique=True))
def test_the_threshold_with_the_least_noise_in_the_layer_s_output_is_chosen(seed: int, parts: list[float]) -> None:
    random = np.random.default_rng(seed)
    graph = one_layer(random.standard_normal((3, 2, 3, 3)).astype(np.float32))
    x = random.laplace(size=(3, 2, 6, 6)).astype(np.float32)
    thresholds = {f"m{index}": part * float(np.abs(x).max()) for index, part in enumerate(parts)}
    plan = plan_for(graph, layers_of(graph))
    chosen = choose(graph, plan, {"x": thresholds}, feeds_of(x))
    measured = {method: noise(graph, scale_of(threshold), x) for method, threshold in thresholds.items()}
    assert list(chosen) == ["x"]
    near = [method for method, t in thresholds.items() if abs(t / thresholds[chosen["x"]] - 1) < 0.011]
    assert measured[chosen["x"]] <= min(measured.values()) * (1 + 1e-4) or len(near) > 1


def test_what_matters_is_what_the_layer_computes_not_what_the_tensor_holds() -> None:
    """Outliers in a channel that no weight reads are clipped; the same outliers, read, are kept."""
    x = images(4, shape=(2, 6, 6))
    x[:, 0] *= 50.0
    deaf = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)
    deaf[:, 0] = 0.0
    keen = deaf.copy()
    keen[:, 0] = 1.0
    thresholds = {"max": float(np.abs(x).max()), "small": float(np.abs(x[:, 1]).max())}
    for weight, expected in ((deaf, "small"), (keen, "max")):
        graph = one_layer(weight)
        plan = plan_for(graph, layers_of(graph))
        assert choose(graph, plan, {"x": thresholds}, feeds_of(x)) == {"x": expected}


def test_all_layers_that_read_a_group_have_a_say() -> None:
    """One reader hears only the quiet channel, the other only the loud one; the loud one loses more by clipping."""
    net = Net(1, 2, 6, 6)
    for name, kept in (("quiet", 1), ("loud", 0)):
        weight = net.weights(3, 2, 3, 3)
        weight[:, 1 - kept] = 0.0
        net.node("Conv", ["x", net.constant(f"{name}.w", weight)], name, 3)
    graph = net.graph("quiet", "loud")
    x = images(4, shape=(2, 6, 6))
    x[:, 0] *= 30.0
    plan = plan_for(graph, layers_of(graph))
    thresholds = {"small": float(np.abs(x[:, 1]).max()), "max": float(np.abs(x).max())}
    assert choose(graph, plan, {"x": thresholds}, feeds_of(x)) == {"x": "max"}
    alone = plan_for(graph, [layer for layer in layers_of(graph) if layer.node == "quiet"])
    assert choose(graph, alone, {"x": thresholds}, feeds_of(x)) == {"x": "small"}


def test_where_methods_agree_the_first_is_taken() -> None:
    graph = one_layer(np.ones((1, 2, 3, 3), np.float32))
    plan = plan_for(graph, layers_of(graph))
    x = images(1, shape=(2, 6, 6))
    same = {"max": 1.0, "percentile": 0.995, "mse": 1.004}
    assert choose(graph, plan, {"x": same}, feeds_of(x)) == {"x": "max"}
    zero = {"entropy": 0.0, "max": 0.0}
    assert choose(graph, plan, {"x": zero}, feeds_of(0 * x)) == {"x": "entropy"}


@pytest.mark.parametrize("batch", [1, 3])
def test_every_group_of_a_network_gets_one_of_its_candidates(batch: int) -> None:
    graph, x = classifier(batch), images(6)
    before = graph.serialized
    plan = plan_for(graph, layers_of(graph))
    largest = {}
    for group in plan.groups:
        value = x if group.read[0] == "x" else run(graph.with_outputs(group.read), feeds_of(x, batch)[0])[group.read[0]]
        largest[group.tensors[0]] = Histogram.of(value).largest
    candidates = {name: {"max": most, "half": most / 2, "tiny": most / 100} for name, most in largest.items()}
    chosen = choose(graph, plan, candidates, feeds_of(x, batch))
    assert list(chosen) == [group.tensors[0] for group in plan.groups]
    assert set(chosen.values()) <= {"max", "half"}
    assert choose(graph, plan, candidates, feeds_of(x, batch)) == chosen
    assert graph.serialized == before


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_every_kind_of_layer_can_be_tried(op: str) -> None:
    net = Net(2, 4)
    net.node(op, ["x", net.constant("w", net.weights(4, 3))], "y", 3)
    graph, x = net.graph(), images(4, shape=(4,))
    plan = plan_for(graph, layers_of(graph))
    candidates = {"x": {"tiny": 1e-3, "max": float(np.abs(x).max())}}
    assert choose(graph, plan, candidates, feeds_of(x, 2)) == {"x": "max"}
