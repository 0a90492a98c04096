"""Layer normalisation of blocked pixels: some neighbouring pixels at a time, read thrice from the first-level cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import PARAMETERS, is_marked

NORMALIZE = "normalize"


@dataclass(frozen=True)
class Normalize:
    """Schedules normalisations over channels."""

    name: str = "normalize"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the kernel, or None where the function is not one."""
        if not is_marked(function, NORMALIZE):
            return None
        schedule, blocks = tir.root_blocks(function)
        last = schedule.get(blocks[-1])
        channels, bits = (int(number) for number in last.annotations[PARAMETERS])
        epsilon = float(np.int32(bits).view("float32"))
        return _Builder(function, channels, epsilon, machine).function(function)


class _Builder:
    """Writes one normalisation's loops."""

    def __init__(self, function: Any, channels: int, epsilon: float, machine: Machine) -> None:
        self.machine = machine
        self.channels, self.epsilon = channels, epsilon
        data, self.scale, self.shift, result = function.params
        self.batch, self.blocks, rows, columns, self.lanes = tir.shape_of(data)
        self.points = rows * columns
        shape = (self.batch, self.blocks, self.points, self.lanes)
        self.data, self.result = tir.buffer(shape, "data_flat"), tir.buffer(shape, "result_flat")
        self.aliases = {data: self.data, result: self.result}
        # The pixels of a task stay in half of L1, and their sums in half of the registers.
        held = self.blocks * self.lanes * 4
        registers = machine.registers * machine.lanes // (2 * self.lanes)
        self.tile = max(
            size
            for size in (1, 2, 4, 8)
            if size == 1 or (size <= self.points and size <= registers and size * held <= machine.l1 // 2)
        )

    def function(self, like: Any) -> Any:
        """Return the function with its kernel as body."""
        tiles = -(-self.points // self.tile)

        def task(number: Any) -> Any:
            image, start = number // tiles, number % tiles * self.tile
            if self.points % self.tile:  # the last tile overlaps the one before
                start = tirx.min(start, tir.index(self.points - self.tile))
            return self._tile(image, start)

        tasks = self.batch * tiles
        work = tasks * self.tile * self.blocks * self.lanes
        body = tir.shared(tasks, work, task)
        return tir.function(like, tir.views(self.aliases, body))

    def _tile(self, image: Any, start: Any) -> Any:
        mean, factor = (tir.buffer([self.tile, self.lanes], name, scope="local") for name in ("mean", "factor"))
        one, count = tirx.const(1.0, "float32"), tirx.const(float(self.channels), "float32")
        epsilon = tirx.const(self.epsilon, "float32")

        def read(block: Any, point: int, lane: Any) -> Any:
            return self.data[image, block, start + point, lane]

        def centred(block: Any, point: int, lane: Any) -> Any:
            return read(block, point, lane) - mean[point, lane]

        def put(block: Any) -> Any:
            return self._each(
                lambda point, lane: tir.store(
                    self.result,
                    [image, block, start + point, lane],
                    centred(block, point, lane) * factor[point, lane] * self.scale[block, lane]
                    + self.shift[block, lane],
                )
            )

        statements = [
            *self._sums(mean, read),
            self._each(lambda point, lane: tir.store(mean, [point, lane], mean[point, lane] / count)),
            *self._sums(factor, lambda *place: centred(*place) * centred(*place)),
            self._each(
                lambda point, lane: tir.store(
                    factor, [point, lane], one / tirx.sqrt(factor[point, lane] / count + epsilon)
                )
            ),
            tir.loop(self.blocks, put, name="block"),
        ]
        return tir.block(tir.sequence(statements), [mean, factor], "tile")

    def _sums(self, sums: Any, term: Any) -> list[Any]:
        """Return the statements that put the sum of a term over all channels into every lane of each point."""
        zero = tirx.const(0.0, "float32")
        full, rest = divmod(self.channels, self.lanes)

        def add(block: Any, lanes: int) -> Any:
            def element(point: int, lane: Any) -> Any:
                value = term(block, point, lane)
                if lanes < self.lanes:  # what the lanes after the last channel hold may be NaN
                    value = tirx.Select(lane < lanes, value, zero)
                return tir.store(sums, [point, lane], sums[point, lane] + value)

            return self._each(element)

        statements = [self._each(lambda point, lane: tir.store(sums, [point, lane], zero))]
        if full:
            statements.append(tir.loop(full, lambda block: add(block, self.lanes), name="block"))
        if rest:
            statements.append(add(tir.index(full), rest))
        return [*statements, *(self._spread(sums, point) for point in range(self.tile))]

    def _spread(self, sums: Any, point: int) -> Any:
        """Return the statements that add all lanes of a point: to each the one half a vector on, then a quarter."""
        whole = tirx.Ramp(tir.index(0), tir.index(1), self.lanes)
        statements = []
        step = self.lanes // 2
        while step:
            turned = [tirx.IntImm("int32", (lane + step) % self.lanes) for lane in range(self.lanes)]
            value = sums[point, whole]
            statements.append(tir.store(sums, [point, whole], value + tirx.Shuffle([value], turned)))
            step //= 2
        return tir.sequence(statements)

    def _each(self, body: Any) -> Any:
        """Return a statement for each lane of each point."""

        def of(point: int) -> Any:
            return tir.for_vectors(self.lanes, self.machine.lanes, lambda lane: body(point, lane))

        return tir.sequence([of(point) for point in range(self.tile)])
