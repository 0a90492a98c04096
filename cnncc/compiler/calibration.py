"""`cnncc calibrate` and `cnncc quantize`: MODEL and DATA → calibration table → Q/DQ ONNX."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cnncc
from cnncc.calibration.table import CalibrationTable, read_table, write_table
from cnncc.compiler.cache import Cache, default_cache_folder
from cnncc.compiler.graph_stages import CLEANED, clean_stage, export_stage, preprocessing_of, specs_of
from cnncc.compiler.keys import tools
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.reporting import Reporter, Silent
from cnncc.compiler.stage import Stage
from cnncc_runtime.bundle import CALIBRATION, to_plain
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.preprocess import Preprocessing

if TYPE_CHECKING:
    from cnncc.calibration.calibrate import Options
    from cnncc.graph.onnx_graph import OnnxGraph

SAMPLES = 512
"""Samples of calibration data at most: the second 256 moved ranges by 1.4 % at most (benchmarks/accuracy.py)."""

_LINT_WORDS = {"refused": "would be refused", "float": "would be computed in float", "slow": "costs speed"}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote.

    Attributes:
        digest: Of the graph.
        size: Of the file, bytes.
        layers: That could be quantized.
        kept: Modules that stay in float.
    """

    digest: str
    size: int
    layers: int
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """What calibration is given, beside the model.

    Attributes:
        data: DATA.
        validation: DATA with labels that accuracy is measured on; empty for none.
        samples: Of ``data`` at most.
        seed: Of the draw.
        skip_bad: Whether damaged samples are left out and counted.
        preprocessing: Replaces the contract that stands beside the model.
        method: Of the thresholds.
        equalize: Whether channels may be equalized.
        shift: Whether tensors may be shifted.
        correct_bias: Whether biases may be corrected.
        float_adds: Whether additions of two tensors read float tensors.
        keep: Patterns of modules that stay in float.
        max_accuracy_drop: Points that may be lost on ``validation``.
        min_sqnr: Least SQNR of the outputs, dB.
    """

    data: str = ""
    validation: str = ""
    samples: int = SAMPLES
    seed: int = 0
    skip_bad: bool = False
    preprocessing: Preprocessing | None = None
    method: str = "auto"
    equalize: bool = True
    shift: bool = True
    correct_bias: bool = True
    float_adds: bool = False
    keep: tuple[str, ...] = ()
    max_accuracy_drop: float | None = None
    min_sqnr: float | None = None

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            UsageError: There is no data, or a budget of accuracy and nothing to measure it on.
        """
        if not self.data:
            raise UsageError(
                "int8 needs data to find its scales with, and there is no default",
                hint="--data images/ (with --preprocess), --data x.npz, or --data package.module:factory: a few "
                "hundred samples of what the device will see; --data random is for trying out",
            )
        if self.max_accuracy_drop is not None and not self.validation:
            raise UsageError("--max-accuracy-drop needs data to measure accuracy on", hint="add --val DATA with labels")

    def options(self) -> Options:
        """Return what the calibration itself is asked for."""
        from cnncc.calibration.calibrate import Options
        from cnncc.calibration.search import Budget

        budget = Budget(self.max_accuracy_drop, self.min_sqnr)
        return Options(self.method, self.equalize, self.shift, self.correct_bias, self.float_adds, self.keep, budget)


def calibrate(
    model: ModelRequest,
    calibration: Calibration,
    output: Path,
    *,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> CalibrationTable:
    """Calibrate a model and write its calibration table.

    A calibration that is cut short leaves what it has in the cache; the same command goes on from there.

    Raises:
        UsageError: A flag contradicts another, or the output is a folder.
        ModelRefused: The model was refused, or a tensor of it becomes NaN or infinite.
        DataRefused: The data was refused.
        BudgetExceeded: No choice of layers meets the budget.
        StorageFailed: The table cannot be written.
    """
    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    calibration.check()
    check_file(output, "model.calib.json")
    export = export_stage(model, cache, reporter)
    clean = clean_stage(export, cache, reporter)
    table = table_of(calibration_stage(export, clean, calibration, cache, reporter), reporter)
    write_table(table, output)
    return table


def import_cache(
    model: ModelRequest,
    source: Path,
    output: Path,
    *,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> CalibrationTable:
    """Write the calibration table that a TensorRT calibration cache makes for a model.

    Raises:
        DataRefused: The file is no such cache, or of another model.
        ModelRefused: The model was refused.
        StorageFailed: The table cannot be written.
    """
    from cnncc.calibration.tensorrt_cache import read_cache, table_of_cache
    from cnncc.graph.reader import load_trusted

    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    check_file(output, "model.calib.json")
    scales = read_cache(source)
    export = export_stage(model, cache, reporter)
    graph = load_trusted(clean_stage(export, cache, reporter).file(CLEANED))
    table = table_of_cache(graph, scales, name=export.value["name"], version=cnncc.__version__, source=str(source))
    write_table(table, output)
    tell(table, reporter)
    return table


def calibration_stage(export: Stage, clean: Stage, calibration: Calibration, cache: Cache, reporter: Reporter) -> Stage:
    """Return the stage that makes a calibration table.

    Its key holds what is known of the data before it is read: names, sizes and times of files. What a callable gives
    is not known, so its calibration is never reused.

    Raises:
        DataRefused: The data cannot be opened.
        UsageError: DATA is of no known form.
    """
    from cnncc.calibration.data import open_data

    inputs = specs_of(export, "inputs")
    preprocessing = calibration.preprocessing or preprocessing_of(export)
    stream = open_data(
        calibration.data,
        inputs,
        preprocessing,
        limit=calibration.samples,
        seed=calibration.seed,
        skip_bad=calibration.skip_bad,
    )
    validation = (
        open_data(calibration.validation, inputs, preprocessing, limit=None) if calibration.validation else None
    )
    options = calibration.options()
    key = cache.key(
        "calibrate",
        graph=clean.value["graph"],
        data=[stream.identity, validation.identity if validation else ""],
        options=to_plain(options),
        tools=tools("onnx", "onnxruntime"),
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        from cnncc.calibration.calibrate import Job
        from cnncc.calibration.calibrate import calibrate as run
        from cnncc.graph.reader import load_trusted

        table = run(
            Job(
                graph=load_trusted(clean.file(CLEANED), clean.value["graph"]),
                name=export.value["name"],
                version=cnncc.__version__,
                stream=stream,
                seed=calibration.seed,
                preprocessing=preprocessing,
                validation=validation,
                options=options,
                workers=host_cpu().cores,
                resume=cache.folder / "calibration",
                progress=reporter.progress,
            )
        )
        path = folder / CALIBRATION
        path.write_bytes(table.to_bytes())
        return {"digest": table.digest}, {CALIBRATION: path}, summary(table)

    if stream.count is None or (validation is not None and validation.count is None):
        cache.forget("calibrate", key)
    return Stage("calibrate", key, compute, cache, reporter)


def table_of(stage: Stage, reporter: Reporter) -> CalibrationTable:
    """Return a stage's table, and tell what a person should know of it."""
    table = read_table(stage.file(CALIBRATION))
    tell(table, reporter)
    return table


def tell(table: CalibrationTable, reporter: Reporter) -> None:
    """Tell what a person should know of a table."""
    for finding in table.health:
        place = finding.module or finding.tensor
        reporter.note(
            f"{place}: {finding.message}; {finding.advice}" if place else f"{finding.message}; {finding.advice}"
        )
    if table.data is not None and table.data.random:
        reporter.note("calibrated on random numbers: good for trying out, and refused by `cnncc publish`")
    if table.data is not None and table.data.skipped:
        reporter.note(f"{table.data.skipped} bad samples were skipped")


def summary(table: CalibrationTable) -> str:
    """Return a table in one line."""
    quantized = len(table.layers) - len(table.kept)
    parts = [f"{quantized} of {len(table.layers)} layers int8"]
    parts += [f"{table.data.samples} samples"] if table.data else []
    parts += [f"output SQNR {table.sqnr_db:.1f} dB"] if table.sqnr_db is not None else []
    if table.accuracy is not None and table.accuracy.metric:
        parts.append(f"{table.accuracy.metric} {table.accuracy.fp32:.2f} → {table.accuracy.int8:.2f} %")
    return ", ".join(parts)


# ---- quantize


def quantize_stage(export: Stage, clean: Stage, table: CalibrationTable, cache: Cache, reporter: Reporter) -> Stage:
    """Return the stage that turns the cleaned graph into a Q/DQ graph; it takes the cleaned graph's place.

    Raises:
        DataRefused: The table was made for another model or other weights.
    """
    key = cache.key("quantize", graph=clean.value["graph"], table=table.digest, tools=tools("onnx"))

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        from cnncc.calibration.quantize import quantize as run
        from cnncc.graph.reader import load_trusted, with_shapes

        quantized = with_shapes(run(load_trusted(clean.file(CLEANED)), table, name=export.value["name"]))
        path = folder / CLEANED
        path.write_bytes(quantized.serialized)
        nodes = len(quantized.nodes)
        return {"graph": quantized.digest, "nodes": nodes}, {CLEANED: path}, f"{nodes} nodes, {summary(table)}"

    return Stage("quantize", key, compute, cache, reporter)


def quantize(
    model: ModelRequest,
    table: Path,
    output: Path,
    *,
    method: str = "",
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> Quantized:
    """Write a model as Q/DQ ONNX, by a calibration table.

    Args:
        model: The model that was calibrated.
        table: Its calibration table.
        output: The file; an existing one is replaced.
        method: Thresholds of another method than the table's; empty for the table's own.
        cache: Where stages are kept.
        reporter: Told of stages and notes.

    Raises:
        DataRefused: The table is damaged, or was made for another model or other weights.
        ModelRefused: The model was refused.
        UsageError: The method is unknown, or the output is a folder.
        StorageFailed: The file cannot be written.
    """
    from cnncc.calibration.quantize import quantize as run
    from cnncc.graph.reader import load_trusted, with_shapes

    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    check_file(output, "model.int8.onnx")
    found = read_table(table)
    export = export_stage(model, cache, reporter)
    graph = load_trusted(clean_stage(export, cache, reporter).file(CLEANED))
    quantized = run(graph, found, name=export.value["name"], method=method)
    tell_findings(with_shapes(quantized), {layer.node for layer in found.kept}, (), reporter)
    with atomic_file(output) as partial:
        partial.write_bytes(quantized.serialized)
    kept = tuple(layer.module for layer in found.kept)
    return Quantized(quantized.digest, output.stat().st_size, len(found.layers), kept)


def tell_findings(graph: OnnxGraph, floats: Collection[str], targets: Collection[str], reporter: Reporter) -> None:
    """Lint a Q/DQ graph: what a target of ours refuses is refused here, the rest is told, a line for each rule.

    Args:
        graph: With Q/DQ.
        floats: Nodes that stay in float on purpose.
        targets: Those that the graph is for; empty for all.
        reporter: Told of what costs speed, and of what other targets would do.

    Raises:
        UnsupportedGraph: A target would refuse the graph or compute something else.
    """
    from cnncc.calibration.lint import Finding, lint, require_clean

    findings = lint(graph, floats=floats)
    require_clean(finding for finding in findings if not targets or set(targets) & set(finding.targets))
    by_rule: dict[str, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    for found in by_rule.values():
        first = found[0]
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        reporter.note(f"{', '.join(first.targets)}: {_LINT_WORDS[first.severity]}: {first}{others}; {first.hint}")


def check_file(path: Path, example: str) -> None:
    """Refuse an output path that is a folder.

    Raises:
        UsageError: It is.
        StorageFailed: It cannot be looked at.
    """
    with storage_errors(path):
        if path.is_dir():
            raise UsageError(f"{path} is a folder", hint=f"give a file: -o {example}")
