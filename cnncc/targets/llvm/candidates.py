"""Which knobs are worth measuring: the rule's, and the few that the rules' own model of costs ranks next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cnncc.targets.llvm.knobs import DEPTHWISE, DIRECT, WINOGRAD, Plan, decode_depthwise, decode_direct
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import (
    ConvShape,
    DirectPlan,
    WindowPlan,
    depthwise_plan,
    direct_plan,
    register_tiles,
    tiling_of,
)
from cnncc.targets.llvm.winograd_rules import applies, direct_cycles, predicted_plans
from cnncc_runtime.errors import DataRefused

_TILES = 4
"""Register tiles that are tried beside the rule's."""
_DEARER = 1.2
"""Predicted cost of a register tile, against the best, up to which it is tried."""
_SPLITS = 4
"""Splits of Winograd's tiles that are tried for each tile size."""
_HOPELESS = 1.3
"""Predicted time of Winograd's method, against the direct one's, beyond which it is not tried."""
_WINDOW_COLUMNS = range(2, 15)
"""Columns of a sliding window's register tile that are tried."""


@dataclass(frozen=True)
class Candidate:
    """A kernel to measure.

    Attributes:
        method: One of `knobs.METHODS`.
        plan: Its knobs.
    """

    method: str
    plan: Plan


def candidates_of(shape: ConvShape, machine: Machine, *, winograd: bool) -> dict[str, list[Candidate]]:
    """Return method → what to measure, the rule's choice first.

    Args:
        shape: The convolution.
        machine: What the kernel is for.
        winograd: Whether Winograd's method is allowed.
    """
    if shape.depthwise:
        return {DEPTHWISE: _candidates(DEPTHWISE, _depthwise(shape, machine))}
    found = {DIRECT: _candidates(DIRECT, _direct(shape, machine))}
    if winograd and applies(shape, machine):
        for size, method in WINOGRAD.items():
            plans = predicted_plans(shape, machine, size)
            if plans[0].cycles < _HOPELESS * direct_cycles(shape, machine):
                found[method] = _candidates(method, plans[:_SPLITS])
    return found


def _candidates(method: str, plans: Iterable[Plan]) -> list[Candidate]:
    distinct: dict[tuple[int, ...], Plan] = {}
    for plan in plans:
        distinct.setdefault(tuple(plan.numbers), plan)
    return [Candidate(method, plan) for plan in distinct.values()]


def _direct(shape: ConvShape, machine: Machine) -> Iterator[DirectPlan]:
    rule = direct_plan(shape, machine)
    yield rule
    ranked = sorted(register_tiles(shape, machine))
    cheapest: dict[int, tuple[float, tuple[int, int]]] = {}
    for cost, (columns, panel) in ranked:  # the best of each panel, then what comes next
        cheapest.setdefault(panel, (cost, (columns, panel)))
    order = [*sorted(cheapest.values()), *ranked]
    tiles = [tile for cost, tile in order if cost <= _DEARER * ranked[0][0] and tile != (rule.columns, rule.panel)]
    for tile in list(dict.fromkeys(tiles))[:_TILES]:
        yield direct_plan(shape, machine, tile)
    chunks = (max(1, rule.chunk // 2), rule.chunk * 2, tiling_of(shape, rule.columns, machine).count)
    changed = [replace(rule, chunk=chunk) for chunk in chunks]
    changed += [replace(rule, chain=max(1, rule.chain // 2)), replace(rule, chain=1)]
    for plan in changed:
        if _sound(plan, shape, machine):
            yield plan


def _sound(plan: DirectPlan, shape: ConvShape, machine: Machine) -> bool:
    try:
        decode_direct(plan.numbers, shape, machine)
    except DataRefused:
        return False
    return True


def _depthwise(shape: ConvShape, machine: Machine) -> Iterator[WindowPlan]:
    rule = depthwise_plan(shape, machine)
    yield rule
    even = [columns for columns in _WINDOW_COLUMNS if shape.output[1] % columns == 0 and columns != rule.columns]
    near = sorted(even, key=lambda columns: abs(columns - rule.columns))[:2]
    changed = [replace(rule, columns=columns) for columns in (*near, rule.columns - 1, -(-rule.columns // 2))]
    changed += [replace(rule, split=rule.split % shape.kernel[1] + 1), replace(rule, unrolled=not rule.unrolled)]
    if machine.cores > 1:
        changed.append(replace(rule, shared=not rule.shared))
    for plan in changed:
        try:
            yield decode_depthwise(plan.numbers, shape, machine)
        except DataRefused:
            continue
