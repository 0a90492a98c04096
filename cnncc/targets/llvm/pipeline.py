"""Relax to kernels: the passes, in order, each with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from cnncc.targets.base import Progress
from cnncc.targets.llvm.blocked.methods import KernelPolicy
from cnncc.targets.llvm.blocked.propagate import BlockChannels
from cnncc.targets.llvm.expansions import Expansions
from cnncc.targets.llvm.halves import WidenHalves
from cnncc.targets.llvm.layers import Call, record_origins, replay
from cnncc.targets.llvm.legalize import legalizers
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.passes import FoldConstants
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.schedule.driver import Scheduled, schedule
from cnncc.targets.llvm.schedule.rules import RULES
from cnncc.targets.llvm.weights import Weights, separate

Passes = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class ScheduledProgram:
    """A module whose kernels are made.

    Attributes:
        module: Relax functions that call them, and scheduled kernels.
        calls: Entry → its kernel calls in order.
        kernels: Kernel → how it was made.
        expansions: Which constants are made of smaller ones.
    """

    module: Any
    calls: Mapping[str, tuple[Call, ...]]
    kernels: Mapping[str, Scheduled]
    expansions: Expansions


@dataclass(frozen=True)
class Lowered:
    """A module that is ready for code generation.

    Attributes:
        module: Relax functions in the virtual machine's form, and scheduled kernels.
        calls: Entry → its kernel calls in order.
        kernels: Kernel → how it was made.
        weights: What the entries take after their inputs.
    """

    module: Any
    calls: Mapping[str, tuple[Call, ...]]
    kernels: Mapping[str, Scheduled]
    weights: Weights


def simplify_passes() -> Passes:
    """Operators to simpler operators."""
    return [
        ("decompose", relax.transform.DecomposeOpsForInference()),
        ("fold-constants", FoldConstants()),
        ("share-common", relax.transform.EliminateCommonSubexpr()),
        ("remove-unused", relax.transform.DeadCodeElimination()),
    ]


def layout_passes(plans: Plans, policies: Mapping[str, KernelPolicy], expansions: Expansions) -> Passes:
    """Images in blocks of channels."""
    return [
        ("block-channels", BlockChannels(plans, policies, expansions)),
        ("widen-halves", WidenHalves(plans.machine)),
        ("remove-unused", relax.transform.DeadCodeElimination()),
    ]


def legalize_passes(machine: Machine) -> Passes:
    """Operators to loop nests."""
    return [
        ("legalize", relax.transform.LegalizeOps(legalizers(machine))),
        ("fold", relax.transform.FoldConstant()),
        ("classify", relax.transform.AnnotateTIROpPattern()),
    ]


def fuse_passes() -> Passes:
    """Loop nests that read each other's results to one function."""
    return [("fuse", relax.transform.FuseOps())]


def merge_passes() -> Passes:
    """Groups to kernels; reshapes to views."""
    return [
        ("merge", relax.transform.FuseTIR()),
        ("reshape-views", relax.transform.RewriteDataflowReshape()),
        ("remove-unused", relax.transform.DeadCodeElimination()),
    ]


def lower_passes() -> Passes:
    """Kernel calls to the virtual machine's instructions, with memory planned ahead."""
    return [
        ("leave-dataflow", relax.transform.ToNonDataflow()),
        ("drop-purity", relax.transform.RemovePurityChecking()),
        ("call-kernels", relax.transform.CallTIRRewrite()),
        ("plan-memory", relax.transform.StaticPlanBlockMemory()),
        ("allocate", relax.transform.LowerAllocTensor()),
        ("free", relax.transform.KillAfterLastUse()),
        ("builtins", relax.transform.LowerRuntimeBuiltin()),
        ("prim-values", relax.transform.ComputePrimValue()),
        ("shapes", relax.transform.VMShapeLower()),
        ("symbols", relax.transform.AttachGlobalSymbol()),
    ]


def lower(
    module: Any,
    policies: Mapping[str, KernelPolicy],
    target: Any,
    machine: Machine,
    progress: Progress,
    plans: Plans | None = None,
) -> Lowered:
    """Run all passes.

    Args:
        module: What the importer made; one function per entry.
        policies: Names of those functions, and what their kernels must heed.
        target: TVM's target.
        machine: What kernels are scheduled for.
        progress: Told about the schedule, 0 to 1.
        plans: Knobs of kernels; the rules' by default.

    Returns:
        The module and which kernels compute which nodes.
    """
    scheduled, entries = schedule_kernels(module, policies, target, machine, progress, plans), list(policies)
    with target, tvm.transform.PassContext(opt_level=3):
        module = run(scheduled.module, lower_passes())
        module, weights = separate(module, entries, scheduled.expansions)
    return Lowered(module, scheduled.calls, scheduled.kernels, weights)


def schedule_kernels(
    module: Any,
    policies: Mapping[str, KernelPolicy],
    target: Any,
    machine: Machine,
    progress: Progress,
    plans: Plans | None = None,
) -> ScheduledProgram:
    """Run the passes that make kernels; the arguments are those of `lower`."""
    entries = list(policies)
    expansions = Expansions()
    with target, tvm.transform.PassContext(opt_level=3):
        module = run(module, simplify_passes())
        module = run(module, layout_passes(plans or Plans(machine), policies, expansions))
        module = run(module, legalize_passes(machine))
        origins = {entry: record_origins(module[entry]) for entry in entries}
        module = run(module, fuse_passes())
        calls = {entry: replay(module, entry, origins[entry]) for entry in entries}
        module = run(module, merge_passes())
        module, kernels = schedule(module, RULES, machine, lambda fraction: progress("schedule kernels", fraction))
    kept = {entry: tuple(call for call in calls[entry] if call.kernel in kernels) for entry in entries}
    return ScheduledProgram(module, kept, kernels, expansions)


def run(module: Any, passes: Passes) -> Any:
    """Run passes one by one."""
    for _name, step in passes:
        module = step(module)
    return module
