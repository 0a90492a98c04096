"""The driver: tries each rule on each function; the last rule always applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule.anchor import KERNEL, MEASURED
from cnncc.targets.llvm.schedule.products import ZERO


@dataclass(frozen=True)
class Scheduled:
    """How a kernel was made.

    Attributes:
        rule: Name of the rule, and whether its knobs were measured.
        operand: Element type that its operation reads: ``int8`` for steps; empty where no operation is marked.
    """

    rule: str
    operand: str


class Rule(Protocol):
    """Schedules one family of functions."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the scheduled function, or None where the rule does not know this kind."""
        ...


def schedule(
    module: Any, rules: Sequence[Rule], machine: Machine, progress: Callable[[float], None]
) -> tuple[Any, dict[str, Scheduled]]:
    """Schedule every function of a module.

    Args:
        module: An ``IRModule`` of TIR functions and Relax functions; the latter stay as they are.
        rules: Tried in order; the last must not decline.
        machine: What the kernels are made for.
        progress: Called with the fraction done.

    Returns:
        The module, and kernel → how it was made.
    """
    used: dict[str, Scheduled] = {}
    functions = [(var, function) for var, function in module.functions_items() if isinstance(function, tirx.PrimFunc)]
    done = module.clone() if hasattr(module, "clone") else module
    for position, (var, function) in enumerate(functions):
        function = _keeping_nan(function)
        seen = machine.of(_element(function))
        for rule in rules:
            scheduled = rule.apply(function, seen)
            if scheduled is not None:
                done.update_func(var, scheduled)
                name = f"{rule.name}, measured" if _is_measured(function, rule.name) else rule.name
                used[var.name_hint] = Scheduled(name, _operand(function))
                break
        progress((position + 1) / len(functions))
    return done, used


def _element(function: Any) -> str:
    """Return the element type whose vectors a kernel is made of: its operation's; of plain loops, the narrowest."""
    dtypes = {str(buffer.dtype) for buffer in function.params}
    return _operand(function) or ("float16" if "float16" in dtypes else "float32")


def _operand(function: Any) -> str:
    """Return the element type of what a function's marked operation reads first."""
    found: list[str] = []

    def note(block: Any) -> None:
        if KERNEL in block.annotations and block.reads:
            found.append(str(block.reads[0].source.dtype))

    tvm_ffi.structural_walk(function.body, [(SBlock, note)])
    return "int8" if found and found[0] in ZERO else found[0] if found else ""


def _is_measured(function: Any, kernel: str) -> bool:
    """Whether a function holds an operation whose kernel was given measured knobs."""
    found = [False]

    def note(block: Any) -> None:
        if str(block.annotations.get(KERNEL, "")) == kernel and int(block.annotations.get(MEASURED, 0)):
            found[0] = True

    tvm_ffi.structural_walk(function.body, [(SBlock, note)])
    return found[0]


def _keeping_nan(function: Any) -> Any:
    """Return the function with bounds (ReLU, clip) that pass NaN through, as ONNX Runtime's do; it costs nothing.

    LLVM compares "x > bound ? x : bound", which gives the bound for NaN; the same instruction with its operands
    exchanged gives x.
    """

    def above(bound: Any) -> Any:
        if not _is_bound(bound):
            return bound
        return tirx.Select(bound.a < bound.b, bound.b, bound.a)

    def below(bound: Any) -> Any:
        if not _is_bound(bound):
            return bound
        return tirx.Select(bound.b < bound.a, bound.b, bound.a)

    return tvm_ffi.structural_map(function, [(tirx.Max, above), (tirx.Min, below)], order="post")


def _is_bound(value: Any) -> bool:
    return isinstance(value.b, tirx.FloatImm) and not isinstance(value.a, tirx.FloatImm)
