"""The main job: MODEL → ONNX → engine → proof → bundle, each stage cached, the bundle published atomically.

::

    export   MODEL, weights, shapes      → exported.onnx, program.pt2
    clean    exported.onnx               → cleaned.onnx          (numerics proved on the spot)
    calibrate, quantize                  → cleaned.onnx with Q/DQ, calibration.json (only for int8)
    qat      cleaned.onnx, table, data   → the same, trained     (only where it is asked for)
    narrow   cleaned.onnx                → cleaned.onnx in half precision           (only for fp16 and bf16)
    kernels  cleaned.onnx, measurements  → kernels.json          (only where kernels are measured, or were before)
    build    cleaned.onnx, target        → engine.so, weights.bin
    payoff   engines in int8 and fp32    → payoff.json           (only for int8: which is faster)
    verify   engine, samples             → bundle files, parity  (a failed proof is never cached)
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnncc.compiler.cache import Cache, default_cache_folder
from cnncc.compiler.compile_request import AUTO, BF16, CALIBRATED, FP16, FP32, INT8, CompileRequest
from cnncc.compiler.device_runtime import Compilers, DeviceRuntime, device_runtime, find_compilers
from cnncc.compiler.engine_stages import (
    Job,
    build_options,
    bundle_name,
    check_fallback,
    choose,
    quantized,
    verify_stage,
)
from cnncc.compiler.graph_stages import CLEANED, EXPORTED, clean_stage, export_stage, specs_of
from cnncc.compiler.kernel_stage import check_optimize
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.reporting import Reporter, Silent
from cnncc.compiler.stage import Stage
from cnncc.targets.base import VM, Preflight, Preflighting, Target
from cnncc.targets.devices import host_machine, machine_name
from cnncc.targets.registry import load_target
from cnncc_runtime.bundle import MANIFEST, Bundle, make_executable, read_bundle
from cnncc_runtime.errors import BundleRefused, CnnccError, ParityFailed, UsageError
from cnncc_runtime.files import atomic_file, atomic_folder, storage_errors, sweep

if TYPE_CHECKING:
    from cnncc.graph.onnx_graph import OnnxGraph

__all__ = [
    "AUTO",
    "BF16",
    "FP16",
    "FP32",
    "INT8",
    "CompileRequest",
    "Compiled",
    "Exported",
    "bundle_name",
    "check_output",
    "clean_graph",
    "compile",
    "compile_all",
    "export",
]


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
        EnvironmentMissing: A package, a linker, a compiler or disk space is missing, or the device's C library is too
            old for the runtime that the bundle is to carry.
        ExportFailed: PyTorch could not export the module.
        BuildFailed: The compiler failed.
        BudgetExceeded: The engine computes more int8 layers in float than may be, or is slower than fp32.
        ParityFailed: The engine does not compute what the model computes; no bundle is left.
    """
    reporter = reporter or Silent()
    cache = cache or Cache(default_cache_folder(), reporter.note)
    target, preflight = _prepare(request)
    for note in preflight.notes:
        reporter.note(note)
    runtime = _runtime(request, cache, reporter)
    export = export_stage(request.model, cache, reporter)
    clean = clean_stage(export, cache, reporter)
    _check_batches(export, request.batches)
    job = Job(request, target, preflight, export, clean, cache, reporter, runtime)
    variant = quantized(job)
    check_fallback(job, variant)
    choice = choose(job, variant)
    if choice.variant is not variant:
        check_fallback(job, choice.variant)
    verify = verify_stage(job, choice)
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

    Every request is checked before any work is done. A failure ends the rest; what was finished stays, and the
    reporter is told.

    Raises:
        CnnccError: As `compile`.
    """
    reporter = reporter or Silent()
    for request in requests:
        _prepare(request)
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


def _prepare(request: CompileRequest) -> tuple[Target, Preflight]:
    """Check all of a request that can be checked before any work is done.

    Returns:
        The target, and how it will build.

    Raises:
        CnnccError: As `compile`.
    """
    check_output(request.output)
    if request.precision in CALIBRATED and request.table is None:
        request.calibration.check()
    if request.retraining is not None:
        _check_retraining(request)
    target = load_target(request.target, request.profile)
    check_optimize(request.optimize, target)
    if request.with_runtime:
        _runtime_compilers(request)
    if not isinstance(target, Preflighting):
        return target, Preflight((target.name,))
    return target, target.preflight(build_options(request))


def _check_retraining(request: CompileRequest) -> None:
    """Refuse what training a quantized model does not go with.

    Raises:
        UsageError: Another precision, a table made before, or a budget of noise.
    """
    said = {
        f"--precision {request.precision}": request.precision != INT8,
        "--calib": request.table is not None,
        "--min-sqnr": request.calibration.min_sqnr is not None,
    }
    if wrong := [flag for flag, given in said.items() if given]:
        hints = {"--calib": "`cnncc quantize --calib … --qat` trains from a table; compile what it writes"}
        raise UsageError(
            f"--qat does not go with {wrong[0]}",
            hint=hints.get(wrong[0], "--precision int8, and --max-accuracy-drop for a budget"),
        )


def _runtime_compilers(request: CompileRequest) -> Compilers:
    """Return what compiles the runtime that the bundle is to carry.

    Raises:
        UsageError: The engine needs none.
        DependencyMissing: There is no compiler for the device.
    """
    if request.profile.gpu or request.runtime != VM:
        raise UsageError(
            "--with-runtime is for engines for CPUs that TVM's virtual machine runs", hint="leave --with-runtime out"
        )
    return find_compilers(machine_name(request.profile.triple), host_machine(), request.glibc)


def _runtime(request: CompileRequest, cache: Cache, reporter: Reporter) -> DeviceRuntime | None:
    """Return the runtime that the bundle is to carry, None for none; made first: the device may be too old for it.

    Raises:
        BuildFailed: It cannot be compiled.
        TargetUnavailable: It needs a newer C library than the device has.
    """
    if not request.with_runtime:
        return None
    runtime = device_runtime(_runtime_compilers(request), cache, reporter)
    runtime.check(request.glibc)
    reporter.note(f"the bundle carries its runtime, which needs glibc {runtime.glibc} or newer and no other library")
    return runtime


# ---- the bundle's way out


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
            make_executable(folder, read_bundle(folder).manifest)
    return Compiled(read_bundle(output), value["state"], tuple(value["failures"]), unchanged)


def _holds(output: Path, digest: str) -> bool:
    try:
        bundle = read_bundle(output)
        return bundle.digest == digest and all(bundle.file(name) for name in bundle.manifest.files)
    except BundleRefused:
        return False


def _check_batches(export: Stage, batches: tuple[int, ...]) -> None:
    symbolic = any(spec.symbols for spec in specs_of(export, "inputs"))
    if symbolic and not batches:
        raise UsageError(
            "the model has a symbolic batch, and no batch sizes to build for were given", hint="add --batch 1,8"
        )
    if batches and not symbolic:
        raise UsageError("--batch needs a symbolic batch", hint="give the shape as --input-shape N,3,224,224")
