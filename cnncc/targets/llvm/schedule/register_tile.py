"""The inner loop of every product: a tile of sums that stays in registers.

A tile is pixels × channels. A step of the sum loads a few vectors of weights, and multiplies each pixel's one value
with all of them. Pixels and vectors are unrolled here, and the sums live in buffers of one pixel each: LLVM keeps a
buffer in registers if it is small and every index into it is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
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
        split: Buffers that share a sum: one after the other takes a product.
        held: What is added to: for each share, the sums of the pixels that are multiplied at once,
            ``[pixels · channels]``, in the order of the instruction.
        sums: Of each pixel, ``[channels]``, whole after `finish`.
    """

    pixels: int
    channels: int
    lanes: int
    products: Products = FLOATS
    split: int = 1
    held: tuple[Any, ...] = field(init=False)
    sums: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Make the buffers."""
        rows = self.products.rows
        held = self._buffers(self.split * self._shared, rows * self.channels)
        object.__setattr__(self, "held", held)
        sums = held[: self.pixels] if rows == 1 else self._buffers(self.pixels, self.channels)
        object.__setattr__(self, "sums", sums)

    def _buffers(self, count: int, size: int) -> tuple[Any, ...]:
        return tuple(tir.buffer([size], "tile", self.products.dtype, "local") for _ in range(count))

    @property
    def _shared(self) -> int:
        """Buffers of a share."""
        return -(-self.pixels // self.products.rows)

    @property
    def buffers(self) -> tuple[Any, ...]:
        """All buffers."""
        return self.held if self.products.rows == 1 else (*self.held, *self.sums)

    def clear(self) -> list[Any]:
        """Return the statements that set every sum to zero."""
        zero = tirx.const(0, self.products.dtype)
        width = self.products.rows * self.channels
        return self._each(len(self.held), width, lambda number, place: tir.store(self.held[number], [place], zero))

    def step(self, source: Source, weight: Weight, number: int = 0) -> list[Any]:
        """Return the statements that add one product to every sum; ``number`` says which of several it is."""
        share = self.held[number % self.split * self._shared :][: self._shared]
        return [
            self.products.step(held, first, self.lanes, source(at * self.products.rows), weight)
            for at, held in enumerate(share)
            for first in range(0, self.channels, self.lanes)
        ]

    def finish(self) -> list[Any]:
        """Return the statements after the last step: shares come together, halves onto halves, pixels apart."""
        statements, left = [], self.split
        width = self.products.rows * self.channels
        while left > 1:
            left //= 2

            def add(number: int, place: Any, distance: int = left * self._shared) -> Any:
                held, other = self.held[number], self.held[number + distance]
                return tir.store(held, [place], held[place] + other[place])

            statements += self._each(left * self._shared, width, add)
        rows = self.products.rows
        for number, held in enumerate(self.held[: self._shared]):
            statements += self.products.apart(held, self.sums[number * rows :][:rows], self.channels)
        return statements

    def collect(self, put: Put) -> list[Any]:
        """Return the statements that take every sum out of the tile."""
        return self._each(
            self.pixels, self.channels, lambda pixel, channel: put(pixel, channel, self.sums[pixel][channel])
        )

    def _each(self, count: int, width: int, element: Callable[[int, Any], Any]) -> list[Any]:
        def vector(number: int, first: int) -> Any:
            return tir.vector(self.lanes, lambda lane: element(number, first + lane))

        return [vector(number, first) for number in range(count) for first in range(0, width, self.lanes)]
