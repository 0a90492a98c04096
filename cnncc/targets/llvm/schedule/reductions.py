"""Reductions as loops: along memory, across it side by side in vectors, or one element at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.access import Access, joined, joined_inside
from cnncc.targets.llvm.schedule.elementary import assign
from cnncc.targets.llvm.schedule.nests import Nest, product, put, shared, unravel

_CHAIN = 256
"""Terms that follow each other in one register; see `rules`."""

_PARTS = 4
"""Registers that share a sum: an addition takes up to four cycles, a load half a cycle."""


def reduction(nest: Nest, machine: Machine) -> Any:
    """Return the loops of a reduction."""
    along = joined(nest.reduced, (nest.target, nest.indices), nest.value)
    operator = _operator(nest)
    last, length = along.axes[-1] if along.axes else (None, 1)  # there is none where each result has one term
    if operator is not None and length >= machine.lanes and along.contiguous(last, store=False):
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
        places = unravel(number, nest.spatial)
        partial = tir.buffer([lanes], "partial", dtype, "local")
        result = tir.buffer([1], "result", dtype, "local")
        clear = tir.vector(lanes, lambda lane: tir.store(partial, [lane], nest.start))

        def update(where: Any, buffer: Any, slot: Any, reduce_places: dict[Any, Any]) -> Any:
            term = put(access.value, {**places, **reduce_places, inner: where})
            return assign(buffer, [slot], _with_result(term, access.target, buffer[slot]))

        def row(number: Any) -> Any:
            at = unravel(number, outer)
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
        done = tir.store(nest.target, [put(index, places) for index in nest.indices], result[tir.index(0)])
        first = tir.store(result, [tir.index(0)], nest.start)
        body = [clear, first, tir.loop(product(outer), row, name="row"), fold, done]
        return tir.block(tir.sequence(body), [partial, result], "reduce")

    count = product(nest.spatial)
    return shared(access, count, count * product(nest.reduced), task)


def _beside(nest: Nest, access: Access, machine: Machine) -> Any:
    """Reduce across memory: neighbouring results side by side in a vector."""
    lanes = machine.lanes
    *outer, (inner, length) = access.axes
    pieces = [(start + i * width, width) for start, width, count in tir.pieces(length, lanes) for i in range(count)]
    full, tail = length // lanes, [piece for piece in pieces if piece[1] < lanes]
    access = joined_inside(nest.reduced, access)
    column = _Column(nest, access, inner)

    def task(number: Any) -> Any:
        places = unravel(number // max(full, 1), outer)
        position = number % max(full, 1)
        statements = [column.emit(places, position * lanes, lanes)] if full else []
        if tail:
            rest = tir.sequence([column.emit(places, tir.index(start), width) for start, width in tail])
            statements.append(tir.when(position == max(full, 1) - 1, rest))
        return tir.sequence(statements)

    count = product(outer)
    return shared(access, count * max(full, 1), count * length * product(nest.reduced), task)


class _Column:
    """Some neighbouring results of a reduction, each in a lane.

    Several registers share the sum, so that one addition need not wait for the one before, and each adds at most
    `_CHAIN` terms before it joins the total: see `rules`.
    """

    def __init__(self, nest: Nest, access: Access, inner: Any) -> None:
        self.nest = nest
        self.access = access
        self.inner = inner
        self.count = product(access.axes)
        self.operator = _operator(nest) if _is_neutral(nest) else None
        self.parts = _PARTS if self.operator is not None and self.count >= 2 * _PARTS else 1

    def emit(self, places: dict[Any, Any], start: Any, width: int) -> Any:
        """Return the loops that compute and store them.

        Args:
            places: Where, on the other axes.
            start: The first.
            width: How many.
        """
        dtype = str(self.nest.target.dtype)
        held = tir.buffer([self.parts, width], "held", dtype, "local")
        total = tir.buffer([1, width], "total", dtype, "local")

        def step(number: Any, registers: Any, part: int) -> Any:
            at = {**places, **unravel(number, self.access.axes)}

            def element(lane: Any) -> Any:
                term = put(self.access.value, {**at, self.inner: start + lane})
                return assign(registers, [part, lane], _with_result(term, self.access.target, registers[part, lane]))

            return tir.vector(width, element)

        def finish(lane: Any) -> Any:
            there = [put(index, {**places, self.inner: start + lane}) for index in self.access.indices]
            return tir.store(self.access.target, there, total[0, lane])

        shared_sums, done = self._shared_sums(held, total, step)
        rest = self.count - done
        alone = [tir.loop(rest, lambda n: step(done + n, total, 0), name="k")] if rest else []
        body = tir.sequence([*self._clear(total), *shared_sums, *alone, tir.vector(width, finish)])
        return tir.block(body, [held, total] if shared_sums else [total], "reduce")

    def _shared_sums(self, held: Any, total: Any, step: Callable[[Any, Any, int], Any]) -> tuple[list[Any], int]:
        """Return the chains of several registers that join the total, and how many terms they take."""
        parts, operator = self.parts, self.operator
        if operator is None or parts == 1:
            return [], 0
        width = tir.shape_of(held)[1]

        def join(part: int) -> Any:
            return tir.vector(width, lambda i: tir.store(total, [0, i], operator(total[0, i], held[part, i])))

        def chain(first: Any, length: int) -> Any:
            def steps(number: Any) -> Any:
                return tir.sequence([step(first + number * parts + part, held, part) for part in range(parts)])

            return tir.sequence([*self._clear(held), tir.loop(length, steps, name="k"), *map(join, range(parts))])

        length = min(self.count // parts, _CHAIN)
        chains, left = divmod(self.count // parts, length)
        statements = [tir.loop(chains, lambda number: chain(number * (parts * length), length), name="chain")]
        if left:
            statements.append(chain(tir.index(chains * parts * length), left))
        return statements, (chains * length + left) * parts

    def _clear(self, registers: Any) -> list[Any]:
        parts, width = tir.shape_of(registers)

        def clear(part: int) -> Any:
            return tir.vector(width, lambda lane: tir.store(registers, [part, lane], self.nest.start))

        return [clear(part) for part in range(parts)]


def _is_neutral(nest: Nest) -> bool:
    """Whether a reduction that starts anew, and is combined with what was there, gives the same."""
    if _kind(nest.value) in ("Max", "Min"):
        return True
    neutral = {"Add": 0.0, "Mul": 1.0}.get(_kind(nest.value))
    start = getattr(nest.start, "value", None)
    return neutral is not None and start is not None and float(start) == neutral


def _scalar(nest: Nest) -> Any:
    """Reduce one element at a time: small, or in no order that vectors could follow."""
    dtype = str(nest.target.dtype)

    def task(number: Any) -> Any:
        places = unravel(number, nest.spatial)
        result = tir.buffer([1], "result", dtype, "local")
        slot = result[tir.index(0)]

        def step(number: Any) -> Any:
            term = put(nest.value, {**places, **unravel(number, nest.reduced)})
            return assign(result, [tir.index(0)], _with_result(term, nest.target, slot))

        first = tir.store(result, [tir.index(0)], nest.start)
        done = tir.store(nest.target, [put(index, places) for index in nest.indices], slot)
        steps = tir.loop(product(nest.reduced), step, name="k")
        return tir.block(tir.sequence([first, steps, done]), [result], "reduce")

    count = product(nest.spatial)
    return tir.shared(count, count * product(nest.reduced), task)


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
