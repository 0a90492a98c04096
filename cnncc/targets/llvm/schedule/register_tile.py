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
"""Pixel of the tile → its value in this step."""
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
        split: Buffers that share a pixel's sums: one after the other takes a product.
        buffers: The sums of each pixel, ``[channels]``; first those that `fold` leaves the whole sums in.
    """

    pixels: int
    channels: int
    lanes: int
    products: Products = FLOATS
    split: int = 1
    buffers: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Make the buffers."""
        made = (
            tir.buffer([self.channels], "tile", self.products.dtype, "local") for _ in range(self.pixels * self.split)
        )
        object.__setattr__(self, "buffers", tuple(made))

    @property
    def sums(self) -> tuple[Any, ...]:
        """The sums of each pixel, whole after `fold`."""
        return self.buffers[: self.pixels]

    def clear(self) -> list[Any]:
        """Return the statements that set every sum to zero."""
        zero = tirx.const(0, self.products.dtype)
        return self._each(lambda pixel, channel: tir.store(self.buffers[pixel], [channel], zero), len(self.buffers))

    def step(self, source: Source, weight: Weight, number: int = 0) -> list[Any]:
        """Return the statements that add one product to every sum; ``number`` says which of several it is."""
        start = number % self.split * self.pixels
        return [
            self.products.step(held, first, self.lanes, source(pixel), weight)
            for pixel, held in enumerate(self.buffers[start : start + self.pixels])
            for first in range(0, self.channels, self.lanes)
        ]

    def fold(self) -> list[Any]:
        """Return the statements that bring the buffers which share sums together, halves onto halves."""
        statements, left = [], self.split
        while left > 1:
            left //= 2

            def add(pixel: int, channel: Any, distance: int = left * self.pixels) -> Any:
                held, other = self.buffers[pixel], self.buffers[pixel + distance]
                return tir.store(held, [channel], held[channel] + other[channel])

            statements += self._each(add, left * self.pixels)
        return statements

    def collect(self, put: Put) -> list[Any]:
        """Return the statements that take every sum out of the tile."""
        return self._each(lambda pixel, channel: put(pixel, channel, self.buffers[pixel][channel]))

    def _each(self, element: Callable[[int, Any], Any], count: int = 0) -> list[Any]:
        def vector(pixel: int, first: int) -> Any:
            return tir.vector(self.lanes, lambda lane: element(pixel, first + lane))

        pixels = range(count or self.pixels)
        return [vector(pixel, first) for pixel in pixels for first in range(0, self.channels, self.lanes)]
