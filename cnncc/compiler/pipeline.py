"""The main job: MODEL → ONNX → engine → proof → bundle, each stage cached, the bundle published atomically.

::

    export   MODEL, weights, shapes      → exported.onnx, program.pt2
    clean    exported.onnx               → cleaned.onnx          (numerics proved on the spot)
    calibrate, quantize                  → cleaned.onnx with Q/DQ, calibration.json (only for int8)
    kernels  cleaned.onnx, measurements  → kernels.json          (only where kernels are measured, or were before)
    build    cleaned.onnx, target        → engine.so, weights.bin
    verify   engine, samples             → bundle files, parity  (a failed proof is never cached)
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cnncc.calibration.data import DataSet, load_data
from cnncc.calibration.table import CalibrationTable, read_table
from cnncc.compiler.build_worker import build_apart, engine_from_plain, engine_to_plain
from cnncc.compiler.cache import Cache, default_cache_folder
from cnncc.compiler.calibration import (
    TABLE,
    Calibration,
    calibration_stage,
    quantize_stage,
    table_of,
    tell_findings,
)
from cnncc.compiler.engine_process import EngineProcess
from cnncc.compiler.graph_stages import (
    CLEANED,
    EXPORTED,
    clean_stage,
    export_stage,
    preprocessing_of,
    specs_of,
)
from cnncc.compiler.kernel_stage import KERNELS, Optimize, check_optimize, kernel_stage
from cnncc.compiler.keys import tools, versions
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.reporting import Reporter, Silent
from cnncc.compiler.stage import Stage
from cnncc.targets.base import BuildOptions, Engine, KernelOptions, Profile, Target
from cnncc.targets.devices import NATIVE
from cnncc.targets.registry import load_target
from cnncc_runtime.bundle import (
    GOLDEN,
    MANIFEST,
    PARITY,
    REFERENCE,
    SCHEMA,
    Bundle,
    LayerRecord,
    Manifest,
    read_bundle,
    to_plain,
    write_bundle,
)
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.digests import canonical_json, digest_json
from cnncc_runtime.errors import BudgetExceeded, BundleRefused, CnnccError, DataRefused, ParityFailed, UsageError
from cnncc_runtime.files import atomic_file, atomic_folder, storage_errors, sweep
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.session import engine_mismatch
from cnncc_runtime.specs import Feeds, Tensors

if TYPE_CHECKING:
    from cnncc.compiler.parity import ParityReport
    from cnncc.graph.onnx_graph import OnnxGraph

FP32, INT8 = "fp32", "int8"

_SHOWN = 3
"""Layers that a message names."""

SAMPLES = 2
"""Seeded random inputs that every engine is checked with, per batch size."""


@dataclass(frozen=True)
class CompileRequest:
    """What `compile` is asked for.

    Attributes:
        model: The MODEL argument with its weights and shapes.
        profile: The device.
        output: Where the bundle goes; an existing bundle is replaced, anything else is refused.
        target: The target's name.
        batches: Batch sizes to build for, where the model has a symbolic batch.
        kernels: What the target's choice of kernels must heed.
        optimize: How knobs of kernels are found.
        data: DATA for real inputs in the parity check; empty for none.
        samples: Real inputs at most.
        preprocessing: Replaces the contract that stands beside the model.
        labels: Replaces the class names that stand beside the model.
        keep_failed: Keep a bundle whose parity failed, marked so.
        reference: Store the cleaned ONNX in the bundle, for `verify` and `bench`.
        precision: ``fp32``, or ``int8`` by a calibration or its table.
        calibration: How to calibrate, for int8 without a table.
        table: A calibration table made before.
        max_fallback: Layers that are int8 in the graph and may be float in the engine; None for any number.
    """

    model: ModelRequest
    profile: Profile
    output: Path
    target: str = "llvm"
    batches: tuple[int, ...] = ()
    kernels: KernelOptions = field(default_factory=KernelOptions)
    optimize: Optimize = field(default_factory=Optimize)
    data: str = ""
    samples: int = 32
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    keep_failed: bool = False
    reference: bool = True
    precision: str = FP32
    calibration: Calibration = field(default_factory=Calibration)
    table: Path | None = None
    max_fallback: int | None = None


@dataclass(frozen=True)
class Compiled:
    """What `compile` made.

    Attributes:
        bundle: The bundle at its final place.
        parity: ``passed``, ``failed`` or ``pending``.
        failures: What failed, a sentence each.
        unchanged: Whether the output already held these very bytes.
    """

    bundle: Bundle
    parity: str
    failures: tuple[str, ...]
    unchanged: bool


def compile(request: CompileRequest, *, cache: Cache | None = None, reporter: Reporter | None = None) -> Compiled:
    """Compile a model into a verified bundle.

    Args:
        request: What to make.
        cache: Where stages are kept; the user's cache folder by default.
        reporter: Told of stages and notes.

    Returns:
        The bundle, at ``request.output``.

    Raises:
        UsageError: A shape, batch size or output path is wrong.
        ModelRefused: The model, its weights or its graph were refused.
        DataRefused: DATA was refused.
        EnvironmentMissing: A package, a linker or disk space is missing.
        ExportFailed: PyTorch could not export the module.
        BuildFailed: The compiler failed.
        BudgetExceeded: The engine computes more int8 layers in float than may be.
        ParityFailed: The engine does not compute what the model computes; no bundle is left.
    """
    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    check_output(request.output)
    if request.precision != FP32 and request.table is None:
        request.calibration.check()
    target = load_target(request.target, request.profile)
    check_optimize(request.optimize, target)
    export = export_stage(request.model, cache, reporter)
    clean = clean_stage(export, cache, reporter)
    _check_batches(export, request.batches)
    built = _quantized(export, clean, request, cache, reporter)
    build = _build_stage(
        built.graph, target, request, _measured(built.graph, target, request, cache, reporter), cache, reporter
    )
    _audit(built, build, request, reporter)
    verify = _verify_stage(export, built, build, request, cache, reporter)
    compiled = _publish(verify, request.output)
    if compiled.parity == "failed":
        raise ParityFailed(
            f"the engine does not compute what the model computes; {request.output} is kept and marked as failed",
            where=compiled.failures,
            hint=f"`cnncc verify {request.output} --layers` finds the layer",
        )
    return compiled


def compile_all(
    requests: Sequence[CompileRequest], *, cache: Cache | None = None, reporter: Reporter | None = None
) -> list[Compiled]:
    """Compile a model for several targets or devices: one export, many engines.

    Every output path is checked before any work is done. A failure ends the rest; what was finished stays, and the
    reporter is told.

    Raises:
        CnnccError: As `compile`.
    """
    reporter = reporter or Silent()
    for request in requests:
        check_output(request.output)
    done: list[Compiled] = []
    try:
        for request in requests:
            done.append(compile(request, cache=cache, reporter=reporter))
    except CnnccError:
        if done:
            reporter.note(f"finished before the failure: {', '.join(str(result.bundle.path) for result in done)}")
        raise
    return done


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        digest: Of the graph.
        size: Of the file, bytes.
        nodes: Of the graph.
    """

    digest: str
    size: int
    nodes: int


def export(
    model: ModelRequest,
    output: Path,
    *,
    raw: bool = False,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Export a model to an ONNX file.

    Args:
        model: The MODEL argument with its weights and shapes.
        output: The file; an existing one is replaced.
        raw: The graph as exported, before cnncc's passes.
        cache: Where stages are kept.
        reporter: Told of stages and notes.

    Raises:
        ModelRefused: The model, its weights or its graph were refused.
        ExportFailed: PyTorch could not export the module.
        StorageFailed: The file cannot be written.
    """
    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    with storage_errors(output):
        if output.is_dir():
            raise UsageError(f"{output} is a folder", hint="give a file: -o model.onnx")
    stage = export_stage(model, cache, reporter)
    name = EXPORTED
    if not raw:
        stage, name = clean_stage(stage, cache, reporter), CLEANED
    with atomic_file(output) as partial:
        shutil.copyfile(stage.file(name), partial)
    return Exported(stage.value["graph"], output.stat().st_size, stage.value["nodes"])


def clean_graph(model: ModelRequest, *, cache: Cache | None = None, reporter: Reporter | None = None) -> OnnxGraph:
    """Return a model's cleaned ONNX graph.

    Raises:
        ModelRefused: The model, its weights or its graph were refused.
        ExportFailed: PyTorch could not export the module.
    """
    from cnncc.graph.reader import load_trusted

    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    return load_trusted(clean_stage(export_stage(model, cache, reporter), cache, reporter).file(CLEANED))


# ---- stages


@dataclass(frozen=True)
class _Graph:
    """What an engine is built from.

    Attributes:
        graph: The stage that made it.
        precision: Asked for.
        table: By which it was quantized; None for fp32, and for models that came with Q/DQ.
    """

    graph: Stage
    precision: str
    table: CalibrationTable | None = None

    @property
    def reference(self) -> str:
        """Digest of the calibration table, empty for none."""
        return self.table.digest if self.table else ""


def _quantized(export: Stage, clean: Stage, request: CompileRequest, cache: Cache, reporter: Reporter) -> _Graph:
    """Return the graph to build from: the cleaned one, or its Q/DQ form."""
    from cnncc.graph.reader import load_trusted

    if clean.value["quantized"]:
        if request.precision != FP32:
            raise UsageError(
                "the model carries Q/DQ already, with scales of its own",
                hint="leave --precision and --data out: its scales are respected; or give the float32 model",
            )
        reporter.note("the model carries Q/DQ: its own scales are used")
        tell_findings(load_trusted(clean.file(CLEANED)), (), (request.target,), reporter)
        return _Graph(clean, INT8)
    if request.precision == FP32:
        return _Graph(clean, FP32)
    if request.table is not None:
        table = read_table(request.table)
        _check_preprocessing(table, request.preprocessing or preprocessing_of(export))
    else:
        table = table_of(calibration_stage(export, clean, request.calibration, cache, reporter), reporter)
    return _Graph(quantize_stage(export, clean, table, cache, reporter), INT8, table)


def _check_preprocessing(table: CalibrationTable, wanted: Preprocessing | None) -> None:
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


def _for_target(clean: Stage, target: Target, request: CompileRequest) -> dict[str, Any]:
    """Return what determines an engine before anything was measured."""
    return {
        "graph": clean.value["graph"],
        "target": target.name,
        "profile": to_plain(target.profile),
        "machine": host_cpu().model if target.profile.cpu == NATIVE else "",
        "batches": request.batches,
        "kernels": to_plain(request.kernels),
        "tools": {**tools(), **target.toolchain()},
    }


def _measured(clean: Stage, target: Target, request: CompileRequest, cache: Cache, reporter: Reporter) -> str:
    """Return the measurements that the build is given, an empty text for none."""
    if not request.optimize.wanted:
        return ""
    key = cache.key("kernels", level=request.optimize.level, **_for_target(clean, target, request))
    options = BuildOptions(target.profile, request.batches, request.kernels, progress=reporter.progress)
    stage = kernel_stage(key, clean, target, request.optimize, options, cache, reporter)
    return stage.file(KERNELS).read_text(encoding="utf-8")


def _build_stage(
    clean: Stage, target: Target, request: CompileRequest, measured: str, cache: Cache, reporter: Reporter
) -> Stage:
    key = cache.key("build", measured=digest_json(measured), **_for_target(clean, target, request))
    options = BuildOptions(target.profile, request.batches, request.kernels, measured, reporter.progress)

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        engine = build_apart(target.name, clean.file(CLEANED), options, folder)
        files = {name: path for name, (_role, path) in engine.files.items()}
        size = sum(path.stat().st_size for path in files.values())
        detail = f"{target.name} {engine.target.cpu}, {len(engine.layers)} kernels, {size / 1e6:.1f} MB"
        return {"engine": engine_to_plain(engine)}, files, detail

    return Stage("build", key, compute, cache, reporter)


def _audit(built: _Graph, build: Stage, request: CompileRequest, reporter: Reporter) -> None:
    """Tell which layers of a quantized graph the engine computes in float, or refuse it.

    Raises:
        BudgetExceeded: They are more than may be.
    """
    if built.precision != INT8:
        return
    from cnncc.compiler.audit import audit
    from cnncc.graph.reader import load_trusted

    layers = msgspec.convert(build.value["engine"]["layers"], tuple[LayerRecord, ...])
    found = audit(load_trusted(built.graph.file(CLEANED)), layers)
    if not found.fallbacks:
        return
    said = f"{request.target} computes {len(found.fallbacks)} of {found.quantized} int8 layers in float32"
    if request.max_fallback is not None and len(found.fallbacks) > request.max_fallback:
        raise BudgetExceeded(
            said,
            where=found.fallbacks[:_SHOWN],
            hint=f"--max-fallback {len(found.fallbacks)} allows it; --keep MODULE leaves a layer in float on purpose",
        )
    more = ", …" if len(found.fallbacks) > _SHOWN else ""
    reporter.note(f"{said}: {', '.join(found.fallbacks[:_SHOWN])}{more}")


def _engine_files(build: Stage, engine: Engine) -> dict[str, tuple[str, Path]]:
    return {name: (role, build.file(name)) for name, role in engine.record.roles.items()}


@dataclass(frozen=True)
class _Inputs:
    """What the user gave for the proof and the bundle, with the model's own as defaults."""

    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    data: DataSet | None


def _inputs(request: CompileRequest, export: Stage) -> _Inputs:
    preprocessing = request.preprocessing or preprocessing_of(export)
    labels = request.labels or tuple(export.value["labels"])
    data = None
    if request.data:
        data = load_data(request.data, specs_of(export, "inputs"), preprocessing, limit=request.samples)
    return _Inputs(preprocessing, labels, data)


def _verify_stage(
    export: Stage, built: _Graph, build: Stage, request: CompileRequest, cache: Cache, reporter: Reporter
) -> Stage:
    inputs = _inputs(request, export)
    key = cache.key(
        "verify",
        model=[export.key, export.value["graph"]],
        build=[build.key, build.digests],
        data=inputs.data.digest if inputs.data else "",
        preprocessing=to_plain(inputs.preprocessing),
        labels=inputs.labels,
        options=[request.reference, request.keep_failed, bundle_name(request.output), built.precision, built.reference],
        tools=tools("torch", "onnx", "onnxruntime", "apache-tvm", "apache-tvm-ffi"),
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        proof = _prove(export, built, build, request, inputs, folder)
        if proof.state == "failed" and not request.keep_failed:
            raise ParityFailed(
                "the engine does not compute what the model computes; no bundle was written",
                where=proof.report.failures,
                hint="`--keep-failed` keeps the bundle, marked as failed; then `cnncc verify --layers` finds the layer",
            )
        manifest = _manifest(export, built, proof.engine, request, inputs, proof.state)
        contents = folder / "bundle"
        contents.mkdir()
        files: dict[str, tuple[str, Path | bytes]] = {
            **_engine_files(build, proof.engine),
            PARITY: ("report", canonical_json(to_plain(proof.report))),
            GOLDEN: ("golden", proof.golden),
        }
        if request.reference:
            files[REFERENCE] = ("reference", built.graph.file(CLEANED))
        if built.table is not None:
            files[TABLE] = ("report", built.table.to_bytes())
        bundle = write_bundle(contents, manifest, files)
        value = {"state": proof.state, "manifest": bundle.digest, "failures": list(proof.report.failures)}
        names = (MANIFEST, *bundle.manifest.files)
        return value, {name: contents / name for name in names}, _summary(proof)

    return Stage("verify", key, compute, cache, reporter)


# ---- the proof


@dataclass(frozen=True)
class _Proof:
    engine: Engine
    report: ParityReport
    golden: bytes
    state: str


def _prove(
    export: Stage, built: _Graph, build: Stage, request: CompileRequest, inputs: _Inputs, folder: Path
) -> _Proof:
    """Run the engine and its references on the same samples.

    The engine runs in a process of its own, out of a bundle whose parity is still pending: the very path of a device.
    """
    from cnncc.compiler.verify import random_samples, verify_engine
    from cnncc.graph.reader import load_trusted

    engine = engine_from_plain(build.value["engine"], folder)
    trial = folder / "trial.cnncc"
    trial.mkdir()
    manifest = _manifest(export, built, engine, request, inputs, "pending")
    write_bundle(trial, manifest, _engine_files(build, engine))
    feeds, names = random_samples(specs_of(export, "inputs"), batches=request.batches, count=SAMPLES)
    if inputs.data is not None:
        feeds += [sample.feeds for sample in inputs.data.samples]
        names += [sample.name for sample in inputs.data.samples]
    mismatch = engine_mismatch(engine.target)
    if mismatch is not None:
        build.reporter.note(f"{mismatch.message}: parity is pending until `cnncc verify` runs on the device")
    cleaned = functools.partial(load_trusted, built.graph.file(CLEANED))
    # a quantized engine is to compute what the Q/DQ graph says; how far that is from the model, calibration measured
    exported = cleaned if built.table else functools.partial(load_trusted, export.file(EXPORTED))
    with EngineProcess(trial) if mismatch is None else nullcontext() as process:
        found = verify_engine(
            exported=exported,
            cleaned=cleaned,
            torch_run=None if built.table else _torch_run(export),
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


def _manifest(
    export: Stage, built: _Graph, engine: Engine, request: CompileRequest, inputs: _Inputs, parity: str
) -> Manifest:
    value = export.value
    model = {"source": value["source"], "digest": value["digest"], "graph": value["graph"]}
    if "program.pt2" in export.digests:
        model["program"] = export.digests["program.pt2"]
    return Manifest(
        schema=SCHEMA,
        name=bundle_name(request.output),
        model=model,
        target=engine.target,
        engine=engine.record,
        inputs=specs_of(export, "inputs"),
        outputs=specs_of(export, "outputs"),
        batches=request.batches,
        preprocessing=inputs.preprocessing,
        labels=inputs.labels,
        precision=built.precision,
        layers=engine.layers,
        parity=parity,
        toolchain={**versions("torch", "onnx", "onnxruntime"), **engine.toolchain},
        reproducible=engine.reproducible,
        files={},
    )


# ---- the bundle's way out


def bundle_name(output: Path) -> str:
    """Return the name a bundle gets from its folder: ``digits.cnncc`` → ``digits``."""
    return output.name.removesuffix(".cnncc")


def check_output(output: Path) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        UsageError: Something that is not a bundle stands there.
        StorageFailed: The parent folder is missing or cannot be written.
    """
    with storage_errors(output):
        parent = output.parent.resolve(strict=True)
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
        if (output.exists() or output.is_symlink()) and not (output / MANIFEST).is_file():
            raise UsageError(f"{output} exists and is not a bundle", hint="choose another -o, or move it away")
        sweep(parent)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


def _publish(verify: Stage, output: Path) -> Compiled:
    """Put the bundle at its place in one step, unless these very bytes are there already."""
    value = verify.value
    unchanged = _holds(output, value["manifest"])
    if not unchanged:
        files = {name: verify.file(name) for name in verify.digests}
        with atomic_folder(output, marker=MANIFEST) as folder:
            for name, path in files.items():
                shutil.copyfile(path, folder / name)
    return Compiled(read_bundle(output), value["state"], tuple(value["failures"]), unchanged)


def _holds(output: Path, digest: str) -> bool:
    try:
        bundle = read_bundle(output)
        return bundle.digest == digest and all(bundle.file(name) for name in bundle.manifest.files)
    except BundleRefused:
        return False


# ---- what keys are made of


def _check_batches(export: Stage, batches: tuple[int, ...]) -> None:
    symbolic = any(spec.symbols for spec in specs_of(export, "inputs"))
    if symbolic and not batches:
        raise UsageError(
            "the model has a symbolic batch, and no batch sizes to build for were given", hint="add --batch 1,8"
        )
    if batches and not symbolic:
        raise UsageError("--batch needs a symbolic batch", hint="give the shape as --input-shape N,3,224,224")
