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

MEASURED = "cnncc.measured"
"""Block annotation: whether the parameters come from a measurement; the manifest says so."""

FUSES = {"op_pattern": 4}
"""Attribute of an anchor's function, TVM's ``kOutEWiseFusable``: element-wise operators after it may join it, none
before."""


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
        """Return the tail with rows and columns as one axis, and the buffers it sees so; None where that is not one.

        The output is blocked: ``[n, block, row, column, lane]``.
        """
        *outer, high, low, lane = self.axes
        rows, columns, _ = tir.shape_of(self.output)[-3:]
        joined = tirx.Var("point", tir.INDEX)
        aliases: dict[Any, Any] = {}

        def view(whole: Any) -> Any:
            if whole not in aliases:
                *first, _, _, last = tir.shape_of(whole)
                aliases[whole] = tir.buffer((*first, rows * columns, last), f"{whole.name}_flat", str(whole.dtype))
            return aliases[whole]

        def join(load: Any) -> Any:
            indices = list(load.indices)
            if load.source.same_as(self.result):
                return tir.at(view_result, *outer, joined, lane)
            shape = tir.shape_of(load.source)
            if (
                len(indices) == len(self.axes)
                and shape[-3:-1] == (rows, columns)
                and _same(indices[-3:-1], (high, low))
            ):
                return tir.at(view(load.source), *indices[:-3], joined, indices[-1])
            return load

        *first, _, _, last = tir.shape_of(self.result)
        view_result = tir.buffer((*first, rows * columns, last), "result_flat", str(self.result.dtype))
        value = tvm_ffi.structural_map(self.value, [(ir.TensorLoad, join)], order="post")
        if _mentions(value, (high, low)):
            return None
        output = view(self.output)
        return Tail((*outer, joined, lane), output, value, view_result), aliases


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
    if not is_marked(function, kernel):
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


def is_marked(function: Any, kernel: str) -> bool:
    """Whether some block of a function is to be computed by a kernel."""
    names: list[str] = []

    def note(block: Any) -> None:
        if KERNEL in block.annotations:
            names.append(str(block.annotations[KERNEL]))

    from tvm.s_tir import SBlock

    tvm_ffi.structural_walk(function.body, [(SBlock, note)])
    return kernel in names


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
