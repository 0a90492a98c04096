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
    graphs: Mapping[str, OnnxGraph], profile: Profile, folder: Path, progress: Progress
) -> Compiled:
    """Compile graphs into one set of objects.

    Args:
        graphs: Name of the function to make → its graph, of static shapes.
        profile: What to compile for.
        folder: Where the objects go.
        progress: Told what is done.

    Raises:
        UnsupportedGraph: Lists every refused node.
    """
    functions: dict[Any, Any] = {}
    for position, (entry, graph) in enumerate(graphs.items()):
        progress("import", position / len(graphs))
        module = import_graph(graph, entry)
        functions.update(dict(module.functions_items()))
    progress("import", 1.0)
    target = tvm.target.Target(target_options(profile))
    machine = machine_of(profile)
    with quiet():
        lowered = lower(tvm.IRModule(functions), list(graphs), target, machine, progress)
        progress("generate code", 0.0)
        objects = write_objects(lowered.module, target, folder)
    progress("generate code", 1.0)
    first, graph = next(iter(graphs.items()))
    return Compiled(objects, layer_records(graph, lowered.calls[first], lowered.rules))
