"""Runs engines, and graphs compiled on the spot, in this process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import Engine, Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.quiet import quiet
from cnncc_runtime.weights import map_weights


def run_engine(engine: Engine, entry: str, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Load an engine, run one entry, return its outputs."""
    arrays = [*arrays, *_weights(engine, entry)]
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        import tvm
        import tvm_ffi

        machine = tvm_ffi.load_module(str(engine.payload))["vm_load_executable"]()
        machine["vm_initialization"](1, 0, 2)
        result = machine[entry](*[tvm.runtime.tensor(np.require(array, requirements="C")) for array in arrays])
    outputs = [result] if hasattr(result, "numpy") else list(result)
    return [output.numpy() for output in outputs]


def _weights(engine: Engine, entry: str) -> list[NDArray[Any]]:
    record = engine.record.weights
    if record is None:
        return []
    with engine.payload.with_name(record.file).open("rb") as file:
        tensors = map_weights(file, record)
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


def kernels_of(graph: OnnxGraph, profile: Profile | None = None) -> list[str]:
    """Return the kernels of a graph in order of execution."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        lowered, _ = _lowered(graph, profile)
    return [call.kernel for call in lowered.calls["main"]]


def run_graph(
    graph: OnnxGraph, feeds: Mapping[str, NDArray[Any]], profile: Profile | None = None
) -> list[NDArray[Any]]:
    """Compile a graph as the target does, without writing or linking a file, and run it in this process.

    Args:
        graph: Of static shapes.
        feeds: Its inputs.
        profile: What to compile for, something this machine can run; this machine by default.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        import tvm
        from tvm import relax, tirx

        from cnncc.targets.llvm import codegen

        lowered, target = _lowered(graph, profile)
        tirx.register_tir_pipeline("cnncc-test", codegen._pipeline)
        executable = relax.build(lowered.module, target=target, relax_pipeline=None, tir_pipeline="cnncc-test")
        run = relax.VirtualMachine(executable, tvm.cpu())["main"]
        arrays = [*(feeds[spec.name] for spec in graph.inputs), *lowered.weights.of("main")]
        result = run(*[tvm.runtime.tensor(np.require(array, requirements="C")) for array in arrays])
    outputs = [result] if hasattr(result, "numpy") else list(result)
    return [output.numpy() for output in outputs]
