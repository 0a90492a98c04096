"""The cleaning pipeline: what it keeps, what it removes, and what its proof catches."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import helper

from cnncc.compiler.passes import pipeline
from cnncc.compiler.passes.pipeline import PASSES, clean, first_failure, relative_difference, summary
from cnncc.graph.draft import Draft, GraphPass
from cnncc.graph.feeds import random_feeds
from cnncc.graph.names import set_module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import ToolchainFailed
from tests.compiler.passes.strategies import cnn_graphs
from tests.graph.graphs import graph_of

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@PROPERTY
@given(cnn_graphs())
def test_cleaning_keeps_numerics_and_interface_and_is_idempotent(graph: OnnxGraph) -> None:
    before = graph.digest
    cleaned, report = clean(graph)
    assert graph.digest == before, "the graph given was changed"
    assert [str(spec) for spec in cleaned.inputs] == [str(spec) for spec in graph.inputs]
    assert [spec.name for spec in cleaned.outputs] == [spec.name for spec in graph.outputs]
    onnx.checker.check_model(cleaned.proto, full_check=True)
    kinds = {node.op_type for node in cleaned.nodes}
    assert not kinds & {"Constant", "Dropout", "BatchNormalization"}
    names = [node.name for node in cleaned.nodes]
    assert len({*names}) == len(names) and all(names)
    assert report.proof in ("bit-exact", "rounding", "noise")
    again, second = clean(cleaned)
    assert again.digest == cleaned.digest
    assert second.proof == "bit-exact"
    assert clean(graph)[0].digest == cleaned.digest


@PROPERTY
@given(cnn_graphs())
def test_every_pass_alone_is_pure_and_keeps_numerics(graph: OnnxGraph) -> None:
    feeds = random_feeds(graph.inputs, 1)
    wanted = Reference(graph).run(feeds)
    for each in dict.fromkeys(PASSES):
        digest = graph.digest
        changed = each(graph)
        assert graph.digest == digest, each.name
        difference = relative_difference(wanted, Reference(changed).run(feeds))
        assert difference == 0.0 if each.exact else difference < 1e-4, each.name
        assert each(changed).digest == each(each(changed)).digest, each.name


def test_the_name_map_survives_and_fused_modules_are_listed() -> None:
    weight, one = np.ones((2, 2, 1, 1), np.float32), np.ones(2, np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "s", "t", "t", "s"], ["n"], name="bn"),
        helper.make_node("Relu", ["n"], ["y"], name="relu"),
    ]
    for node, path in zip(nodes, ("stem.conv", "stem.bn", "stem.act"), strict=True):
        set_module_path(node, path)
    cleaned, _ = clean(graph_of(nodes, {"x": (1, 2, 4, 4)}, {"w": weight, "s": one, "t": one}))
    [conv, relu] = cleaned.proto.graph.node
    metadata = {entry.key: entry.value for entry in conv.metadata_props}
    assert metadata == {"cnncc.module": "stem.conv", "cnncc.fused": "stem.bn"}
    assert [path for _, path in cleaned.places()] == ["stem.conv", "stem.act"]
    assert relu.op_type == "Relu"


def test_normalization_before_a_branch_keeps_its_module_as_mul_and_add() -> None:
    one = np.ones(2, np.float32)
    node = helper.make_node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y"], name="bn")
    set_module_path(node, "norm")
    cleaned, report = clean(graph_of([node], {"x": ("N", 2, 4, 4)}, {"s": one * 2}))
    assert [(n.op_type, path) for n, path in cleaned.places()] == [("Mul", "norm"), ("Add", "norm")]
    assert report.proof in ("rounding", "bit-exact")
    assert cleaned.inputs[0].shape == ("N", 2, 4, 4)


def test_quantization_nodes_are_not_folded_away() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["dw"], axis=0),
        helper.make_node("Conv", ["x", "dw"], ["y"]),
    ]
    constants = {"w": np.ones((2, 2, 1, 1), np.int8), "scale": np.float32([0.1, 0.2]), "zero": np.int8([0, 0])}
    cleaned, _ = clean(graph_of(nodes, {"x": (1, 2, 4, 4)}, constants))
    assert [node.op_type for node in cleaned.nodes] == ["DequantizeLinear", "Conv"]


def test_a_pass_that_changes_numerics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(draft: Draft) -> int:
        for name, tensor in list(draft.weights.items()):
            if tensor.data_type == onnx.TensorProto.FLOAT:
                draft.set_constant(name, onnx.numpy_helper.to_array(tensor) * np.float32(1.01))
        return 1

    spoiled = (*PASSES[:3], GraphPass("spoil_weights", spoil), *PASSES[3:])
    monkeypatch.setattr(pipeline, "PASSES", spoiled)
    graph = graph_of(
        [helper.make_node("Conv", ["x", "w"], ["y"])], {"x": (1, 2, 4, 4)}, {"w": np.ones((2, 2, 1, 1), np.float32)}
    )
    with pytest.raises(ToolchainFailed, match="spoil_weights"):
        clean(graph)


def test_rounding_beyond_ulps_is_measured_against_the_float64_truth() -> None:
    """A bias of 10⁴ that the normalization takes away again: folded, it is gone, and with it the float32 noise."""
    random = np.random.default_rng(0)
    offset, one = np.full(4, 1e4, np.float32), np.ones(4, np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "m"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("BatchNormalization", ["c", "s", "s", "m", "s"], ["y"], name="bn"),
    ]
    constants = {"w": random.normal(size=(4, 4, 3, 3)).astype(np.float32), "s": one, "m": offset}
    _, report = clean(graph_of(nodes, {"x": (1, 4, 8, 8)}, constants))
    assert report.proof == "noise"
    assert report.difference > 1e-5


def noisy(tail: list[onnx.NodeProto]) -> OnnxGraph:
    random = np.random.default_rng(0)
    offset, one = np.full(4, 1e6, np.float32), np.ones(4, np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "m"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("BatchNormalization", ["c", "s", "s", "m", "s"], ["n"], name="bn"),
        *tail,
    ]
    constants = {"w": random.normal(size=(4, 4, 3, 3)).astype(np.float32), "s": one, "m": offset}
    return graph_of(nodes, {"x": (1, 4, 32, 32)}, constants)


def test_near_ties_that_rounding_turns_are_judged_by_what_they_are_decided_from() -> None:
    """A segmentation model's class map: pixels between two classes may turn, the scores may not."""
    graph = noisy([helper.make_node("ArgMax", ["n"], ["y"], axis=1, name="classes")])
    cleaned, report = clean(graph)
    feeds = random_feeds(graph.inputs)
    assert not np.array_equal(Reference(graph).run(feeds)["y"], Reference(cleaned).run(feeds)["y"])
    assert report.proof == "noise"


def test_a_class_map_that_is_wrong_is_not_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(draft: Draft) -> int:
        for name, tensor in list(draft.weights.items()):
            if len(tensor.dims) == 4:
                draft.set_constant(name, -onnx.numpy_helper.to_array(tensor))
        return 1

    spoiler = GraphPass("spoil_weights", spoil, exact=False)
    monkeypatch.setattr(pipeline, "PASSES", (*PASSES, spoiler))
    with pytest.raises(ToolchainFailed, match="spoil_weights"):
        clean(noisy([helper.make_node("ArgMax", ["n"], ["y"], axis=1, name="classes")]))


@pytest.mark.parametrize("bad", [1, 2, 5, 7, 8])
def test_bisection_finds_the_first_failure(bad: int) -> None:
    asked: list[int] = []

    def failed(count: int) -> bool:
        asked.append(count)
        return count >= bad

    assert first_failure(8, failed) == bad
    assert len(asked) <= 3


def test_differences_of_places_of_nan_and_of_integers_are_infinite() -> None:
    nan = np.float32([np.nan, 1])
    assert relative_difference({"y": nan}, {"y": nan.copy()}) == 0.0
    assert relative_difference({"y": nan}, {"y": np.float32([1, np.nan])}) == float("inf")
    assert relative_difference({"y": np.int64([1])}, {"y": np.int64([2])}) == float("inf")
    assert relative_difference({"y": np.float32([2, 4])}, {"y": np.float32([2, 3])}) == 0.25


def test_the_summary_counts_changes_by_pass() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    cleaned, report = clean(graph_of(nodes, {"x": (2, 2)}, {}))
    assert summary(report)["remove_identity"] == 1
    assert (report.nodes_before, report.nodes_after) == (2, 1)
    assert len(cleaned.proto.graph.node) == 1
