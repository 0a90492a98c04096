"""The transforms of Winograd's convolution, vectors over the channels of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.blocked.transforms import Transform
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Tail
from cnncc.targets.llvm.schedule.winograd_products import Scratch


@dataclass(frozen=True)
class Tiles:
    """A rectangle of tiles of one image that lie one after the other in scratch memory.

    Attributes:
        image: Which.
        row: First row of tiles.
        column: First column of tiles.
        rows: Rows.
        columns: Columns.
        start: Place of the first tile in a row of scratch memory.
        total: Tiles of a row of scratch memory.
    """

    image: Any
    row: Any
    column: Any
    rows: int
    columns: int
    start: Any
    total: int


class Names:
    """Values of a vector loop that are computed once: each is stored to a buffer, which LLVM keeps in a register."""

    def __init__(self) -> None:
        self.statements: list[Any] = []

    def __call__(self, value: Any) -> Any:
        """Return what stands for a value."""
        lanes = tir.current_lanes()
        if lanes is None:
            raise AssertionError("values are named inside a vector loop only")
        buffer, slot = lanes.temporary("float32")
        self.statements.append(tir.store(buffer, [slot], value))
        return buffer[slot]


class Spread:
    """The input transform.

    A strip of a row of tiles is transformed along columns first, which neighbouring tiles share, then along rows.
    Columns outside the image are zero; rows outside it are checked for in the first and last rows of tiles only.

    Attributes:
        transform: Matrices.
        data: ``[n, block, h, w, lane]``.
        padding: Top, left.
        machine: Its cache bounds a strip.
    """

    def __init__(self, transform: Transform, data: Any, padding: tuple[int, int], machine: Machine) -> None:
        self.transform = transform
        self.data = data
        self.padding = padding
        self.machine = machine
        *_, self.height, self.width, self.block = tir.shape_of(data)

    def tiles(self, spread: Scratch, tiles: Tiles, blocks: int, place: Callable[[Any], tuple[Any, Any]]) -> Any:
        """Return the transform of some tiles.

        Args:
            spread: A row of it is ``[block, tile, lane]``.
            tiles: Which tiles.
            blocks: How many blocks of channels.
            place: Number of a block → its place in the data, and in `spread`.
        """
        size = self.transform.outputs
        room = self.machine.l1 // 2 // (self.transform.size * self.block * 4)
        count = ceil(tiles.columns / max(1, (room - 2) // size))
        wide = ceil(tiles.columns / count)
        columns = tir.buffer([self.transform.size, wide * size + 2, self.block], "columns")

        def strip(kb: Any, row: Any, number: Any) -> Any:
            block, held = place(kb)
            first = tirx.min(number * wide, tir.index(tiles.columns - wide))  # the last strips overlap
            line = held * tiles.total + tiles.start + row * tiles.columns + first
            corner = ((tiles.row + row) * size - self.padding[0], (tiles.column + first) * size - self.padding[1])
            vertical = self._vertical(columns, (tiles.image, block, *corner), wide * size + 2)
            return tir.sequence([*vertical, self._horizontal(columns, spread, line, wide)])

        def rows(kb: Any) -> Any:
            return tir.loop(
                tiles.rows, lambda row: tir.loop(count, lambda number: strip(kb, row, number), name="strip"), name="row"
            )

        return tir.block(tir.loop(blocks, rows, name="kb"), [columns], "strips")

    def _vertical(self, columns: Any, corner: tuple[Any, Any, Any, Any], wide: int) -> list[Any]:
        """Return the transform of columns.

        Args:
            columns: Where they go.
            corner: Image, block, row and column of the first pixel; it may lie outside the image.
            wide: Columns.
        """
        *_, y, x = corner
        last, zero = tir.index(wide), tir.index(0)
        left = tirx.max(zero, tirx.min(last, zero - x))
        right = tirx.max(left, tirx.min(last, tir.index(self.width) - x))

        def inside(whole: bool) -> Any:
            return tir.loop(right - left, lambda i: self._column(columns, left + i, corner, whole), name="column")

        fits = tirx.all(y >= 0, y + self.transform.size <= self.height)
        return [
            tir.loop(left, lambda i: self._blank(columns, i), name="column"),
            tir.loop(last - right, lambda i: self._blank(columns, right + i), name="column"),
            tirx.IfThenElse(fits, inside(True), inside(False)),
        ]

    def _column(self, columns: Any, number: Any, corner: tuple[Any, Any, Any, Any], whole: bool) -> Any:
        image, block, y, x = corner

        def pixel(row: int, lane: Any) -> Any:
            value = self.data[image, block, y + row, x + number, lane]
            if whole:
                return value
            return tirx.if_then_else(tirx.all(y + row >= 0, y + row < self.height), value, tirx.const(0.0, "float32"))

        def element(lane: Any) -> Any:
            names = Names()
            pixels = [names(pixel(row, lane)) for row in range(self.transform.size)]
            values = self.transform.spread(pixels, names)
            stores = [tir.store(columns, [row, number, lane], value) for row, value in enumerate(values)]
            return tir.sequence([*names.statements, *stores])

        return for_lanes(self.block, self.machine.lanes, element)

    def _blank(self, columns: Any, number: Any) -> Any:
        zero = tirx.const(0.0, "float32")

        def element(lane: Any) -> Any:
            return tir.sequence([tir.store(columns, [row, number, lane], zero) for row in range(self.transform.size)])

        return for_lanes(self.block, self.machine.lanes, element)

    def _horizontal(self, columns: Any, spread: Scratch, line: Any, wide: int) -> Any:
        transform = self.transform

        def row(tile: Any, high: int) -> Any:
            def element(lane: Any) -> Any:
                names = Names()
                pixels = [names(columns[high, tile * transform.outputs + k, lane]) for k in range(transform.size)]
                place = (line + tile) * self.block + lane
                stores = [
                    spread.store(high * transform.size + low, place, value)
                    for low, value in enumerate(transform.spread(pixels, names))
                ]
                return tir.sequence([*names.statements, *stores])

            return for_lanes(self.block, self.machine.lanes, element)

        return tir.loop(
            wide, lambda tile: tir.sequence([row(tile, high) for high in range(transform.size)]), name="tile"
        )


class Gather:
    """The output transform, and what follows the convolution.

    Attributes:
        transform: Matrices.
        tail: What follows.
        panel: Blocks of a row of products.
        lanes: Elements of a vector.
    """

    def __init__(self, transform: Transform, tail: Tail, panel: int, lanes: int) -> None:
        self.transform = transform
        self.tail = tail
        self.panel = panel
        self.lanes = lanes
        *_, self.height, self.width, self.block = tir.shape_of(tail.result)

    def tiles(self, products: Scratch, row: Any, tiles: Tiles, first: Any, blocks: Any) -> Any:
        """Return the transform of one panel of some tiles.

        Args:
            products: A row of it is ``[tile, block, lane]``.
            row: Its first row, of frequency 0.
            tiles: Which tiles.
            first: Block of the output where the panel starts.
            blocks: How many of the panel's blocks there are.
        """

        def tile(down: Any, right: Any, block: Any) -> Any:
            line = (tiles.start + down * tiles.columns + right) * self.panel + block
            size = self.transform.outputs
            corner = (tiles.image, first + block, (tiles.row + down) * size, (tiles.column + right) * size)
            return self._tile(products, (row, line), corner)

        def across(down: Any) -> Any:
            return tir.loop(
                tiles.columns,
                lambda right: tir.loop(blocks, lambda block: tile(down, right, block), name="block"),
                name="column",
            )

        return tir.loop(tiles.rows, across, name="row")

    def _tile(self, products: Scratch, source: tuple[Any, Any], corner: tuple[Any, Any, Any, Any]) -> Any:
        size = self.transform.outputs
        whole = self._whole(products, source, corner)
        if self.height % size == 0 and self.width % size == 0:
            return whole
        *_, y, x = corner
        fits = tirx.all(y + size <= self.height, x + size <= self.width)
        return tirx.IfThenElse(fits, whole, self._part(products, source, corner))

    def _whole(self, products: Scratch, source: tuple[Any, Any], corner: tuple[Any, Any, Any, Any]) -> Any:
        """Return a tile that lies inside the output."""
        *outer, y, x = corner

        def element(lane: Any) -> Any:
            names = Names()
            named = [
                (down, right, names(value))
                for down, values in enumerate(self._results(products, source, lane, names))
                for right, value in enumerate(values)
            ]
            stores = [self.tail.at((*outer, y + down, x + right, lane), value) for down, right, value in named]
            return tir.sequence([*names.statements, *stores])

        return for_lanes(self.block, self.lanes, element)

    def _part(self, products: Scratch, source: tuple[Any, Any], corner: tuple[Any, Any, Any, Any]) -> Any:
        """Return a tile at the edge of the output: its pixels wait in a buffer."""
        *outer, y, x = corner
        size = self.transform.outputs
        held = tir.buffer([size, size, self.block], "edge", scope="local")

        def element(lane: Any) -> Any:
            names = Names()
            stores = [
                tir.store(held, [down, right, lane], value)
                for down, values in enumerate(self._results(products, source, lane, names))
                for right, value in enumerate(values)
            ]
            return tir.sequence([*names.statements, *stores])

        def pixel(down: Any, right: Any) -> Any:
            return for_lanes(
                self.block,
                self.lanes,
                lambda lane: self.tail.at((*outer, y + down, x + right, lane), held[down, right, lane]),
            )

        rows = tirx.min(tir.index(size), self.height - y)
        columns = tirx.min(tir.index(size), self.width - x)
        copy = tir.loop(rows, lambda down: tir.loop(columns, lambda right: pixel(down, right), name="x"), name="y")
        return tir.block(tir.sequence([for_lanes(self.block, self.lanes, element), copy]), [held], "edge")

    def _results(self, products: Scratch, source: tuple[Any, Any], lane: Any, names: Names) -> list[list[Any]]:
        """Return the pixels of a tile: along columns, then along rows."""
        row, line = source
        transform = self.transform
        size = transform.size
        place = line * self.block + lane

        def column(low: int) -> list[Any]:
            taken = [names(products.at(row + high * size + low, place)) for high in range(size)]
            return [names(value) for value in transform.gather(taken, names)]

        columns = [column(low) for low in range(size)]
        return [transform.gather([values[down] for values in columns], names) for down in range(transform.outputs)]


def for_lanes(block: int, lanes: int, body: Callable[[Any], Any]) -> Any:
    """Return the vector loops over a block's channels."""
    return tir.loop(block // lanes, lambda part: tir.vector(lanes, lambda lane: body(part * lanes + lane)), name="part")
