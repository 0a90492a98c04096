"""The build without its last step: graph to objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import Profile, Progress
from cnncc.targets.llvm.codegen import write_objects
from cnncc.targets.llvm.importer import import_graph
from cnncc.targets.llvm.layers import layer_records
from cnncc.targets.llvm.machine import machine_of, target_options
from cnncc.targets.llvm.pipeline import lower
from cnncc.targets.llvm.quiet import quiet
from cnncc_runtime.bundle import LayerRecord


@dataclass(frozen=True)
class Compiled:
    """Objects to link.

    Attributes:
        objects: Object files.
        layers: Kernel calls of the first entry.
    """

    objects: list[Path]
    layers: tuple[LayerRecord, ...]


def compile_graph(
    graph: OnnxGraph, entries: Mapping[int, str], profile: Profile, folder: Path, progress: Progress
) -> Compiled:
    """Compile a graph once per entry into one set of objects.

    Args:
        graph: The graph.
        entries: Batch size → name of the function to make; ``0`` for a graph without symbols.
        profile: What to compile for.
        folder: Where the objects go.
        progress: Told what is done.

    Raises:
        UnsupportedGraph: Lists every refused node.
    """
    symbols = {symbol for spec in graph.inputs for symbol in spec.symbols}
    functions: dict[Any, Any] = {}
    for position, (batch, entry) in enumerate(entries.items()):
        progress("import", position / len(entries))
        module = import_graph(graph, dict.fromkeys(symbols, batch), entry)
        functions.update(dict(module.functions_items()))
    progress("import", 1.0)
    target = tvm.target.Target(target_options(profile))
    machine = machine_of(profile)
    with quiet():
        lowered = lower(tvm.IRModule(functions), list(entries.values()), target, machine, progress)
        progress("generate code", 0.0)
        objects = write_objects(lowered.module, target, folder)
    progress("generate code", 1.0)
    first = next(iter(entries.values()))
    return Compiled(objects, layer_records(graph, lowered.calls[first], lowered.rules))
