"""Runs engines, and graphs compiled on the spot, in this process."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import Engine, Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.quiet import quiet
from cnncc_runtime.engine_threads import Pool
from cnncc_runtime.weights import MappedWeights

if TYPE_CHECKING:
    from cnncc.targets.llvm.loading import Loaded


def run_engine(engine: Engine, entry: str, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Load an engine, run one entry, return its outputs."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        from cnncc.targets.llvm.loading import load_library

        return call_entry(load_library(engine.payload), entry, [*arrays, *weights_of(engine, entry)])


def call_entry(loaded: Loaded, entry: str, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Run one entry of a loaded engine, return its outputs."""
    import tvm

    result = entry_of(loaded, entry)(*[tvm.runtime.tensor(np.require(array, requirements="C")) for array in arrays])
    outputs = [result] if hasattr(result, "numpy") else list(result)
    return [output.numpy() for output in outputs]


def entry_of(loaded: Loaded, entry: str) -> Callable[..., Any]:
    """Return one entry of a loaded engine as a function of tensors, which runs on two threads."""
    machine = loaded.module["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 2)
    function, pool = machine[entry], Pool(loaded.launcher, 2)

    def run(*tensors: Any) -> Any:
        with pool:
            return function(*tensors)

    return run


def weights_of(engine: Engine, entry: str) -> list[NDArray[Any]]:
    """Return what an entry takes after its inputs."""
    record = engine.record.weights
    if record is None:
        return []
    with engine.payload.with_name(record.file).open("rb") as file:
        tensors = MappedWeights(file, record)
    batch = next(batch for batch, name in engine.record.entries.items() if name == entry)
    return [tensors[position] for position in record.entries[batch]]


def _lowered(graph: OnnxGraph, profile: Profile | None) -> tuple[Any, Any]:
    """Return a graph's kernels and program, and TVM's target."""
    import tvm

    from cnncc.targets.llvm import importer, machine, pipeline
    from cnncc.targets.llvm.blocked.methods import KernelPolicy

    chosen = named(profile or resolve_profile())
    target = tvm.target.Target(machine.target_options(chosen))
    module = importer.import_graph(graph, "main")
    policies = {"main": KernelPolicy()}
    return pipeline.lower(module, policies, target, machine.machine_of(chosen), lambda _what, _fraction: None), target


def operands_of(graph: OnnxGraph, profile: Profile | None = None) -> set[str]:
    """Return the element types that the operations of a graph read."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        lowered, _ = _lowered(graph, profile)
    return {kernel.operand for kernel in lowered.kernels.values()}


def tensors_of(graph: OnnxGraph, profile: Profile | None = None) -> dict[str, list[str]]:
    """Return kernel → element types of the tensors that it takes."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        lowered, _ = _lowered(graph, profile)
    return {name: [str(buffer.dtype) for buffer in lowered.module[name].params] for name in lowered.kernels}


def kernels_of(graph: OnnxGraph, profile: Profile | None = None) -> list[str]:
    """Return the kernels of a graph in order of execution."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        lowered, _ = _lowered(graph, profile)
    return [call.kernel for call in lowered.calls["main"]]


def run_graph(
    graph: OnnxGraph, feeds: Mapping[str, NDArray[Any]], profile: Profile | None = None
) -> list[NDArray[Any]]:
    """Compile a graph as the target does, without a bundle, and run it in this process.

    Args:
        graph: Of static shapes.
        feeds: Its inputs.
        profile: What to compile for, something this machine can run; this machine by default.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        from cnncc.targets.llvm import codegen
        from cnncc.targets.llvm.loading import load_objects

        lowered, target = _lowered(graph, profile)
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_objects(codegen.write_objects(lowered.module, target, Path(folder)))
        arrays = [*(feeds[spec.name] for spec in graph.inputs), *lowered.weights.of("main")]
        return call_entry(loaded, "main", arrays)
