"""A graph to a static library and a static executable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from numpy.typing import NDArray

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import host_machine, machine_name
from cnncc.targets.llvm.aot import source
from cnncc.targets.llvm.aot.kernels import write_plain_kernels
from cnncc.targets.llvm.aot.program import Program, lay_out, program_of
from cnncc.targets.llvm.aot.toolchain import CCompiler, find_compiler
from cnncc.targets.llvm.compile import import_graphs, plans_of, policy
from cnncc.targets.llvm.layers import layer_records
from cnncc.targets.llvm.machine import machine_of, target_options
from cnncc.targets.llvm.pipeline import schedule_kernels
from cnncc.targets.llvm.quiet import quiet
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.errors import TargetUnavailable, UsageError
from cnncc_runtime.weights import ALIGNMENT

_ENTRY = "main"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a network.

    Attributes:
        arena: Static memory that it writes.
        weights: Static memory that it only reads.
        code: Its kernels' object file.
        library: The static library.
        executable: The executable.
    """

    arena: int
    weights: int
    code: int
    library: int
    executable: int


@dataclass(frozen=True)
class Aot:
    """What was built, in its folder.

    Attributes:
        executable: A static executable; see ``main.c``.
        library: ``libNAME.a``.
        header: ``NAME.h``.
        sizes: Bytes.
        layers: Kernel calls.
        compiler: What compiled the C.
    """

    executable: Path
    library: Path
    header: Path
    sizes: Sizes
    layers: tuple[LayerRecord, ...]
    compiler: str


def build_aot(graph: OnnxGraph, options: BuildOptions, name: str, folder: Path) -> Aot:
    """Build a graph.

    Args:
        graph: Of static shapes.
        options: Their profile is what to compile for; its CPU is named.
        name: What to call the network; what C does not take is replaced.
        folder: Where all files go.

    Raises:
        UnsupportedGraph: Lists every refused node.
        UsageError: The graph's shapes are not static.
        TargetUnavailable: No C compiler makes executables for the profile; the sources and the objects are in the
            folder, and the hint says how to compile them.
        BuildFailed: TVM, LLVM or the C compiler broke.
    """
    profile = replace(options.profile, cores=1)
    _check_static(graph)
    prefix = source.c_name(name)
    target = tvm.target.Target(target_options(profile))
    machine = machine_of(profile)
    plans = plans_of(options.measured, profile, machine)
    policies = {_ENTRY: policy(graph, options.kernels)}
    module = import_graphs({_ENTRY: graph}, options.progress)
    with quiet():
        scheduled = schedule_kernels(module, policies, target, machine, options.progress, plans)
        program = _prefixed(program_of(scheduled.module[_ENTRY]), prefix)
        used = {step.kernel: step.kernel.removeprefix(f"{prefix}_") for step in program.steps}
        kernels = {symbol: scheduled.module[kernel] for symbol, kernel in used.items()}
        options.progress("generate code", 0.0)
        made, spaces = write_plain_kernels(kernels, target, folder / f"{prefix}_kernels.o") if kernels else (None, {})
        options.progress("generate code", 1.0)
    places, weights = _write_weights(program, folder / f"{prefix}_weights.bin")
    network = source.Network(
        prefix, name, graph.inputs, graph.outputs, program, lay_out(program, spaces), places, weights
    )
    sources = _write_sources(network, folder)
    options.progress("compile C", 0.0)
    compiler = _compiler(machine_name(profile.triple), sources, made, prefix)
    library, executable = _compiled(compiler, sources, made, prefix, folder)
    options.progress("compile C", 1.0)
    code = made.stat().st_size if made else 0
    sizes = Sizes(network.layout.arena, weights, code, library.stat().st_size, executable.stat().st_size)
    layers = layer_records(graph, scheduled.calls[_ENTRY], scheduled.kernels)
    return Aot(executable, library, folder / f"{prefix}.h", sizes, layers, compiler.version)


def _check_static(graph: OnnxGraph) -> None:
    """Refuse sizes that are not known.

    Raises:
        UsageError: Names the tensors.
    """
    if symbolic := [str(spec) for spec in (*graph.inputs, *graph.outputs) if spec.symbols]:
        raise UsageError(
            "an engine without the virtual machine has static shapes only",
            where=symbolic,
            hint="give --batch one size, or --input-shape without N",
        )


def _prefixed(program: Program, prefix: str) -> Program:
    """Return the program with kernels whose names no other library has."""
    return replace(program, steps=tuple(replace(step, kernel=f"{prefix}_{step.kernel}") for step in program.steps))


def _write_weights(program: Program, path: Path) -> tuple[dict[int, int], int]:
    """Write what kernels and outputs read of the constants, as they read it; return where each lies, and the size.

    Weights that an engine's runtime would expand (`cnncc_runtime.weights.Expansion`) are stored expanded: they can
    stay in flash, and nothing has to be computed before the first run.
    """
    used = {buffer for step in program.steps for buffer in step.reads} | set(program.outputs)
    kept: dict[int, NDArray[Any]] = {at: array for at, array in program.constants.items() if at in used}
    places = {}
    with path.open("wb") as file:
        for buffer, array in kept.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            places[buffer] = file.tell()
            file.write(array.data)
        return places, file.tell()


def _write_sources(network: source.Network, folder: Path) -> list[str]:
    """Write the C; returns the files to compile, that of the executable last."""
    name = network.name
    texts = {f"{name}.h": source.header(network), f"{name}.c": source.driver(network)}
    if network.weights:
        texts[f"{name}_weights.S"] = source.weights_source(network, f"{name}_weights.bin")
    texts[f"{name}_main.c"] = source.tables(network) + Path(__file__).with_name("main.c").read_text("utf-8")
    for file, text in texts.items():
        (folder / file).write_text(text, "utf-8")
    return [file for file in texts if not file.endswith(".h")]


def _compiler(machine: str, sources: list[str], kernels: Path | None, name: str) -> CCompiler:
    try:
        return find_compiler(machine, host_machine())
    except TargetUnavailable as exc:
        files = " ".join([*sources, *([kernels.name] if kernels else [])])
        raise TargetUnavailable(
            exc.message,
            where=[f"all but its compiler is there: CC -std=c99 -O2 -static -o {name} {files} -lm"],
            hint=exc.hint,
        ) from exc


def _compiled(
    compiler: CCompiler, sources: list[str], kernels: Path | None, name: str, folder: Path
) -> tuple[Path, Path]:
    *parts, main = compiler.compile(sources, folder)
    objects = [*parts, *([kernels.name] if kernels else [])]
    compiler.archive(objects, f"lib{name}.a", folder)
    compiler.link([main, *objects], name, folder)
    return folder / f"lib{name}.a", folder / name
