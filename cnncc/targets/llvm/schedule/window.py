"""Depthwise convolution and pooling: one channel's plane at a time, a vector of pixels per register."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, Tail, find_anchor
from cnncc.targets.llvm.schedule.planes import Place, Window, finish

WINDOW = "window"
WEIGHTED, GREATEST, SUM = range(3)
"""What is done with the elements under the window."""

_UNROLLED_TAPS = 64


@dataclass(frozen=True)
class SlidingWindow:
    """Depthwise convolution, maximum and sum under a sliding window."""

    name: str = "window"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the window's kernel, or None where the function is not one."""
        anchor = find_anchor(function, WINDOW)
        return None if anchor is None else _Builder(anchor, machine).function(function)


class _Builder:
    """Writes one window's loops."""

    def __init__(self, anchor: Anchor, machine: Machine) -> None:
        *numbers, kernel_h, kernel_w, kind = anchor.parameters
        self.machine = machine
        self.kind = kind
        self.data = anchor.reads[0]
        self.weight = anchor.reads[1] if kind == WEIGHTED else None
        self.tail = anchor.tail
        self.batch, self.inputs, height, width = tir.shape_of(self.data)
        _, self.outputs, out_h, out_w = tir.shape_of(self.tail.result)
        self.window = Window(
            (height, width), (kernel_h, kernel_w), (numbers[0], numbers[1]), (numbers[2], numbers[3]),
            (numbers[4], numbers[5]), (out_h, out_w),
        )  # fmt: skip
        self.pixels = out_h * self.window.width
        self.vectors = _vectors(self.pixels, machine)
        self.columns = self.vectors * machine.lanes
        self.packed = not self.window.plain or self.pixels < self.columns
        self.start = tirx.const(float("-inf") if kind == GREATEST else 0.0, "float32")

    def function(self, like: Any) -> Any:
        window = self.window
        flat = self.tail.flat() if window.width == window.output[1] else None
        aliases = dict(flat[1]) if flat else {}
        whole = tir.buffer([self.batch * self.inputs * window.size], f"{self.data.name}_flat")
        if not self.packed:
            aliases[self.data] = whole

        def task(number: Any) -> Any:
            image, channel = number // self.outputs, number % self.outputs
            source = channel // (self.outputs // self.inputs)
            return self._plane((image, channel, source), whole, flat[0] if flat else None)

        body = tir.parallel(self.batch * self.outputs, task)
        return tir.function(like, tir.views(aliases, body) if aliases else body)

    def _plane(self, where: tuple[Any, Any, Any], whole: Any, flat: Tail | None) -> Any:
        window, columns = self.window, self.columns
        image, channel, source = where
        tiles = -(-self.pixels // columns)
        results = tir.buffer([tiles * columns], "results", scope="local")
        allocate, statements = [results], []
        plane, base = whole, (image * self.inputs + source) * window.size
        if self.packed:
            plane, base = tir.buffer([window.size + window.slack + columns], "plane"), tir.index(0)
            allocate.append(plane)
            statements.append(window.pack(self.data, (image, source), plane, base, self.start))
            rest = window.slack + columns
            statements.append(tir.loop(rest, lambda i: tir.store(plane, [window.size + i], self.start)))

        def tile(number: Any) -> Any:
            start = number * columns
            if not self.packed and self.pixels % columns:
                start = tirx.min(start, tir.index(self.pixels - columns))
            return self._tile(plane, base + start, results, start, channel)

        place = Place((image, channel), lambda i: results[i], flat)
        last = finish(window, self.tail, place, (window.output[0], tir.index(0)), self.machine.lanes)
        statements += [tir.loop(tiles, tile, name="tile"), last]
        return tir.block(tir.sequence(statements), allocate, "plane")

    def _tile(self, plane: Any, base: Any, results: Any, start: Any, channel: Any) -> Any:
        window, lanes = self.window, self.machine.lanes
        tile = tir.buffer([self.columns], "tile", scope="local")
        parts = [part * lanes for part in range(self.vectors)]

        def take(down: Any, right: Any) -> list[Any]:
            place = base + window.tap(down, right)

            def update(part: int) -> Any:
                def element(lane: Any) -> Any:
                    held, found = tile[part + lane], plane[place + part + lane]
                    return tir.store(tile, [part + lane], self._combine(held, found, (channel, down, right)))

                return tir.vector(lanes, element)

            return [update(part) for part in parts]

        high, wide = window.kernel
        if high * wide * self.vectors <= _UNROLLED_TAPS:
            steps = [s for y in range(high) for x in range(wide) for s in take(tir.index(y), tir.index(x))]
            taps = tir.sequence(steps)
        else:
            taps = tir.loop(high, lambda y: tir.loop(wide, lambda x: tir.sequence(take(y, x)), name="kw"), name="kh")

        def clear(part: int) -> Any:
            return tir.vector(lanes, lambda lane: tir.store(tile, [part + lane], self.start))

        def keep(part: int) -> Any:
            return tir.vector(lanes, lambda lane: tir.store(results, [start + part + lane], tile[part + lane]))

        return tir.block(tir.sequence([*map(clear, parts), taps, *map(keep, parts)]), [tile], "tile")

    def _combine(self, held: Any, found: Any, where: tuple[Any, Any, Any]) -> Any:
        if self.kind == GREATEST:
            return tirx.Select(held > found, held, found)
        if self.weight is None:
            return held + found
        return held + found * self.weight[where]


def _vectors(pixels: int, machine: Machine) -> int:
    """Return how many registers of pixels a tile has: few computed in vain, enough to hide a multiply-add's latency."""

    def cost(vectors: int) -> float:
        columns = vectors * machine.lanes
        return -(-pixels // columns) * columns / pixels * (1 + 0.5 / vectors)

    return min((1, 2, 4, 8), key=cost)
