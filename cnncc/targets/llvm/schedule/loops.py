"""Any function of plain loops: each block becomes a nest that cores share and vectors run along memory.

Blocks that only feed others are computed in place. What remains are element-wise nests and reductions, one after the
other; they are told apart and ordered by how they walk through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.s_tir.schedule import ScheduleError

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.access import Access, joined, mentions
from cnncc.targets.llvm.schedule.elementary import assign, expensive

_PARALLEL_WORK = 16384
"""Elements below which waking other cores costs more than it saves (4 µs a region)."""

_CHUNK = 4096
"""Elements of a task where one long row is shared among cores."""


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
        nests = _nests(schedule, blocks)
        if nests is None:
            return None
        root = schedule.get(schedule.get_sblock("root"))
        allocated = [buffer for buffer in root.alloc_buffers]
        statements = [_emit(nest, machine) for nest in nests]
        return tir.function(function, tir.sequence(statements), allocated)


def _nests(schedule: Any, blocks: list[Any]) -> list[Nest] | None:
    kept = []
    for position, block in enumerate(blocks):
        if position + 1 < len(blocks) and _cheap(schedule.get(block)) and _inlined(schedule, block):
            continue
        kept.append(block)
    nests = []
    for block in kept:
        nest = _nest(schedule, block)
        if nest is None:
            return None
        nests.append(nest)
    return nests


def _cheap(block: Any) -> bool:
    return block.init is None and isinstance(block.body, tirx.BufferStore) and not expensive(block.body.value)


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


def _emit(nest: Nest, machine: Machine) -> Any:
    return _reduction(nest, machine) if nest.reduced else _elementwise(nest, machine)


def _elementwise(nest: Nest, machine: Machine) -> Any:
    access = joined(nest.spatial, (nest.target, nest.indices), nest.value)
    *outer, (inner, length) = access.axes or [(tirx.Var("one", tir.INDEX), 1)]
    lanes = machine.lanes if access.contiguous(inner) else 1
    tasks = _product(outer)
    chunk = length
    if tasks * 4 < 16 * machine.cores and length > _CHUNK:
        chunk = _CHUNK
    chunks = -(-length // chunk)

    def part(places: dict[Any, Any], start: Any, count: int) -> Any:
        def element(i: Any) -> Any:
            return _store(access, {**places, inner: start + i})

        return tir.for_vectors(count, lanes, element) if lanes > 1 else tir.loop(count, element)

    def task(number: Any) -> Any:
        places = _unravel(number // chunks, outer)
        position = number % chunks
        rest = length - (chunks - 1) * chunk
        if rest == chunk or chunks == 1:
            return part(places, position * chunk, chunk)
        whole, ragged = part(places, position * chunk, chunk), part(places, position * chunk, rest)
        return tirx.IfThenElse(position < chunks - 1, whole, ragged)

    return _shared(access, tasks * chunks, tasks * length, task)


def _store(access: Access, places: dict[Any, Any]) -> Any:
    indices = [_put(index, places) for index in access.indices]
    return assign(access.target, indices, _put(access.value, places))


def _reduction(nest: Nest, machine: Machine) -> Any:
    along = joined(nest.reduced, (nest.target, nest.indices), nest.value)
    last = along.axes[-1][0]
    operator = _operator(nest)
    if operator is not None and along.contiguous(last, store=False) and along.axes[-1][1] >= machine.lanes:
        return _across(nest, along, operator, machine)
    across = joined(nest.spatial, (nest.target, nest.indices), nest.value)
    if across.axes and across.contiguous(across.axes[-1][0]) and across.axes[-1][1] >= machine.lanes:
        return _beside(nest, across, machine)
    return _scalar(nest)


def _across(nest: Nest, access: Access, operator: Any, machine: Machine) -> Any:
    """Reduce along memory: a vector of partial results, then those."""
    lanes, dtype = machine.lanes, str(nest.target.dtype)
    *outer, (inner, length) = access.axes
    full = length // lanes

    def task(number: Any) -> Any:
        places = _unravel(number, nest.spatial)
        partial = tir.buffer([lanes], "partial", dtype, "local")
        result = tir.buffer([1], "result", dtype, "local")
        clear = tir.vector(lanes, lambda lane: tir.store(partial, [lane], nest.start))

        def update(where: Any, buffer: Any, slot: Any, reduce_places: dict[Any, Any]) -> Any:
            term = _put(access.value, {**places, **reduce_places, inner: where})
            return assign(buffer, [slot], _with_result(term, access.target, buffer[slot]))

        def row(number: Any) -> Any:
            at = _unravel(number, outer)
            steps = tir.loop(
                full,
                lambda step: tir.vector(lanes, lambda lane: update(step * lanes + lane, partial, lane, at)),
            )
            rest = length - full * lanes
            tail = [tir.loop(rest, lambda i: update(full * lanes + i, result, tir.index(0), at))] if rest else []
            return tir.sequence([steps, *tail])

        fold = tir.loop(
            lanes, lambda lane: tir.store(result, [tir.index(0)], operator(result[tir.index(0)], partial[lane]))
        )
        done = tir.store(nest.target, [_put(index, places) for index in nest.indices], result[tir.index(0)])
        first = tir.store(result, [tir.index(0)], nest.start)
        body = [clear, first, tir.loop(_product(outer), row, name="row"), fold, done]
        return tir.block(tir.sequence(body), [partial, result], "reduce")

    count = _product(nest.spatial)
    return _shared(access, count, count * _product(nest.reduced), task)


def _beside(nest: Nest, access: Access, machine: Machine) -> Any:
    """Reduce across memory: neighbouring results side by side in a vector."""
    lanes = machine.lanes
    *outer, (inner, length) = access.axes
    pieces = [(start + i * width, width) for start, width, count in tir.pieces(length, lanes) for i in range(count)]
    full, tail = length // lanes, [piece for piece in pieces if piece[1] < lanes]

    def column(places: dict[Any, Any], start: Any, width: int) -> Any:
        result = tir.buffer([width], "result", str(nest.target.dtype), "local")
        clear = tir.vector(width, lambda lane: tir.store(result, [lane], nest.start))

        def step(number: Any) -> Any:
            at = {**places, **_unravel(number, nest.reduced)}

            def element(lane: Any) -> Any:
                term = _put(access.value, {**at, inner: start + lane})
                return assign(result, [lane], _with_result(term, access.target, result[lane]))

            return tir.vector(width, element)

        def finish(lane: Any) -> Any:
            there = [_put(index, {**places, inner: start + lane}) for index in access.indices]
            return tir.store(access.target, there, result[lane])

        steps = tir.loop(_product(nest.reduced), step, name="k")
        return tir.block(tir.sequence([clear, steps, tir.vector(width, finish)]), [result], "reduce")

    def task(number: Any) -> Any:
        places = _unravel(number // max(full, 1), outer)
        position = number % max(full, 1)
        statements = [column(places, position * lanes, lanes)] if full else []
        if tail:
            rest = tir.sequence([column(places, tir.index(start), width) for start, width in tail])
            statements.append(tir.when(position == max(full, 1) - 1, rest))
        return tir.sequence(statements)

    count = _product(outer)
    return _shared(access, count * max(full, 1), count * length * _product(nest.reduced), task)


def _scalar(nest: Nest) -> Any:
    """Reduce one element at a time: small, or in no order that vectors could follow."""
    dtype = str(nest.target.dtype)

    def task(number: Any) -> Any:
        places = _unravel(number, nest.spatial)
        result = tir.buffer([1], "result", dtype, "local")
        slot = result[tir.index(0)]

        def step(number: Any) -> Any:
            term = _put(nest.value, {**places, **_unravel(number, nest.reduced)})
            return assign(result, [tir.index(0)], _with_result(term, nest.target, slot))

        first = tir.store(result, [tir.index(0)], nest.start)
        done = tir.store(nest.target, [_put(index, places) for index in nest.indices], slot)
        steps = tir.loop(_product(nest.reduced), step, name="k")
        return tir.block(tir.sequence([first, steps, done]), [result], "reduce")

    count = _product(nest.spatial)
    body = tir.parallel if count * _product(nest.reduced) >= _PARALLEL_WORK else tir.loop
    return body(count, task)


def _shared(access: Access, tasks: int, work: int, task: tir.Body) -> Any:
    body = tir.parallel(tasks, task) if work >= _PARALLEL_WORK and tasks > 1 else tir.loop(tasks, task)
    return tir.views(access.aliases, body) if access.aliases else body


def _operator(nest: Nest) -> Any | None:
    """Return how two partial results combine, where the reduction is a sum, product, minimum or maximum."""
    kinds = {"Add": lambda a, b: a + b, "Max": tirx.max, "Min": tirx.min, "Mul": lambda a, b: a * b}
    value = nest.value
    name = _kind(value)
    if name not in kinds:
        return None
    left = _operands(value)[0]
    if isinstance(left, ir.TensorLoad) and left.source.same_as(nest.target):
        return kinds[name]
    return None


def _kind(value: Any) -> str:
    if isinstance(value, ir.Call):
        return str(getattr(value.op, "name", "")).rsplit(".", 1)[-1].capitalize()
    return type(value).__name__


def _operands(value: Any) -> Sequence[Any]:
    return list(value.args) if isinstance(value, ir.Call) else [value.a, value.b]


def _with_result(value: Any, target: Any, current: Any) -> Any:
    return tvm_ffi.structural_map(
        value, [(ir.TensorLoad, lambda load: current if load.source.same_as(target) else load)], order="post"
    )


def _put(value: Any, places: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(value, [(ir.Var, lambda var: places.get(var, var))], order="post")


def _unravel(number: Any, axes: Sequence[tuple[Any, int]]) -> dict[Any, Any]:
    places = {}
    for position, (var, extent) in reversed(list(enumerate(axes))):
        places[var] = tir.index(0) if extent == 1 else (number % extent if position else number)
        if extent > 1:
            number = number // extent
    return places


def _product(axes: Sequence[tuple[Any, int]]) -> int:
    result = 1
    for _, extent in axes:
        result *= extent
    return result
