"""Quantization-aware training: it wins back what calibration lost, is repeatable, and never makes things worse."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from cnncc.calibration.calibrate import Job as Calibrating
from cnncc.calibration.calibrate import Options, calibrate
from cnncc.calibration.quantize import quantize
from cnncc.calibration.table import CalibrationTable, table_from_bytes
from cnncc.compression import training
from cnncc.compression.examples import Examples
from cnncc.compression.graph_network import GraphNetwork
from cnncc.compression.qat import Tuned, Tuning, tune
from cnncc.compression.recipe import Recipe
from cnncc.compression.task import task_of
from cnncc.compression.train import Opened
from cnncc.compression.training import Job, evaluate, fit
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import DataRefused, UsageError
from tests.calibration.graphs import Net, stream_of
from tests.compression.sets import CLASSES, Silence, bars, examples

TASK = task_of("classification")
RECIPE = Recipe(epochs=4, batch=16, rate=1e-3)
CPU = Tuning(accelerator="cpu")


class Killed(BaseException):
    """What ends a run from outside."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Bars to train on and others to judge by."""
    folder = tmp_path_factory.mktemp("bars")
    return Opened(TASK, examples(folder, count=128), examples(folder, count=200, seed=1))


@pytest.fixture(scope="module")
def graph(data: Opened) -> OnnxGraph:
    """A network that knows bars, its channels as uneven as ranges per tensor cannot bear."""
    net = Net("N", 3, 12, 12, seed=1)
    x = net.node("Relu", [net.conv("x", 16, "first")])
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[3, 3])
    x = net.node("Relu", [net.conv(x, 16, "second", kernel=1)])
    net.gemm(net.node("Flatten", [x], size=256), CLASSES, "head")
    network = GraphNetwork(net.graph())
    fit(Job(network, Recipe(epochs=4, batch=16, rate=5e-3), TASK, data.train, accelerator="cpu"), Silence())
    return uneven(network.trained_graph())


def uneven(graph: OnnxGraph) -> OnnxGraph:
    """Return a graph that computes the same, channels of the first layer scaled by up to 3000."""
    factors = np.exp(np.linspace(0.0, 8.0, 16)).astype(np.float32)
    proto = graph.copy_proto()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name.startswith("first."):
            array = array * factors.reshape(-1, *[1] * (array.ndim - 1))
        elif tensor.name == "second.weight":
            array = array / factors.reshape(1, -1, 1, 1)
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return OnnxGraph(proto)


@pytest.fixture(scope="module")
def table(graph: OnnxGraph) -> CalibrationTable:
    """Its table, by ranges alone: equalizing would undo the damage."""
    stream = stream_of(bars(32, 0)[0])
    return calibrate(Calibrating(graph, "net", "0.0", stream, options=Options(equalize=False, method="max")))


def tuned(
    graph: OnnxGraph, table: CalibrationTable, data: Opened, recipe: Recipe = RECIPE, tuning: Tuning = CPU
) -> tuple[Tuned, Silence]:
    """Return what training makes of a graph, and what was told."""
    watcher = Silence()
    return tune(graph, table, data, recipe, tuning, watcher), watcher


def top_1(graph: OnnxGraph, found: Examples) -> float:
    """Return what ONNX Runtime reaches with a graph."""
    [batch] = found.__getitems__(range(len(found)))
    [outputs] = Reference(graph).run({"x": batch.inputs[0].numpy()}).values()
    return float((outputs.argmax(1) == batch.targets.numpy()).mean())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_training_wins_back_what_calibration_lost(
    graph: OnnxGraph, table: CalibrationTable, data: Opened, alpha: float
) -> None:
    made, watcher = tuned(graph, table, data, tuning=replace(CPU, alpha=alpha))
    assert made.fp32 > 0.95
    assert made.calibrated < made.fp32 - 0.2
    assert made.reached > made.fp32 - (made.fp32 - made.calibrated) / 2
    assert "float top-1" in watcher.notes[0]
    assert data.validation is not None
    assert top_1(made.graph, data.validation) == pytest.approx(made.reached, abs=0.011)
    assert {node.op_type for node in made.graph.nodes} >= {"QuantizeLinear", "DequantizeLinear"}
    assert quantize(made.floats, made.table, name="net").digest == made.graph.digest
    assert table_from_bytes(made.table.to_bytes(), "the table") == made.table
    with pytest.raises(DataRefused, match="the table was calibrated for"):
        quantize(graph, made.table, name="net")


def test_what_calibration_did_to_the_model_is_in_the_trained_one(data: Opened) -> None:
    net = Net("N", 3, 12, 12, seed=1)
    low, high = net.constant("low", np.float32(0.0)), net.constant("high", np.float32(6.0))
    x = net.node("Clip", [net.conv("x", 16, "first"), low, high])
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[3, 3])
    x = net.node("Relu", [net.conv(x, 16, "second", kernel=1)])
    x = net.conv(x, 16, "third", kernel=1)
    net.gemm(net.node("Flatten", [x], size=256), CLASSES, "head")
    graph = uneven(net.graph())
    table = calibrate(Calibrating(graph, "net", "0.0", stream_of(bars(32, 0)[0]), options=Options(keep=("net.third",))))
    assert table.equalization or table.relu6_to_relu or table.shifts
    made, _ = tuned(graph, table, replace(data, validation=None), replace(RECIPE, epochs=1))
    assert quantize(made.floats, made.table, name="net").digest == made.graph.digest
    assert [layer.why for layer in made.table.layers] == ["", "", "asked", ""]


def test_scales_are_learned_unless_they_are_to_stay(graph: OnnxGraph, table: CalibrationTable, data: Opened) -> None:
    def scales(found: OnnxGraph) -> list[float]:
        names = {node.input[1] for node in found.nodes if node.op_type == "QuantizeLinear"}
        return sorted(float(found.constant(name)) for name in names)  # type: ignore[arg-type]

    recipe = replace(RECIPE, epochs=1)
    frozen, _ = tuned(graph, table, data, recipe, replace(CPU, learn_scales=False))
    learned, _ = tuned(graph, table, data, recipe)
    calibrated = sorted({group.scale for group in table.groups})
    assert sorted(set(scales(frozen.graph))) == pytest.approx(calibrated)
    assert sorted(set(scales(learned.graph))) != pytest.approx(calibrated)


def test_calibration_is_kept_where_no_epoch_betters_it(graph: OnnxGraph, table: CalibrationTable, data: Opened) -> None:
    made, watcher = tuned(graph, table, data, replace(RECIPE, epochs=1, rate=10.0))
    assert made.reached == made.calibrated
    assert "no epoch was better than calibration alone" in watcher.notes[-1]
    np.testing.assert_array_equal(
        made.graph.constant("second.weight_quantized"), tuned_none(graph, table).constant("second.weight_quantized")
    )


def tuned_none(graph: OnnxGraph, table: CalibrationTable) -> OnnxGraph:
    """Return what calibration alone makes of a graph."""
    return quantize(graph, table, name="net")


def test_without_validation_data_the_last_weights_are_delivered(
    graph: OnnxGraph, table: CalibrationTable, data: Opened
) -> None:
    made, watcher = tuned(graph, table, replace(data, validation=None), replace(RECIPE, epochs=1))
    assert made.reached != made.reached
    assert not watcher.notes


@pytest.mark.parametrize("steps", [3, 9])
def test_a_training_that_was_killed_ends_with_the_same_graph(
    graph: OnnxGraph,
    table: CalibrationTable,
    data: Opened,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    class Cut(Silence):
        def step(self, epoch: int, done: float) -> None:
            super().step(epoch, done)
            if self.steps == steps:
                raise Killed

    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    whole, _ = tuned(graph, table, data)
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        tune(graph, table, data, RECIPE, CPU, Cut(), checkpoint=path)
    watcher = Silence()
    again = tune(graph, table, data, RECIPE, CPU, watcher, checkpoint=path)
    assert any("goes on from" in note for note in watcher.notes)
    assert again.graph.digest == whole.graph.digest
    assert path.exists(), "until what came of it is written, which may fail"


def test_another_table_or_teacher_is_another_training(
    graph: OnnxGraph, table: CalibrationTable, data: Opened, tmp_path: Path
) -> None:
    class Cut(Silence):
        def epoch(self, number: int, facts: object) -> None:
            pass

        def step(self, epoch: int, done: float) -> None:
            if epoch == 2:
                raise Killed

    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        tune(graph, table, data, RECIPE, CPU, Cut(), checkpoint=path)
    with pytest.raises(UsageError, match="differs in alpha"):
        tune(graph, table, data, RECIPE, replace(CPU, alpha=0.1), Silence(), checkpoint=path)


def test_a_moving_average_is_delivered_where_it_is_asked_for(
    graph: OnnxGraph, table: CalibrationTable, data: Opened
) -> None:
    plain, _ = tuned(graph, table, data)
    made, _ = tuned(graph, table, data, replace(RECIPE, average=0.5))
    assert made.reached > (made.fp32 + made.calibrated) / 2
    assert made.graph.digest != plain.graph.digest


def test_what_makes_no_sense_is_refused(graph: OnnxGraph, table: CalibrationTable, data: Opened) -> None:
    with pytest.raises(UsageError, match="is trained in float32"):
        tuned(graph, table, data, replace(RECIPE, precision="bf16"))
    with pytest.raises(UsageError, match="an alpha of 2"):
        tuned(graph, table, data, tuning=replace(CPU, alpha=2.0))
    with pytest.raises(DataRefused, match="calibrated for other weights"):
        tuned(uneven(graph), table, data)


def test_the_float_model_is_left_as_it_was(graph: OnnxGraph, table: CalibrationTable, data: Opened) -> None:
    before = copy.deepcopy(graph.serialized)
    tuned(graph, table, data, replace(RECIPE, epochs=1))
    assert graph.serialized == before
    assert data.validation is not None
    assert evaluate(GraphNetwork(graph), TASK, data.validation) > 0.95
    assert not torch.are_deterministic_algorithms_enabled()
