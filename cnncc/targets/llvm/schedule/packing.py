"""Copies between plain and blocked tensors: squares of pixels × channels transposed in registers.

A square is transposed in log₂ steps, each of which exchanges ever larger parts between pairs of vectors (Eklundh, A
Fast Computer Method for Matrix Transposing, 1972).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import PARAMETERS, is_marked

PACKING = "packing"
TO_BLOCKS, FROM_BLOCKS = range(2)
CHANNELS_FIRST, CHANNELS_LAST = range(2)

_SQUARES = 8
"""Squares of a task; a task is then a few microseconds."""

Move = Callable[[Any, Any, Any, int], Any]
"""Takes image, block, first pixel and number of channels; returns the statement that copies as many pixels as a block
has lanes, or one."""


@dataclass(frozen=True)
class Packing:
    """Schedules packing and unpacking of images."""

    name: str = "packing"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the kernel, or None where the function is not one, or has too few pixels for a square."""
        if not is_marked(function, PACKING) or not machine.computes(str(function.params[0].dtype)):
            return None
        schedule, blocks = tir.root_blocks(function)
        block = schedule.get(blocks[-1])
        direction, side, channels = (int(number) for number in block.annotations[PARAMETERS])
        source, target = function.params
        blocked = target if direction == TO_BLOCKS else source
        *_, rows, columns, lanes = tir.shape_of(blocked)
        if side == CHANNELS_FIRST and rows * columns < lanes:
            return None
        return _Builder(source, target, direction, side, channels).function(function)


class _Builder:
    """Writes one copy's loops."""

    def __init__(self, source: Any, target: Any, direction: int, side: int, channels: int) -> None:
        self.to_blocks, self.channels = direction == TO_BLOCKS, channels
        blocked, plain = (target, source) if self.to_blocks else (source, target)
        self.batch, self.blocks, rows, columns, self.lanes = tir.shape_of(blocked)
        self.points, self.side = rows * columns, side
        shape = (channels, self.points) if side == CHANNELS_FIRST else (self.points, channels)
        self.blocked = tir.buffer((self.batch, self.blocks, self.points, self.lanes), "blocked", str(blocked.dtype))
        self.plain = tir.buffer((self.batch, *shape), "plain", str(plain.dtype))
        self.aliases = {blocked: self.blocked, plain: self.plain}

    def function(self, like: Any) -> Any:
        """Return the function with its kernel as body."""
        step = self.lanes if self.side == CHANNELS_FIRST else 1
        move = self._square if self.side == CHANNELS_FIRST else self._pixel
        steps = -(-self.points // step)
        chunk = min(steps, _SQUARES * self.lanes // step)
        chunks = -(-steps // chunk)
        rest = self.channels - (self.blocks - 1) * self.lanes

        def task(number: Any) -> Any:
            part, rest_of = number % chunks, number // chunks
            image, block = rest_of // self.blocks, rest_of % self.blocks
            last = tirx.min(tir.index(chunk), steps - part * chunk)

            def moves(channels: int) -> Any:
                def at(position: Any) -> Any:
                    point = (part * chunk + position) * step
                    if self.points % step:  # the last square overlaps the one before
                        point = tirx.min(point, tir.index(self.points - step))
                    return move(image, block, point, channels)

                return tir.loop(chunk if steps % chunk == 0 else last, at, name="square")

            if rest == self.lanes:
                return moves(self.lanes)
            if self.blocks == 1:
                return moves(rest)
            return tirx.IfThenElse(block < self.blocks - 1, moves(self.lanes), moves(rest))

        tasks = self.batch * self.blocks * chunks
        work = self.batch * self.channels * self.points
        body = tir.shared(tasks, work, task)
        return tir.function(like, tir.views(self.aliases, body))

    def _pixel(self, image: Any, block: Any, point: Any, channels: int) -> Any:
        """Return the copy of one pixel's channels, which lie side by side in both tensors."""

        def element(lane: Any) -> Any:
            there, here = [image, block, point, lane], [image, point, block * self.lanes + lane]
            if self.to_blocks:
                return tir.store(self.blocked, there, self.plain[tuple(here)])
            return tir.store(self.plain, here, self.blocked[tuple(there)])

        return tir.for_vectors(channels, self.lanes, element)

    def _square(self, image: Any, block: Any, point: Any, channels: int) -> Any:
        """Return the transposition of as many pixels as a block has lanes."""
        size = self.lanes
        rows = [tir.buffer([size, size], f"rows{number}", str(self.plain.dtype), "local") for number in range(2)]

        def along(start: Any) -> Any:
            return tirx.Ramp(start, tir.index(1), size)

        def plain(channel: int) -> tuple[Any, ...]:
            return image, block * size + channel, along(point)

        def blocked(pixel: int) -> tuple[Any, ...]:
            return image, block, point + pixel, along(tir.index(0))

        zero = tirx.Broadcast(tirx.const(0, str(self.plain.dtype)), size)
        statements = []
        for number in range(size):
            if self.to_blocks:
                value = self.plain[plain(number)] if number < channels else zero
            else:
                value = self.blocked[blocked(number)]
            statements.append(tir.store(rows[0], [number, along(tir.index(0))], value))
        done, steps = _transposed(rows, size)
        statements += steps
        for number in range(size if self.to_blocks else channels):
            value = done[number, along(tir.index(0))]
            target, place = (self.blocked, blocked(number)) if self.to_blocks else (self.plain, plain(number))
            statements.append(tir.store(target, list(place), value))
        return tir.block(tir.sequence(statements), rows, "square")


def _transposed(buffers: list[Any], size: int) -> tuple[Any, list[Any]]:
    """Return the statements that transpose a square, and the buffer in which it ends.

    Args:
        buffers: Two squares; the first holds the values.
        size: Rows of a square, a power of two.
    """
    source, target = buffers
    statements = []
    whole = tirx.Ramp(tir.index(0), tir.index(1), size)
    step = 1
    while step < size:
        for row in range(size):
            low, high = row & ~step, row | step
            pair = [source[low, whole], source[high, whole]]
            if row == low:
                lanes = [lane if not lane & step else size + (lane ^ step) for lane in range(size)]
            else:
                lanes = [size + lane if lane & step else lane | step for lane in range(size)]
            value = tirx.Shuffle(pair, [tirx.IntImm("int32", lane) for lane in lanes])
            statements.append(tir.store(target, [row, whole], value))
        source, target = target, source
        step *= 2
    return source, statements
