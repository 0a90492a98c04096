"""The proof of half-precision engines: right ones round elsewhere than the reference, wrong ones compute other things.

No machine here computes in half precision, so engines are other evaluations of the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cnncc.compiler.half import narrow
from cnncc.compiler.verify import (
    Run,
    Verification,
    first_divergence,
    random_samples,
    verify_bundle,
    verify_engine,
    verify_layers,
)
from cnncc.graph.half import emulated, half_types
from cnncc.graph.names import set_module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference
from cnncc_runtime.bundle import GOLDEN, REFERENCE, SCHEMA, Bundle, EngineRecord, Manifest, TargetRecord, write_bundle
from cnncc_runtime.golden import check_golden, read_golden
from tests.compiler.test_half import quantized_graph
from tests.targets.conformance import graph_of

PRECISIONS = ["fp16", "bf16"]
DEPTH = 4


def network() -> OnnxGraph:
    """Return four convolutions, a bounded ReLU behind each, the last one added to what it read, and a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def constant(name: str, array: NDArray[np.float64]) -> str:
        weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    low, high = constant("low", np.array(0.0)), constant("high", np.array(2.0))
    value, channels = "x", 3
    for number in range(DEPTH):
        w = constant(f"w{number}", rng.standard_normal((16, channels, 3, 3)) * np.sqrt(2 / (9 * channels)))
        b = constant(f"b{number}", rng.standard_normal(16) * 0.5)
        nodes.append(helper.make_node("Conv", [value, w, b], [f"c{number}"], f"conv{number}", pads=[1] * 4))
        nodes.append(helper.make_node("Clip", [f"c{number}", low, high], [f"r{number}"], f"relu{number}"))
        if number == DEPTH - 1:
            nodes.append(helper.make_node("Add", [value, f"r{number}"], [f"a{number}"], f"add{number}"))
        value, channels = nodes[-1].output[0], 16
    nodes.append(helper.make_node("MaxPool", [value], ["p"], "pool", kernel_shape=[4, 4], strides=[4, 4]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flatten"))
    head, bias = constant("w", rng.standard_normal((10, 256)) / 16), constant("b", rng.standard_normal(10) / 4)
    nodes.append(helper.make_node("Gemm", ["f", head, bias], ["y"], "classifier", transB=1))
    for node in nodes:
        set_module_path(node, node.name)
    return with_shapes(graph_of(nodes, {"x": [1, 3, 16, 16]}, {"y": [1, 10]}, weights))


@pytest.fixture(scope="module", params=PRECISIONS)
def narrowed(request: pytest.FixtureRequest) -> OnnxGraph:
    return narrow(network(), request.param).graph


def kind_of(graph: OnnxGraph) -> int:
    [kind] = half_types(graph)
    return kind


# ---- right engines


def rounded_everywhere(graph: OnnxGraph) -> OnnxGraph:
    return emulated(graph, seed=77)


def rounded_nowhere(graph: OnnxGraph) -> OnnxGraph:
    """Return an engine that keeps float32 between the graph's inputs and outputs: every rounding goes."""
    return rounded_at(graph, lambda _number: False)


def rounded_here_and_there(graph: OnnxGraph) -> OnnxGraph:
    """Return an engine that fuses some operators."""
    return rounded_at(graph, lambda number: number % 3 > 0)


def rounded_at(graph: OnnxGraph, keep: Callable[[int], bool]) -> OnnxGraph:
    proto = emulated(graph).copy_proto()
    roundings = [node for node in proto.graph.node if node.op_type == "Cast" and node.attribute[0].i in (10, 16)]
    for number, node in enumerate(roundings):
        if not keep(number):
            node.attribute[0].i = TensorProto.FLOAT
    return OnnxGraph(proto)


def summed_in_pieces(graph: OnnxGraph) -> OnnxGraph:
    """Return an engine whose convolutions are sums over a few channels each, rounded one after another."""
    proto = emulated(graph).copy_proto()
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "Conv" or weights[node.input[1]].shape[1] < 16:
            nodes.append(node)
            continue
        total = ""
        for first in range(0, 16, 2):
            part, piece = f"{node.output[0]}_{first}", weights[node.input[1]].copy()
            piece[:, :first] = piece[:, first + 2 :] = 0
            proto.graph.initializer.append(numpy_helper.from_array(piece, f"{part}_w"))
            inputs = [node.input[0], f"{part}_w", *([] if total else node.input[2:])]
            nodes.append(helper.make_node("Conv", inputs, [part], pads=[1] * 4))
            if total:
                nodes.append(helper.make_node("Add", [total, part], [f"{part}_sum"]))
                part = f"{part}_sum"
            nodes.append(helper.make_node("Cast", [part], [f"{part}_half"], to=kind_of(graph)))
            nodes.append(helper.make_node("Cast", [f"{part}_half"], [f"{part}_float"], to=TensorProto.FLOAT))
            total = f"{part}_float"
        nodes.append(helper.make_node("Identity", [total], [node.output[0]]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name not in read]:
        proto.graph.initializer.remove(tensor)
    return OnnxGraph(proto)


RIGHT = [rounded_everywhere, rounded_nowhere, rounded_here_and_there]


def verify(graph: OnnxGraph, engine: Run) -> tuple[str, ...]:
    feeds, names = random_samples(graph.inputs)
    return verify_engine(
        exported=graph, cleaned=graph, torch_run=None, engine_run=engine, samples=feeds, sample_names=names
    ).report.failures


@pytest.mark.parametrize("engine", RIGHT, ids=lambda engine: engine.__name__)
def test_engines_that_round_elsewhere_pass(narrowed: OnnxGraph, engine: Callable[[OnnxGraph], OnnxGraph]) -> None:
    assert verify(narrowed, Reference(engine(narrowed)).run) == ()
    layers = verify_layers(
        narrowed, lambda part: Reference(engine(part)).run, random_samples(narrowed.inputs)[0][0]
    )  # fmt: skip
    assert first_divergence(layers) is None


def test_engines_that_sum_in_float16_pass() -> None:
    graph = narrow(network(), "fp16").graph
    assert verify(graph, Reference(summed_in_pieces(graph)).run) == ()


def test_onnx_runtimes_own_float16_passes() -> None:
    graph = narrow(network(), "fp16").graph
    assert verify(graph, Reference(graph).run) == ()


# ---- wrong engines


def changed(graph: OnnxGraph, name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> OnnxGraph:
    proto = graph.copy_proto()
    [tensor] = [tensor for tensor in proto.graph.initializer if tensor.name.startswith(f"{name}_")]
    dtype = numpy_helper.to_array(tensor).dtype
    array = change(numpy_helper.to_array(tensor).astype(np.float32)).astype(dtype)
    tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.tobytes(), raw=True))
    return OnnxGraph(proto)


def channel_off(graph: OnnxGraph, share: float, layer: str = "w2") -> OnnxGraph:
    def change(array: NDArray[np.float32]) -> NDArray[np.float32]:
        array = array.copy()
        array[int(np.argmax(np.abs(array).sum(axis=tuple(range(1, array.ndim)))))] *= 1 + share
        return array

    return changed(graph, layer, change)


def relu_without_bound(graph: OnnxGraph) -> OnnxGraph:
    proto = graph.copy_proto()
    [node] = [node for node in proto.graph.node if node.name == "relu2"]
    node.op_type = "Relu"
    del node.input[1:]
    return OnnxGraph(proto)


WRONG = {
    "a channel's weights are 25 % off": lambda graph: channel_off(graph, 0.25),
    "a layer's weights are 5 % off": lambda graph: changed(graph, "w2", lambda array: array * np.float32(1.05)),
    "a class's weights are 10 % off": lambda graph: channel_off(graph, 0.1, "w"),
    "a bias is dropped": lambda graph: changed(graph, "b3", np.zeros_like),
    "ReLU is computed for ReLU6, as it were": relu_without_bound,
}
"""What even bfloat16 cannot hide."""

WRONG_IN_FP16 = {
    "a channel's weights are 5 % off": lambda graph: channel_off(graph, 0.05),
    "a layer's weights are 1 % off": lambda graph: changed(graph, "w2", lambda array: array * np.float32(1.01)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_engines_fail(narrowed: OnnxGraph, fault: str) -> None:
    assert verify(narrowed, Reference(emulated(WRONG[fault](narrowed))).run)


@pytest.mark.parametrize("fault", WRONG_IN_FP16)
def test_less_wrong_engines_fail_in_float16(fault: str) -> None:
    graph = narrow(network(), "fp16").graph
    assert verify(graph, Reference(emulated(WRONG_IN_FP16[fault](graph))).run)


def test_bfloat16_is_not_float16() -> None:
    engine = Reference(emulated(narrow(network(), "bf16").graph))
    assert verify(narrow(network(), "fp16").graph, engine.run)


def test_a_sum_that_overflows_in_float16_is_found() -> None:
    """Partial sums beyond 65504 are infinite, though they cancel at the end."""
    w = np.full((4, 64), 200.0, np.float32)
    w[:, 32:] = -200.0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "product"), helper.make_node("Add", ["m", "x4"], ["y"], "a")]
    weights = [numpy_helper.from_array(np.ascontiguousarray(w.T), "w"), numpy_helper.from_array(np.ones(4, "f"), "x4")]
    graph = narrow(with_shapes(graph_of(nodes, {"x": [2, 64]}, {"y": [2, 4]}, weights)), "fp16").graph
    feeds = {"x": 20 + np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)}

    def engine(feeds: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        half = feeds["x"].astype(np.float16)
        total = np.zeros((2, 4), np.float16)
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(64):
                total += half[:, k, None] * w.T[k].astype(np.float16)
        return {"y": (total + np.float16(1)).astype(np.float32)}

    def failures(run: Run) -> tuple[str, ...]:
        return verify_engine(
            exported=graph, cleaned=graph, torch_run=None, engine_run=run, samples=[feeds], sample_names=["s"]
        ).report.failures

    assert "NaN or Inf" in failures(engine)[0]
    assert failures(Reference(rounded_nowhere(graph)).run) == ()


def test_the_layer_that_is_wrong_is_named(narrowed: OnnxGraph) -> None:
    feeds = random_samples(narrowed.inputs)[0][0]
    layers = verify_layers(narrowed, lambda part: Reference(emulated(channel_off(part, 0.25))).run, feeds)
    assert first_divergence(layers).module == "conv2"
    halves = {node.output[0] for node in narrowed.nodes if node.name == "conv2"}
    assert first_divergence(layers).tensor in halves
    assert len(layers) == len(narrowed.nodes)


# ---- integers


def classified() -> OnnxGraph:
    """Return the class of every pixel, of two whose scores are alike nearly everywhere."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 3, 1, 1)).astype(np.float32)
    weights[1] = weights[0] * np.float32(1 + 2e-3)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "scores"),
        helper.make_node("ArgMax", ["c"], ["y"], "argmax", axis=1, keepdims=0),
    ]
    found = [numpy_helper.from_array(weights, "w")]
    return with_shapes(graph_of(nodes, {"x": [1, 3, 16, 16]}, {"y": (TensorProto.INT64, [1, 16, 16])}, found))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_integers_that_rounding_decides_are_not_held_against_an_engine(precision: str) -> None:
    graph = narrow(classified(), precision).graph
    feeds, names = random_samples(graph.inputs)

    def report(engine: OnnxGraph) -> Verification:
        return verify_engine(
            exported=graph,
            cleaned=graph,
            torch_run=None,
            engine_run=Reference(engine).run,
            samples=feeds,
            sample_names=names,
        )

    for right in RIGHT:
        found = report(right(graph))
        assert found.report.passed, found.report.failures
        assert "the golden sample leaves out 'y'" in found.report.notes[0]
    wrong = report(emulated(changed(graph, "w", lambda array: array[::-1].copy())))
    assert "integer elements of output 'y' differ" in wrong.report.failures[0]


# ---- int8 with its float part in half precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantized_engines_are_proven_too(precision: str) -> None:
    graph = narrow(quantized_graph(), precision).graph
    feeds = [{"x": np.random.default_rng(seed).standard_normal((4, 8), "f")} for seed in range(4)]

    def failures(engine: OnnxGraph) -> tuple[str, ...]:
        run, names = Reference(engine).run, ["1", "2", "3", "4"]
        return verify_engine(
            exported=graph, cleaned=graph, torch_run=None, engine_run=run, samples=feeds, sample_names=names
        ).report.failures

    assert failures(rounded_everywhere(graph)) == ()
    assert failures(rounded_nowhere(graph)) == ()
    assert failures(emulated(changed(graph, "ws", lambda array: array * np.float32(1.5))))


# ---- bundles


class Session:
    """An open engine of a graph."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._run = Reference(emulated(graph)).run

    def run(self, feeds: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        return self._run(feeds)


def bundle_of(folder: Path, graph: OnnxGraph, *, reference: bool = True) -> Bundle:
    feeds, names = random_samples(graph.inputs)
    golden = verify_engine(
        exported=graph, cleaned=graph, torch_run=None, engine_run=None, samples=feeds, sample_names=names
    ).golden
    manifest = Manifest(
        schema=SCHEMA,
        name="half",
        model={},
        target=TargetRecord("cuda", "sm89", "", "", "x86_64", ()),
        engine=EngineRecord("engine.plan", "tensorrt-rtx", "1", {0: "main"}),
        inputs=graph.inputs,
        outputs=graph.outputs,
        batches=(),
        preprocessing=None,
        labels=(),
        precision="bf16",
        layers=(),
        parity="pending",
        toolchain={},
        reproducible=True,
        files={},
    )
    files: dict[str, tuple[str, Path | bytes]] = {"engine.plan": ("engine", b"x"), GOLDEN: ("golden", golden)}
    if reference:
        files[REFERENCE] = ("reference", graph.serialized)
    folder.mkdir()
    return write_bundle(folder, manifest, files)


@pytest.mark.parametrize("reference", [True, False])
def test_a_bundle_is_proven_by_its_own_graph_and_by_its_golden_sample(
    narrowed: OnnxGraph, reference: bool, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path / "b.cnncc", narrowed, reference=reference)

    def passes(engine: OnnxGraph) -> bool:
        return verify_bundle(bundle, open_session=lambda _path: contextlib.nullcontext(Session(engine))).passed

    wrong = changed(narrowed, "w2", lambda array: array * np.float32(1.05))
    assert passes(narrowed)
    assert not passes(wrong)
    golden = read_golden(bundle.file(GOLDEN))
    assert check_golden(Session(narrowed), golden) == ()
    assert check_golden(Session(wrong), golden)


def test_layers_of_a_bundle_are_compared(narrowed: OnnxGraph, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "b.cnncc", narrowed)
    report = verify_bundle(
        bundle,
        open_session=lambda _path: contextlib.nullcontext(Session(narrowed)),
        layers=lambda part: Reference(emulated(part)).run,
    )
    assert report.passed
    assert {layer.module for layer in report.layers} >= {"conv0", "add3", "classifier"}
    assert all(layer.within for layer in report.layers)


def test_a_bfloat16_graph_is_standard_onnx() -> None:
    onnx.checker.check_model(narrow(network(), "bf16").graph.proto, full_check=True)
