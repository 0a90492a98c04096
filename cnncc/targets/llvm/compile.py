"""The build without its last step: graph to objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tvm

from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions, KernelOptions, Profile, Progress
from cnncc.targets.llvm.blocked.methods import KernelPolicy
from cnncc.targets.llvm.codegen import write_objects
from cnncc.targets.llvm.expansions import Expansions
from cnncc.targets.llvm.importer import import_graph
from cnncc.targets.llvm.kernel_database import Conditions, KernelDatabase
from cnncc.targets.llvm.layers import layer_records
from cnncc.targets.llvm.machine import Machine, machine_of, target_options
from cnncc.targets.llvm.pipeline import layout_passes, lower, run, simplify_passes
from cnncc.targets.llvm.plans import MeasuredPlans, Plans
from cnncc.targets.llvm.quiet import quiet
from cnncc.targets.llvm.weights import Weights
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.errors import UsageError

_SHOWN = 8
"""Modules that a refused pattern is shown beside."""


@dataclass(frozen=True)
class Compiled:
    """Objects to link.

    Attributes:
        objects: Object files.
        layers: Kernel calls of the first entry.
        weights: What the functions take after their inputs.
    """

    objects: list[Path]
    layers: tuple[LayerRecord, ...]
    weights: Weights


def compile_graph(graphs: Mapping[str, OnnxGraph], options: BuildOptions, folder: Path) -> Compiled:
    """Compile graphs into one set of objects.

    Args:
        graphs: Name of the function to make → its graph, of static shapes.
        options: Their profile is what to compile for; its CPU is named.
        folder: Where the objects go.

    Raises:
        UnsupportedGraph: Lists every refused node.
        UsageError: A pattern of modules matches no convolution.
    """
    profile, progress = options.profile, options.progress
    policies = {entry: policy(graph, options.kernels) for entry, graph in graphs.items()}
    module = import_graphs(graphs, progress)
    target = tvm.target.Target(target_options(profile))
    machine = machine_of(profile)
    plans = plans_of(options.measured, profile, machine)
    with quiet():
        lowered = lower(module, policies, target, machine, progress, plans)
        progress("generate code", 0.0)
        objects = write_objects(lowered.module, target, folder)
    progress("generate code", 1.0)
    first, graph = next(iter(graphs.items()))
    return Compiled(objects, layer_records(graph, lowered.calls[first], lowered.kernels), lowered.weights)


def import_graphs(graphs: Mapping[str, OnnxGraph], progress: Progress) -> Any:
    """Return one module with a function for each graph.

    Raises:
        UnsupportedGraph: Lists every refused node.
    """
    functions: dict[Any, Any] = {}
    for position, (entry, graph) in enumerate(graphs.items()):
        progress("import", position / len(graphs))
        functions.update(dict(import_graph(graph, entry).functions_items()))
    progress("import", 1.0)
    return tvm.IRModule(functions)


def ask_plans(plans: Plans, graphs: Mapping[str, OnnxGraph], options: BuildOptions) -> None:
    """Have every convolution of some graphs ask for its knobs, as a build would; nothing is compiled.

    Args:
        plans: Asked.
        graphs: Entry → graph of static shapes.
        options: The profile's CPU is named.

    Raises:
        UnsupportedGraph: Lists every refused node.
        UsageError: A pattern of modules matches no convolution.
    """
    policies = {entry: policy(graph, options.kernels) for entry, graph in graphs.items()}
    module = import_graphs(graphs, options.progress)
    with quiet(), tvm.target.Target(target_options(options.profile)), tvm.transform.PassContext(opt_level=3):
        run(run(module, simplify_passes()), layout_passes(plans, policies, Expansions()))


def plans_of(measured: str, profile: Profile, machine: Machine) -> Plans:
    """Return where kernels get their knobs: from a database's text, or from the rules where it is empty."""
    if not measured:
        return Plans(machine)
    database = KernelDatabase.parse(measured.encode(), "the measurements for this build")
    return MeasuredPlans(machine, list(database.of(Conditions.of(profile, machine)).values()))


def policy(graph: OnnxGraph, kernels: KernelOptions) -> KernelPolicy:
    """Return what the kernels of a graph must heed: patterns of modules become nodes.

    Raises:
        UsageError: A pattern matches no convolution.
    """
    direct: set[int] = set()
    modules = {index: module_path(node) for index, node in enumerate(graph.nodes) if node.op_type == "Conv"}
    for pattern in kernels.direct:
        found = {index for index, module in modules.items() if fnmatchcase(module, pattern)}
        if not found:
            raise UsageError(
                f"no convolution lies in a module called '{pattern}'",
                where=sorted(set(modules.values()))[:_SHOWN],
                hint="give a module's path, or a pattern such as layer4.*; `cnncc inspect` lists the modules",
            )
        direct |= found
    return KernelPolicy(kernels.winograd, frozenset(direct), kernels.growth)
