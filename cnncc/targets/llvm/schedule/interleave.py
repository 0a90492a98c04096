"""Pixels of several blocked tensors interleaved: each row takes turns among the tensors of its phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor

INTERLEAVE = "interleave"


@dataclass(frozen=True)
class Interleave:
    """Schedules the last step of transposed convolutions."""

    name: str = "interleave"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the kernel, or None where the function is not one."""
        anchor = find_anchor(function, INTERLEAVE)
        if anchor is None or len(anchor.reads) != anchor.parameters[0] * anchor.parameters[1]:
            return None
        return _function(anchor, function, machine)


def _function(anchor: Anchor, like: Any, machine: Machine) -> Any:
    high, wide, top, left = anchor.parameters
    batch, blocks, rows, columns, lanes = tir.shape_of(anchor.tail.result)

    def row(image: Any, block: Any, y: Any, phase: int) -> Any:
        return tir.sequence([turn(image, block, y, phase, column) for column in range(min(wide, columns))])

    def turn(image: Any, block: Any, y: Any, phase: int, first: int) -> Any:
        """Return the loop over every so many pixels of a row, which come from one tensor."""
        source = anchor.reads[phase * wide + (first + left) % wide]

        def pixel(number: Any) -> Any:
            place = [image, block, (y + top) // high, number + (first + left) // wide]
            there = [image, block, y, number * wide + first]
            return tir.for_vectors(
                lanes, machine.lanes, lambda lane: anchor.tail.at([*there, lane], tir.at(source, *place, lane))
            )

        return tir.loop(-(-(columns - first) // wide), pixel, name="turn")

    def task(number: Any) -> Any:
        y, rest = number % rows, number // rows
        image, block = rest // blocks, rest % blocks
        chain = row(image, block, y, high - 1)
        for phase in range(high - 2, -1, -1):
            chain = tirx.IfThenElse((y + top) % high == phase, row(image, block, y, phase), chain)
        return chain

    tasks = batch * blocks * rows
    work = tasks * columns * lanes
    return tir.function(like, tir.shared(tasks, work, task))
