"""float16 engines for AArch64 under qemu: proven against their own graphs, as `cnncc compile` proves them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from cnncc.compiler.audit import audit
from cnncc.compiler.half import Narrowed, narrow, overflowing
from cnncc.compiler.verify import Verification, verify_engine
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.targets.base import Engine, Profile
from cnncc.targets.devices import named, resolve_profile
from tests.calibration.graphs import Net
from tests.qemu.board import Board, build, disassembly, make_board, require
from tests.targets.conformance import feeds_of
from tests.targets.llvm.test_aot import Machine, built, outputs_of
from tests.targets.llvm.test_blocked_operators import OPERATORS, written
from tests.targets.llvm.test_convolutions import Case, cases
from tests.targets.llvm.test_convolutions import graph_of_case as convolution
from tests.targets.llvm.test_operators import CASES, X, graph_of_case

pytestmark = pytest.mark.slow

Feeds = Mapping[str, NDArray[Any]]
SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    require()
    return make_board(tmp_path_factory.mktemp("board"), "cortex-a76")


def profile() -> Profile:
    return named(resolve_profile("raspberry-pi-5"))


def proven(board: Board, engine: Engine, graph: OnnxGraph, feeds: Feeds) -> Verification:
    """Return what the proof finds of an engine on the board."""

    def run(given: Feeds) -> dict[str, NDArray[Any]]:
        made = board.run(engine, graph, [given[spec.name] for spec in graph.inputs])
        return dict(zip((spec.name for spec in graph.outputs), made, strict=True))

    return proof_of(graph, run, feeds)


def proof_of(graph: OnnxGraph, run: Callable[[Feeds], dict[str, NDArray[Any]]], feeds: Feeds) -> Verification:
    return verify_engine(
        exported=graph, cleaned=graph, torch_run=None, engine_run=run, samples=[dict(feeds)], sample_names=["the one"]
    )


def check(board: Board, graph: OnnxGraph, feeds: Feeds, folder: Path) -> None:
    """Prove what the llvm target makes of a graph in float16."""
    half = narrow(with_shapes(graph), "fp16").graph
    found = proven(board, build(half, profile(), folder), half, feeds)
    assert found.report.passed, found.report.failures


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_its_narrowed_graph_says(name: str, board: Board, tmp_path: Path) -> None:
    graph = graph_of_case(CASES[name])
    check(board, graph, feeds_of(graph), tmp_path / "engine")


@pytest.mark.parametrize("channels", [17, 32])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_on_blocks_computes_what_its_narrowed_graph_says(
    name: str, channels: int, board: Board, tmp_path: Path
) -> None:
    writer = written(OPERATORS[name], channels)
    feeds = {"x": np.random.default_rng(1).standard_normal(writer.shape).astype("float32")}
    check(board, writer.graph(writer.result), feeds, tmp_path / "engine")


@given(case=cases())
@settings(
    max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # always the same: of ever new small outputs, some will once have a lucky floor
def test_a_convolution_computes_what_its_narrowed_graph_says(case: Case, board: Board, tmp_path: Path) -> None:
    graph = convolution(case)
    check(board, graph, random_feeds(graph.inputs), tmp_path / "engine")


def weights(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(4).standard_normal(shape).astype("float32")


WIDE = [1, 40, 9, 11]
LONG_SUMS = {
    "7×7": ("Conv", [WIDE, weights(24, 40, 7, 7)], {"pads": [3] * 4}),
    "7×7 of one channel": ("Conv", [[1, 1, 20, 20], weights(24, 1, 7, 7)], {"strides": [2, 2], "pads": [3] * 4}),
    "11×11 of three channels": ("Conv", [[1, 3, 40, 40], weights(24, 3, 11, 11)], {"strides": [4, 4]}),
    "1×9": ("Conv", [WIDE, weights(24, 40, 1, 9)], {"pads": [0, 4, 0, 4]}),
    "depthwise 11×11": ("Conv", [WIDE, weights(40, 1, 11, 11)], {"group": 40, "pads": [5] * 4}),
    "1×1 of 1000 channels": ("Conv", [[1, 1000, 3, 5], weights(24, 1000, 1, 1)], {}),
    "product of 1001 rows": ("Gemm", [[5, 1001], weights(1001, 70)], {}),
    "mean of many": ("GlobalAveragePool", [[1, 8, 150, 150]], {}),
    "thresholded relu": ("ThresholdedRelu", [X], {"alpha": 0.3}),
}


@pytest.mark.parametrize("name", LONG_SUMS)
def test_long_sums_lose_no_more_than_they_may(name: str, board: Board, tmp_path: Path) -> None:
    graph = graph_of_case(LONG_SUMS[name])
    check(board, graph, feeds_of(graph), tmp_path / "engine")


def test_a_mean_of_more_than_float16_can_hold_is_finite(board: Board, tmp_path: Path) -> None:
    graph = graph_of_case(LONG_SUMS["mean of many"])
    feeds = {name: np.abs(value) * 1000 for name, value in feeds_of(graph).items()}
    assert min(float(value.sum(axis=(2, 3)).min()) for value in feeds.values()) > 65504.0
    check(board, graph, feeds, tmp_path / "engine")


def network(gain: float = 1.0) -> Net:
    """Return a network with most that CNNs have; a layer amplifies, and the next one makes up for it."""
    net = Net(1, *SHAPE, seed=11)

    def layer(x: str, size: int, name: str, **options: Any) -> str:
        return net.node("Relu", [net.conv(x, size, name, **options)])

    x = layer("x", 24, "stem", strides=[2, 2])
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    inner = layer(layer(x, 72, "expand", kernel=1), 72, "depthwise", group=72)
    gate = net.node("GlobalAveragePool", [inner])
    gate = net.node("Sigmoid", [net.conv(layer(gate, 20, "squeeze", kernel=1), 72, "excite", kernel=1)])
    inner = net.conv(net.node("Mul", [inner, gate]), 24, "project", kernel=1)
    x = net.node("Add", [inner, x])
    low = layer(x, 40, "down", strides=[2, 2])
    loud = net.conv(low, 40, "loud", kernel=1)
    low = layer(net.node("Relu", [loud]), 40, "quiet", kernel=1)
    for name, factor in (("loud", gain), ("quiet", 1 / gain)):
        for part in ("weight", "bias"):
            net.constants[f"{name}.{part}"] *= np.float32(factor)
    up = net.node("Resize", [low, "", net.constant("scales", np.array([1, 1, 2, 2], np.float32))], mode="nearest")
    other = net.node("ConvTranspose", [low, net.constant("up.weight", net.weights(40, 16, 2, 2))], "up", 16,
                     strides=[2, 2])  # fmt: skip
    x = layer(net.node("Concat", [x, up, other], size=80, axis=1), 32, "merge")
    net.gemm(net.flat(x), 10, "head")
    return net


def narrowed(gain: float, *, measured: bool) -> tuple[Narrowed, Feeds]:
    graph = with_shapes(network(gain).graph())
    feeds = random_feeds(graph.inputs)
    return narrow(graph, "fp16", overflowing(graph, [feeds]) if measured else ()), feeds


@pytest.fixture(scope="module")
def engine(board: Board, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, OnnxGraph, Feeds]:
    half, feeds = narrowed(1.0, measured=True)
    assert not half.wide
    return build(half.graph, profile(), tmp_path_factory.mktemp("network")), half.graph, feeds


def test_a_network_is_computed_in_float16_throughout(board: Board, engine: tuple[Engine, OnnxGraph, Feeds]) -> None:
    made, graph, feeds = engine
    found = audit(graph, made.layers, "fp16")
    assert (found.asked, found.fallbacks, found.narrowed) == (12, (), ())
    report = proven(board, made, graph, feeds).report
    assert report.passed, report.failures


def test_an_engine_without_the_virtual_machine_computes_the_same(
    engine: tuple[Engine, OnnxGraph, Feeds], tmp_path: Path
) -> None:
    _, graph, feeds = engine
    emulated = ("qemu-aarch64", "-cpu", "cortex-a76")
    machine = Machine("aarch64-linux-gnu", "cortex-a76", emulated, tools=("aarch64-linux-gnu-gcc",))
    machine.require()
    made = built(graph, machine, tmp_path / "net")

    def run(given: Feeds) -> dict[str, NDArray[Any]]:
        return dict(zip((spec.name for spec in graph.outputs), outputs_of(made, graph, machine, given), strict=True))

    report = proof_of(graph, run, feeds).report
    assert report.passed, report.failures


def test_wrong_weights_are_found(board: Board, engine: tuple[Engine, OnnxGraph, Feeds]) -> None:
    made, _, feeds = engine
    other = network()
    other.constants["merge.weight"] *= np.float32(1.03)
    report = proven(board, made, narrow(with_shapes(other.graph()), "fp16").graph, feeds).report
    assert not report.passed


def test_the_products_are_those_of_eight_lanes(engine: tuple[Engine, OnnxGraph, Feeds]) -> None:
    text = disassembly(engine[0].payload)
    eight = len(re.findall(r"\tfmla\t(?:v\d+\.8h, ){2}v\d+\.(?:8h|h\[\d\])", text))
    assert eight > 1000
    assert not re.findall(r"\tfmla\t(?:v\d+\.4s, ){2}v\d+\.s\[", text), "a layer multiplies in float32"


def test_layers_that_overflow_stay_in_float32(board: Board, tmp_path: Path) -> None:
    half, feeds = narrowed(1e5, measured=True)
    assert {name.split()[0] for name in half.wide} >= {"net.loud", "net.quiet"}
    made = build(half.graph, profile(), tmp_path / "engine")
    executed = {node: layer.precision for layer in made.layers for node in layer.nodes}
    assert (executed["loud"], executed["quiet"], executed["merge"]) == ("float32", "float32", "float16")
    report = proven(board, made, half.graph, feeds).report
    assert report.passed, report.failures


def test_without_a_measurement_they_would_overflow(board: Board, tmp_path: Path) -> None:
    half, feeds = narrowed(1e5, measured=False)
    made = build(half.graph, profile(), tmp_path / "engine")
    (got,) = board.run(made, half.graph, list(feeds.values()))
    assert not np.isfinite(got).all()


def test_a_cpu_without_float16_refuses_the_engine(
    board: Board, engine: tuple[Engine, OnnxGraph, Feeds], tmp_path: Path
) -> None:
    made, graph, _ = engine
    old = make_board(board.folder, "cortex-a72")
    refused = old.runner(old.bundle(tmp_path / "bundle", made, graph), code=3).stderr
    assert "fullfp16" in refused
