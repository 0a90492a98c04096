"""The products of Winograd's convolution: one matrix product for each frequency."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.register_tile import RegisterTile
from cnncc.targets.llvm.tiling import groups_of
from cnncc.targets.llvm.winograd_rules import WinogradPlan

_LINE = 16
"""Floats of a cache line."""
_AHEAD = 256
"""Input channels by which weights are asked for ahead: some 30 KB, time enough for memory to answer."""


class Scratch:
    """Memory of transformed tiles: rows of vectors, a row for each frequency.

    A row has an odd number of vectors, so that the rows of a tile, which are used together, do not fall into the same
    sets of a cache; it made the input transform four times faster. The buffer is flat: from one with an axis of rows
    TVM would cut the unused vectors off.

    Attributes:
        buffer: To be allocated.
        row: Elements of a row.
    """

    def __init__(self, name: str, rows: int, vectors: int, lanes: int) -> None:
        self.row = (vectors + 1 - vectors % 2) * lanes
        self.buffer = tir.buffer([rows * self.row], name)

    def at(self, row: Any, place: Any) -> Any:
        """Return a load."""
        return self.buffer[row * self.row + place]

    def store(self, row: Any, place: Any, value: Any) -> Any:
        """Return a store."""
        return tir.store(self.buffer, [row * self.row + place], value)


@dataclass(frozen=True)
class Rows:
    """What is multiplied.

    Attributes:
        spread: Row of transformed input.
        first: First block of input channels in it.
        weight: Row of weights.
        products: Row of the result.
    """

    spread: Any
    first: Any
    weight: Any
    products: Any


@dataclass(frozen=True)
class Multiply:
    """Multiplies rows of transformed tiles with transformed weights.

    Attributes:
        plan: Knobs.
        weight: ``[row, input channel, output channel of a panel]``; rows are used one after the other.
        spread: Transformed tiles; a row is ``[input block, tile, lane]``.
        products: A row is ``[tile, output channel of a panel]``.
        tiles: Tiles of a row.
        block: Channels of a block.
        lanes: Elements of a vector.
        ahead: Whether weights come from beyond the caches, and are asked for ahead.
        tight: See `Machine`.
    """

    plan: WinogradPlan
    weight: Any
    spread: Scratch
    products: Scratch
    tiles: int
    block: int
    lanes: int
    ahead: bool
    tight: bool

    @property
    def inputs(self) -> int:
        """Input channels; lanes after the last one hold anything and are not read."""
        return tir.shape_of(self.weight)[1]

    @property
    def blocks(self) -> int:
        """Blocks of input channels."""
        return ceil(self.inputs / self.block)

    @property
    def chains(self) -> int:
        """Chains that add up to a result."""
        return ceil(self.blocks / self.plan.chain)

    def row(self, rows: Rows) -> Any:
        """Return the product of one row. The weights of a chain stay in the first-level cache for all tiles."""
        sizes = groups_of(self.tiles, self.plan.pixels)

        def run(size: int, chain: Any) -> Any:
            """Groups of one size follow each other."""
            first = sizes.index(size)
            start = sum(sizes[:first])

            def group(number: Any) -> Any:
                return self._tile(rows, chain, (start + number * size, size), (first + number, len(sizes)))

            return tir.loop(sizes.count(size), group, name="group")

        distinct = sorted(set(sizes), reverse=True)
        return tir.loop(self.chains, lambda chain: tir.sequence([run(size, chain) for size in distinct]), name="chain")

    def _tile(self, rows: Rows, chain: Any, tiles: tuple[Any, int], turn: tuple[Any, int]) -> Any:
        """Return one register tile over one chain of input channels.

        Args:
            rows: What is multiplied.
            chain: Number of the chain.
            tiles: First tile, and how many.
            turn: Number of this register tile, and how many pass over the same weights.
        """
        start, size = tiles
        wide = self.plan.panel * self.block
        tile = RegisterTile(size, wide, self.lanes)
        opening = chain * self.plan.chain
        length: Any = self.plan.chain
        if self.blocks % self.plan.chain:
            length = tirx.min(tir.index(length), self.blocks - opening)

        def add_block(number: Any) -> Any:
            kb = opening + number
            return tir.sequence([*self._ahead(rows, kb, turn), self._channels(rows, tile, kb, start)])

        steps = tir.loop(length, add_block, name="kb")

        def keep(pixel: int, channel: Any, value: Any) -> Any:
            return self.products.store(rows.products, (start + pixel) * wide + channel, value)

        def add(pixel: int, channel: Any, value: Any) -> Any:
            return keep(pixel, channel, self.products.at(rows.products, (start + pixel) * wide + channel) + value)

        last = tir.sequence(tile.collect(keep))
        if self.chains > 1:
            last = tirx.IfThenElse(chain == 0, last, tir.sequence(tile.collect(add)))
        return tir.block(tir.sequence([*tile.clear(), steps, last]), tile.buffers, "register_tile")

    def _channels(self, rows: Rows, tile: RegisterTile, kb: Any, start: Any) -> Any:
        """Return the steps over one block of input channels."""
        # NEON multiplies by lanes. LLVM would load those of all steps that it knows of first, and spill sums.
        abreast = 2 if self.tight and self.inputs % 2 == 0 else 1
        steps = self.block // abreast
        count: Any = tir.unknown(steps) if self.tight else steps
        if self.inputs % self.block:
            count = tirx.min(count if self.tight else tir.index(steps), self.inputs // abreast - kb * steps)

        def step(lane: Any) -> Any:
            line = ((rows.first + kb) * self.tiles + start) * self.block + lane
            products = tile.step(
                lambda pixel: self.spread.at(rows.spread, line + pixel * self.block),
                lambda channel: self.weight[rows.weight, kb * self.block + lane, channel],
            )
            return tir.sequence(products)

        def some(first: Any) -> Any:
            return tir.sequence([step(first * abreast + number) for number in range(abreast)])

        return tir.loop(count, some, name="ic")

    def _ahead(self, rows: Rows, kb: Any, turn: tuple[Any, int]) -> list[Any]:
        """Return prefetches of weights for later; the register tiles that pass over the same weights share them."""
        if not self.ahead:
            return []
        number, of = turn
        lines = ceil(self.block * self.plan.panel * self.block / _LINE / of)
        place = kb * self.block + _AHEAD
        return [
            tir.prefetch(self.weight, (rows.weight, place, (number * lines + line) * _LINE)) for line in range(lines)
        ]
