"""The reference executor: what it gives out, and weights that it does not copy."""

from __future__ import annotations

import gc

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference, side_by_side
from cnncc_runtime.errors import ModelRefused
from tests.graph.graphs import graph_of

RNG = np.random.default_rng(0)
FEEDS = {"x": RNG.standard_normal((1, 8, 9, 9)).astype(np.float32)}


def layers() -> OnnxGraph:
    """Two convolutions, one with int8 weights: both large enough to be given to ONNX Runtime beside the model."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("DequantizeLinear", ["q", "step"], ["dq"], axis=0),
        helper.make_node("Conv", ["a", "dq"], ["y"]),
    ]
    constants = {
        "w": RNG.standard_normal((16, 8, 3, 3)).astype(np.float32),
        "q": RNG.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
        "step": np.full(16, 0.01, np.float32),
    }
    return graph_of(nodes, {"x": FEEDS["x"].shape}, constants, ["y"])


def test_weights_beside_the_model_give_the_bits_of_weights_inside() -> None:
    graph = layers()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(graph.serialized, options, providers=["CPUExecutionProvider"])
    reference = Reference(graph)
    del graph
    gc.collect()
    np.testing.assert_array_equal(reference.run(FEEDS)["y"], session.run(["y"], FEEDS)[0])


def test_inner_values_are_given_out_where_they_are_asked_for() -> None:
    graph = layers()
    found = Reference(graph, outputs=["a", "y"]).run(FEEDS)
    assert list(found) == ["a", "y"]
    np.testing.assert_array_equal(found["a"], Reference(graph.with_outputs(["a"])).run(FEEDS)["a"])
    assert list(Reference(graph, outputs=["a", "y"]).run(FEEDS, ["a"])) == ["a"]


def test_a_graph_that_does_not_load_is_refused() -> None:
    broken = layers().copy_proto()
    broken.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ModelRefused, match="does not load"):
        Reference(OnnxGraph(broken))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_runs_side_by_side_come_in_order_and_give_the_same_bits(threads: int) -> None:
    graph = layers()
    samples = [{"x": np.float32(number) * FEEDS["x"]} for number in range(7)]
    alone = Reference(graph, threads=1)
    together = side_by_side(Reference(graph, threads=threads, beside=7).run, samples, threads=threads)
    for sample, found in zip(samples, together, strict=True):
        np.testing.assert_array_equal(found["y"], alone.run(sample)["y"])


def test_a_failure_of_one_run_is_the_failure_of_all() -> None:
    def run(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    with pytest.raises(ValueError, match="two"):
        side_by_side(run, range(4), threads=2)
