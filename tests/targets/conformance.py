"""What every target must do; a target's tests subclass `TargetConformance`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc.targets.base import BuildOptions, Engine, Target
from cnncc_runtime.digests import digest_file
from cnncc_runtime.errors import UnsupportedGraph, UsageError


def small_graph(batch: int | str = 1) -> OnnxGraph:
    """Return convolution, depthwise convolution, pooling and a classifier."""
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype("float32") * 0.3, name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "conv2", kernel_shape=[3, 3], group=13, strides=[2, 2]),
        helper.make_node("MaxPool", ["c2"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"], "gap"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "classifier", transB=1),
    ]
    weights = [tensor("w1", 13, 3, 3, 3), tensor("b1", 13), tensor("w2", 13, 1, 3, 3), tensor("w3", 5, 13),
               tensor("b3", 5)]  # fmt: skip
    return graph_of(nodes, {"x": [batch, 3, 16, 18]}, {"y": [batch, 5]}, weights)


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    weights: list[onnx.TensorProto] | None = None,
    opset: int = 20,
) -> OnnxGraph:
    """Return a checked graph; a value is a shape of float32, or a pair of ONNX type and shape."""

    def info(name: str, value: Any) -> onnx.ValueInfoProto:
        kind, shape = value if isinstance(value, tuple) else (TensorProto.FLOAT, value)
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes, "test", [info(*item) for item in inputs.items()], [info(*item) for item in outputs.items()], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    if all(value is not None for value in outputs.values()):
        onnx.checker.check_model(model)
    return OnnxGraph(model)


def feeds_of(graph: OnnxGraph, batch: int = 1) -> dict[str, NDArray[Any]]:
    """Return reproducible inputs."""
    rng = np.random.default_rng(1)
    feeds = {}
    for spec in graph.inputs:
        shape = [batch if isinstance(size, str) else size for size in spec.shape]
        feeds[spec.name] = np.asarray(rng.standard_normal(shape) * 2).astype(spec.dtype)
    return feeds


def _output_of(operator: str) -> Any:
    return (TensorProto.INT64, [2, None]) if operator == "NonZero" else [2, 3]


class BuildConformance:
    """What needs no machine that runs the engines; a subclass gives a target.

    Attributes:
        unsupported: Two operators of one input and one output that the target cannot build; a name in the graph each.
    """

    unsupported = ("NonZero", "RandomNormalLike")

    @pytest.fixture
    def target(self) -> Target:
        raise NotImplementedError

    def build(self, target: Target, graph: OnnxGraph, folder: Path, *batches: int) -> Engine:
        folder.mkdir(exist_ok=True)
        return target.build(graph, BuildOptions(target.profile, batches), folder)

    def test_probe_says_ready_or_how_to_fix_it(self, target: Target) -> None:
        found = target.probe()
        assert found.ready or found.fix

    def test_a_symbolic_batch_without_sizes_is_a_usage_error(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="N"):
            self.build(target, small_graph("N"), tmp_path)

    def test_every_unsupported_node_is_listed(self, target: Target, tmp_path: Path) -> None:
        first, second = self.unsupported
        nodes = [helper.make_node(first, ["x"], ["a"], "first"), helper.make_node(second, ["x"], ["b"], "second")]
        graph = graph_of(nodes, {"x": [2, 3]}, {"a": _output_of(first), "b": _output_of(second)})
        assert [issue.node for issue in target.unsupported(graph)] == ["first", "second"]
        with pytest.raises(UnsupportedGraph) as caught:
            self.build(target, graph, tmp_path)
        assert len(caught.value.where) == 2, caught.value

    def test_a_supported_graph_has_no_issues(self, target: Target) -> None:
        assert target.unsupported(small_graph()) == ()

    def test_layers_name_every_node_that_computes(self, target: Target, tmp_path: Path) -> None:
        engine = self.build(target, small_graph(), tmp_path)
        named = {node for layer in engine.layers for node in layer.nodes}
        assert {"conv1", "relu1", "conv2", "pool", "gap", "classifier"} <= named

    def test_the_same_inputs_give_the_same_bytes(self, target: Target, tmp_path: Path) -> None:
        first = self.build(target, small_graph(), tmp_path / "a")
        second = self.build(target, small_graph(), tmp_path / "b")
        if first.reproducible:
            assert first.record == second.record
            for name, (_role, path) in first.files.items():
                assert digest_file(path) == digest_file(second.files[name][1]), name

    def test_a_build_reports_progress(self, target: Target, tmp_path: Path) -> None:
        steps: list[tuple[str, float]] = []
        target.build(small_graph(), BuildOptions(target.profile, progress=lambda *step: steps.append(step)), tmp_path)
        assert len({what for what, _ in steps}) > 2
        assert all(0 <= fraction <= 1 for _, fraction in steps)

    def test_each_batch_size_is_an_entry(self, target: Target, tmp_path: Path) -> None:
        engine = self.build(target, small_graph("N"), tmp_path, 1, 3)
        assert sorted(engine.record.entries) == [1, 3]


class TargetConformance(BuildConformance):
    """The suite; a subclass also gives a way to run the engines."""

    def run(self, engine: Engine, entry: str, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run an engine and return its outputs in order."""
        raise NotImplementedError

    def test_an_engine_computes_what_the_graph_says(self, target: Target, tmp_path: Path) -> None:
        graph = small_graph()
        engine = self.build(target, graph, tmp_path)
        feeds = feeds_of(graph)
        (got,) = self.run(engine, engine.record.entries[0], feeds)
        np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-5, atol=1e-5)

    def test_each_batch_size_has_an_entry(self, target: Target, tmp_path: Path) -> None:
        graph = small_graph("N")
        engine = self.build(target, graph, tmp_path, 1, 3)
        assert sorted(engine.record.entries) == [1, 3]
        for batch, entry in engine.record.entries.items():
            feeds = feeds_of(graph, batch)
            (got,) = self.run(engine, entry, feeds)
            np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-5, atol=1e-5)
