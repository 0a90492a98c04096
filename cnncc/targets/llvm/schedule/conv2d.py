"""Direct convolution on blocked tensors: register tiles of pixels × channels, chains of products, an epilogue.

The int8 convolution is the same one on other elements: a few channels are one element, and a product sums over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import DirectPlan, chain_products
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor
from cnncc.targets.llvm.schedule.elementary import expensive
from cnncc.targets.llvm.schedule.padded import Image, Sliding
from cnncc.targets.llvm.schedule.products import Dots, FloatProducts, Products, dots_for
from cnncc.targets.llvm.schedule.register_tile import RegisterTile
from cnncc.targets.llvm.schedule.tiling import place_of
from cnncc.targets.llvm.tiling import Tiling

CONV2D = "conv2d"
INTEGER_CONV2D = "conv2d_int8"
_OPERANDS = 2
_PLAIN = 3
"""Axes before the last one of a tensor that is not blocked."""
_LINE = 64
"""Bytes of a cache line."""

Take = Callable[[RegisterTile, Any], list[Any]]
"""Registers of a tile and its number in the task → the statements that take its sums."""


@dataclass(frozen=True)
class Conv2d:
    """Direct convolution with packed weights."""

    name: str = "conv2d"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the convolution's kernel, or None where the function is not one, or reads nothing but padding."""
        return _kernel(function, CONV2D, machine, lambda data, _weight: FloatProducts(str(data.dtype), machine.abreast))


@dataclass(frozen=True)
class IntegerConv2d:
    """Direct convolution of int8 with packed weights."""

    name: str = "int8"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the convolution's kernel, or None where the function is not one, or reads nothing but padding."""

        def products(data: Any, weight: Any) -> Dots:
            *_, channels = tir.shape_of(weight)
            return next(dots for dots in dots_for(machine, str(data.dtype)) if dots.channels == channels)

        return _kernel(function, INTEGER_CONV2D, machine, products)


def _kernel(function: Any, kind: str, machine: Machine, products: Callable[[Any, Any], Products]) -> Any | None:
    anchor = find_anchor(function, kind)
    if anchor is None or len(anchor.reads) != _OPERANDS:
        return None
    return _Builder(anchor, machine, products(*anchor.reads)).function(function)


@dataclass(frozen=True)
class _Part:
    """What one task computes: an image, a group of channels, and one panel of its output blocks."""

    image: Any
    group: Any
    panel: Any


@dataclass(frozen=True)
class _Run:
    """The register tiles of one task.

    Attributes:
        first: Number of the first.
        count: How many; an expression, where the last task has fewer.
        most: How many at most.
    """

    first: Any
    count: Any
    most: int


class _Builder:
    """Writes one convolution's loops."""

    def __init__(self, anchor: Anchor, machine: Machine, products: Products) -> None:
        sh, sw, top, left, dh, dw, self.inputs, flat, *knobs = anchor.parameters
        self.plan = DirectPlan.of_numbers(knobs)
        self.batch, total, high, wide, self.block = tir.shape_of(anchor.tail.result)
        self.products = products
        data, weight = anchor.reads
        self.data, self.weight, self.vector, seen = data, weight, self.block, {}
        if isinstance(products, Dots):
            self.data, self.weight = _as_elements(data, products), _weights_as_elements(weight, products)
            self.vector = machine.lanes
            seen = {weight: self.weight} | ({} if self.data.same_as(data) else {data: self.data})
        self.groups, self.panels, self.blocks, kh, kw, self.lanes, _ = tir.shape_of(self.weight)
        self.outputs = total // self.groups
        self.width = self.plan.panel * self.block
        self.abreast = products.abreast if self.lanes % products.abreast == 0 else 1
        self.unrolled, self.split, self.rows = self.abreast, 1, kh
        if products.dtype == "float16":  # a block under a large kernel is several chains
            self.unrolled, self.split = self.lanes, machine.split
            self.rows = min(kh, max(1, chain_products(self.lanes, machine) // (kw * self.lanes)))
        self.sliding = Sliding(
            self.data, self.lanes, self.groups * self.blocks, (kh, kw), (sh, sw), (top, left), (dh, dw), (high, wide),
            products.blank,
        )  # fmt: skip
        joined = anchor.tail.flat() if flat else None
        self.tail, aliases = joined or (anchor.tail, {})
        self.source, self.aliases = data, {**seen, **aliases}
        self.flat = joined is not None
        rows, columns = (1, high * wide) if self.flat else (high, wide)
        self.tiling = Tiling.of(rows, columns, self.plan.columns, pointers=machine.pointers)

    def function(self, like: Any) -> Any:
        """Return the kernel."""
        if self.sliding.in_place:
            image, copies, memory = self.sliding.view(), [], []
            self.aliases[self.source] = image.buffer
        else:
            image, copy = self.sliding.copied()
            copies, memory = [copy], [image.buffer]
        body = tir.sequence([*copies, self._tasks(image.as_row() if self.flat else image)])
        return tir.function(like, tir.views(self.aliases, body) if self.aliases else body, memory)

    def _tasks(self, image: Image) -> Any:
        """Return the loop that cores share. Panels run fastest: their part of the image stays in L2."""
        tiles = self.tiling.count
        chunk = min(self.plan.chunk, tiles)
        chunks = -(-tiles // chunk)

        def task(number: Any) -> Any:
            panel, rest = number % self.panels, number // self.panels
            first, rest = rest % chunks * chunk, rest // chunks
            last: Any = chunk if tiles % chunk == 0 else tirx.min(tir.index(chunk), tiles - first)
            return self._chunk(image, _Part(rest // self.groups, rest % self.groups, panel), _Run(first, last, chunk))

        tasks = self.batch * self.groups * chunks * self.panels
        return tir.parallel(tasks, task) if self.plan.shared else tir.loop(tasks, task)

    def _chunk(self, image: Image, part: _Part, run: _Run) -> Any:
        """Return the work of one task."""
        chains = -(-self.blocks // self.plan.chain) * -(-self.sliding.kernel[0] // self.rows)
        if chains > 1 or expensive(self.tail.value):
            return self._through_sums(image, part, run, chains)

        def take(registers: RegisterTile, number: Any) -> list[Any]:
            stores = []
            for pixel, held in enumerate(registers.sums):
                stores += self._store(part, place_of(self.tiling, run.first + number, pixel), held.__getitem__)
            return stores

        return self._tiles(image, part, run, tir.index(0), take)

    def _tiles(self, image: Image, part: _Part, run: _Run, chain: Any, take: Take) -> Any:
        """Return the loop over the register tiles of a task."""
        pixels = range(self.tiling.columns)

        def tile(number: Any) -> Any:
            registers = RegisterTile(self.tiling.columns, self.width, self.vector, self.products, self.split)
            spot = image.pixel(*place_of(self.tiling, run.first + number, 0))
            offsets = [spot + image.pixel(0, pixel) for pixel in pixels]
            held, buffers = [], list(registers.buffers)
            if self.tiling.joined:  # the pixels do not lie at constant distances: each address is computed once
                kept = tir.buffer([len(pixels)], "offsets", "int32", "local")
                places = [image.pixel(*place_of(self.tiling, run.first + number, pixel)) for pixel in pixels]
                held = [tir.store(kept, [n], where.astype("int32")) for n, where in enumerate(places)]
                offsets = [kept[n] for n in pixels]
                buffers.append(kept)
            steps = self._chain(registers, image, part, offsets, chain)
            body = [*held, *registers.clear(), steps, *registers.finish(), *take(registers, number)]
            return tir.block(tir.sequence(body), buffers, "tile")

        return tir.loop(run.count, tile, name="tile")

    def _through_sums(self, image: Image, part: _Part, run: _Run, chains: int) -> Any:
        """Return the work of one task whose sums wait in memory: for their next chain, or for a costly epilogue."""
        sums = tir.buffer([run.most, self.tiling.columns, self.width], "sums", self.products.total)

        def finish(number: Any) -> Any:
            def pixel(index: Any) -> Any:
                here = place_of(self.tiling, run.first + number, index)
                return tir.sequence(
                    self._store(
                        part, here, lambda channel: tir.at(sums, number, index, channel).astype(self.products.dtype)
                    )
                )

            return tir.loop(self.tiling.columns, pixel, name="pixel")

        def all_tiles(chain: Any) -> Any:
            def take(registers: RegisterTile, number: Any) -> list[Any]:
                def keep(pixel: int, channel: Any, value: Any) -> Any:
                    return tir.store(sums, (number, pixel, channel), value.astype(self.products.total))

                def add(pixel: int, channel: Any, value: Any) -> Any:
                    total = value.astype(self.products.total)
                    return tir.store(sums, (number, pixel, channel), sums[number, pixel, channel] + total)

                if chains == 1:
                    return registers.collect(keep)
                first, next_one = (tir.sequence(registers.collect(put)) for put in (keep, add))
                return [tirx.IfThenElse(chain == 0, first, next_one)]

            return self._tiles(image, part, run, chain, take)

        body = [tir.loop(chains, all_tiles, name="chain"), tir.loop(run.count, finish, name="finish")]
        return tir.block(tir.sequence(body), [sums], "chunk")

    def _chain(self, registers: RegisterTile, image: Image, part: _Part, offsets: Sequence[Any], chain: Any) -> Any:
        """Return the loops that add one chain of products to a tile, whose pixels lie at some offsets of a plane."""
        length, total = self.plan.chain, self.blocks
        high, wide = self.sliding.kernel
        parts = -(-high // self.rows)
        group, part_of = (chain, tir.index(0)) if parts == 1 else (chain // parts, chain % parts)
        start = ((part.image * self.groups + part.group) * total) * image.plane
        line_elements = _LINE // np.dtype(str(self.weight.dtype)).itemsize

        def step(block: Any, down: Any, right: Any, first: Any, number: int) -> Any:
            base = start + block * image.plane + image.tap(down, right) + first + (number if self.abreast == 1 else 0)
            tap = (down, right, first + number)
            products = registers.step(
                lambda pixel: self._source(image, base + offsets[pixel], pixel, number),
                lambda output: tir.at(self.weight, part.group, part.panel, block, *tap, output),
                number,
            )
            # What this tile reads now, the tiles of the next chain read next: it comes from memory meanwhile.
            ahead = [
                tir.prefetch(self.weight, (part.group, part.panel, block + length, *tap, tir.index(line)))
                for line in range(0, self.width, line_elements)
            ]
            return tir.sequence([*ahead, *products])

        def channels(block: Any, down: Any, right: Any) -> Any:
            def steps(some: Any) -> Any:
                first = some * self.unrolled
                return tir.sequence([step(block, down, right, first, number) for number in range(self.unrolled)])

            count: Any = self.lanes // self.unrolled
            # Lanes after the last channel hold anything. Where several are loaded, they meet weights of 0: in int8 they
            # may be anything, and of float16 they were cleared.
            if self.inputs % self.lanes and self.unrolled == 1:
                count = self.inputs if total == 1 else tirx.min(tir.index(count), self.inputs - block * count)
            return tir.loop(count, steps, name="ic")

        count, rows = self._lengths(group, part_of)

        def taps(number: Any) -> Any:
            block = group * length + number

            def row(down: Any) -> Any:
                down = down if parts == 1 else part_of * self.rows + down
                return tir.loop(wide, lambda right: channels(block, down, right), name="kw")

            return tir.loop(rows, row, name="kh")

        return tir.loop(count, taps, name="kb")

    def _lengths(self, group: Any, part_of: Any) -> tuple[Any, Any]:
        """Return how many blocks a chain has, and how many rows of the kernel."""
        length, total, high = self.plan.chain, self.blocks, self.sliding.kernel[0]
        count: Any = min(length, total)
        ragged = total % count > 0
        rows: Any = self.rows
        # short loops of few instructions LLVM unrolls, and keeps their weights for all tiles
        if self.products.rows > 1 and count > 1:
            count = tir.unknown(count)
        elif self.products.rows > 1 and rows > 1:
            rows = tir.unknown(rows)
        if ragged:
            count = tirx.min(tir.index(length), total - group * length)
        if high % self.rows:
            rows = tirx.min(tir.index(rows), high - part_of * self.rows)
        return count, rows

    def _source(self, image: Image, place: Any, pixel: int, number: int) -> Any:
        """Return the element of a pixel, or those of the pixels from this one on that are multiplied at once.

        Two pixels lie at a constant distance: tiles end with the row wherever instructions take two.
        """
        if self.products.rows == 1:
            return tir.one_of(image.buffer, place, self.abreast, number)
        if pixel + 1 == self.tiling.columns:  # without a second one; what its sums are is not looked at
            return tirx.Broadcast(image.buffer[place], self.products.rows)
        return image.buffer[tirx.Ramp(place, tir.index(image.pixel(0, 1)), self.products.rows)]

    def _store(self, part: _Part, here: tuple[Any, Any], value: Callable[[Any], Any]) -> list[Any]:
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


def _as_elements(data: Any, dots: Dots) -> Any:
    """Return a view of bytes or int16 whose last axis, channels, is one of elements.

    Of ``[n, c, h, w]`` there is no such view: channels do not lie side by side.
    """
    *outer, last = tir.shape_of(data)
    return data if len(outer) == _PLAIN else _view(data, (*outer, last // dots.channels), dots)


def _weights_as_elements(weight: Any, dots: Dots) -> Any:
    """Return a view of packed weights whose last axis, the channels of an element, is none."""
    return _view(weight, tir.shape_of(weight)[:-1], dots)


def _view(source: Any, shape: tuple[int, ...], dots: Dots) -> Any:
    return tir.buffer(shape, f"{source.name}_elements", dots.element)
