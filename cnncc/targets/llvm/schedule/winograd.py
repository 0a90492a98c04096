"""Winograd's convolution: tiles of pixels are transformed, multiplied frequency by frequency, and transformed back.

A task takes a rectangle of tiles through all stages while they are in its cache; where an image has few tiles, each
stage is a parallel region over the whole tensor instead, so that the weights pass once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.blocked.transforms import transform_of
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor
from cnncc.targets.llvm.schedule.winograd_products import Multiply, Rows, Scratch
from cnncc.targets.llvm.schedule.winograd_transforms import Gather, Spread, Tiles
from cnncc.targets.llvm.winograd_rules import WinogradPlan

WINOGRAD = "winograd"


@dataclass(frozen=True)
class Winograd:
    """Winograd's convolution on blocked tensors."""

    name: str = "winograd"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the convolution's kernel, or None where the function is not one."""
        anchor = find_anchor(function, WINOGRAD)
        return None if anchor is None or len(anchor.reads) < 2 else _Builder(anchor, machine).function(function)


class _Builder:
    """Writes one convolution's loops."""

    def __init__(self, anchor: Anchor, machine: Machine) -> None:
        top, left, self.groups, self.inputs, *numbers = anchor.parameters
        self.plan = WinogradPlan.of_numbers(numbers)
        self.machine = machine
        data, self.weight = anchor.reads
        self.batch, blocks, height, width, self.block = tir.shape_of(anchor.tail.result)
        self.grid = (ceil(height / self.plan.size), ceil(width / self.plan.size))
        self.blocks_in = ceil(self.inputs / self.block)
        self.blocks_out = blocks // self.groups
        self.panels = ceil(self.blocks_out / self.plan.panel)
        transform = transform_of(self.plan.size)
        self.frequencies = transform.frequencies
        self.spread = Spread(transform, data, (top, left), machine)
        self.gather = Gather(transform, anchor.tail, self.plan.panel, machine.lanes)

    def function(self, like: Any) -> Any:
        """Return the kernel, with another function's signature."""
        return self._staged(like) if self.plan.staged else tir.function(like, self._chunked())

    def _chunked(self) -> Any:
        """Return the loop over rectangles of tiles; the last ones overlap, so that all are of one size."""
        rows, columns = self.plan.rows, self.plan.columns
        down, across = ceil(self.grid[0] / rows), ceil(self.grid[1] / columns)

        def task(number: Any) -> Any:
            right, rest = number % across, number // across
            low, rest = rest % down, rest // down
            group, image = rest % self.groups, rest // self.groups
            row = tirx.min(low * rows, tir.index(self.grid[0] - rows))
            column = tirx.min(right * columns, tir.index(self.grid[1] - columns))
            return self._task(Tiles(image, row, column, rows, columns, tir.index(0), rows * columns), group)

        return tir.parallel(self.batch * self.groups * down * across, task)

    def _task(self, tiles: Tiles, group: Any) -> Any:
        """Return all stages of some tiles and one group; the products of one panel at a time."""
        spread = Scratch("spread", self.frequencies, self.blocks_in * tiles.total, self.block)
        products = Scratch("products", self.frequencies, self.plan.panel * tiles.total, self.block)
        multiply = self._multiply(spread, products, tiles.total)
        into = self.spread.tiles(spread, tiles, self.blocks_in, lambda kb: (group * self.blocks_in + kb, kb))

        def panel(number: Any) -> Any:
            def frequency(position: Any) -> Any:
                weight = (group * self.panels + number) * self.frequencies + position
                return multiply.row(Rows(position, tir.index(0), weight, position))

            steps = tir.loop(self.frequencies, frequency, name="frequency")
            return tir.sequence([steps, self._gather(products, tir.index(0), tiles, (group, number))])

        body = tir.sequence([into, tir.loop(self.panels, panel, name="panel")])
        return tir.block(body, [spread.buffer, products.buffer], "task")

    def _staged(self, like: Any) -> Any:
        """Return the kernel of three parallel regions."""
        down, across = self.grid
        total = self.batch * down * across
        inputs, panels = self.groups * self.blocks_in, self.groups * self.panels
        spread = Scratch("spread", self.frequencies, inputs * total, self.block)
        products = Scratch("products", panels * self.frequencies, self.plan.panel * total, self.block)
        product = self._multiply(spread, products, total)

        def row_of(image: Any, row: Any) -> Tiles:
            return Tiles(image, row, tir.index(0), 1, across, (image * down + row) * across, total)

        def into(number: Any) -> Any:
            row, rest = number % down, number // down
            block, image = rest % inputs, rest // inputs
            return self.spread.tiles(spread, row_of(image, row), 1, lambda _: (block, block))

        def multiply(number: Any) -> Any:
            """Panels run fastest: the input of a frequency stays in the cache of a core."""
            panel, frequency = number % panels, number // panels
            first = panel // self.panels * self.blocks_in
            return product.row(Rows(frequency, first, number, panel * self.frequencies + frequency))

        def back(number: Any) -> Any:
            row, rest = number % down, number // down
            panel, image = rest % panels, rest // panels
            place = (panel // self.panels, panel % self.panels)
            return self._gather(products, panel * self.frequencies, row_of(image, row), place)

        regions = [
            tir.parallel(self.batch * inputs * down, into),
            tir.parallel(self.frequencies * panels, multiply),
            tir.parallel(self.batch * panels * down, back),
        ]
        return tir.function(like, tir.sequence(regions), [spread.buffer, products.buffer])

    def _multiply(self, spread: Scratch, products: Scratch, tiles: int) -> Multiply:
        ahead = prod(tir.shape_of(self.weight)) * 4 > self.machine.l2 // 2
        lanes, tight = self.machine.lanes, self.machine.tight
        return Multiply(self.plan, self.weight, spread, products, tiles, self.block, lanes, ahead, tight)

    def _gather(self, products: Scratch, row: Any, tiles: Tiles, place: tuple[Any, Any]) -> Any:
        group, panel = place
        first = panel * self.plan.panel
        blocks: Any = self.plan.panel
        if self.blocks_out % self.plan.panel:
            blocks = tirx.min(tir.index(blocks), self.blocks_out - first)
        return self.gather.tiles(products, row, tiles, group * self.blocks_out + first, blocks)
