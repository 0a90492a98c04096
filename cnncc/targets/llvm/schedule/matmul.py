"""Matrix products: a register tile of rows × columns, fed by broadcast left and vectors of right elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import HALF_CHAIN
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor

MATMUL = "matmul"

_PRODUCTS = 4
"""Products that take as long as touching one element."""


@dataclass(frozen=True)
class Matmul:
    """Products with packed or plain right sides."""

    name: str = "matmul"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the product's kernel, or None where the function is not one."""
        anchor = find_anchor(function, MATMUL)
        return None if anchor is None else _Builder(anchor, machine).function(function)


class _Builder:
    """Writes one product's loops."""

    def __init__(self, anchor: Anchor, machine: Machine) -> None:
        self.machine = machine
        self.rows, self.vectors, self.depth, self.packed = anchor.parameters
        self.left, self.right = anchor.reads
        self.tail = anchor.tail
        self.dtype = str(self.tail.result.dtype)
        *self.outer, self.height, self.width = tir.shape_of(self.tail.result)
        self.columns = self.vectors * machine.lanes

    def function(self, like: Any) -> Any:
        down, across = -(-self.height // self.rows), -(-self.width // self.columns)
        matrices = 1
        for size in self.outer:
            matrices *= size
        right_heavy = self.width > self.height

        def task(number: Any) -> Any:
            rest = number
            if right_heavy:
                row, rest = rest % down, rest // down
                column, rest = rest % across, rest // across
            else:
                column, rest = rest % across, rest // across
                row, rest = rest % down, rest // down
            return self._tile(self._outer(rest), row, column, across)

        work = matrices * self.height * self.width * self.depth
        tasks = matrices * down * across
        body = tir.shared(tasks, work // _PRODUCTS, task)
        return tir.function(like, body)

    def _outer(self, number: Any) -> list[Any]:
        places = []
        for size in reversed(self.outer):
            places.append(tir.index(0) if size == 1 else number % size)
            number = number // size if size > 1 else number
        return places[::-1]

    def _tile(self, outer: list[Any], row: Any, column: Any, across: int) -> Any:
        lanes, rows = self.machine.lanes, range(self.rows)
        tile = tir.buffer([self.rows, self.columns], "tile", self.dtype, "local")
        registers = [(r, part * lanes) for part in range(self.vectors) for r in rows]
        first, start = row * self.rows, column * self.columns
        ragged = self.width % self.columns
        if ragged and not self.packed:
            start = tirx.min(start, tir.index(self.width - self.columns))
        zero = tirx.const(0.0, self.dtype)

        def line(r: int) -> Any:
            return first + r if self.height % self.rows == 0 else tirx.min(first + r, tir.index(self.height - 1))

        def clear(register: tuple[int, int]) -> Any:
            r, part = register
            return tir.vector(lanes, lambda lane: tir.store(tile, [r, part + lane], zero))

        def add(register: tuple[int, int], k: Any) -> Any:
            r, part = register
            value = tir.at(self.left, *self._aligned(self.left, outer), line(r), k)

            def element(lane: Any) -> Any:
                other = self._right(outer, k, column, start, part + lane)
                return tir.store(tile, [r, part + lane], tile[r, part + lane] + value * other)

            return tir.vector(lanes, element)

        def chain(begin: Any, length: Any) -> Any:
            steps = tir.loop(
                length, lambda k: tir.sequence([add(register, begin + k) for register in registers]), name="k"
            )
            return tir.sequence([*map(clear, registers), steps])

        totals, body = self._sums(tile, registers, chain)

        def store(count: int) -> Any:
            def each(r: Any) -> Any:
                body = tir.for_vectors(
                    count,
                    lanes,
                    lambda i: self.tail.at((*outer, first + r, start + i), totals[r, i].astype(self.dtype)),
                )
                return body if self.height % self.rows == 0 else tir.when(first + r < self.height, body)

            return tir.loop(self.rows, each, name="row")

        last = store(self.columns)
        if ragged and self.packed:
            last = store(ragged) if across == 1 else tirx.IfThenElse(column < across - 1, last, store(ragged))
        buffers = [tile] if totals is tile else [tile, totals]
        return tir.block(tir.sequence([body, last]), buffers, "tile")

    def _sums(self, tile: Any, registers: list[tuple[int, int]], chain: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        """Return the buffer of whole sums, and the loops that make them: chains of float16 join in float32.

        Args:
            tile: What a chain adds up in.
            registers: Row and first column of each vector of it.
            chain: Takes the first product and how many; returns their loop.
        """
        if self.dtype != "float16" or self.depth <= HALF_CHAIN:
            return tile, chain(tir.index(0), self.depth)
        totals = tir.buffer([self.rows, self.columns], "totals", scope="local")
        lanes, count = self.machine.lanes, -(-self.depth // HALF_CHAIN)

        def join(register: tuple[int, int]) -> Any:
            r, part = register

            def element(lane: Any) -> Any:
                place = (r, part + lane)
                return tir.store(totals, place, totals[place] + tile[place].astype("float32"))

            return tir.vector(lanes, element)

        def clear(r: int, part: int) -> Any:
            return tir.vector(lanes, lambda lane: tir.store(totals, (r, part + lane), tirx.const(0.0, "float32")))

        def step(number: Any) -> Any:
            first = number * HALF_CHAIN
            length: Any = HALF_CHAIN
            if self.depth % HALF_CHAIN:
                length = tirx.min(tir.index(length), self.depth - first)
            return tir.sequence([chain(first, length), *map(join, registers)])

        cleared = [clear(*register) for register in registers]
        return totals, tir.sequence([*cleared, tir.loop(count, step, name="chain")])

    def _right(self, outer: list[Any], k: Any, column: Any, start: Any, offset: Any) -> Any:
        if self.packed:
            return self.right[column, k, offset]
        return tir.at(self.right, *self._aligned(self.right, outer), k, start + offset)

    def _aligned(self, operand: Any, outer: list[Any]) -> list[Any]:
        """Return the outer indices of an operand: it may have fewer axes than the result, or axes of size 1."""
        sizes = tir.shape_of(operand)[:-2]
        places = outer[len(outer) - len(sizes) :]
        return [tir.index(0) if size == 1 else place for size, place in zip(sizes, places, strict=True)]


def matmul_tile(height: int, width: int, machine: Machine) -> tuple[int, int]:
    """Return rows and vectors of the register tile for a product; see `conv2d.tile_of`."""

    def cost(tile: tuple[int, int]) -> float:
        rows, vectors = tile
        columns = vectors * machine.lanes
        waste = (-(-height // rows) * rows / height) * (-(-width // columns) * columns / width)
        return waste * (1 + 0.35 * (rows + vectors) / (rows * vectors)) * max(1.0, 8 / (rows * vectors))

    return min(machine.tiles, key=cost)
