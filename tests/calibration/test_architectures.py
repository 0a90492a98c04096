"""Whole networks, calibrated and quantized: what TensorRT-RTX and TVM make of them.

The networks are those of benchmarks/accuracy.py, untrained: structure is what is tested here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.trained import nets
from cnncc.calibration.calibrate import Job, calibrate
from cnncc.calibration.data import open_data
from cnncc.calibration.lint import lint
from cnncc.calibration.quantize import quantize
from cnncc.compiler.half import narrow
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.pipeline import clean_graph
from cnncc.graph.jitter import jittered
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import bind_batch, with_shapes
from cnncc.graph.reference import Reference
from tests.calibration.rtx import rtx_executed_types
from tests.calibration.tvm_import import tvm_run

pytestmark = pytest.mark.slow

FLOATS = {"unet": {"up.0", "up.1"}}
"""Modules that no target computes in int8."""


@pytest.fixture(scope="module", params=["resnet", "mbv2", "effnet", "unet"])
def network(request: pytest.FixtureRequest) -> tuple[str, OnnxGraph, OnnxGraph]:
    """A network's name, its float graph and its Q/DQ graph."""
    shape = "N,3,64,64" if request.param == "unet" else "N,3,32,32"
    graph = clean_graph(ModelRequest(f"{Path(nets.__file__)}:{request.param}", None, (shape,), ()))
    stream = open_data("random", graph.inputs, None, limit=16)
    table = calibrate(Job(graph=graph, name=request.param, version="test", stream=stream, workers=2))
    assert table.sqnr_db is not None
    assert table.sqnr_db > 20
    assert {layer.module for layer in table.kept} == FLOATS.get(request.param, set())
    return request.param, graph, with_shapes(quantize(graph, table, name=request.param))


def test_the_lint_finds_nothing_but_narrow_groups(network: tuple[str, OnnxGraph, OnnxGraph]) -> None:
    name, _, quantized = network
    found = {finding.rule for finding in lint(quantized, floats=FLOATS.get(name, ()))}
    assert found <= {"narrow-groups"}


def test_tensorrt_rtx_computes_every_intended_layer_in_int8(network: tuple[str, OnnxGraph, OnnxGraph]) -> None:
    name, _, quantized = network
    executed = rtx_executed_types(quantized.proto)
    floats = {node.name for node in quantized.nodes if node.op_type == "ConvTranspose"}
    assert len(floats) == len(FLOATS.get(name, ()))
    assert {node for node, kind in executed.items() if kind != "int8"} == floats


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_float_part_in_half_precision_leaves_every_layer_in_int8(
    network: tuple[str, OnnxGraph, OnnxGraph], precision: str
) -> None:
    _, _, quantized = network
    wide, half = rtx_executed_types(quantized.proto), rtx_executed_types(narrow(quantized, precision).graph.proto)
    assert {node for node, kind in half.items() if kind == "int8"} == {n for n, kind in wide.items() if kind == "int8"}
    assert set(half.values()) <= {"int8", {"fp16": "half", "bf16": "bf16"}[precision]}


def test_tvm_computes_what_onnx_runtime_does(network: tuple[str, OnnxGraph, OnnxGraph]) -> None:
    quantized = bind_batch(network[2], 1)
    x = np.random.default_rng(3).standard_normal(quantized.inputs[0].shape).astype(np.float32)
    feeds = {quantized.inputs[0].name: x}
    [want], [found] = Reference(quantized).run(feeds).values(), tvm_run(quantized, feeds).values()
    # sums in another order move values over the ties of QuantizeLinear: as much as jitter does, and no more
    [moved] = Reference(jittered(quantized, 1)).run(feeds).values()
    assert np.linalg.norm(found - want) <= 2 * np.linalg.norm(moved - want) + 1e-6 * np.linalg.norm(want)


def test_the_float_graph_is_left_alone(network: tuple[str, OnnxGraph, OnnxGraph]) -> None:
    _, graph, _ = network
    assert not any(node.op_type == "QuantizeLinear" for node in graph.nodes)
