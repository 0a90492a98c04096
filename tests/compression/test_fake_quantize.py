"""A quantized network computes what its Q/DQ graph computes, and its gradients are those of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.calibration.calibrate import Job, Options, calibrate
from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import quantize_weight
from cnncc.calibration.quantize import corrected, quantize
from cnncc.calibration.shift import Shift
from cnncc.compression.fake_quantize import QuantizedNetwork, fake_quantize, round_weight
from cnncc.graph.exact import Exact
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from tests.calibration.graphs import Net, classifier, images, stream_of

X = images(6, seed=5)


def residual(batch: Any = 1) -> OnnxGraph:
    """An addition of two tensors, ReLU6, a pool, a concatenation, a product of rows."""
    net = Net(batch, 3, 8, 8, seed=3)
    low, high = net.constant("low", np.float32(0.0)), net.constant("high", np.float32(6.0))
    x = net.node("Relu", [net.conv("x", 8, "first")])
    inner = net.node("Clip", [net.conv(x, 8, "second"), low, high])
    x = net.node("Relu", [net.node("Add", [net.conv(inner, 8, "third"), x], "sum")])
    x = net.node("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Concat", [x, net.node("Relu", [net.conv(x, 4, "fourth", bias=False)])], axis=1, size=12)
    x = net.node("Relu", [net.conv(x, 6, "fifth", kernel=1)])
    net.gemm(net.flat(x), 5, "head", trans=0)
    return net.graph()


def inverted(batch: Any = 1) -> OnnxGraph:
    """A bottleneck whose 1×1 convolutions read what a ReLU gives: shifts, depthwise, and a layer without a bias."""
    net = Net(batch, 3, 8, 8, seed=4)
    x = net.node("Relu", [net.conv("x", 8, "stem")])
    x = net.node("Relu", [net.conv(x, 16, "expand", kernel=1)])
    x = net.node("Relu", [net.conv(x, 16, "depthwise", group=16)])
    x = net.conv(x, 8, "project", kernel=1, bias=False)
    x = net.node("HardSigmoid", [net.conv(x, 6, "last", kernel=1)])
    net.gemm(net.flat(x), 5, "head")
    return net.graph()


def network_of(graph: OnnxGraph, **options: Any) -> tuple[QuantizedNetwork, OnnxGraph]:
    """Return a graph as calibrated, to be trained, and what calibration alone makes of it."""
    table = calibrate(Job(graph, "net", "0.0", stream_of(images(12)), options=Options(**options)))
    prepared, layers = corrected(graph, table)
    made = QuantizedNetwork(prepared, layers, table.scales, table.shifts, float_adds=table.float_adds)
    return made, quantize(graph, table, name="net")


GRAPHS: list[tuple[Callable[[Any], OnnxGraph], dict[str, Any]]] = [
    (classifier, {}),
    (residual, {}),
    (residual, {"float_adds": True}),
    (residual, {"keep": ("net.second", "net.head"), "method": "max"}),
    (inverted, {}),
    (inverted, {"equalize": False, "shift": False}),
]


@pytest.mark.parametrize(("make", "options"), GRAPHS)
@pytest.mark.parametrize("batch", [1, "N"])
def test_the_network_is_its_q_dq_graph(make: Callable[[Any], OnnxGraph], options: dict[str, Any], batch: Any) -> None:
    network, calibrated = network_of(make(batch), **options)
    with torch.no_grad():  # as after training: other weights, other scales
        network.growth += 0.2 * torch.randn(len(network.growth), generator=torch.Generator().manual_seed(0))
        for weight in network.weights:
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    graph = network.quantized()
    assert [node.op_type for node in graph.nodes] == [node.op_type for node in calibrated.nodes]
    # in float64 no sum is near enough to a tie of rounding to be turned by the order of its terms
    with torch.no_grad():
        found = network.double()(torch.from_numpy(X).double()).numpy()
    exact = Exact(graph)
    for row, image in zip(found, X, strict=True):
        [wanted] = exact.run({"x": image[None]}).values()
        np.testing.assert_allclose(row, wanted[0], rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_it_begins_as_calibration_ended() -> None:
    network, calibrated = network_of(inverted(), correct_bias=False)
    assert network._steps  # something is shifted
    graph = network.quantized()
    for name in calibrated.constants:
        if not name.endswith("_shift"):
            np.testing.assert_allclose(graph.constant(name), calibrated.constant(name), rtol=1e-6, err_msg=name)
    assert graph.constants.keys() == calibrated.constants.keys()


def test_with_scales_that_are_powers_of_two_it_is_onnx_runtime_bit_for_bit() -> None:
    net = Net(1, 3, 8, 8)
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        steps = random.integers(-126, 127, shape)
        steps.reshape(shape[0], -1)[:, 0] = 127  # the largest: its channel's scale is 2⁻⁸ then
        return (steps / 256).astype(np.float32)

    x = "x"
    for name, shape, pads in (("a", (8, 3, 3, 3), 1), ("b", (6, 8, 1, 1), 0), ("c", (4, 6, 1, 1), 0)):
        bias = net.constant(f"{name}.bias", (random.integers(-64, 64, shape[0]) / 32).astype(np.float32))
        weight = net.constant(f"{name}.weight", weights(*shape))
        x = net.node("Relu", [net.node("Conv", [x, weight, bias], name, shape[0], pads=[pads] * 4)])
    graph = net.graph()
    layers = layers_of(graph)
    tensors = [group.tensors[0] for group in plan_for(graph, layers).groups]
    scales = {name: 2.0**-5 for name in tensors}
    shifts = {tensors[1]: Shift(100 * 2.0**-6, 2.0**-6), tensors[2]: Shift(30 * 2.0**-6, 2.0**-6)}
    network = QuantizedNetwork(graph, layers, scales, shifts)
    assert network._steps == {tensors[1]: 100.0, tensors[2]: 30.0}
    reference = Reference(network.quantized())
    with torch.no_grad():
        found = network(torch.from_numpy(X)).numpy()
    for row, image in zip(found, X, strict=True):
        [wanted] = reference.run({"x": image[None]}).values()
        np.testing.assert_array_equal(row, wanted[0])
    assert len(np.unique(found)) > 100


@given(st.integers(0, 10_000), st.floats(1e-3, 1.0))
@settings(deadline=None, max_examples=50)
def test_the_gradients_of_rounding_are_those_of_the_paper(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (100 * size * torch.randn(2, 3, 5, generator=generator)).requires_grad_()
    scale = torch.tensor(size, requires_grad=True)
    upstream = torch.randn(2, 3, 5, generator=generator)
    fake_quantize(x, scale).backward(upstream)
    steps = (x / scale).detach()
    inside = (steps >= -128) & (steps <= 127)
    # Esser et al. 2020, equations 3 and 5, and g = 1 / √(N · Q_P)
    slope = torch.where(inside, steps.round() - steps, steps.clamp(-128, 127))
    assert x.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(x.grad, upstream * inside)
    torch.testing.assert_close(scale.grad, (upstream * slope).sum() / (15 * 127) ** 0.5, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10_000), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=50)
def test_weights_are_rounded_as_the_writer_does(seed: int, axis: int) -> None:
    random = np.random.default_rng(seed)
    array = (random.normal(size=(4, 5, 3)) * 10.0 ** random.integers(-6, 6, (4, 1, 1))).astype(np.float32)
    array[1] = 0.0
    integers, scales = quantize_weight(array, axis)
    shape = [-1 if index == axis else 1 for index in range(3)]
    weight = torch.from_numpy(array.copy()).requires_grad_()
    rounded = round_weight(weight, axis)
    np.testing.assert_array_equal(rounded.detach().numpy(), integers * scales.reshape(shape))
    rounded.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_scales_learn_and_stay_positive_whatever_the_step() -> None:
    network, _ = network_of(classifier())
    optimizer = torch.optim.SGD([network.growth], lr=1e3)
    before = network.scales().detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.from_numpy(X)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_([network.growth], 1e-2)
        optimizer.step()
    assert (network.scales() > 0).all()
    assert not torch.equal(network.scales(), before)
    assert not QuantizedNetwork(classifier(), (), {}, learn_scales=False).growth.requires_grad
