"""Proves a finished bundle again on this machine: `cnncc verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path

from cnncc.calibration.data import load_data
from cnncc.compiler.build_worker import build_apart
from cnncc.compiler.cache import Cache
from cnncc.compiler.emulation import can_emulate, emulated, emulator_for, make_runner, qemu_command
from cnncc.compiler.engine_process import EngineProcess
from cnncc.compiler.parity import ParityReport
from cnncc.compiler.remote.address import BoardAddress
from cnncc.compiler.remote.engine import RemoteEngine
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.verify import Executor, Run, verify_bundle
from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import AOT, VM, BuildOptions, GpuOptions, KernelOptions, Profile
from cnncc_runtime.bundle import (
    AOT_STATIC,
    MANIFEST,
    PARITY,
    REFERENCE,
    Bundle,
    EngineRecord,
    LayerRecord,
    Manifest,
    TargetRecord,
    read_bundle,
    to_plain,
    write_bundle,
)
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import StorageFailed, UsageError
from cnncc_runtime.files import atomic_folder, scratch_folder
from cnncc_runtime.golden import Runs
from cnncc_runtime.gpu import host_gpus
from cnncc_runtime.session import obstacle

_WINOGRAD = "winograd"
"""What the schedule of a layer begins with that uses Winograd's method."""


Opener = Callable[[Path], AbstractContextManager[Runs]]
"""Opens a bundle's folder for running its engine."""


def prove_bundle(
    path: Path,
    *,
    data: str = "",
    samples: int = 32,
    layers: bool = False,
    emulate: bool = False,
    board: BoardAddress | None = None,
    cache: Path,
    reporter: Reporter,
) -> ParityReport:
    """Verify a bundle's engine against the model stored in the bundle.

    A bundle whose parity was pending (it was built where it could not run) gets the verdict recorded.

    Args:
        path: The bundle.
        data: DATA for real inputs; seeded random ones where empty.
        samples: Real inputs at most.
        layers: Whether to compare layer by layer too; builds the engine again with every layer as an output.
        emulate: Whether to run the engine under emulation of its CPU, which this machine is not.
        board: Where the engine is run; None runs it here.
        cache: A folder for scratch work.
        reporter: Told of progress.

    Raises:
        BundleRefused: The bundle is damaged.
        BoardUnavailable: The board cannot be reached.
        EngineMismatch: The engine was built for another machine, or for one that cannot be emulated.
        DependencyMissing: What emulates its CPU is not installed.
        RunFailed: The engine failed or crashed, or the board went away.
        UsageError: Layers were asked for, and the bundle holds no model or is run on a board; or the engine is to be
            emulated, and this machine runs it itself.
    """
    bundle = read_bundle(path)
    if board is not None and (layers or emulate):
        flag = "--layers" if layers else "--emulate"
        raise UsageError(f"{flag} is for this machine only", hint=f"leave --remote or {flag} out")
    away = None if board else obstacle(bundle.manifest.target, bundle.manifest.engine)
    if emulate and away is None:
        raise UsageError("this machine runs the engine itself", hint="leave out --emulate")
    if away is not None and not emulate:
        raise type(away)(
            f"the engine cannot be executed here: {away.message}", hint=_elsewhere(bundle.manifest.target, away.hint)
        )
    if layers and not bundle.has(REFERENCE):
        raise UsageError(
            "comparing layers needs the model, and the bundle was made without it",
            hint="compile without --no-reference",
        )
    manifest = bundle.manifest
    found = load_data(data, manifest.inputs, manifest.preprocessing, limit=samples).samples if data else ()
    reporter.stage("verify")
    with ExitStack() as stack:
        # a board is asked first: it may be away, or unfit
        remote = stack.enter_context(RemoteEngine(path, board)) if board else None
        opener = _emulated(manifest, cache, stack, reporter) if emulate else EngineProcess
        report = verify_bundle(
            bundle,
            samples=[sample.feeds for sample in found],
            sample_names=[sample.name for sample in found],
            layers=_layer_engines(bundle, opener, cache, stack, reporter) if layers else None,
            open_session=opener if remote is None else lambda _: nullcontext(remote),
        )
    if remote is not None:
        report = replace(report, notes=(*report.notes, f"the engine was run on a board: {remote.report}"))
    if emulate:
        report = replace(report, notes=(*report.notes, _emulation_note(manifest)))
    if manifest.parity == "pending":
        _record(bundle, report, reporter)
    return report


def _elsewhere(target: TargetRecord, hint: str) -> str:
    """Return a hint, and where else an engine can be executed."""
    if target.gpu:
        return hint
    emulated = "--emulate executes it here; " if can_emulate(target) else ""
    return f"{emulated}--remote runs it on a board; or {hint}"


def _emulated(manifest: Manifest, cache: Path, stack: ExitStack, reporter: Reporter) -> Opener:
    """Return what opens bundles under emulation until the stack unwinds."""
    executable = manifest.engine.format == AOT_STATIC
    emulator = emulator_for(manifest.target, executable=executable)
    runner = None
    if not executable:
        folder = stack.enter_context(scratch_folder(cache))
        runner = make_runner(emulator, folder, Cache(cache, reporter.note), reporter)
    reporter.note(_emulation_note(manifest))
    return partial(emulated, runner=runner)


def _emulation_note(manifest: Manifest) -> str:
    emulator = emulator_for(manifest.target, executable=manifest.engine.format == AOT_STATIC)
    return f"the engine was executed under emulation: {' '.join(qemu_command(emulator, manifest.target))}"


def _record(bundle: Bundle, report: ParityReport, reporter: Reporter) -> None:
    """Write the verdict into a bundle that was built where it could not run: nothing opens it while it is pending."""
    verdict = "passed" if report.passed else "failed"
    files: dict[str, tuple[str, Path | bytes]] = {
        name: (record.role, bundle.file(name)) for name, record in bundle.manifest.files.items()
    }
    files[PARITY] = ("report", canonical_json(to_plain(report)))
    try:
        with atomic_folder(bundle.path, marker=MANIFEST) as folder:
            write_bundle(folder, replace(bundle.manifest, parity=verdict), files)
    except StorageFailed as exc:
        reporter.note(f"the bundle's parity stays 'pending', the verdict cannot be recorded: {exc.message}")
    else:
        reporter.note(f"the bundle's parity was pending; it is now recorded as '{verdict}'")


def _layer_engines(bundle: Bundle, opener: Opener, cache: Path, stack: ExitStack, reporter: Reporter) -> Executor:
    """Return what builds an engine of a graph for the bundle's own target, and opens it until the stack unwinds."""

    def build(graph: OnnxGraph) -> Run:
        folder = stack.enter_context(scratch_folder(cache))
        path = folder / "layers.onnx"
        path.write_bytes(graph.serialized)
        options = BuildOptions(
            _profile(bundle.manifest.target, host_cpu().cores),
            bundle.manifest.batches,
            kernels=kernels_of(bundle.manifest.layers, graph),
            gpu=gpu_options(bundle.manifest),
            runtime=AOT if bundle.manifest.engine.format == AOT_STATIC else VM,
            progress=reporter.progress,
        )
        engine = build_apart(bundle.manifest.target.name, path, options, folder)
        trial = folder / "layers.cnncc"
        trial.mkdir()
        manifest = _with_engine(bundle.manifest, graph, engine.record)
        write_bundle(trial, manifest, engine.files)
        return stack.enter_context(opener(trial)).run

    return build


def kernels_of(layers: Sequence[LayerRecord], graph: OnnxGraph) -> KernelOptions:
    """Return options by which a graph's convolutions are computed by the methods that a bundle's are."""
    winograd = {module for layer in layers if layer.schedule.startswith(_WINOGRAD) for module in layer.modules}
    modules = {module_path(node) for node in graph.nodes if node.op_type == "Conv"}
    return KernelOptions(bool(winograd & modules), tuple(sorted(escape(module) for module in modules - winograd)))


def _profile(target: TargetRecord, cores: int) -> Profile:
    return Profile(target.device, target.triple, target.cpu, target.features, cores, _gpu(target))


def _gpu(target: TargetRecord) -> str:
    """Return the compute capability that engines are built for again: this machine's, where the engine is for many."""
    if not target.gpu.endswith("+"):
        return target.gpu
    return next((gpu.capability for gpu in host_gpus()), target.gpu.removesuffix("+"))


def gpu_options(manifest: Manifest) -> GpuOptions:
    """Return options by which the library builds that built a bundle's engine: a GPU engine's format is its name."""
    if not manifest.target.gpu:
        return GpuOptions()
    dla = manifest.engine.dla
    return GpuOptions(manifest.engine.format, dla=dla, gpu_fallback=dla is not None)


def _with_engine(manifest: Manifest, graph: OnnxGraph, engine: EngineRecord) -> Manifest:
    return replace(manifest, engine=engine, inputs=graph.inputs, outputs=graph.outputs, parity="pending")
