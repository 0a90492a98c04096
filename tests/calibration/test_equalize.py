"""Equalization: it preserves the function, evens ranges out, touches nothing else, and is repeatable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cnncc.calibration import equalize as module
from cnncc.calibration.channels import Layer, Site, find_sites
from cnncc.calibration.equalize import (
    LIMIT,
    ROUNDS,
    Equalization,
    apply_equalization,
    equalize,
    relu6_to_relu,
)
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import DataRefused, ModelRefused
from cnncc_runtime.specs import Tensors
from tests.calibration.channel_graphs import Net, channel_graphs

Ranges = dict[str, NDArray[np.float64]]

random_graphs = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(graph: OnnxGraph) -> Tensors:
    return Reference(graph, threads=1).run(random_feeds(graph.inputs, 3))


def measured(graph: OnnxGraph) -> Ranges:
    """Largest absolute activation of each channel of what the sites' consumers read."""
    names = list(dict.fromkeys(name for site in find_sites(graph) for name in site.tensors))
    values = run(graph.with_outputs(names)) if names else {}
    return {name: np.abs(v).max(axis=(0, *range(2, v.ndim))).astype(np.float64) for name, v in values.items()}


def assert_close(graph: OnnxGraph, other: OnnxGraph) -> None:
    before, after = run(graph), run(other)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-4 * max(float(np.abs(value).max()), 1e-6))


def random_scales(graph: OnnxGraph, seed: int, *, spread: int = 6) -> list[Equalization]:
    """Powers of two for every channel of every site."""
    random = np.random.default_rng(seed)
    return [
        Equalization(site, tuple(float(2.0**n) for n in random.integers(-spread, spread + 1, site.channels)), 0)
        for site in find_sites(graph)
    ]


# ---- the function stays


@random_graphs
@given(channel_graphs(), st.integers(0, 2**16))
def test_powers_of_two_at_every_site_leave_every_bit_of_the_outputs(graph: OnnxGraph, seed: int) -> None:
    scaled = apply_equalization(graph, random_scales(graph, seed))
    after = run(scaled)
    for name, value in run(graph).items():
        np.testing.assert_array_equal(after[name], value)


@random_graphs
@given(channel_graphs(), st.booleans())
def test_equalizing_changes_outputs_by_rounding_only(graph: OnnxGraph, with_ranges: bool) -> None:
    equalized, _ = equalize(graph, ranges=measured(graph) if with_ranges else None)
    assert_close(graph, equalized)


@random_graphs
@given(channel_graphs(), st.booleans())
def test_equalizing_again_changes_nothing(graph: OnnxGraph, with_ranges: bool) -> None:
    once, first = equalize(graph, ranges=measured(graph) if with_ranges else None)
    assume(all(1 / LIMIT < scale < LIMIT for each in first for scale in each.scales))
    assume(all(each.rounds < ROUNDS for each in first))
    twice, second = equalize(once, ranges=measured(once) if with_ranges else None)
    assert all(set(each.scales) == {1.0} for each in second)
    assert twice.serialized == once.serialized


@random_graphs
@given(channel_graphs(), st.booleans())
def test_the_record_gives_the_same_graph_even_through_json(graph: OnnxGraph, with_ranges: bool) -> None:
    equalized, done = equalize(graph, ranges=measured(graph) if with_ranges else None)
    table = json.loads(canonical_json([dataclasses.asdict(each) for each in done]))
    assert apply_equalization(graph, [record(entry) for entry in table]).serialized == equalized.serialized


def record(entry: dict[str, Any]) -> Equalization:
    site = entry["site"]
    layers = [tuple(Layer(**layer) for layer in site[side]) for side in ("producers", "consumers")]
    return Equalization(
        Site(*layers, tuple(site["tensors"]), site["channels"]), tuple(entry["scales"]), entry["rounds"]
    )


@given(channel_graphs(), st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_weights_looked_at_in_pieces_give_the_same_scales(graph: OnnxGraph, with_ranges: bool) -> None:
    ranges = measured(graph) if with_ranges else None
    whole = equalize(graph, ranges=ranges)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 1)
        assert equalize(graph, ranges=ranges)[1] == whole


# ---- ranges become even


def bottleneck(seed: int = 0) -> OnnxGraph:
    """Two inverted bottlenecks with a residual sum, and a classifier."""
    net = Net(seed)
    x = net.node("Relu", net.conv("x", 8, 3))
    for _ in range(2):
        wide = net.node("Relu", net.conv(x, 16))
        deep = net.node("Relu", net.conv(wide, 16, 3, groups=16))
        x = net.node("Add", net.conv(deep, 8), x)
    return net.done(net.gemm(net.pooled(x), 10))


def spreads(graph: OnnxGraph) -> list[float]:
    """Range of each tensor's widest channel over that of its narrowest live one."""
    return [float(r.max() / r[r > 0].min()) for r in measured(graph).values()]


def test_pathological_scales_are_undone() -> None:
    graph = bottleneck()
    broken = apply_equalization(graph, random_scales(graph, 1))
    equalized, _ = equalize(broken, ranges=measured(broken))
    healthy, _ = equalize(graph, ranges=measured(graph))
    assert np.median(spreads(broken)) > 500
    assert max(spreads(equalized)) < max(spreads(broken)) / 50
    # where one started from is as good as forgotten
    assert np.median(spreads(equalized)) < 2 * np.median(spreads(healthy))


def test_a_depthwise_convolution_lets_activations_become_equal() -> None:
    net = Net()
    hidden = net.node("Relu", net.conv("x", 16))
    graph = net.done(net.conv(hidden, 16, 3, groups=16))
    assert spreads(graph)[0] > 5
    assert spreads(equalize(graph, ranges=measured(graph))[0])[0] < 1.01


def test_with_ranges_activations_and_columns_are_balanced() -> None:
    """Xiao et al. 2023, equation 4: each channel's activations and weights end with the same relative range."""
    net = Net()
    graph = net.done(net.conv(net.node("Relu", net.conv("x", 12)), 6))
    equalized, _ = equalize(graph, ranges=measured(graph))
    [activations] = measured(equalized).values()
    weights = np.abs(weight_of(equalized, 1)).max(axis=(2, 3))
    columns = (weights / weights.max(axis=1, keepdims=True)).max(axis=0)
    live = activations > 0
    ratio = (activations / columns)[live]
    np.testing.assert_allclose(ratio, ratio[0], rtol=0.01)


def test_a_transposed_convolution_is_balanced_in_the_channels_that_share_a_scale() -> None:
    net = Net()
    graph = net.done(net.transposed(net.node("Relu", net.conv("x", 12)), 6, groups=2))
    equalized, _ = equalize(graph, ranges=measured(graph))
    [activations] = measured(equalized).values()
    node = equalized.nodes[2]
    weights = np.abs(equalized.constant(node.input[1])).max(axis=(2, 3))  # type: ignore[arg-type]
    rows = (weights / weights.max(axis=0)).max(axis=1)
    live = activations > 0
    np.testing.assert_allclose((activations / rows)[live], (activations / rows)[live][0], rtol=0.01)


def test_without_ranges_rows_and_columns_are_balanced() -> None:
    """Nagel et al. 2019, section 4.1: r₁·s = r₂/s."""
    net = Net()
    graph = net.done(net.conv(net.node("Relu", net.conv("x", 12)), 6))
    equalized, _ = equalize(graph)
    rows = np.abs(weight_of(equalized, 0)).max(axis=(1, 2, 3))
    columns = np.abs(weight_of(equalized, 1)).max(axis=(0, 2, 3))
    np.testing.assert_allclose(rows / columns, rows[0] / columns[0], rtol=0.01)


def weight_of(graph: OnnxGraph, number: int) -> NDArray[np.float32]:
    node = [node for node in graph.nodes if node.op_type in ("Conv", "Gemm")][number]
    weight = graph.constant(node.input[1])
    assert weight is not None
    return weight


@pytest.mark.parametrize("with_ranges", [False, True])
def test_dead_channels_keep_their_scale_and_extreme_ones_meet_the_limit(with_ranges: bool) -> None:
    net = Net()
    hidden = net.node("Relu", net.conv("x", 8, bias=False))
    out = net.conv(hidden, 6)
    first, second = (net.constants[net.nodes[n].input[1]] for n in (0, 2))
    first[0] = 0.0  # writes nothing
    second[:, 1] = 0.0  # is not read
    first[2] *= 1e-12
    first[3] *= 1e12
    graph = net.done(out)
    equalized, [done] = equalize(graph, ranges=measured(graph) if with_ranges else None)
    assert done.scales[:2] == (1.0, 1.0)
    assert done.scales[2:4] == (LIMIT, 1 / LIMIT)
    assert_close(graph, equalized)


def test_a_balanced_graph_stays_as_it_is_byte_for_byte() -> None:
    net = Net()
    out = net.conv(net.node("Relu", net.conv("x", 8)), 6)
    for node in (net.nodes[0], net.nodes[2]):
        weight = net.constants[node.input[1]]
        weight[...] = np.sign(weight) * 0.5
    graph = net.done(out)
    equalized, [done] = equalize(graph)
    assert set(done.scales) == {1.0}
    assert equalized.serialized == graph.serialized


def test_only_the_sites_asked_for_are_scaled() -> None:
    graph = bottleneck()
    sites = find_sites(graph)
    equalized, done = equalize(graph, sites[1:2], ranges=measured(graph))
    assert [each.site for each in done] == [sites[1]]
    allowed = {layer.weight for layer in (*sites[1].producers, *sites[1].consumers)}
    names = {node.input[1] for node in graph.nodes if node.op_type in ("Conv", "Gemm")}
    changed = {n for n in names if not np.array_equal(graph.constant(n), equalized.constant(n))}  # type: ignore[arg-type]
    assert changed == allowed


def test_without_ranges_sums_are_left_alone_unless_asked_for() -> None:
    graph = bottleneck()
    sums = [site for site in find_sites(graph) if len(site.producers) > 1]
    assert len(sums) == 1
    assert not {each.site for each in equalize(graph)[1]} & set(sums)
    assert {each.site for each in equalize(graph, sums)[1]} == set(sums)


# ---- where scales pass

PASSING: dict[str, Callable[[Net, str], str]] = {
    "nothing": lambda net, x: x,
    "ReLU": lambda net, x: net.node("Relu", x),
    "leaky ReLU": lambda net, x: net.node("LeakyRelu", x, alpha=0.1),
    "PReLU with a slope a channel": lambda net, x: net.node("PRelu", x, net.constant(net.numbers(4, 1, 1))),
    "a clip from 0 on": lambda net, x: net.node("Clip", x, net.constant(np.float32(0))),
    "max pooling": lambda net, x: net.node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4),
    "average pooling": lambda net, x: net.node("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4),
    "zero padding and a crop": lambda net, x: net.node(
        "MaxPool",
        net.node("Pad", x, net.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1])), shape=(2, 4, 10, 10)),
        shape=(2, 4, 8, 8),
        kernel_shape=[3, 3],
    ),
    "bilinear resizing": lambda net, x: net.node(
        "Resize", x, "", net.constant(np.float32([1, 1, 2, 2])), shape=(2, 4, 16, 16), mode="linear"
    ),
    "a channel shuffle": lambda net, x: net.shuffle(x),
    "a product with constants": lambda net, x: net.node("Mul", x, net.constant(net.numbers(4, 8, 8))),
    "a quotient by a constant": lambda net, x: net.node("Div", x, net.constant(np.float32(3))),
    "a sum with a constant a channel": lambda net, x: net.node("Add", x, net.constant(net.numbers(4, 1, 1))),
    "a constant minus": lambda net, x: net.node("Sub", net.constant(net.numbers(4, 1, 1)), x, shape=(2, 4, 8, 8)),
    "squeeze and excite": lambda net, x: net.gated(x),
    "a concatenation of the image's halves": lambda net, x: net.node(
        "Concat", net.node("Relu", x), net.node("Neg", x), shape=(2, 4, 16, 8), axis=2
    ),
}


@pytest.mark.parametrize("between", PASSING.values(), ids=PASSING)
def test_scales_pass_through(between: Callable[[Net, str], str]) -> None:
    net = Net()
    graph = net.done(net.conv(between(net, net.conv("x", 4)), 3))
    first = graph.nodes[0].input[1]
    assert [site.channels for site in find_sites(graph) if site.producers[0].weight == first] == [4]
    after = run(apply_equalization(graph, random_scales(graph, 0)))
    np.testing.assert_array_equal(next(iter(after.values())), next(iter(run(graph).values())))


BLOCKING: dict[str, Callable[[Net, str], str]] = {
    "ReLU6": lambda net, x: net.node("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6))),
    "a clip from 1": lambda net, x: net.node("Clip", x, net.constant(np.float32(1))),
    "sigmoid": lambda net, x: net.node("Sigmoid", x),
    "hard swish": lambda net, x: net.node("HardSwish", x),
    "SiLU": lambda net, x: net.node("Mul", x, net.node("Sigmoid", x)),
    "a square": lambda net, x: net.node("Mul", x, x),
    "softmax": lambda net, x: net.node("Softmax", x, axis=1),
    "a sum with what is fixed": lambda net, x: net.node("Add", x, "x"),
    "a sum with one number": lambda net, x: net.node("Add", x, net.constant(np.float32(1))),
    "padding with ones": lambda net, x: net.node(
        "Pad",
        x,
        net.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1])),
        net.constant(np.float32(1)),
        shape=(2, 4, 10, 10),
    ),
    "a mean over channels": lambda net, x: net.node("ReduceMean", x, net.constant(np.int64([1])), shape=(2, 1, 8, 8)),
    "a crop filled with a number": lambda net, x: net.node(
        "Resize",
        x,
        net.constant(np.float32([0, 0, 0, 0, 1, 1, 2, 2])),
        net.constant(np.float32([1, 1, 2, 2])),
        shape=(2, 4, 32, 32),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=1.0,
    ),
    "channels that move to the end": lambda net, x: net.node("Transpose", x, perm=[0, 2, 3, 1], shape=(2, 8, 8, 4)),
    "a reshape that mixes channels": lambda net, x: net.reshape(x, 2, 2, 2, 64),
    "its reciprocal": lambda net, x: net.node("Div", net.constant(np.float32(1)), x, shape=(2, 4, 8, 8)),
    "a normalization of instances": lambda net, x: net.node(
        "InstanceNormalization", x, net.constant(net.numbers(4)), net.constant(net.numbers(4))
    ),
}


@pytest.mark.parametrize("between", BLOCKING.values(), ids=BLOCKING)
def test_scales_do_not_pass_through(between: Callable[[Net, str], str]) -> None:
    net = Net()
    graph = net.done(net.conv(between(net, net.conv("x", 4)), 3))
    assert find_sites(graph) == ()
    equalized, done = equalize(graph)
    assert done == ()
    assert equalized.serialized == graph.serialized


def test_rows_that_take_the_place_of_channels_are_not_taken_for_them() -> None:
    net = Net(size=4)
    mean = net.node("ReduceMean", net.conv("x", 4), net.constant(np.int64([1])), shape=(2, 4, 4), keepdims=0)
    assert find_sites(net.done(net.conv(net.reshape(mean, 2, 4, 4, 1), 3))) == ()


def test_what_leaves_the_graph_is_not_scaled() -> None:
    net = Net()
    hidden = net.node("Relu", net.conv("x", 4))
    assert find_sites(net.done(net.conv(hidden, 3), hidden)) == ()


def test_each_channel_before_flatten_owns_its_columns() -> None:
    net = Net(size=4)
    hidden = net.node("Relu", net.conv("x", 6))
    graph = net.done(net.gemm(net.flatten(hidden), 5))
    [site] = find_sites(graph)
    assert site.channels == 6
    scaled = apply_equalization(graph, [Equalization(site, (2.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0)])
    np.testing.assert_array_equal(weight_of(scaled, 1)[:, :16] * 2, weight_of(graph, 1)[:, :16])
    np.testing.assert_array_equal(weight_of(scaled, 1)[:, 16:], weight_of(graph, 1)[:, 16:])


def test_terms_of_a_sum_share_their_scales() -> None:
    net = Net()
    stem = net.node("Relu", net.conv("x", 6))
    total = net.node("Relu", net.node("Add", net.conv(stem, 6), stem))
    [site] = find_sites(net.done(net.conv(total, 3)))
    assert (len(site.producers), len(site.consumers), site.channels) == (2, 2, 6)
    assert site.tensors == (stem, total)


def test_of_a_split_only_the_half_that_a_layer_reads_is_scaled() -> None:
    net = Net()
    left, right = net.split(net.node("Relu", net.conv("x", 6)))
    graph = net.done(net.conv(left, 2), net.node("Sigmoid", right))
    [site] = find_sites(graph)
    assert site.channels == 3
    equalized, _ = equalize(graph)
    np.testing.assert_array_equal(weight_of(equalized, 0)[3:], weight_of(graph, 0)[3:])
    assert not np.array_equal(weight_of(equalized, 0)[:3], weight_of(graph, 0)[:3])


def test_layers_of_a_concatenation_have_sites_of_their_own() -> None:
    net = Net()
    parts = [net.node("Relu", net.conv("x", count)) for count in (2, 4)]
    sites = find_sites(net.done(net.conv(net.concat(*parts, "x"), 3)))
    assert [site.channels for site in sites] == [2, 4]
    assert len({site.consumers for site in sites}) == 1


def test_weights_that_something_else_reads_stay() -> None:
    net = Net()
    out = net.conv(net.node("Relu", net.conv("x", 4)), 4)
    weight = net.nodes[0].input[1]
    assert find_sites(net.done(out, net.node("Abs", weight, shape=(4, 4, 1, 1)))) == ()


def test_a_bias_that_two_layers_share_becomes_two() -> None:
    net = Net()
    first = net.conv("x", 4)
    second = net.conv(net.node("Relu", first), 4)
    net.nodes[2].input[2] = net.nodes[0].input[2]
    graph = net.done(net.conv(net.node("Sigmoid", second), 2))
    scaled = apply_equalization(graph, random_scales(graph, 5))
    assert scaled.nodes[0].input[2] != scaled.nodes[2].input[2]
    np.testing.assert_array_equal(*[next(iter(run(each).values())) for each in (graph, scaled)])


# ---- ReLU6


def relu6_graph(opset: int) -> OnnxGraph:
    net = Net()
    hidden = net.conv("x", 4)
    if opset < 11:
        clipped = net.node("Clip", hidden, min=0.0, max=6.0)
    else:
        clipped = net.node("Clip", hidden, net.constant(np.float32(0)), net.constant(np.float32(6)))
    other = net.node("Clip", net.conv(clipped, 4), min=0.0, max=1.0) if opset < 11 else net.conv(clipped, 4)
    return net.done(other, opset=opset)


@pytest.mark.parametrize("opset", [10, 18])
def test_relu6_becomes_relu_and_opens_a_site(opset: int) -> None:
    graph = relu6_graph(opset)
    opened = relu6_to_relu(graph)
    before, after = ([node.op_type for node in each.nodes] for each in (graph, opened))
    assert (find_sites(graph), len(find_sites(opened))) == ((), 1)
    assert after == ["Relu" if index == 1 else name for index, name in enumerate(before)]
    assert {name for node in opened.nodes for name in node.input} - {"x"} >= set(opened.constants)
    assert relu6_to_relu(opened).serialized == opened.serialized
    run(opened)


# ---- what is refused


def test_a_record_of_another_model_is_refused_by_layer() -> None:
    _, done = equalize(bottleneck())
    net = Net()
    other = net.done(net.conv(net.node("Relu", net.conv("x", 4)), 3))
    with pytest.raises(ModelRefused) as caught:
        apply_equalization(other, done)
    assert any(done[0].site.producers[0].weight in place for place in caught.value.where)
    with pytest.raises(ModelRefused):
        equalize(other, [done[0].site])


@pytest.mark.parametrize(
    "damage",
    [lambda s: s[:-1], lambda s: (0.0, *s[1:]), lambda s: (-1.0, *s[1:]), lambda s: (float("nan"), *s[1:])],
    ids=["one too few", "zero", "negative", "not a number"],
)
def test_damaged_scales_are_refused(damage: Callable[[tuple[float, ...]], tuple[float, ...]]) -> None:
    graph = bottleneck()
    _, done = equalize(graph)
    with pytest.raises(DataRefused, match="scale"):
        apply_equalization(graph, [dataclasses.replace(done[0], scales=damage(done[0].scales))])


@pytest.mark.parametrize(
    "damage",
    [lambda r: r[:-1], lambda r: -1 - r, lambda r: r * np.nan, None],
    ids=["one too few", "negative", "not numbers", "missing"],
)
def test_damaged_ranges_are_refused_by_tensor(damage: Callable[[Any], Any] | None) -> None:
    graph = bottleneck()
    ranges = measured(graph)
    name = next(iter(ranges))
    broken = ranges.pop(name)
    if damage is not None:
        ranges[name] = damage(broken)
    with pytest.raises(DataRefused) as caught:
        equalize(graph, ranges=ranges)
    assert caught.value.where == (name,)


def test_scales_that_overflow_are_refused() -> None:
    net = Net()
    graph = net.done(net.conv(net.node("Relu", net.conv("x", 2)), 2))
    [site] = find_sites(graph)
    with pytest.raises(ModelRefused, match="overflows"):
        apply_equalization(graph, [Equalization(site, (3e38, 1e-38), 0)])
