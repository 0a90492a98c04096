"""Finds the operation that a fused function is built around, and what follows it.

Our legalizations mark the block of an operation that has a kernel of its own (`KERNEL`). A function that FuseTIR made
holds that block and elementwise ones after it; they become one expression, which the kernel applies to each of its
results before it stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.s_tir.schedule import ScheduleError

from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.elementary import assign

KERNEL = "cnncc.kernel"
"""Block annotation: name of the kernel that computes the block."""

PARAMETERS = "cnncc.parameters"
"""Block annotation: integers that the kernel wants to know."""


@dataclass(frozen=True)
class Tail:
    """What is done to each result before it is stored.

    Attributes:
        axes: The output's index variables, as `value` has them.
        output: Buffer that is stored to.
        value: What is stored; it reads `result` at `axes` only.
        result: The operation's own result.
    """

    axes: tuple[Any, ...]
    output: Any
    value: Any
    result: Any

    def at(self, indices: Sequence[Any], accumulated: Any) -> Any:
        """Return the store of one element.

        Args:
            indices: Where, in the output.
            accumulated: The operation's result there.
        """
        return assign(self.output, indices, self._value(indices, accumulated))

    def _value(self, indices: Sequence[Any], accumulated: Any) -> Any:
        places = dict(zip(self.axes, indices, strict=True))
        return tvm_ffi.structural_map(
            self.value,
            [
                (ir.TensorLoad, lambda load: accumulated if load.source.same_as(self.result) else load),
                (ir.Var, lambda var: places.get(var, var)),
            ],
            order="post",
        )

    def flat(self) -> tuple[Tail, dict[Any, Any]] | None:
        """Return the tail with the last two axes as one, and the buffers it sees so; None where that is not one.

        Rows of an image are then one long row, whose length vectors divide better.
        """
        *outer, high, low = self.axes
        rows, columns = tir.shape_of(self.output)[-2:]
        joined = tirx.Var("point", tir.INDEX)
        aliases: dict[Any, Any] = {}

        def view(whole: Any) -> Any:
            if whole not in aliases:
                shape = (*tir.shape_of(whole)[:-2], rows * columns)
                flat_buffer = tir.buffer(shape, f"{whole.name}_flat", str(whole.dtype))
                aliases[whole] = flat_buffer
            return aliases[whole]

        def join(load: Any) -> Any:
            if load.source.same_as(self.result):
                return tir.at(view_result, *outer, joined)
            indices = list(load.indices)
            if (
                len(indices) > 1
                and _same(indices[-2:], (high, low))
                and tir.shape_of(load.source)[-2:] == (rows, columns)
            ):
                return tir.at(view(load.source), *indices[:-2], joined)
            return load

        view_result = tir.buffer((*tir.shape_of(self.result)[:-2], rows * columns), "result_flat")
        value = tvm_ffi.structural_map(self.value, [(ir.TensorLoad, join)], order="post")
        if _mentions(value, (high, low)):
            return None
        output = view(self.output)
        return Tail((*outer, joined), output, value, view_result), aliases


@dataclass(frozen=True)
class Anchor:
    """A function's operation.

    Attributes:
        reads: Buffers that it reads, in the order in which its expression names them.
        parameters: Integers that the legalization noted.
        tail: What follows.
    """

    reads: tuple[Any, ...]
    parameters: tuple[int, ...]
    tail: Tail


def find_anchor(function: Any, kernel: str) -> Anchor | None:
    """Return the operation of a function, or None where it is not the kernel asked for, or is not alone."""
    if kernel not in str(_kernels(function)):
        return None
    schedule, blocks = tir.root_blocks(function)
    found = [schedule.get(block) for block in blocks]
    if str(found[0].annotations.get(KERNEL, "")) != kernel:
        return None
    anchor = found[0]
    try:
        for block in blocks[1:-1]:
            schedule.compute_inline(block)
    except ScheduleError:
        return None
    result = anchor.writes[0].source
    if len(blocks) == 1:
        store = _store_of(anchor.body)
        if store is None:
            return None
        axes = tuple(store.indices)
        tail = Tail(axes, result, result[axes], result)
    else:
        last = schedule.get(blocks[-1])
        store = _store_of(last.body)
        axes = tuple(iteration.var for iteration in last.iter_vars)
        if store is None or not _same(store.indices, axes) or not _reads_in_place(store.value, result, axes):
            return None
        tail = Tail(axes, store.buffer, store.value, result)
    parameters = tuple(int(number) for number in anchor.annotations[PARAMETERS])
    return Anchor(_reads(anchor.body, result), parameters, tail)


def _kernels(function: Any) -> list[str]:
    names: list[str] = []

    def note(block: Any) -> None:
        if KERNEL in block.annotations:
            names.append(str(block.annotations[KERNEL]))

    from tvm.s_tir import SBlock

    tvm_ffi.structural_walk(function.body, [(SBlock, note)])
    return names


def _store_of(body: Any) -> Any | None:
    return body if isinstance(body, tirx.BufferStore) else None


def _reads(body: Any, result: Any) -> tuple[Any, ...]:
    found: list[Any] = []

    def note(load: Any) -> None:
        if not load.source.same_as(result) and not any(load.source.same_as(other) for other in found):
            found.append(load.source)

    tvm_ffi.structural_walk(body, [(ir.TensorLoad, note)])
    return tuple(found)


def _reads_in_place(value: Any, result: Any, axes: tuple[Any, ...]) -> bool:
    right = [True]

    def check(load: Any) -> None:
        if load.source.same_as(result) and not _same(load.indices, axes):
            right[0] = False

    tvm_ffi.structural_walk(value, [(ir.TensorLoad, check)])
    return right[0]


def _mentions(value: Any, names: tuple[Any, ...]) -> bool:
    found = [False]

    def check(var: Any) -> None:
        if any(var.same_as(name) for name in names):
            found[0] = True

    tvm_ffi.structural_walk(value, [(ir.Var, check)])
    return found[0]


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two lists hold the same nodes; ``==`` of expressions is an expression."""
    return len(left) == len(right) and all(a.same_as(b) for a, b in zip(left, right, strict=True))
