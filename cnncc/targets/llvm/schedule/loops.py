"""Any function of plain loops: each block becomes a nest that cores share and vectors run along memory.

What is left of a function's blocks are element-wise nests and reductions, one after the other; they are told apart and
ordered by how they walk through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.s_tir.schedule import ScheduleError

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.access import Access, joined, joined_inside
from cnncc.targets.llvm.schedule.elementary import assign
from cnncc.targets.llvm.schedule.nests import Nest, nests_of, product, put, shared, unravel
from cnncc.targets.llvm.schedule.reductions import reduction

_CHUNK = 4096
"""Elements of a task where one long row is shared among cores."""


@dataclass(frozen=True)
class Loops:
    """Schedules functions whose blocks are plain loops."""

    name: str = "loops"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the function's nests, or None where a block is not one store in plain loops."""
        try:
            schedule, blocks = tir.root_blocks(function)
        except ScheduleError:
            return None
        nests = nests_of(schedule, blocks)
        if nests is None:
            return None
        root = schedule.get(schedule.get_sblock("root"))
        allocated = [buffer for buffer in root.alloc_buffers]
        statements = [_emit(nest, machine) for nest in nests]
        return tir.function(function, tir.sequence(statements), allocated)


def _emit(nest: Nest, machine: Machine) -> Any:
    return reduction(nest, machine) if nest.reduced else _elementwise(nest, machine)


def _elementwise(nest: Nest, machine: Machine) -> Any:
    access = joined(nest.spatial, (nest.target, nest.indices), nest.value)
    *outer, (inner, length) = access.axes or [(tirx.Var("one", tir.INDEX), 1)]
    if access.contiguous(inner) and outer and length <= machine.block:
        return _pixels(access, machine)
    lanes = machine.lanes if access.contiguous(inner) else 1

    def part(places: dict[Any, Any], start: Any, count: int) -> Any:
        def element(i: Any) -> Any:
            return _store(access, {**places, inner: start + i})

        return tir.for_vectors(count, lanes, element) if lanes > 1 else tir.loop(count, element)

    tasks = product(outer)
    chunk = _CHUNK if tasks * 4 < 16 * machine.cores and length > _CHUNK else length
    return _chunked(access, outer, (length, chunk), tasks * length, part)


def _pixels(access: Access, machine: Machine) -> Any:
    """Element-wise on lanes: tasks of many pixels, so that what all pixels share stays in registers."""
    *outer, (inner, length) = access.axes
    access = joined_inside(outer, access)
    *outer, (pixel, pixels) = access.axes

    def part(places: dict[Any, Any], start: Any, count: int) -> Any:
        def row(number: Any) -> Any:
            at = {**places, pixel: start + number}
            return tir.for_vectors(length, length, lambda i: _store(access, {**at, inner: i}))

        return tir.loop(count, row, name="pixel")

    tasks = product(outer)
    wanted = max(1, _CHUNK // length)
    chunk = wanted if tasks * 4 < 16 * machine.cores and pixels > wanted else pixels
    return _chunked(access, outer, (pixels, chunk), tasks * pixels * length, part)


def _chunked(
    access: Access, outer: Sequence[tuple[Any, int]], size: tuple[int, int], work: int, part: Callable[..., Any]
) -> Any:
    """Return tasks that each compute a part of an axis.

    Args:
        access: What is computed.
        outer: The axes before it.
        size: Its extent, and that of a part.
        work: Elements of all tasks.
        part: Takes the places of the outer axes, a start and how many; returns the loops.
    """
    length, chunk = size
    chunks = -(-length // chunk)
    rest = length - (chunks - 1) * chunk

    def task(number: Any) -> Any:
        places = unravel(number // chunks, outer)
        position = number % chunks
        whole = part(places, position * chunk, chunk)
        if rest == chunk:
            return whole
        return tirx.IfThenElse(position < chunks - 1, whole, part(places, position * chunk, rest))

    return shared(access, product(outer) * chunks, work, task)


def _store(access: Access, places: dict[Any, Any]) -> Any:
    indices = [put(index, places) for index in access.indices]
    return assign(access.target, indices, put(access.value, places))
