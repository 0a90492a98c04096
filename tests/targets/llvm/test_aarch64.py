"""int8 engines for AArch64 under qemu: exact to the last bit, with and without instructions for products of int8."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.compiler.audit import audit
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference
from cnncc.targets.base import Engine, Profile
from cnncc.targets.devices import named, resolve_profile
from tests.calibration.graphs import Net, feeds_of, images, scales_for
from tests.qemu.board import Board, build, disassembly, make_board, require
from tests.targets.llvm.test_convolutions import Case
from tests.targets.llvm.test_integers import EXTREMES, LARGEST, Run, check, check_largest, integer_cases

pytestmark = pytest.mark.slow

CPUS = {"cortex-a72": "cortex-a72", "cortex-a76": "cortex-a76", "neoverse-v1": "max"}
"""CPU to build for, without dotprod, with it, and with i8mm → what qemu emulates for it."""

SHAPE = (3, 32, 32)


def profile_of(cpu: str) -> Profile:
    return named(resolve_profile(mtriple="aarch64-linux-gnu", mcpu=cpu))


def with_powers_of_two(graph: OnnxGraph) -> OnnxGraph:
    """Return a quantized graph whose scales are powers of two and whose biases are few bits: float32 errs nowhere."""
    proto = graph.copy_proto()
    scales = {node.input[1] for node in proto.graph.node if node.op_type.endswith("eLinear")}
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(np.exp2(np.rint(np.log2(value))).astype(np.float32), tensor.name))
        elif tensor.name.endswith(".bias"):
            tensor.CopyFrom(numpy_helper.from_array((np.rint(value * 256) / 256).astype(np.float32), tensor.name))
    return with_shapes(OnnxGraph(proto))


@functools.cache
def network() -> OnnxGraph:
    """Return a quantized residual network of every kind of layer, in which every result is exact."""
    net = Net(1, *SHAPE, seed=7)

    def layer(x: str, size: int, name: str, **options: Any) -> str:
        return net.node("Relu", [net.conv(x, size, name, **options)])

    x = layer("x", 24, "stem", strides=[2, 2])
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inner = net.conv(layer(x, 24, "first_a"), 24, "first_b")
    x = net.node("Relu", [net.node("Add", [inner, x])])
    inner = layer(layer(x, 72, "second_a", kernel=1), 72, "second_b", group=72, strides=[2, 2])
    inner = net.conv(inner, 40, "second_c", kernel=1)
    x = net.node("Relu", [net.node("Add", [inner, net.conv(x, 40, "shortcut", kernel=1, strides=[2, 2])])])
    x = layer(x, 64, "grouped", group=2)
    net.gemm(net.flat(x), 10, "head")
    graph = with_shapes(net.graph())
    plan = plan_for(graph, layers_of(graph))
    assert len(plan.layers) == 9
    quantized = insert_qdq(graph, plan, scales_for(graph, plan, feeds_of(images(4, shape=SHAPE))))
    return with_powers_of_two(quantized)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Board]:
    """What each of `CPUS` runs on."""
    require()
    folder = tmp_path_factory.mktemp("board")
    return {cpu: make_board(folder, emulated) for cpu, emulated in CPUS.items()}


@pytest.fixture(scope="module")
def engines(boards: dict[str, Board], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """`network` for each of `CPUS`."""
    return {cpu: build(network(), profile_of(cpu), tmp_path_factory.mktemp(cpu)) for cpu in CPUS}


def runner(board: Board, cpu: str, folder: Path) -> Run:
    return functools.partial(board.run_graph, profile=profile_of(cpu), workdir=folder)


@pytest.mark.parametrize("cpu", CPUS)
def test_a_quantized_network_is_exact(cpu: str, boards: dict[str, Board], engines: dict[str, Engine]) -> None:
    engine = engines[cpu]
    found = audit(network(), engine.layers)
    assert (found.asked, found.fallbacks) == (9, ())
    for feeds in feeds_of(images(3, seed=1, shape=SHAPE)):
        (got,) = boards[cpu].run(engine, network(), [feeds["x"]])
        (want,) = Reference(network()).run(feeds).values()
        assert len(np.unique(want)) == want.size, "a network whose outputs are alike would prove little"
        np.testing.assert_array_equal(got, want)


def test_products_are_what_the_instruction_set_has(engines: dict[str, Engine]) -> None:
    def count(cpu: str, instruction: str) -> int:
        return len(re.findall(rf"\t{instruction}\t", disassembly(engines[cpu].payload)))

    assert count("cortex-a72", "sadalp") > 100
    assert count("cortex-a76", "sdot") > 100
    assert count("neoverse-v1", "smmla") > 100
    assert count("neoverse-v1", "sdot") > 10, "the first layer and the product of one row"
    assert count("cortex-a72", "sdot") == 0
    for cpu in ("cortex-a72", "cortex-a76"):
        assert count(cpu, "smmla") == 0
    for cpu in ("cortex-a76", "neoverse-v1"):
        assert count(cpu, "sadalp") == 0


def test_an_engine_with_dotprod_is_refused_where_there_is_none_and_would_die(
    boards: dict[str, Board], engines: dict[str, Engine], tmp_path: Path
) -> None:
    board, engine = boards["cortex-a72"], engines["cortex-a76"]
    refused = board.runner(board.bundle(tmp_path / "honest", engine, network()), code=3).stderr
    assert "built for: cortex-a76, found: a CPU which lacks dotprod" in refused
    lying = replace(engine, target=replace(engine.target, features=()))
    died = board.runner(board.bundle(tmp_path / "lying", lying, network()), "--bench", "0.1", code=5).stderr
    assert "the engine crashed" in died


def test_an_engine_with_i8mm_is_refused_where_there_is_none_and_would_die(
    boards: dict[str, Board], tmp_path: Path
) -> None:
    profile = named(resolve_profile(mtriple="aarch64-linux-gnu", mcpu="cortex-a76", mattr=["+i8mm"]))
    engine = build(network(), profile, tmp_path / "build")
    board = boards["cortex-a76"]
    refused = board.runner(board.bundle(tmp_path / "honest", engine, network()), code=3).stderr
    assert "built for: cortex-a76, found: a CPU which lacks i8mm" in refused
    honest = set(engine.target.features)
    lying = replace(engine, target=replace(engine.target, features=tuple(sorted(honest - {"i8mm"}))))
    died = board.runner(board.bundle(tmp_path / "lying", lying, network()), "--bench", "0.1", code=5).stderr
    assert "the engine crashed" in died
    (got,) = boards["neoverse-v1"].run(engine, network(), [feeds_of(images(1, seed=1, shape=SHAPE))[0]["x"]])
    (want,) = Reference(network()).run(feeds_of(images(1, seed=1, shape=SHAPE))[0]).values()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize(("of_steps", "of_weights"), LARGEST)
def test_the_largest_sums_are_exact(
    cpu: str, of_steps: str, of_weights: str, boards: dict[str, Board], tmp_path: Path
) -> None:
    check_largest(runner(boards[cpu], cpu, tmp_path), of_steps, of_weights)


@pytest.mark.parametrize("cpu", CPUS)
@given(case=integer_cases(), steps=EXTREMES, weights=EXTREMES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_convolution_of_int8_is_exact(
    cpu: str, case: Case, steps: str, weights: str, seed: int, boards: dict[str, Board], tmp_path: Path
) -> None:
    check(case, runner(boards[cpu], cpu, tmp_path), steps, weights, seed)


MATRICES = {
    "one pair of pixels and of channels": Case(
        1, 1, 8, 2, (1, 2), (1, 1), (1, 1), (0,) * 4, (1, 1), False, False, "none"
    ),
    "odd channels": Case(1, 1, 13, 11, (6, 10), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, False, "relu"),
    "odd rows": Case(1, 1, 24, 40, (7, 7), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, False, "quantized"),
    "rows of 3": Case(1, 1, 24, 16, (5, 3), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "quantized"),
    "rows of 1": Case(1, 1, 16, 16, (9, 1), (3, 1), (1, 1), (1, 0, 1, 0), (1, 1), False, False, "none"),
    "rows of 23": Case(1, 1, 16, 24, (3, 23), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "quantized"),
    "stride 2": Case(1, 1, 24, 40, (15, 17), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), True, False, "quantized"),
    "stride 3 to the right": Case(1, 1, 24, 24, (8, 29), (3, 3), (1, 3), (1, 1, 1, 1), (1, 1), True, False, "none"),
    "dilation": Case(1, 1, 20, 33, (11, 13), (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), False, False, "quantized"),
    "groups": Case(1, 3, 8, 16, (9, 11), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, False, "quantized"),
    "groups of odd channels": Case(1, 4, 6, 10, (8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "none"),
    "1×1": Case(1, 1, 72, 40, (7, 9), (1, 1), (1, 1), (0,) * 4, (1, 1), True, False, "quantized"),
    "1×1 stride 2": Case(1, 1, 40, 24, (9, 9), (1, 1), (2, 2), (0,) * 4, (1, 1), True, False, "relu"),
    "1×1 of odd pixels": Case(1, 1, 24, 10, (3, 5), (1, 1), (1, 1), (0,) * 4, (1, 1), True, False, "none"),
    "padding on one side": Case(1, 1, 17, 9, (6, 8), (2, 4), (1, 1), (1, 0, 0, 3), (1, 1), False, False, "none"),
    "residual": Case(1, 1, 32, 32, (14, 14), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, True, "relu"),
    "batch 2": Case(2, 1, 24, 40, (6, 9), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, True, "quantized"),
    "several chains": Case(1, 1, 111, 40, (5, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "quantized"),
    "many outputs": Case(1, 1, 16, 200, (4, 2), (1, 1), (1, 1), (0,) * 4, (1, 1), False, False, "none"),
}
"""Convolutions that are products of matrices."""


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("extremes", [("random", "random"), ("smallest", "opposite")], ids=["random", "extreme"])
def test_a_product_of_matrices_is_exact(
    name: str, extremes: tuple[str, str], boards: dict[str, Board], tmp_path: Path
) -> None:
    profile, made = named(resolve_profile("graviton3")), []

    def run(graph: OnnxGraph, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        made.append(build(graph, profile, tmp_path))
        return boards["neoverse-v1"].run(made[0], graph, [feeds[spec.name] for spec in graph.inputs])

    check(MATRICES[name], run, *extremes, seed=len(name))
    code = disassembly(made[0].payload)
    assert "\tsmmla\t" in code
    assert "\tsdot\t" not in code


@st.composite
def matrix_cases(draw: Any) -> Case:
    """Draw convolutions of enough pixels and channels that they are products of matrices."""
    case: Case = draw(integer_cases())
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    image = (max(case.image[0], 4), max(case.image[1], 4))
    return replace(case, groups=groups, inputs=draw(st.integers(5, 40)), outputs=draw(st.integers(2, 40)), image=image)


@given(case=matrix_cases(), steps=EXTREMES, weights=EXTREMES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_of_matrices_are_exact_whatever_their_shape(
    case: Case, steps: str, weights: str, seed: int, boards: dict[str, Board], tmp_path: Path
) -> None:
    check(case, runner(boards["neoverse-v1"], "neoverse-v1", tmp_path), steps, weights, seed)
