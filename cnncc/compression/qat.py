"""Quantization-aware training: a calibrated model's weights and scales, trained while rounded as in the engine.

It begins with what calibration found and works on the very graph that becomes the engine: equalized, BatchNorm folded,
Q/DQ where the plan has them. What comes out is that graph as Q/DQ ONNX, which every target takes. BatchNorm is thereby
frozen, as is usual for short trainings (Jacob et al. 2018 unfreeze it for long ones).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from torch import nn

from cnncc.calibration.accuracy import Validation
from cnncc.calibration.data import open_data
from cnncc.calibration.quantize import corrected, quantize
from cnncc.calibration.table import CalibrationTable, ModelDigests, check_model, digests_of, read_table
from cnncc.calibration.thresholds import LEVELS
from cnncc.compiler.cache import Cache, default_cache_folder
from cnncc.compiler.calibration import Quantized, check_file, tell_findings
from cnncc.compiler.compile_request import Retraining
from cnncc.compiler.engine_stages import check_preprocessing
from cnncc.compiler.graph_stages import CLEANED, clean_stage, export_stage, preprocessing_of, specs_of
from cnncc.compiler.ingest import Model
from cnncc.compiler.keys import tools
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.reporting import Reporter, Silent
from cnncc.compiler.stage import Stage
from cnncc.compression.checkpoint import checkpoint_of, resumable
from cnncc.compression.distil import Distillation, Lessons
from cnncc.compression.fake_quantize import QuantizedNetwork
from cnncc.compression.graph_network import GraphNetwork, check_batches
from cnncc.compression.recipe import Recipe
from cnncc.compression.task import Task
from cnncc.compression.train import Material, Opened, open_material
from cnncc.compression.training import Job, Trained, Watcher, evaluate, fit
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import load_trusted, with_shapes
from cnncc_runtime.bundle import CALIBRATION
from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.preprocess import Preprocessing

TRAINED = "trained"
"""The method of scales that were trained, in a table."""


@dataclass(frozen=True)
class Tuning:
    """How a quantized network is trained, beside the recipe.

    Attributes:
        learn_scales: Whether scales of tensors are trained too, or stay as calibration found them.
        alpha: Share of the float model in the loss, as a teacher; the labels have the rest.
        temperature: Of its soft targets.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        workers: Processes that read samples.
    """

    learn_scales: bool = True
    alpha: float = 0.5
    temperature: float = 4.0
    accelerator: str = "auto"
    workers: int = 0

    def lessons(self) -> Lessons | None:
        """Return what the float model teaches; None for nothing.

        Raises:
            UsageError: A number is out of its bounds.
        """
        lessons = Lessons(self.temperature, self.alpha)
        if self.alpha:
            lessons.check()
        return lessons if self.alpha else None


@dataclass(frozen=True)
class Teacher:
    """What teaches a quantized network, where that is not its own float model.

    Attributes:
        module: Takes the same inputs, and gives outputs of the same shapes.
        digest: Of its weights and structure.
    """

    module: nn.Module
    digest: str


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        floats: The float graph, its weights trained.
        table: Of that graph: `cnncc.calibration.quantize.quantize` makes the next of both.
        graph: With Q/DQ, trained.
        task: What for.
        fp32: The metric of the float model on the validation data; NaN without any.
        calibrated: Of the quantized model before training.
        reached: Of the graph.
        trained: How training went.
    """

    floats: OnnxGraph
    table: CalibrationTable
    graph: OnnxGraph
    task: Task
    fp32: float
    calibrated: float
    reached: float
    trained: Trained


def tune(
    graph: OnnxGraph,
    table: CalibrationTable,
    opened: Opened,
    recipe: Recipe,
    tuning: Tuning,
    watcher: Watcher,
    *,
    name: str = "",
    checkpoint: Path | None = None,
    teacher: Teacher | None = None,
) -> Tuned:
    """Train a calibrated graph, quantized.

    Args:
        graph: Cleaned, in float32: the one that was calibrated.
        table: Of this graph.
        opened: What it is trained on and judged by. Where there is validation data and no epoch betters what
            calibration reached, calibration's weights and scales are delivered.
        recipe: How; in float32.
        tuning: How a quantized network is.
        watcher: Told how it goes.
        name: What the user calls the model, for refusals; empty as the table does.
        checkpoint: Where it is kept while it is not over; None for nowhere.
        teacher: By default the graph.

    Raises:
        DataRefused: The table is of another model, or the data cannot be used.
        UnsupportedGraph: An operator cannot be trained through.
        ModelRefused: The model takes no batches.
        UsageError: The recipe makes no sense, or the checkpoint is of another training.
        TrainingDiverged: The loss became NaN or infinite.
    """
    recipe.check()
    lessons = tuning.lessons()
    if recipe.precision != "fp32":
        raise UsageError("a quantized network is trained in float32: its rounding is the engine's", hint="no --amp")
    name = name or table.model.name
    check_model(table, digests_of(graph, name))
    prepared, layers = corrected(graph, table)
    network = QuantizedNetwork(
        prepared,
        layers,
        table.scales,
        table.shifts,
        float_adds=table.float_adds,
        learn_scales=tuning.learn_scales,
    )
    model = GraphNetwork(graph).eval()
    [probe] = opened.train.__getitems__(range(min(2, len(opened.train))))
    check_batches(model, probe.inputs)
    validation = opened.validation
    fp32, calibrated = (
        (evaluate(each.eval(), opened.task, validation) for each in (model, network))
        if validation is not None
        else (float("nan"), float("nan"))
    )
    if validation is not None:
        watcher.note(f"float {opened.task.text(fp32)}, calibrated {opened.task.text(calibrated)}")
    start = copy.deepcopy(network.state_dict())
    teaching = teacher.module if teacher else model
    objective = Distillation(teaching, network, opened.task, lessons) if lessons else None
    job = Job(
        network,
        recipe,
        opened.task,
        opened.train,
        validation,
        objective=objective,
        checkpoint=checkpoint,
        identity={
            "graph": graph.digest,
            "table": table.digest,
            "teacher": teacher.digest if teacher else "",
            **{k: str(v) for k, v in vars(tuning).items()},
        },
        accelerator=tuning.accelerator,
        workers=tuning.workers,
    )
    trained = fit(job, watcher)
    reached = trained.best
    if validation is not None and not opened.task.better(reached, calibrated):
        watcher.note(f"no epoch was better than calibration alone, whose weights are kept: {opened.task.text(reached)}")
        network.load_state_dict(start)
        reached = calibrated
    floats = network.cpu().trained_graph()
    learned = _table(table, network, digests_of(floats, name))
    return Tuned(floats, learned, network.quantized(learned.digest), opened.task, fp32, calibrated, reached, trained)


def _table(table: CalibrationTable, network: QuantizedNetwork, model: ModelDigests) -> CalibrationTable:
    """Return the table of a trained network: what was done before is in its weights, its scales are of no histogram."""
    scales, shifts = network.learned()
    of = {name: group for group in table.groups for name in group.tensors}
    members: dict[int, list[str]] = {}
    for name, index in network.groups.items():
        members.setdefault(index, []).append(name)
    groups = tuple(
        replace(
            of[names[0]],
            tensors=tuple(names),
            read=tuple(name for name in names if name in of[name].read),
            exponent=None,
            counts="",
            thresholds={},
            method=TRAINED,
            threshold=scales[names[0]] * LEVELS,
            scale=scales[names[0]],
            shift=shifts.get(names[0]),
        )
        for names in members.values()
    )
    return replace(
        table,
        model=model,
        method=TRAINED,
        groups=groups,
        layers=tuple(replace(layer, bias="") for layer in table.layers),
        relu6_to_relu=False,
        equalization=(),
        sqnr_db=None,
        accuracy=None,
    )


def retraining(
    material: Material,
    recipe: Recipe,
    tuning: Tuning,
    *,
    teacher: Teacher | None = None,
    watcher: Watcher | None = None,
) -> Retraining:
    """Return what trains quantized models for `cnncc.compiler.pipeline.compile`.

    Its stage is cached as others are, and cut short, the same compile goes on from its checkpoint in the cache.

    Args:
        material: What is trained on and judged by; its preprocessing gives way to the compile's.
        recipe: How.
        tuning: How a quantized network is.
        teacher: By default the float model.
        watcher: Told how it goes; by default the stage's reporter is.

    Raises:
        UsageError: The recipe or the tuning makes no sense.
    """
    recipe.check()
    tuning.lessons()

    def stage(
        export: Stage,
        clean: Stage,
        table: CalibrationTable,
        preprocessing: Preprocessing | None,
        cache: Cache,
        reporter: Reporter,
    ) -> Stage:
        inputs = specs_of(export, "inputs")
        sources = (material.data, material.validation)
        streams = [open_data(each, inputs, preprocessing, limit=None) for each in sources if each]
        key = cache.key(
            "qat",
            graph=clean.value["graph"],
            table=table.digest,
            data=[stream.identity for stream in streams],
            how=[vars(recipe), vars(tuning), teacher.digest if teacher else ""],
            tools=tools("torch", "lightning-fabric", "onnx", "onnxruntime"),
        )

        def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
            graph = load_trusted(clean.file(CLEANED), clean.value["graph"])
            model = _model(export, graph, preprocessing)
            opened = open_material(model, dataclasses.replace(material, preprocessing=preprocessing), recipe)
            resume = cache.folder / "qat" / f"{key.rpartition(':')[2][:32]}.checkpoint"
            with storage_errors(resume):
                resume.parent.mkdir(parents=True, exist_ok=True)
            told = watcher or _Reporting(reporter, recipe.epochs)
            with resumable(resume, note=told.note):
                tuned = tune(
                    graph,
                    table,
                    opened,
                    recipe,
                    tuning,
                    told,
                    name=model.name,
                    checkpoint=resume,
                    teacher=teacher,
                )
                measured = tuned.table
                if len(streams) > 1 and table.accuracy is not None:
                    reached = Validation(graph, streams[1]).measure(tuned.graph)
                    accuracy = replace(table.accuracy, int8=round(reached.value, 4), sqnr_db=round(reached.sqnr_db, 3))
                    measured = replace(measured, accuracy=accuracy)
                made = with_shapes(quantize(tuned.floats, measured, name=model.name))
                (folder / CLEANED).write_bytes(made.serialized)
                (folder / CALIBRATION).write_bytes(measured.to_bytes())
            value = {"graph": made.digest, "nodes": len(made.nodes)}
            return value, {name: folder / name for name in (CLEANED, CALIBRATION)}, _summary(tuned, table, measured)

        if any(stream.count is None for stream in streams):
            cache.forget("qat", key)
        return Stage("qat", key, compute, cache, reporter)

    return stage


class _Reporting:
    """A watcher that tells a stage's reporter."""

    def __init__(self, reporter: Reporter, epochs: int) -> None:
        self._reporter, self._epochs = reporter, epochs

    def step(self, epoch: int, done: float) -> None:
        self._reporter.progress(f"training, epoch {epoch} of {self._epochs}", (epoch - 1 + done) / self._epochs)

    def epoch(self, number: int, facts: Mapping[str, float]) -> None:
        self._reporter.progress(f"training, epoch {number} of {self._epochs}", number / self._epochs)

    def note(self, text: str) -> None:
        self._reporter.note(text)


def _summary(tuned: Tuned, before: CalibrationTable, after: CalibrationTable) -> str:
    said = f"{tuned.trained.epochs} epochs"
    if before.accuracy is None or after.accuracy is None:
        return f"{said}, loss {tuned.trained.history[-1]['loss']:.4f}"
    was, now = before.accuracy, after.accuracy
    return f"{said}, {now.metric} {was.int8:.2f} → {now.int8:.2f} %, float {now.fp32:.2f} %"


def _model(export: Stage, graph: OnnxGraph, preprocessing: Preprocessing | None) -> Model:
    return Model(
        name=export.value["name"],
        source=export.value["source"],
        inputs=specs_of(export, "inputs"),
        digest=export.value["digest"],
        graph=graph,
        preprocessing=preprocessing,
    )


def quantize_aware(
    request: ModelRequest,
    table: Path,
    material: Material,
    recipe: Recipe,
    tuning: Tuning,
    output: Path,
    watcher: Watcher,
    *,
    fresh: bool = False,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> tuple[Quantized, Tuned]:
    """Write a model as Q/DQ ONNX, trained while quantized; what was cut short goes on.

    Args:
        request: The model that was calibrated.
        table: Its calibration table.
        material: What it is trained on and judged by.
        recipe: How.
        tuning: How a quantized network is.
        output: The file; its checkpoint lies beside it while training lasts.
        watcher: Told how it goes.
        fresh: Whether to begin anew where there is a checkpoint.
        cache: Where stages are kept.
        reporter: Told of stages and notes.

    Raises:
        As `tune` and `cnncc.compiler.calibration.quantize`.
    """
    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    check_file(output, "model.int8.onnx")
    with storage_errors(output):
        output.parent.stat()
    recipe.check()
    tuning.lessons()
    found = read_table(table)
    export = export_stage(request, cache, reporter)
    clean = clean_stage(export, cache, reporter)
    graph = load_trusted(clean.file(CLEANED), clean.value["graph"])
    preprocessing = material.preprocessing or preprocessing_of(export)
    check_preprocessing(found, preprocessing)
    model = _model(export, graph, preprocessing)
    checkpoint = checkpoint_of(output)
    opened = open_material(model, material, recipe)
    kept = {layer.node: layer.module for layer in found.kept}
    with resumable(checkpoint, note=watcher.note, fresh=fresh):
        tuned = tune(graph, found, opened, recipe, tuning, watcher, name=model.name, checkpoint=checkpoint)
        tell_findings(with_shapes(tuned.graph), kept.keys(), (), reporter)
        with atomic_file(output) as partial:
            partial.write_bytes(tuned.graph.serialized)
    made = Quantized(tuned.graph.digest, output.stat().st_size, len(found.layers), tuple(kept.values()))
    return made, tuned
