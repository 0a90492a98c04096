"""`LlvmTarget`: CPU engines through Apache TVM and LLVM.

The compiler is imported when a build starts, not before: listing targets must be quick.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from cnncc.targets.base import (
    AOT,
    Availability,
    BuildOptions,
    Engine,
    Measured,
    MeasureOptions,
    NodeIssue,
    Preflight,
    Profile,
)
from cnncc.targets.devices import host_machine, machine_name, named
from cnncc.targets.entries import batch_sizes
from cnncc.targets.llvm.aot.toolchain import find_compiler
from cnncc.targets.llvm.link import INSTALL, find_linker, link
from cnncc.targets.llvm.machine import machine_of
from cnncc_runtime import aot_session, engine_threads
from cnncc_runtime.bundle import AOT_STATIC, MEMORY, EngineRecord, TargetRecord
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import BuildFailed, CnnccError, TargetUnavailable, UsageError

if TYPE_CHECKING:
    from cnncc.graph.onnx_graph import OnnxGraph

ENGINE = "engine.so"
FORMAT = "tvm-vm"
_C_COMPILER = "c-compiler"
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")
_FP16, _BF16 = "fp16", "bf16"


@dataclass(frozen=True)
class LlvmTarget:
    """Builds shared libraries that the TVM runtime's virtual machine runs.

    Attributes:
        profile: The processor to build for.
    """

    profile: Profile
    name: str = "llvm"

    def probe(self) -> Availability:
        """Say whether TVM and a linker are here."""
        missing = [package for package in _PACKAGES if not _version(package)]
        if missing:
            return Availability("missing", f"{', '.join(missing)} not installed", "pip install cnncc")
        try:
            linker = find_linker(machine_name(self.profile.triple), host_machine())
        except CnnccError as exc:
            return Availability("missing", exc.message, exc.hint)
        if problem := _import_problem():
            return Availability("missing", problem, "pip install --force-reinstall apache-tvm apache-tvm-ffi")
        return Availability("ready", f"TVM {_version('apache-tvm')}, {linker.version}")

    def preflight(self, options: BuildOptions) -> Preflight:
        """Refuse GPUs, types that a CPU lacks, several sizes in an executable; see `cnncc.targets.base.Preflighting`.

        Raises:
            UsageError: The device is a GPU, the CPU does not multiply in the precision, or an executable is to be for
                several sizes.
            TargetUnavailable: No C compiler makes the executable.
        """
        if options.profile.gpu:
            raise UsageError(
                f"the llvm target builds for CPUs, and '{options.profile.name}' is a GPU",
                hint=f"--target cuda --device {options.profile.name}",
            )
        _check_types(options)
        if options.runtime == AOT:
            _check_entries(dict.fromkeys(options.batches, ""))
            compiler = find_compiler(machine_name(options.profile.triple), host_machine())
            return Preflight((self.name,), toolchain={_C_COMPILER: compiler.version})
        return Preflight((self.name,))

    def toolchain(self) -> dict[str, str]:
        """Return the versions of TVM, its FFI and the linker."""
        found = {package: _version(package) or "missing" for package in _PACKAGES}
        try:
            found["linker"] = find_linker(machine_name(self.profile.triple), host_machine()).version
        except CnnccError:
            found["linker"] = "missing"
        return found

    def unsupported(self, graph: OnnxGraph) -> tuple[NodeIssue, ...]:
        """List every node that TVM's importer and our converters cannot convert."""
        from cnncc.targets.llvm.importer import unconvertible

        return unconvertible(graph)

    def build(self, graph: OnnxGraph, options: BuildOptions, workdir: Path) -> Engine:
        """Build ``engine.so`` and, where the graph has weights, ``weights.bin``.

        Args:
            graph: Shapes static, or with one symbol: the batch.
            options: Their profile is what the engine is built for.
            workdir: An existing folder.

        Returns:
            The engine; its layers follow the order of execution of the first entry.

        Raises:
            UnsupportedGraph: Lists every refused node.
            TargetUnavailable: TVM or a linker is missing.
            BuildFailed: TVM, LLVM or the linker broke.
            UsageError: The graph has symbolic dimensions but no batch sizes were given.
        """
        profile = named(options.profile)
        machine = machine_name(profile.triple)
        if problem := _import_problem():
            raise TargetUnavailable(problem, hint="pip install cnncc")
        entries = _entries(graph, options.batches)
        if options.runtime == AOT:
            return self._build_aot(graph, replace(options, profile=profile), entries, workdir)
        linker = find_linker(machine, host_machine())
        with _failures():
            from cnncc.targets.llvm.compile import compile_graph
            from cnncc.targets.llvm.weights import WEIGHTS, write_weights

            compiled = compile_graph(_graphs(graph, entries, options), replace(options, profile=profile), workdir)
            options.progress("link", 0.0)
            payload = workdir / ENGINE
            link(linker, machine, compiled.objects, payload)
            for path in compiled.objects:
                path.unlink()
            weights = write_weights(compiled.weights, entries, workdir / WEIGHTS)
            options.progress("link", 1.0)
        return Engine(
            target=self._record(profile),
            record=EngineRecord(ENGINE, FORMAT, abi(), entries, weights),
            payload=payload,
            toolchain=self.toolchain(),
            layers=compiled.layers,
            reproducible=True,
        )

    def _build_aot(self, graph: OnnxGraph, options: BuildOptions, entries: dict[int, str], workdir: Path) -> Engine:
        _check_entries(entries)
        [bound] = _graphs(graph, entries, options).values()
        with _failures():
            from cnncc.targets.llvm.aot.build import build_aot

            made = build_aot(bound, options, options.name, workdir)
        memory = {"arena": made.sizes.arena, "weights": made.sizes.weights, "code": made.sizes.code}
        (workdir / MEMORY).write_bytes(canonical_json(memory))
        toolchain = {name: found for name, found in self.toolchain().items() if name != "linker"}
        return Engine(
            target=self._record(options.profile),
            record=EngineRecord(made.executable.name, AOT_STATIC, aot_session.ABI, entries),
            payload=made.executable,
            toolchain={**toolchain, _C_COMPILER: made.compiler},
            layers=made.layers,
            reproducible=True,
            extras={made.library.name: "library", made.header.name: "library", MEMORY: "report"},
            memory=memory,
        )

    def _record(self, profile: Profile) -> TargetRecord:
        machine = machine_name(profile.triple)
        return TargetRecord(self.name, profile.name, profile.triple, profile.cpu, machine, profile.features)

    def measure(self, graph: OnnxGraph, options: MeasureOptions) -> Measured:
        """Time the kernels of a graph's convolutions on this machine; see `cnncc.targets.base.Measuring`.

        Raises:
            UnsupportedGraph: Lists every refused node.
            TargetUnavailable: TVM is missing.
            DataRefused: The database is damaged or of another kind.
            BuildFailed: TVM or LLVM broke.
            UsageError: The graph has symbolic dimensions but no batch sizes were given, or computes in float16.
        """
        if options.build.precision == _FP16:
            raise UsageError(
                "kernels for float16 are chosen by rule, not measured",
                hint="leave --optimize and --kernel-database out",
            )
        if problem := _import_problem():
            raise TargetUnavailable(problem, hint="pip install cnncc")
        build = replace(options.build, profile=named(options.build.profile))
        graphs = _graphs(graph, _entries(graph, build.batches), build)
        with _failures():
            from cnncc.targets.llvm.measured import measure_kernels

            return measure_kernels(graphs, replace(options, build=build))

    def predict(self, graph: OnnxGraph, options: BuildOptions) -> float:
        """Return the predicted cycles of a graph's convolutions; see `cnncc.targets.base.Predicting`.

        Raises:
            UnsupportedGraph: Lists every refused node.
            TargetUnavailable: TVM is missing.
            BuildFailed: TVM broke.
            UsageError: The graph has symbolic dimensions but no batch sizes were given.
        """
        if problem := _import_problem():
            raise TargetUnavailable(problem, hint="pip install cnncc")
        build = replace(options, profile=named(options.profile))
        graphs = _graphs(graph, _entries(graph, build.batches), build)
        with _failures():
            from cnncc.targets.llvm.predict import predict_cycles

            return predict_cycles(graphs, build)


def abi() -> str:
    """Return the version of the runtime interface that engines need: TVM's and its FFI's minor versions, and ours."""
    packages = [f"{package} {_minor(package)}" for package in ("tvm-ffi", "tvm")]
    return ", ".join([*packages, f"threads {engine_threads.VERSION}"])


def _minor(package: str) -> str:
    return ".".join((_version(f"apache-{package}") or "0.0").split(".")[:2])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _import_problem() -> str:
    """Return why TVM cannot be used, or an empty text."""
    if importlib.util.find_spec("tvm") is None:
        return "apache-tvm is not installed"
    try:
        from cnncc.targets.llvm.quiet import quiet

        with quiet():
            from tvm.target import codegen

            major = codegen.llvm_version_major(allow_none=True)
    except Exception as exc:  # a broken installation raises OSError, ImportError, RuntimeError or what it likes
        return f"apache-tvm does not load: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}"
    return "" if major else "this apache-tvm was built without LLVM"


def _graphs(graph: OnnxGraph, entries: dict[int, str], options: BuildOptions) -> dict[str, OnnxGraph]:
    """Return entry → graph of static shapes."""
    return {entry: options.specialize(graph, batch) if batch else graph for batch, entry in entries.items()}


def _entries(graph: OnnxGraph, batches: tuple[int, ...]) -> dict[int, str]:
    return {batch: f"main_{batch}" for batch in batch_sizes(graph, batches, "llvm")} or {0: "main"}


def _check_types(options: BuildOptions) -> None:
    """Refuse half precision where the CPU would convert it for every product.

    Raises:
        UsageError: It would, or the type is that of an int8 engine's float part.
    """
    if options.precision == _BF16:
        raise UsageError("the llvm target does not compute in bf16", hint="--precision fp32, or fp16 with `fullfp16`")
    if options.float_type in (_FP16, _BF16):
        raise UsageError(
            f"the llvm target computes what is not int8 in float32, not in {options.float_type}",
            hint="--float-type fp32; on CPUs with `fullfp16`, --precision fp16 narrows a model without int8",
        )
    if options.precision == _FP16 and not machine_of(named(options.profile)).halves:
        raise UsageError(
            f"{options.profile.name} ({named(options.profile).cpu}) does not multiply vectors of float16 (`fullfp16`): "
            "every value would be converted to float32 and back, which is slower than fp32",
            hint="--precision fp32 or int8; CPUs with fullfp16 are cortex-a76 (raspberry-pi-5), cortex-a78ae (Jetson "
            "Orin's) and neoverse-v1 (graviton3)",
        )


def _check_entries(entries: dict[int, str]) -> None:
    """Refuse several sizes where there is no virtual machine.

    Raises:
        UsageError: There are several.
    """
    if len(entries) > 1:
        raise UsageError(
            f"an engine of --runtime {AOT} has static shapes only, and {len(entries)} batch sizes were asked for",
            hint="give --batch one size, and compile once for each",
        )


@contextmanager
def _failures() -> Iterator[None]:
    """Turn whatever the toolchain raises into one error of ours."""
    try:
        yield
    except CnnccError:
        raise
    except MemoryError as exc:
        raise BuildFailed(
            "the compiler ran out of memory", hint="close other programs, or build fewer batches"
        ) from exc
    except Exception as exc:  # TVM raises TVMError, ValueError, AssertionError, InternalError and more
        from cnncc.targets.llvm.support import first_line

        raise BuildFailed(
            f"TVM failed: {first_line(exc)}",
            hint="report it with the model; `cnncc export` writes the graph that broke the compiler",
        ) from exc


__all__ = ["ENGINE", "FORMAT", "INSTALL", "LlvmTarget", "abi"]
