"""From the cleaned graph to a proven bundle: quantize, build, audit, weigh int8 against fp32, verify."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cnncc.calibration.data import DataSet, load_data
from cnncc.calibration.table import AccuracyRecord, CalibrationTable, read_table
from cnncc.compiler.build_worker import build_apart, engine_from_plain, engine_to_plain, predict_apart
from cnncc.compiler.cache import Cache
from cnncc.compiler.calibration import calibration_stage, quantize_stage, table_of, tell_findings
from cnncc.compiler.compile_request import AUTO, FP32, HALVES, INT8, CompileRequest, Retraining
from cnncc.compiler.device_runtime import DeviceRuntime
from cnncc.compiler.emulation import can_emulate
from cnncc.compiler.engine_process import EngineProcess
from cnncc.compiler.graph_stages import CLEANED, EXPORTED, preprocessing_of, specs_of
from cnncc.compiler.kernel_stage import KERNELS, kernel_stage
from cnncc.compiler.keys import tools, versions
from cnncc.compiler.narrow_stage import Narrowing, narrow_stage
from cnncc.compiler.payoff import MIXED, PAYOFF, THREADS, Payoff, interval_text, measure, predicted
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc.targets.base import AOT, BuildOptions, Engine, Predicting, Preflight, Target
from cnncc.targets.devices import NATIVE
from cnncc_runtime.bundle import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    PARITY,
    REFERENCE,
    RUNTIME,
    SCHEMA,
    LayerRecord,
    Manifest,
    to_plain,
    write_bundle,
)
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.digests import canonical_json, digest_json
from cnncc_runtime.errors import BudgetExceeded, DataRefused, ParityFailed, UsageError
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.session import obstacle
from cnncc_runtime.specs import Feeds, Tensors

if TYPE_CHECKING:
    from cnncc.compiler.parity import ParityReport

TIMINGS = "timings"
"""Folder in the cache folder: times of kernels that a target's library measured while it built; no input of a build."""

_SHOWN = 3
"""Layers that a message names."""

SAMPLES = 2
"""Seeded random inputs that every engine is checked with, per batch size."""


@dataclass(frozen=True)
class Job:
    """One model on its way to one target.

    Attributes:
        request: What was asked for.
        target: The backend.
        preflight: How it builds.
        export: The stage that exported the model.
        clean: The stage that cleaned its graph.
        cache: Where stages are kept.
        reporter: Told of stages and notes.
        runtime: What the bundle carries to be run without Python; None for nothing.
    """

    request: CompileRequest
    target: Target
    preflight: Preflight
    export: Stage
    clean: Stage
    cache: Cache
    reporter: Reporter
    runtime: DeviceRuntime | None = None


@dataclass(frozen=True)
class Variant:
    """The model in one precision.

    Attributes:
        precision: As the manifest calls it.
        graph: The stage that made the graph: the cleaned one, its Q/DQ form, or that in half precision.
        build: The stage that builds the engine.
        table: By which it was quantized; None for other precisions, and for models that came with Q/DQ.
    """

    precision: str
    graph: Stage
    build: Stage
    table: CalibrationTable | None = None

    @property
    def reference(self) -> str:
        """Digest of the calibration table, empty for none."""
        return self.table.digest if self.table else ""


@dataclass(frozen=True)
class Choice:
    """What becomes the bundle.

    Attributes:
        variant: The model in the precision that was chosen.
        payoff: Why; None where nothing was compared.
    """

    variant: Variant
    payoff: Payoff | None = None


def quantized(job: Job) -> Variant:
    """Return the model in the precision that was asked for; ``auto`` starts with all that may be int8.

    Raises:
        UsageError: The model carries Q/DQ already, or there is no data.
        DataRefused: DATA or the calibration table was refused.
        BudgetExceeded: No choice of layers meets the budget of accuracy.
    """
    from cnncc.graph.reader import load_trusted

    request, clean = job.request, job.clean
    if clean.value["quantized"]:
        if request.precision != FP32:
            raise UsageError(
                "the model carries Q/DQ already, with scales of its own",
                hint="leave --precision and --data out: its scales are respected; or give the float32 model",
            )
        job.reporter.note("the model carries Q/DQ: its own scales are used, and its speed is not compared with fp32")
        tell_findings(load_trusted(clean.file(CLEANED)), (), job.preflight.builders, job.reporter)
        return Variant(INT8, clean, _build_stage(job, clean))
    if request.precision == FP32:
        return _fp32(job)
    if request.precision in HALVES:
        graph = _narrowed(job, clean, request.precision)
        return Variant(request.precision, graph, _build_stage(job, graph))
    if request.retraining is not None:
        return _retrained(job, request.retraining)
    if request.table is not None:
        table = read_table(request.table)
        check_preprocessing(table, request.preprocessing or preprocessing_of(job.export))
        return _by_table(job, table)
    return _by_table(job, table_of(_calibration(job, ()), job.reporter))


def _fp32(job: Job) -> Variant:
    return Variant(FP32, job.clean, _build_stage(job, job.clean))


def _calibration(job: Job, floats: tuple[str, ...]) -> Stage:
    """Return the stage that calibrates.

    Args:
        job: The job.
        floats: Nodes that stay in float besides those that the user named.
    """
    calibration = job.request.calibration
    calibration = replace(calibration, keep=(*calibration.keep, *map(escape, floats)))
    return calibration_stage(job.export, job.clean, calibration, job.cache, job.reporter)


def _by_table(job: Job, table: CalibrationTable) -> Variant:
    return _int8(job, quantize_stage(job.export, job.clean, table, job.cache, job.reporter), table)


def _retrained(job: Job, retraining: Retraining) -> Variant:
    """Return the model in int8, trained unless calibration alone meets the budget, which no layer is kept in float for.

    Raises:
        BudgetExceeded: It misses the budget of accuracy after training too.
        UsageError: There is a budget, and no accuracy.
    """
    export, clean, cache, reporter = job.export, job.clean, job.cache, job.reporter
    drop = job.request.calibration.max_accuracy_drop
    whole = replace(job.request.calibration, max_accuracy_drop=None)
    table = table_of(calibration_stage(export, clean, whole, cache, reporter), reporter)
    if drop is not None and not (table.accuracy and table.accuracy.metric):
        raise UsageError(
            "there is no accuracy that could drop: the first output is no classes", hint="leave --max-accuracy-drop out"
        )
    if drop is not None and table.accuracy is not None and _lost(table.accuracy) <= drop:
        reporter.note(f"nothing was trained: calibration alone loses {_lost(table.accuracy):.2f} points of {drop:g}")
        return _by_table(job, table)
    preprocessing = job.request.preprocessing or preprocessing_of(export)
    stage = retraining(export, clean, table, preprocessing, cache, reporter)
    trained = read_table(stage.file(CALIBRATION))
    if drop is not None and trained.accuracy is not None and _lost(trained.accuracy) > drop:
        raise BudgetExceeded(
            f"int8 loses {_lost(trained.accuracy):.2f} points of {trained.accuracy.metric} after training, and "
            f"{drop:g} may be lost",
            where=[f"before training it lost {_lost(table.accuracy):.2f}"] if table.accuracy else [],
            hint="train for more epochs or on more data, or leave --qat out: then layers are kept in float",
        )
    return _int8(job, stage, trained)


def _lost(accuracy: AccuracyRecord) -> float:
    return accuracy.fp32 - accuracy.int8


def _int8(job: Job, graph: Stage, table: CalibrationTable) -> Variant:
    if job.request.float_type != FP32:
        graph = _narrowed(job, graph, job.request.float_type)
    return Variant(INT8, graph, _build_stage(job, graph), table)


def _narrowed(job: Job, graph: Stage, precision: str) -> Stage:
    request = job.request
    preprocessing = request.preprocessing or preprocessing_of(job.export)
    narrowing = Narrowing(precision, request.batches[:1], request.data, preprocessing)
    return narrow_stage(job.export, job.clean, graph, narrowing, job.cache, job.reporter)


def check_preprocessing(table: CalibrationTable, wanted: Preprocessing | None) -> None:
    """Refuse a table whose images came through another contract than the bundle's will.

    Raises:
        DataRefused: They differ.
    """
    used = table.data.preprocessing if table.data else None
    if used is None or wanted is None or used == wanted:
        return
    pairs = zip(to_plain(used).items(), to_plain(wanted).values(), strict=True)
    raise DataRefused(
        "the table was calibrated with another preprocessing",
        where=[f"{name}: {was}, now {now}" for (name, was), now in pairs if was != now],
        hint="calibrate again with the --preprocess that the bundle gets, or leave --preprocess out",
    )


def _for_target(job: Job, graph: Stage) -> dict[str, Any]:
    """Return what determines an engine before anything was measured."""
    request, target = job.request, job.target
    return {
        "graph": graph.value["graph"],
        "target": target.name,
        "profile": to_plain(target.profile),
        "machine": host_cpu().model if target.profile.cpu == NATIVE else "",
        "batches": request.batches,
        "kernels": to_plain(request.kernels),
        "gpu": to_plain(request.gpu.lasting),
        "runtime": [request.runtime, bundle_name(request) if request.runtime == AOT else ""],
        "tools": {**tools(), **target.toolchain(), **job.preflight.toolchain},
    }


def build_options(request: CompileRequest) -> BuildOptions:
    """Return what a request asks of a build, before anything was measured."""
    return BuildOptions(
        request.profile,
        request.batches,
        request.kernels,
        gpu=request.gpu,
        precision=request.precision,
        float_type=request.float_type,
        runtime=request.runtime,
        name=bundle_name(request),
    )


def _options(job: Job, measured: str) -> BuildOptions:
    return replace(
        build_options(job.request),
        measured=measured,
        timings=job.cache.folder / TIMINGS,
        progress=job.reporter.progress,
        note=job.reporter.note,
    )


def _measured(job: Job, graph: Stage) -> str:
    """Return the measurements that the build is given, an empty text for none."""
    optimize = job.request.optimize
    if not optimize.wanted:
        return ""
    key = job.cache.key("kernels", level=optimize.level, **_for_target(job, graph))
    stage = kernel_stage(key, graph, job.target, optimize, _options(job, ""), job.cache, job.reporter)
    return stage.file(KERNELS).read_text(encoding="utf-8")


def _build_stage(job: Job, graph: Stage) -> Stage:
    measured = _measured(job, graph)
    key = job.cache.key("build", measured=digest_json(measured), **_for_target(job, graph))
    name = job.target.name

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        engine = build_apart(name, graph.file(CLEANED), _options(job, measured), folder)
        files = {name: path for name, (_role, path) in engine.files.items()}
        size = sum(files[name].stat().st_size for name in engine.record.roles)
        detail = f"{name} {engine.target.processor}, {_kernels(engine)}{size / 1e6:.1f} MB{_memory(engine)}"
        return {"engine": engine_to_plain(engine)}, files, detail

    return Stage("build", key, compute, job.cache, job.reporter)


def _kernels(engine: Engine) -> str:
    return f"{len(engine.layers)} kernels, " if engine.layers else ""


def _memory(engine: Engine) -> str:
    return "".join(f", {kind} {size / 1e3:.1f} kB" for kind, size in engine.memory.items())


def check_fallback(job: Job, variant: Variant) -> None:
    """Tell which layers of a graph the engine computes in another type than the graph says; refuse it for wider ones.

    Raises:
        BudgetExceeded: They are more than may be.
    """
    if variant.precision == FP32:
        return
    from cnncc.compiler.audit import audit
    from cnncc.graph.reader import load_trusted

    request = job.request
    layers = msgspec.convert(variant.build.value["engine"]["layers"], tuple[LayerRecord, ...])
    found = audit(load_trusted(variant.graph.file(CLEANED)), layers, variant.precision)
    if found.narrowed:
        job.reporter.note(
            f"{request.target} computes {len(found.narrowed)} layers in {variant.precision} that the graph has "
            f"in float32, between casts: {_some(found.narrowed)}"
        )
    if not found.fallbacks:
        return
    wider = "float32" if request.float_type == FP32 else f"float32 or {request.float_type}"
    name, width = variant.precision, wider if variant.precision == INT8 else "another type"
    said = f"{request.target} computes {len(found.fallbacks)} of {found.asked} {name} layers in {width}"
    if not layers:
        said = f"nobody can tell how {request.target} computes the {found.asked} {name} layers: its engine does not say"
    keep = "; --keep MODULE leaves a layer in float on purpose" if variant.precision == INT8 else ""
    if request.max_fallback is not None and len(found.fallbacks) > request.max_fallback:
        raise BudgetExceeded(
            said,
            where=found.fallbacks[:_SHOWN],
            hint=f"--max-fallback {len(found.fallbacks)} allows it" + keep,
        )
    job.reporter.note(f"{said}: {_some(found.fallbacks)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


# ---- does int8 pay?


def choose(job: Job, int8: Variant) -> Choice:
    """Weigh a quantized model against its fp32 form: measured where this machine runs the target, else predicted.

    ``auto`` takes the faster; layers that int8 slows down go back to float where the whole gains by it.

    Raises:
        BudgetExceeded: int8 was asked for and is slower.
        RunFailed: An engine crashed while it was measured.
    """
    table = int8.table
    if table is None or job.request.allow_slow or len(table.kept) == len(table.layers):
        return Choice(int8)
    engine = engine_from_plain(int8.build.value["engine"], Path())
    if engine.record.dla is not None:
        job.reporter.note("int8 is not weighed against fp32: the DLA does not compute in float32")
        return Choice(int8)
    away = obstacle(engine.target, engine.record)
    if away is not None and not isinstance(job.target, Predicting):
        job.reporter.note(
            f"int8 is not weighed against fp32: it cannot be measured here ({away.message}), and the {job.target.name} "
            "target has no model of time to predict it with; measure both on the device"
        )
        return Choice(int8)
    here = away is None and job.request.runtime != AOT  # such engines tell no times of kernels
    variants = {INT8: int8, FP32: _fp32(job)}
    payoff = _payoff(job, variants, engine.target.processor, here=here)
    if job.request.precision == AUTO:
        some = 0 < len(payoff.slower) < len(payoff.layers)  # of all of them, fp32 is the very model
        if some and job.request.table is not None:
            job.reporter.note(
                f"int8 slows down {len(payoff.slower)} layers, and --calib says which are int8: "
                "with --data instead, they are left in float where that is faster"
            )
        if some and job.request.table is None:
            variants[MIXED] = _mixed(job, frozenset(layer.node for layer in payoff.slower))
            payoff = _payoff(job, variants, engine.target.processor, here=here)
        _tell(job, payoff, variants[payoff.chosen])
        return Choice(variants[payoff.chosen], payoff)
    if payoff.chosen == FP32:
        raise BudgetExceeded(
            f"int8 is slower than fp32: {payoff}",
            where=[f"{layer.module}: fp32 {layer.fp32 * 1e3:.3f} ms, int8 {layer.int8 * 1e3:.3f} ms"
                   for layer in sorted(payoff.slower, key=lambda layer: layer.fp32 - layer.int8)[:_SHOWN]],
            hint="--precision auto takes what is faster, layer by layer; --allow-slow takes int8 all the same: it is "
            "smaller",
        )  # fmt: skip
    _tell(job, payoff, int8)
    return Choice(int8, payoff)


def _mixed(job: Job, floats: frozenset[str]) -> Variant:
    """Return the model calibrated once more, with some nodes in float: biases, accuracy and all are of that model."""
    table = read_table(_calibration(job, tuple(sorted(floats))).file(CALIBRATION))  # its health was told of all layers
    layers = tuple(
        msgspec.structs.replace(layer, why="speed") if layer.node in floats else layer for layer in table.layers
    )
    return _by_table(job, msgspec.structs.replace(table, layers=layers))


def _tell(job: Job, payoff: Payoff, taken: Variant) -> None:
    """Tell what the user would not expect of the precision that was asked for."""
    if payoff.chosen != INT8:
        floats = f", with {len(taken.table.kept)} layers in float" if taken.table else ""
        job.reporter.note(f"{payoff.chosen} is the fastest and was taken{floats}: {payoff}")
        return
    int8 = payoff.of(INT8)
    if int8 is not None and int8.against is not None and int8.against.high >= 1:
        job.reporter.note(f"int8 is no faster than fp32: {interval_text(int8.against)} of its time")


def _payoff(job: Job, variants: dict[str, Variant], processor: str, *, here: bool) -> Payoff:
    """Return the stage's result; ``here`` says whether this machine runs the engines."""
    key = job.cache.key(
        "payoff",
        builds=[[name, variant.build.key, variant.build.digests] for name, variant in sorted(variants.items())],
        machine=host_cpu().model if here else "",
        threads=THREADS,
        tools=tools(),
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        if here:
            payoff = _measure(job, variants, folder)
        else:
            payoff = _predict(job, variants, f"{job.target.profile.name} ({processor})", folder)
        (folder / PAYOFF).write_bytes(canonical_json(to_plain(payoff)))
        return {"payoff": to_plain(payoff)}, {PAYOFF: folder / PAYOFF}, str(payoff)

    stage = Stage("payoff", key, compute, job.cache, job.reporter)
    return msgspec.convert(stage.value["payoff"], Payoff)


def _measure(job: Job, variants: dict[str, Variant], folder: Path) -> Payoff:
    from cnncc.graph.feeds import random_feeds
    from cnncc.graph.names import module_path, node_label
    from cnncc.graph.reader import load_trusted

    inputs = _inputs(job)
    bundles: dict[str, Path] = {}
    for name, variant in variants.items():
        bundles[name] = folder / name
        _write_trial(job, variant, inputs, bundles[name])
    specs = specs_of(job.export, "inputs")
    feeds = random_feeds(specs, batch=next(iter(job.request.batches), 1))
    modules = {node_label(node): module_path(node) for node in load_trusted(job.clean.file(CLEANED)).nodes}
    return measure(bundles, feeds, modules, job.reporter.progress)


def _predict(job: Job, variants: dict[str, Variant], machine: str, folder: Path) -> Payoff:
    cycles = {
        name: predict_apart(job.target.name, variant.graph.file(CLEANED), _options(job, ""), folder)
        for name, variant in variants.items()
    }
    return predicted(cycles, machine)


# ---- verify


@dataclass(frozen=True)
class _Inputs:
    """What the user gave for the proof and the bundle, with the model's own as defaults."""

    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    data: DataSet | None


def _inputs(job: Job) -> _Inputs:
    request, export = job.request, job.export
    preprocessing = request.preprocessing or preprocessing_of(export)
    labels = request.labels or tuple(export.value["labels"])
    data = None
    if request.data:
        data = load_data(request.data, specs_of(export, "inputs"), preprocessing, limit=request.samples)
    return _Inputs(preprocessing, labels, data)


def verify_stage(job: Job, choice: Choice) -> Stage:
    """Return the stage that proves an engine and makes its bundle.

    Raises:
        ParityFailed: The engine does not compute what the model computes.
        DataRefused: DATA was refused.
    """
    inputs, request, variant = _inputs(job), job.request, choice.variant
    payoff = to_plain(choice.payoff) if choice.payoff else None
    key = job.cache.key(
        "verify",
        model=[job.export.key, job.export.value["graph"]],
        build=[variant.build.key, variant.build.digests],
        data=inputs.data.digest if inputs.data else "",
        preprocessing=to_plain(inputs.preprocessing),
        labels=inputs.labels,
        runtime=job.runtime.digests if job.runtime else {},
        options=[
            request.reference,
            request.keep_failed,
            bundle_name(request),
            variant.precision,
            variant.reference,
            payoff,
        ],
        tools=tools("torch", "onnx", "onnxruntime", "apache-tvm", "apache-tvm-ffi"),
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        proof = _prove(job, variant, inputs, folder)
        if proof.state == "failed" and not request.keep_failed:
            raise ParityFailed(
                "the engine does not compute what the model computes; no bundle was written",
                where=proof.report.failures,
                hint="`--keep-failed` keeps the bundle, marked as failed; then `cnncc verify --layers` finds the layer",
            )
        manifest = _manifest(job, variant, proof.engine, inputs, proof.state)
        contents = folder / "bundle"
        contents.mkdir()
        files: dict[str, tuple[str, Path | bytes]] = {
            **_engine_files(variant.build, proof.engine),
            PARITY: ("report", canonical_json(to_plain(proof.report))),
            GOLDEN: ("golden", proof.golden),
        }
        if request.reference:
            files[REFERENCE] = ("reference", variant.graph.file(CLEANED))
        if variant.table is not None:
            files[CALIBRATION] = ("report", variant.table.to_bytes())
        if payoff is not None:
            files[PAYOFF] = ("report", canonical_json(payoff))
        if job.runtime is not None:
            files.update({name: (RUNTIME, job.runtime.file(name)) for name in job.runtime.stages})
        bundle = write_bundle(contents, manifest, files)
        value = {"state": proof.state, "manifest": bundle.digest, "failures": list(proof.report.failures)}
        names = (MANIFEST, *bundle.manifest.files)
        return value, {name: contents / name for name in names}, _summary(proof)

    return Stage("verify", key, compute, job.cache, job.reporter)


def _engine_files(build: Stage, engine: Engine) -> dict[str, tuple[str, Path]]:
    return {name: (role, build.file(name)) for name, (role, _path) in engine.files.items()}


def _write_trial(job: Job, variant: Variant, inputs: _Inputs, folder: Path) -> Engine:
    """Write a bundle whose parity is pending: an engine runs out of it by the very path of a device."""
    engine = engine_from_plain(variant.build.value["engine"], folder)
    folder.mkdir()
    write_bundle(folder, _manifest(job, variant, engine, inputs, "pending"), _engine_files(variant.build, engine))
    return engine


@dataclass(frozen=True)
class _Proof:
    engine: Engine
    report: ParityReport
    golden: bytes
    state: str


def _prove(job: Job, variant: Variant, inputs: _Inputs, folder: Path) -> _Proof:
    """Run the engine, in a process of its own, and its references on the same samples."""
    from cnncc.compiler.verify import random_samples, verify_engine
    from cnncc.graph.reader import load_trusted

    trial = folder / "trial.cnncc"
    engine = _write_trial(job, variant, inputs, trial)
    feeds, names = random_samples(specs_of(job.export, "inputs"), batches=job.request.batches, count=SAMPLES)
    if inputs.data is not None:
        feeds += [sample.feeds for sample in inputs.data.samples]
        names += [sample.name for sample in inputs.data.samples]
    away = obstacle(engine.target, engine.record)
    if away is not None:
        where = "on the device, or here with --emulate" if can_emulate(engine.target) else "on the device"
        job.reporter.note(
            f"built, not executed here ({away.message}): parity is pending until `cnncc verify` runs {where}"
        )
    cleaned = functools.partial(load_trusted, variant.graph.file(CLEANED))
    # an engine in int8 or half precision is to compute what its own graph says; how far that is from the model, the
    # stage that made it measured
    made = variant.graph is not job.clean
    exported = cleaned if made else functools.partial(load_trusted, job.export.file(EXPORTED))
    with EngineProcess(trial) if away is None else nullcontext() as process:
        found = verify_engine(
            exported=exported,
            cleaned=cleaned,
            torch_run=None if made else _torch_run(job.export),
            engine_run=process.run if process else None,
            samples=feeds,
            sample_names=names,
        )
    state = "failed" if not found.report.passed else "passed" if process else "pending"
    return _Proof(engine, found.report, found.golden, state)


def _summary(proof: _Proof) -> str:
    engine = proof.report.subject("engine")
    if engine is None:
        return f"parity {proof.state}"
    errors = [output.rel_l2 for output in engine.outputs if output.rel_l2 is not None]
    agreed = [output.top1_agreement for output in engine.outputs if output.top1_agreement is not None]
    parts = [f"parity {proof.state} on {len(proof.report.samples)} samples"]
    parts += [f"relative error {max(errors):.1e}"] if errors else []
    parts += [f"top-1 agreement {min(agreed):.1%}"] if agreed else []
    return ", ".join(parts)


def _torch_run(export: Stage) -> Callable[[Feeds], Tensors] | None:
    if "program.pt2" not in export.digests:
        return None
    from cnncc.compiler.torch_run import program_runner

    return program_runner(export.file("program.pt2"), [spec.name for spec in specs_of(export, "outputs")])


def _manifest(job: Job, variant: Variant, engine: Engine, inputs: _Inputs, parity: str) -> Manifest:
    export, request = job.export, job.request
    value = export.value
    model = {"source": value["source"], "digest": value["digest"], "graph": value["graph"]}
    if "program.pt2" in export.digests:
        model["program"] = export.digests["program.pt2"]
    return Manifest(
        schema=SCHEMA,
        name=bundle_name(request),
        model=model,
        target=engine.target,
        engine=engine.record,
        inputs=specs_of(export, "inputs"),
        outputs=specs_of(export, "outputs"),
        batches=request.batches,
        preprocessing=inputs.preprocessing,
        labels=inputs.labels,
        precision=variant.precision,
        layers=engine.layers,
        parity=parity,
        toolchain={**versions("torch", "onnx", "onnxruntime"), **engine.toolchain, **_runtime_toolchain(job)},
        reproducible=engine.reproducible,
        files={},
    )


def _runtime_toolchain(job: Job) -> dict[str, str]:
    if job.runtime is None:
        return {}
    return {"runtime compiler": job.runtime.compilers.version, "runtime glibc": job.runtime.glibc}


def bundle_name(request: CompileRequest) -> str:
    """Return the model's name: what is asked for, or that of the folder: ``digits.cnncc`` → ``digits``."""
    return request.name or request.output.name.removesuffix(".cnncc")
