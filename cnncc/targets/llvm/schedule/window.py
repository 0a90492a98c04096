"""Depthwise convolution and pooling of blocked tensors: one block of channels, a piece of an output row at a time.

A register holds an output pixel of all channels of a block. For every row of the kernel, each input pixel that the
piece needs is loaded once and meets every tap and output that it concerns. Kernel rows that lie outside the image
are left out by the loop's bounds, columns by tiles of their own at the left and right edge; where that would take too
many of them, a task copies its rows between margins first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor
from cnncc.targets.llvm.schedule.elementary import expensive
from cnncc.targets.llvm.schedule.products import as_float

WINDOW = "window"
WEIGHTED, GREATEST, SUM = range(3)
"""What is done with the elements under the window."""

_UNROLLED = 112
"""Taps × columns of one tile's kernel row beyond which the columns of the kernel are looped over."""
_MOST_TILES = 6
"""Different tiles of a row beyond which rows are copied between margins: code must stay small."""
_CHAIN, _HALF_CHAIN = 256, 32
"""Terms that follow each other in one register, of float32 and of float16; see `rules`. Joining costs more here."""


@dataclass(frozen=True)
class SlidingWindow:
    """Depthwise convolution, maximum and sum under a sliding window."""

    name: str = "window"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the window's kernel, or None where the function is not one."""
        anchor = find_anchor(function, WINDOW)
        if anchor is None or not anchor.reads:  # a window that sees nothing but padding reads nothing
            return None
        return _Builder(anchor).function(function)


@dataclass(frozen=True)
class _Axis:
    """One direction of the window: sizes, and what of them a position needs."""

    image: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    output: int

    def tap(self, position: Any, tap: Any) -> Any:
        """Return the input position that a tap sees from an output position."""
        return position * self.stride + tap * self.dilation - self.padding

    def inside(self, position: int, tap: int) -> bool:
        """Whether that is in the image."""
        return 0 <= int(self.tap(position, tap)) < self.image

    def bounds(self, position: Any) -> tuple[Any, Any]:
        """Return the first tap in the image and how many there are."""
        if all(self.inside(end, tap) for end in (0, self.output - 1) for tap in (0, self.kernel - 1)):
            return tir.index(0), self.kernel
        before = self.padding - position * self.stride
        first = tirx.max((before + (self.dilation - 1)) // self.dilation, tir.index(0))
        last = tirx.min((before + (self.image + self.dilation - 1)) // self.dilation, tir.index(self.kernel))
        return first, tirx.max(last - first, tir.index(0))

    def within(self) -> tuple[int, int]:
        """Return the first and the last output position of which all taps lie in the image."""
        reach = (self.kernel - 1) * self.dilation
        return -(-self.padding // self.stride), (self.image - 1 - reach + self.padding) // self.stride

    def margins(self) -> tuple[int, int]:
        """Return how many positions go before the image, and how many there are with those before and after it."""
        return self.padding, max(self.image, self.tap(self.output - 1, self.kernel - 1) + 1) + self.padding


@dataclass(frozen=True)
class _Piece:
    """Tiles of one row that are computed by the same code: the first column, columns of each, how many."""

    start: int
    width: int
    count: int


Load = Callable[[Any, Any, Any], Any]
"""Takes an input row, column and lane; returns the value."""
Keep = Callable[[Any, Any, Any], Any]
"""Takes an output column, a lane and the result; returns what is done with it."""


class _Builder:
    """Writes one window's loops."""

    def __init__(self, anchor: Anchor) -> None:
        kernel_h, kernel_w, down, right, top, left, dilation_h, dilation_w, *rest = anchor.parameters
        self.kind, self.columns, self.split, self.chunk, self.unrolled, self.shared = rest
        self.data = anchor.reads[0]
        self.weight = anchor.reads[1] if self.kind == WEIGHTED else None
        self.tail = anchor.tail
        self.batch, self.blocks, height, width, self.lanes = tir.shape_of(self.data)
        _, _, out_h, out_w, _ = tir.shape_of(self.tail.result)
        self.rows = _Axis(height, kernel_h, down, top, dilation_h, out_h)
        self.across = _Axis(width, kernel_w, right, left, dilation_w, out_w)
        self.dtype = str(self.tail.result.dtype)
        self.start = tirx.const(float("-inf") if self.kind == GREATEST else 0.0, self.dtype)
        longest = _HALF_CHAIN if self.dtype == "float16" else _CHAIN
        self.chained = self.kind != GREATEST and kernel_h * kernel_w > longest
        self.looped = kernel_w * self.columns > _UNROLLED
        self.copied = self._needs_margins()
        self.later = expensive(self.tail.value)

    def _needs_margins(self) -> bool:
        pieces = _pieces(self.across, self.columns)
        edges = any(not _clear(self.across, piece) for piece in pieces)
        return len(pieces) > _MOST_TILES or (self.looped and edges)

    def function(self, like: Any) -> Any:
        height = self.rows.output
        chunks = -(-height // self.chunk)

        def task(number: Any) -> Any:
            plane, part = number // chunks, number % chunks
            where = (plane // self.blocks, plane % self.blocks)
            first = part * self.chunk
            count = self.chunk if height % self.chunk == 0 else tirx.min(tir.index(self.chunk), height - first)
            if self.copied:
                return self._copied_rows(where, first, count)
            return self._output_rows(where, first, count, self.across, self._load(where))

        tasks = self.batch * self.blocks * chunks
        return tir.function(like, tir.parallel(tasks, task) if self.shared else tir.loop(tasks, task))

    def _load(self, where: Sequence[Any]) -> Load:
        return lambda y, x, lane: as_float(tir.at(self.data, *where, y, x, lane), self.dtype)

    def _copied_rows(self, where: Sequence[Any], first: Any, count: Any) -> Any:
        """Return the work of one task that copies its rows between margins first."""
        before, width = self.across.margins()
        tall = (self.chunk - 1) * self.rows.stride + (self.rows.kernel - 1) * self.rows.dilation + 1
        copy = tir.buffer([min(tall, self.rows.image), width, self.lanes], "copy", self.dtype)
        top = tirx.max(self.rows.tap(first, 0), tir.index(0))
        bottom = tirx.min(self.rows.tap(first + (count - 1), self.rows.kernel - 1) + 1, tir.index(self.rows.image))
        load = self._load(where)

        def fill(start: int, extent: int, value: Callable[[Any, Any], Any], y: Any) -> list[Any]:
            def pixel(x: Any) -> Any:
                return self._vector(lambda lane: tir.store(copy, [y, start + x, lane], value(x, lane)))

            return [tir.loop(extent, pixel, name="x")] if extent else []

        def line(y: Any) -> Any:
            image = self.across.image
            statements = fill(0, before, lambda _x, _lane: self.start, y)
            statements += fill(before, image, lambda x, lane: load(top + y, x, lane), y)
            statements += fill(before + image, width - before - image, lambda _x, _lane: self.start, y)
            return tir.sequence(statements)

        axis = replace(self.across, image=width, padding=0)
        rows = [
            tir.loop(tirx.max(bottom - top, tir.index(0)), line, name="line"),
            self._output_rows(where, first, count, axis, lambda y, x, lane: copy[y - top, x, lane]),
        ]
        return tir.block(tir.sequence(rows), [copy], "rows")

    def _output_rows(self, where: Sequence[Any], first: Any, count: Any, axis: _Axis, load: Load) -> Any:
        low, high = self.rows.within()
        results = tir.buffer([axis.output, self.lanes], "results", self.dtype, "local")

        def row(number: Any) -> Any:
            place = (*where, first + number)
            pieces = self._pieces_of(place, axis, load, results, whole=False)
            if self.unrolled and low <= high:
                inside = tirx.all(first + number >= low, first + number <= high)
                whole = self._pieces_of(place, axis, load, results, whole=True)
                pieces = tirx.IfThenElse(inside, whole, pieces)
            return tir.sequence([pieces, self._finish(place, results)]) if self.later else pieces

        rows = tir.loop(count, row, name="row")
        return tir.block(rows, [results], "rows") if self.later else rows

    def _pieces_of(self, place: Sequence[Any], axis: _Axis, load: Load, results: Any, *, whole: bool) -> Any:
        """Return the tiles of one output row: stored, or left for `_finish`."""

        def keep(column: Any, lane: Any, value: Any) -> Any:
            if self.later:
                return tir.store(results, [column, lane], value)
            return self.tail.at((*place, column, lane), value)

        def piece(each: _Piece) -> Any:
            def tile(number: Any) -> Any:
                start = number * each.width + each.start
                return self._tile(_Tile(place[1], place[2], each, start, axis, load, whole), keep)

            return tir.loop(each.count, tile, name="tile")

        return tir.sequence([piece(each) for each in _pieces(axis, self.columns)])

    def _finish(self, place: Sequence[Any], results: Any) -> Any:
        """Return the loop that does what follows to a row, where that takes long: its code is then here alone."""

        def pixel(column: Any) -> Any:
            return self._vector(lambda lane: self.tail.at((*place, column, lane), results[column, lane]))

        return tir.loop(self.across.output, pixel, name="column")

    def _tile(self, tile: _Tile, keep: Keep) -> Any:
        """Return one register tile: all taps, and what becomes of the results."""
        width = tile.piece.width
        held = tir.buffer([width * self.split, self.lanes], "held", self.dtype, "local")
        sums = tir.buffer([width, self.lanes], "sums", scope="local")

        def add_up(column: int) -> Any:
            slot = column * self.split
            return self._vector(
                lambda i: tir.store(sums, [column, i], sums[column, i] + held[slot, i].astype("float32"))
            )

        def kernel_row(number: Any) -> Any:
            steps = self._kernel_row(tile, held, number)
            if not self.chained:
                return tir.sequence(steps)
            return tir.sequence([*self._cleared(held), *steps, *self._folded(held), *map(add_up, range(width))])

        def end(column: int) -> Any:
            total, slot = (sums, column) if self.chained else (held, column * self.split)
            return self._vector(lambda lane: keep(tile.start + column, lane, total[slot, lane].astype(self.dtype)))

        taps, ends = self._kernel_rows(tile, kernel_row), map(end, range(width))
        if self.chained:
            return tir.block(tir.sequence([*self._cleared(sums), taps, *ends]), [held, sums], "tile")
        return tir.block(tir.sequence([*self._cleared(held), taps, *self._folded(held), *ends]), [held], "tile")

    def _kernel_rows(self, tile: _Tile, body: tir.Body) -> Any:
        if tile.whole:
            return tir.sequence([body(tir.index(number)) for number in range(self.rows.kernel)])
        first, count = self.rows.bounds(tile.row)
        return tir.loop(count, lambda number: body(first + number), name="kh")

    def _cleared(self, registers: Any) -> list[Any]:
        def clear(slot: int) -> Any:
            return self._vector(lambda lane: tir.store(registers, [slot, lane], self.start.astype(registers.dtype)))

        return [clear(slot) for slot in range(tir.shape_of(registers)[0])]

    def _folded(self, held: Any) -> list[Any]:
        """Return what brings the registers that share an output together in its first, halves onto halves."""

        def fold(to: int, other: int) -> Any:
            return self._vector(lambda i: tir.store(held, [to, i], self._combine(held[to, i], held[other, i])))

        statements = []
        left = self.split
        while left > 1:
            half = (left + 1) // 2
            firsts = range(0, tir.shape_of(held)[0], self.split)
            statements += [fold(first + n, first + n + half) for first in firsts for n in range(left - half)]
            left = half
        return statements

    def _kernel_row(self, tile: _Tile, held: Any, down: Any) -> list[Any]:
        """Return the taps of one row of the kernel, by input column, so that an input is loaded once."""
        axis, width, split = tile.axis, tile.piece.width, self.split
        y = self.rows.tap(tile.row, down)

        def step(column: int, right: Any, share: int) -> Any:
            x = axis.tap(tile.start + column, right)
            slot = column * split + share

            def element(lane: Any) -> Any:
                term = tile.load(y, x, lane)
                if self.weight is not None:
                    term = term * self.weight[tile.block, down, right, lane]
                return tir.store(held, [slot, lane], self._combine(held[slot, lane], term))

            return self._vector(element)

        def some(first: Any, count: int) -> Any:
            return tir.sequence([step(column, first + n, n) for n in range(count) for column in range(width)])

        if self.looped:
            rest = axis.kernel % split
            loops = [tir.loop(axis.kernel // split, lambda n: some(n * split, split), name="kw")]
            return [*loops, some(tir.index(axis.kernel - rest), rest)] if rest else loops
        clear = _clear(axis, tile.piece)
        pairs = sorted(
            (axis.tap(column, right), column, right)
            for column in range(width)
            for right in range(axis.kernel)
            if clear or axis.inside(tile.piece.start + column, right)
        )
        return [step(column, tir.index(right), right % split) for _, column, right in pairs]

    def _combine(self, held: Any, found: Any) -> Any:
        if self.kind != GREATEST:
            return held + found
        # NaN wins, as in PyTorch; which NaN survives in ONNX Runtime depends on its loops. Only NaN is not ≤ ∞.
        greater = tirx.Select(held > found, held, found)
        return tirx.Select(held <= tirx.const(float("inf"), self.dtype), greater, held)

    def _vector(self, body: tir.Body) -> Any:
        return tir.vector(self.lanes, body)


@dataclass(frozen=True)
class _Tile:
    """Where a register tile is.

    Attributes:
        block: Block of channels.
        row: Output row.
        piece: What it belongs to.
        start: Its first output column.
        axis: How the window moves across.
        load: Returns the input at a row, column and lane.
        whole: Whether all rows of the kernel lie in the image, and should be unrolled.
    """

    block: Any
    row: Any
    piece: _Piece
    start: Any
    axis: _Axis
    load: Load
    whole: bool


def _clear(axis: _Axis, piece: _Piece) -> bool:
    """Whether all taps of a piece lie in the image."""
    last = piece.start + piece.width * piece.count - 1
    return axis.inside(piece.start, 0) and axis.inside(last, axis.kernel - 1)


def _pieces(axis: _Axis, columns: int) -> list[_Piece]:
    """Split a row into tiles; those without edges are one piece."""
    found: list[_Piece] = []
    for start in range(0, axis.output, columns):
        piece = _Piece(start, min(columns, axis.output - start), 1)
        last = found[-1] if found else None
        if last and last.width == piece.width and _clear(axis, last) and _clear(axis, piece):
            found[-1] = _Piece(last.start, last.width, last.count + 1)
        else:
            found.append(piece)
    return found
