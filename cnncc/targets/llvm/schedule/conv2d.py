"""Direct convolution on blocked tensors: register tiles of pixels × channels, chains of products, an epilogue."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import DirectPlan
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor
from cnncc.targets.llvm.schedule.elementary import expensive
from cnncc.targets.llvm.schedule.padded import Image, Sliding
from cnncc.targets.llvm.schedule.register_tile import RegisterTile

CONV2D = "conv2d"
_OPERANDS = 2
_LINE = 16
"""Elements of a cache line."""

Place = tuple[Any, Any]
"""Row and column of an output pixel."""
Take = Callable[[RegisterTile, Any, Any, Any], list[Any]]
"""Registers, row, first column and number of a tile → the statements that take its sums."""


@dataclass(frozen=True)
class Conv2d:
    """Direct convolution with packed weights."""

    name: str = "conv2d"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the convolution's kernel, or None where the function is not one, or reads nothing but padding."""
        anchor = find_anchor(function, CONV2D)
        return (
            None if anchor is None or len(anchor.reads) != _OPERANDS else _Builder(anchor, machine).function(function)
        )


@dataclass(frozen=True)
class _Part:
    """What one task computes: an image, a group of channels, and one panel of its output blocks."""

    image: Any
    group: Any
    panel: Any


class _Builder:
    """Writes one convolution's loops."""

    def __init__(self, anchor: Anchor, machine: Machine) -> None:
        sh, sw, top, left, dh, dw, self.inputs, flat, *knobs = anchor.parameters
        self.plan = DirectPlan.of_numbers(knobs)
        data, self.weight = anchor.reads
        self.groups, self.panels, self.blocks, kh, kw, self.lanes, self.width = tir.shape_of(self.weight)
        self.batch, total, high, wide, self.block = tir.shape_of(anchor.tail.result)
        self.outputs = total // self.groups
        self.sliding = Sliding(
            data, self.lanes, self.groups * self.blocks, (kh, kw), (sh, sw), (top, left), (dh, dw), (high, wide)
        )
        joined = anchor.tail.flat() if flat else None
        self.tail, self.aliases = joined or (anchor.tail, {})
        self.flat = joined is not None
        self.extent = (1, high * wide) if self.flat else (high, wide)
        if flat and not self.flat:  # the plan counts pixels of one long row
            rows = max(1, self.plan.chunk // wide)
            self.plan = replace(self.plan, columns=min(self.plan.columns, wide), chunk=rows)

    def function(self, like: Any) -> Any:
        """Return the kernel."""
        if self.sliding.in_place:
            image, copies, memory = self.sliding.view(), [], []
            self.aliases[self.sliding.data] = image.buffer
        else:
            image, copy = self.sliding.copied()
            copies, memory = [copy], [image.buffer]
        body = tir.sequence([*copies, self._tasks(image.as_row() if self.flat else image)])
        return tir.function(like, tir.views(self.aliases, body) if self.aliases else body, memory)

    def _tasks(self, image: Image) -> Any:
        """Return the loop that cores share. Panels run fastest: their part of the image stays in L2."""
        span = self.extent[1] if self.flat else self.extent[0]
        chunk = min(self.plan.chunk, span)
        chunks = -(-span // chunk)

        def task(number: Any) -> Any:
            panel, rest = number % self.panels, number // self.panels
            first, rest = rest % chunks * chunk, rest // chunks
            if span % chunk:  # the last one overlaps: all tasks run the same code
                first = tirx.min(first, tir.index(span - chunk))
            return self._chunk(image, _Part(rest // self.groups, rest % self.groups, panel), first, chunk)

        tasks = self.batch * self.groups * chunks * self.panels
        return tir.parallel(tasks, task) if self.plan.shared else tir.loop(tasks, task)

    def _chunk(self, image: Image, part: _Part, first: Any, size: int) -> Any:
        """Return the work of one task: some rows (pixels, where flat) of one panel."""
        high, wide = (1, size) if self.flat else (size, self.extent[1])
        origin = (tir.index(0), first) if self.flat else (first, tir.index(0))
        chains = -(-self.blocks // self.plan.chain)
        if chains > 1 or expensive(self.tail.value):
            return self._through_sums(image, part, origin, (high, wide), chains)

        def take(registers: RegisterTile, row: Any, column: Any, _slot: Any) -> list[Any]:
            stores = []
            for pixel, held in enumerate(registers.buffers):
                stores += self._store(part, (origin[0] + row, origin[1] + column + pixel), held.__getitem__)
            return stores

        return self._tiles(image, part, origin, (high, wide), tir.index(0), take)

    def _across(self, wide: int) -> tuple[int, Callable[[Any], Any]]:
        """Return how many tiles cover a row, and number of a tile → its first column."""
        columns = self.plan.columns

        def first(number: Any) -> Any:
            return tirx.min(number * columns, tir.index(wide - columns)) if wide % columns else number * columns

        return -(-wide // columns), first

    def _tiles(self, image: Image, part: _Part, origin: Place, size: tuple[int, int], chain: Any, take: Take) -> Any:
        """Return the loops over the register tiles of a rectangle of pixels."""
        across, first = self._across(size[1])

        def tile(row: Any, number: Any) -> Any:
            registers = RegisterTile(self.plan.columns, self.width, self.block)
            column = first(number)
            steps = self._chain(registers, image, part, (origin[0] + row, origin[1] + column), chain)
            body = [*registers.clear(), steps, *take(registers, row, column, row * across + number)]
            return tir.block(tir.sequence(body), registers.buffers, "tile")

        return tir.loop(size[0], lambda y: tir.loop(across, lambda n: tile(y, n), name="tile"), name="row")

    def _through_sums(self, image: Image, part: _Part, origin: Place, size: tuple[int, int], chains: int) -> Any:
        """Return the work of one task whose sums wait in memory: for their next chain, or for a costly epilogue."""
        across, first = self._across(size[1])
        shape = [size[0] * across, self.plan.columns, self.width]
        sums = tir.buffer(shape, "sums")

        def take(registers: RegisterTile, _row: Any, _column: Any, slot: Any) -> list[Any]:
            def put(pixel: int, channel: Any, value: Any) -> Any:
                place = (slot, pixel, channel)
                return tir.store(sums, place, sums[place] + value if chains > 1 else value)

            return registers.collect(put)

        def finish(row: Any, number: Any) -> Any:
            def pixel(index: Any) -> Any:
                here = (origin[0] + row, origin[1] + first(number) + index)
                place = (row * across + number, index)
                return tir.sequence(self._store(part, here, lambda channel: tir.at(sums, *place, channel)))

            return tir.loop(self.plan.columns, pixel, name="pixel")

        body = [
            tir.loop(chains, lambda chain: self._tiles(image, part, origin, size, chain, take), name="chain"),
            tir.loop(size[0], lambda y: tir.loop(across, lambda n: finish(y, n), name="tile"), name="finish"),
        ]
        if chains > 1:
            elements = shape[0] * shape[1] * shape[2]
            flat = tir.buffer([elements], "sums_flat")
            zero = tirx.const(0.0, "float32")
            clear = tir.for_vectors(elements, self.block, lambda i: tir.store(flat, [i], zero))
            body.insert(0, tir.views({sums: flat}, clear))
        return tir.block(tir.sequence(body), [sums], "chunk")

    def _chain(self, registers: RegisterTile, image: Image, part: _Part, spot: Place, chain: Any) -> Any:
        """Return the loops that add one chain of products to a tile."""
        length, total = self.plan.chain, self.blocks
        start = ((part.image * self.groups + part.group) * total) * image.plane + image.pixel(*spot)

        def step(block: Any, down: Any, right: Any, channel: Any) -> Any:
            base = start + block * image.plane + image.tap(down, right) + channel
            tap = (down, right, channel)
            products = registers.step(
                lambda pixel: image.buffer[base + image.pixel(0, pixel)],
                lambda output: tir.at(self.weight, part.group, part.panel, block, *tap, output),
            )
            # What this tile reads now, the tiles of the next chain read next: it comes from memory meanwhile.
            ahead = [
                tir.prefetch(self.weight, (part.group, part.panel, block + length, *tap, tir.index(line)))
                for line in range(0, self.width, _LINE)
            ]
            return tir.sequence([*ahead, *products])

        def channels(block: Any, down: Any, right: Any) -> Any:
            count: Any = self.lanes
            if self.inputs % self.lanes:  # lanes after the last channel hold anything
                count = self.inputs if total == 1 else tirx.min(tir.index(count), self.inputs - block * count)
            return tir.loop(count, lambda channel: step(block, down, right, channel), name="ic")

        def taps(number: Any) -> Any:
            block = chain * length + number
            high, wide = self.sliding.kernel
            return tir.loop(
                high, lambda down: tir.loop(wide, lambda right: channels(block, down, right), name="kw"), name="kh"
            )

        count: Any = min(length, total)
        if total % count:
            count = tirx.min(tir.index(length), total - chain * length)
        return tir.loop(count, taps, name="kb")

    def _store(self, part: _Part, here: Place, value: Callable[[Any], Any]) -> list[Any]:
        """Return the stores of one pixel's channels, with the epilogue."""
        point = (here[1],) if self.flat else here
        ragged = self.outputs % self.plan.panel
        statements = []
        for number in range(self.plan.panel):
            block = part.panel * self.plan.panel + number
            outer = (part.image, part.group * self.outputs + block, *point)
            stored = tir.vector(self.block, functools.partial(self._element, outer, number * self.block, value))
            statements.append(tir.when(block < self.outputs, stored) if ragged and number >= ragged else stored)
        return statements

    def _element(self, outer: tuple[Any, ...], first: int, value: Callable[[Any], Any], lane: Any) -> Any:
        return self.tail.at((*outer, lane), value(first + lane))
