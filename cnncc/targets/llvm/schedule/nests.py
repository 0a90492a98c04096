"""The loop nests of a function: blocks that only feed others are computed in place, what remains is one store each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.s_tir.schedule import ScheduleError

from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.access import Access, mentions
from cnncc.targets.llvm.schedule.elementary import expensive


@dataclass(frozen=True)
class Nest:
    """One block.

    Attributes:
        spatial: Index variables of the output and their sizes.
        reduced: Index variables that are reduced over and their sizes.
        target: Buffer that is stored to.
        indices: Where, in terms of the spatial variables.
        value: What is stored, or the new value of a reduction.
        start: First value of a reduction; None where there is none.
    """

    spatial: tuple[tuple[Any, int], ...]
    reduced: tuple[tuple[Any, int], ...]
    target: Any
    indices: tuple[Any, ...]
    value: Any
    start: Any | None


def nests_of(schedule: Any, blocks: list[Any]) -> list[Nest] | None:
    """Return the nests of a function, or None where a block is not one store in plain loops.

    Args:
        schedule: Blocks that join others are inlined in it.
        blocks: The function's top-level blocks.
    """
    kept = []
    for position, block in enumerate(blocks):
        if position + 1 < len(blocks) and _may_join(schedule, block) and _inlined(schedule, block):
            continue
        kept.append(block)
    nests = []
    for block in kept:
        nest = _nest(schedule, block)
        if nest is None:
            return None
        nests.append(nest)
    return nests


def _may_join(schedule: Any, block: Any) -> bool:
    """Whether a block is better computed where it is read: it takes little, or nobody computes it more than once."""
    found = schedule.get(block)
    if found.init is not None or not isinstance(found.body, tirx.BufferStore):
        return False
    if not expensive(found.body.value):
        return True
    consumers = [schedule.get(consumer) for consumer in schedule.get_consumers(block)]
    return len(consumers) == 1 and consumers[0].init is None and _reads_in_place(consumers[0], found.body.buffer)


def _reads_in_place(block: Any, source: Any) -> bool:
    """Whether a block reads a buffer nowhere but where it stores."""
    places = [axis.var for axis in block.iter_vars]
    found = []

    def check(load: Any) -> None:
        if load.source.same_as(source):
            same = len(load.indices) == len(places)
            found.append(same and all(i.same_as(v) for i, v in zip(load.indices, places, strict=True)))

    tvm_ffi.structural_walk(block.body, [(ir.TensorLoad, check)])
    return all(found)


def _inlined(schedule: Any, block: Any) -> bool:
    consumers = [schedule.get(consumer) for consumer in schedule.get_consumers(block)]
    if not consumers or any(consumer.init is not None and _rereads(consumer) for consumer in consumers):
        return False
    try:
        schedule.compute_inline(block)
    except ScheduleError:
        return False
    return True


def _rereads(block: Any) -> bool:
    """Whether a reduction has a spatial axis that some operand lacks: then it reads an element many times."""
    spatial = [axis.var for axis in block.iter_vars if int(axis.iter_type) == 0 and int(axis.dom.extent) > 1]
    return any(not all(mentions(region, [var]) for var in spatial) for region in block.reads)


def _nest(schedule: Any, block: Any) -> Nest | None:
    found = schedule.get(block)
    if not isinstance(found.body, tirx.BufferStore) or found.match_buffers or found.alloc_buffers:
        return None
    loops = [schedule.get(loop) for loop in schedule.get_loops(block)]
    if len(loops) != len(found.iter_vars):
        return None
    spatial: list[tuple[Any, int]] = []
    reduced: list[tuple[Any, int]] = []
    for axis in found.iter_vars:
        kind = int(axis.iter_type)
        if kind not in (0, 2):  # IterVar.DataPar, IterVar.CommReduce
            return None
        (spatial if kind == 0 else reduced).append((axis.var, int(axis.dom.extent)))
    start = None
    if found.init is not None:
        if not isinstance(found.init, tirx.BufferStore):
            return None
        start = found.init.value
    elif reduced:
        return None
    body = found.body
    return Nest(tuple(spatial), tuple(reduced), body.buffer, tuple(body.indices), body.value, start)


def shared(access: Access, tasks: int, work: int, task: tir.Body) -> Any:
    """Return the loop over tasks, which cores share where the work, in elements, is worth it."""
    body = tir.shared(tasks, work, task)
    return tir.views(access.aliases, body) if access.aliases else body


def put(value: Any, places: dict[Any, Any]) -> Any:
    """Return an expression with index variables replaced."""
    return tvm_ffi.structural_map(value, [(ir.Var, lambda var: places.get(var, var))], order="post")


def unravel(number: Any, axes: Sequence[tuple[Any, int]]) -> dict[Any, Any]:
    """Return the places on some axes that a number in row-major order stands for."""
    places = {}
    for position, (var, extent) in reversed(list(enumerate(axes))):
        places[var] = tir.index(0) if extent == 1 else (number % extent if position else number)
        if extent > 1:
            number = number // extent
    return places


def product(axes: Sequence[tuple[Any, int]]) -> int:
    """Return how many places some axes have."""
    result = 1
    for _, extent in axes:
        result *= extent
    return result
