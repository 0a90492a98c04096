"""Predicts how near the inner loops of a bundle's kernels come to a CPU's peak, without the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc.calibration.plan import PRODUCTS
from cnncc.targets.base import Progress
from cnncc.targets.devices import cpu_features, machine_name
from cnncc.targets.llvm.cycles.analyzer import find_tools
from cnncc.targets.llvm.cycles.disassembly import Instruction
from cnncc.targets.llvm.cycles.predict import (
    LIBRARY,
    Cpu,
    Cycles,
    Forecast,
    HotLoop,
    disassemble,
    forecast,
    hot_loop,
)
from cnncc_runtime.bundle import AOT_STATIC, Bundle, LayerRecord, TargetRecord, read_bundle
from cnncc_runtime.errors import BundleRefused, CnnccError, UsageError

SCHEMA = "cnncc.prediction/1"

USUAL_CPUS = {"aarch64": ("cortex-a72", "cortex-a76", "neoverse-v1")}
"""ELF machine → CPUs that engines are predicted for beside their own, where these have the features."""

LIMITS = (
    "LLVM's scheduling models know no caches and no memory, and predict every jump",
    "of each kernel, the loop that computes most products is analyzed: nothing that runs around it",
    "the peak is the model's own: independent instructions of the best kind that the CPU has for these factors",
)
"""What a reader must know, whatever was predicted."""

_FORMATS = ("tvm-vm", AOT_STATIC)


@dataclass(frozen=True)
class CpuReport:
    """A CPU that was predicted for.

    Attributes:
        name: LLVM's.
        by: CPU whose model was asked.
        units: How that model's units are called (``A57``, ``N1``): which of LLVM's models it is.
        peaks: Type of factors → the most products a cycle.
    """

    name: str
    by: str
    units: str
    peaks: dict[str, float]


@dataclass(frozen=True)
class LoopReport:
    """The loop of a kernel that computes most of its products.

    Attributes:
        type: Of the factors: ``fp32``, ``int8``, ``int16``.
        products: Multiply-accumulates of an iteration.
        instructions: Of an iteration.
        mix: Instruction that multiplies → how often.
    """

    type: str
    products: int
    instructions: int
    mix: dict[str, int]


@dataclass(frozen=True)
class LayerPrediction:
    """One kernel with a convolution or a matrix product.

    Attributes:
        kernel: Name in the engine.
        modules: PyTorch modules it computes.
        precision: Executed element type.
        schedule: Rule that scheduled it.
        loop: Its loop; None where no loop of it multiplies.
        cpus: CPU → cycles of an iteration, products a cycle and their share of the peak.
        problems: CPU → why there are none.
    """

    kernel: str
    modules: tuple[str, ...]
    precision: str
    schedule: str
    loop: LoopReport | None
    cpus: dict[str, Cycles]
    problems: dict[str, str]


@dataclass(frozen=True)
class Prediction:
    """What CPUs' models say of an engine.

    Attributes:
        schema: `SCHEMA`.
        bundle: Digest of the bundle.
        analyzer: Name and version.
        built_for: CPU that the engine was built for.
        cpus: CPUs predicted for, in the order of the tables.
        layers: In order of execution; kernels without products are left out.
        notes: `LIMITS`, and which usual CPUs are left out and why.
    """

    schema: str
    bundle: str
    analyzer: str
    built_for: str
    cpus: tuple[CpuReport, ...]
    layers: tuple[LayerPrediction, ...]
    notes: tuple[str, ...]


def _unheard(_what: str, _fraction: float) -> None:
    """Tell nobody."""


def predict_bundle(path: Path, cpus: Sequence[str] = (), progress: Progress = _unheard) -> Prediction:
    """Predict the cycles of a bundle's inner loops; nothing is executed.

    Args:
        path: The bundle.
        cpus: CPUs by LLVM's names; none takes the engine's own and, for AArch64, the usual ones that can run it.
        progress: Told which CPU it is at.

    Raises:
        BundleRefused: The bundle is damaged, or its engine was stripped of the kernels' names.
        UsageError: The engine is not one of code for a CPU; a CPU is unknown, lacks what the engine needs, or has no
            model.
        DependencyMissing: llvm-mca is missing, or too old for a CPU.
        ToolchainFailed: llvm-mca broke.
    """
    bundle = read_bundle(path)
    target = bundle.manifest.target
    if target.gpu or bundle.manifest.engine.format not in _FORMATS:
        raise UsageError(
            f"cycles are predicted for engines that LLVM compiled for a CPU; this one is for {target.processor}",
            hint="`cnncc bench` measures it where it runs",
        )
    tools = find_tools()
    machine = machine_name(target.triple)
    asked = [_checked(target, name) for name in cpus or [target.cpu]]
    layers = [layer for layer in bundle.manifest.layers if not PRODUCTS.isdisjoint(layer.ops)]
    loops = find_loops(layers, kernel_code(bundle))
    usual = [name for name in USUAL_CPUS.get(machine, ()) if name != target.cpu] if not cpus else []
    forecasts: dict[str, Forecast] = {}
    notes = list(LIMITS)
    for cpu in asked:
        progress(cpu.name, len(forecasts) / (len(asked) + len(usual)))
        forecasts[cpu.name] = forecast(tools, target.triple, machine, cpu, loops)
    for at, name in enumerate(usual, len(asked)):
        progress(name, at / (len(asked) + len(usual)))
        try:
            forecasts[name] = forecast(tools, target.triple, machine, _checked(target, name), loops)
        except CnnccError as exc:
            notes.append(f"not predicted for {name}: {exc.message}")
    return Prediction(
        SCHEMA,
        bundle.digest,
        str(tools),
        target.cpu,
        tuple(CpuReport(name, one.by, one.units, one.peaks) for name, one in forecasts.items()),
        tuple(_layer(layer, loops.get(layer.kernel), forecasts) for layer in layers),
        tuple(notes),
    )


def kernel_code(bundle: Bundle) -> dict[str, tuple[Instruction, ...]]:
    """Return the code of a bundle's kernels.

    Raises:
        BundleRefused: The engine is damaged, or was stripped of the kernels' names.
        DependencyMissing: llvm-objdump is missing.
    """
    manifest = bundle.manifest
    name = manifest.engine.file
    prefix, suffix = "", "_compute_"
    if manifest.engine.format == AOT_STATIC:  # the executable is stripped; its library is not
        libraries = (file for file, record in manifest.files.items() if record.role == "library")
        name = next((file for file in libraries if file.endswith(LIBRARY)), f"lib{name}{LIBRARY}")
        prefix, suffix = f"{name.removeprefix('lib').removesuffix(LIBRARY)}_", ""
    machine = machine_name(manifest.target.triple)
    symbols = disassemble(find_tools(), bundle.file(name), machine, manifest.target.features)
    kernels = {layer.kernel for layer in manifest.layers}
    code = {kernel: symbols[prefix + kernel + suffix] for kernel in kernels if prefix + kernel + suffix in symbols}
    if kernels and not code:
        raise BundleRefused(
            f"'{name}' holds none of the kernels that the manifest lists: its symbols were stripped, or it is another",
            where=[str(bundle.path / name)],
            hint="copy the bundle again, or build it again",
        )
    return code


def find_loops(layers: Sequence[LayerRecord], code: Mapping[str, tuple[Instruction, ...]]) -> dict[str, HotLoop]:
    """Return kernel → its loop that computes most products, for those that have one."""
    kernels = dict.fromkeys(layer.kernel for layer in layers if layer.kernel in code)
    return {kernel: loop for kernel in kernels if (loop := hot_loop(code[kernel])) is not None}


def _checked(target: TargetRecord, name: str) -> Cpu:
    """Return a CPU that has all that an engine needs.

    Raises:
        UsageError: It is unknown, or lacks something.
    """
    if name == target.cpu:
        return Cpu(name, target.features)
    features = cpu_features(target.triple, name)
    if missing := sorted(set(target.features) - features):
        raise UsageError(
            f"{name} cannot run this engine: it lacks {', '.join(missing)}",
            hint=f"compile for it: --mtriple {target.triple} --mcpu {name}",
        )
    return Cpu(name, tuple(sorted(features)))


def _layer(layer: LayerRecord, loop: HotLoop | None, forecasts: Mapping[str, Forecast]) -> LayerPrediction:
    report = LoopReport(loop.type, loop.products, len(loop.code), loop.mix) if loop else None
    found = {name: one.kernels[layer.kernel] for name, one in forecasts.items() if layer.kernel in one.kernels}
    return LayerPrediction(
        layer.kernel,
        layer.modules,
        layer.precision,
        layer.schedule,
        report,
        {name: one for name, one in found.items() if isinstance(one, Cycles)},
        {name: one for name, one in found.items() if isinstance(one, str)},
    )
