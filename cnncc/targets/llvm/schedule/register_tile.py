"""The inner loop of every product: a tile of sums that stays in registers.

A tile is pixels × channels. A step of the sum loads a few vectors of weights, and multiplies each pixel's one value
with all of them. Pixels and vectors are unrolled here, and the sums live in buffers of one pixel each: LLVM keeps a
buffer in registers if it is small and every index into it is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.products import FLOATS, Products, Weight

Source = Callable[[int], Any]
"""Pixel of the tile, the first of those that are multiplied at once → their value in this step."""
Put = Callable[[int, Any, Any], Any]
"""Pixel, channel and sum → a store."""


@dataclass(frozen=True)
class RegisterTile:
    """Sums of a block of statements; the block must allocate `buffers`.

    Attributes:
        pixels: Rows of the tile.
        channels: Columns of the tile; whole vectors.
        lanes: Elements of a vector.
        products: What is added up.
        sums: Of the pixels that are multiplied at once, ``[pixels · channels]``, in the order of the instruction.
        taken: Of each pixel, ``[channels]``, after `apart`.
    """

    pixels: int
    channels: int
    lanes: int
    products: Products = FLOATS
    sums: tuple[Any, ...] = field(init=False)
    taken: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Make the buffers."""
        rows = self.products.rows
        sums = self._buffers(-(-self.pixels // rows), rows * self.channels)
        object.__setattr__(self, "sums", sums)
        object.__setattr__(self, "taken", sums if rows == 1 else self._buffers(self.pixels, self.channels))

    def _buffers(self, count: int, size: int) -> tuple[Any, ...]:
        return tuple(tir.buffer([size], "tile", self.products.dtype, "local") for _ in range(count))

    @property
    def buffers(self) -> tuple[Any, ...]:
        """All buffers."""
        return self.sums if self.products.rows == 1 else (*self.sums, *self.taken)

    def clear(self) -> list[Any]:
        """Return the statements that set every sum to zero."""
        zero = tirx.const(0, self.products.dtype)
        width = self.products.rows * self.channels
        return self._each(self.sums, width, lambda held, place: tir.store(self.sums[held], [place], zero))

    def step(self, source: Source, weight: Weight) -> list[Any]:
        """Return the statements that add one product to every sum."""
        return [
            self.products.step(held, first, self.lanes, source(number * self.products.rows), weight)
            for number, held in enumerate(self.sums)
            for first in range(0, self.channels, self.lanes)
        ]

    def apart(self) -> list[Any]:
        """Return the statements after the last step: they give each pixel its sums."""
        rows = self.products.rows
        return [
            statement
            for number, held in enumerate(self.sums)
            for statement in self.products.apart(held, self.taken[number * rows :][:rows], self.channels)
        ]

    def collect(self, put: Put) -> list[Any]:
        """Return the statements that take every sum out of the tile."""
        return self._each(
            self.taken, self.channels, lambda pixel, channel: put(pixel, channel, self.taken[pixel][channel])
        )

    def _each(self, buffers: Sequence[Any], width: int, element: Callable[[int, Any], Any]) -> list[Any]:
        def vector(number: int, first: int) -> Any:
            return tir.vector(self.lanes, lambda lane: element(number, first + lane))

        return [vector(number, first) for number in range(len(buffers)) for first in range(0, width, self.lanes)]
