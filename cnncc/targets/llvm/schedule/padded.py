"""The image that a convolution's sum reads: flat memory in which no tap falls outside.

Padding, strides of 1×1 kernels and plain ``[n, c, h, w]`` inputs are dealt with by a copy, one pass over the
input; an image that needs none of it is read where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from cnncc.targets.llvm.schedule import tir

Pair = tuple[int, int]


@dataclass(frozen=True)
class Image:
    """Planes ``[n · channel blocks, height, width, lanes]``, one after the other.

    Attributes:
        buffer: One-dimensional.
        height: Rows.
        width: Columns.
        lanes: Channels side by side.
        stride: Between output pixels, down and right.
        dilation: Between taps, down and right.
    """

    buffer: Any
    height: int
    width: int
    lanes: int
    stride: Pair
    dilation: Pair

    @property
    def plane(self) -> int:
        """Elements of one channel block."""
        return self.height * self.width * self.lanes

    def pixel(self, row: Any, column: Any) -> Any:
        """Return the distance of an output pixel's first tap from the plane's start."""
        return (row * (self.stride[0] * self.width) + column * self.stride[1]) * self.lanes

    def tap(self, down: Any, right: Any) -> Any:
        """Return the distance of a tap from the first."""
        return (down * (self.dilation[0] * self.width) + right * self.dilation[1]) * self.lanes

    def as_row(self) -> Image:
        """Return the image with all pixels in one row, for sums that need no neighbours."""
        return replace(self, height=1, width=self.height * self.width, stride=(1, 1), dilation=(1, 1))


@dataclass(frozen=True)
class Sliding:
    """How a convolution reads an image.

    Attributes:
        data: ``[n, blocks, h, w, lanes]``, or ``[n, lanes, h, w]``.
        lanes: Channels that the sum finds side by side.
        blocks: Blocks of channels.
        kernel: Height and width.
        stride: Down and right.
        padding: Top and left; bottom and right follow from the output.
        dilation: Down and right.
        output: Height and width.
        blank: What is read beyond the image.
    """

    data: Any
    lanes: int
    blocks: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    output: Pair
    blank: Any

    @property
    def plain(self) -> bool:
        """Whether the data is not blocked."""
        return len(self.data.shape) == 4

    @property
    def image(self) -> Sequence[int]:
        """Height and width of the data."""
        shape = tir.shape_of(self.data)
        return shape[2:4]

    @property
    def pointwise(self) -> bool:
        """Whether the kernel is one tap."""
        return self.kernel == (1, 1)

    @property
    def reach(self) -> Pair:
        """Rows and columns that the taps of all output pixels span."""
        if self.pointwise:
            return self.output
        height, width = (
            (self.output[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1
            for axis in (0, 1)
        )
        return height, width

    @property
    def in_place(self) -> bool:
        """Whether the sum may read the data where it is."""
        inside = all(size <= there for size, there in zip(self.reach, self.image, strict=True))
        strided = self.pointwise and self.stride != (1, 1)
        return inside and not (self.plain or strided or any(self.padding))

    def view(self) -> Image:
        """Return the data as an image; only where `in_place`."""
        elements = 1
        for size in tir.shape_of(self.data):
            elements *= size
        height, width = self.image
        flat = tir.buffer([elements], f"{self.data.name}_view", str(self.data.dtype))
        return Image(flat, height, width, self.lanes, self.stride, self.dilation)

    def copied(self) -> tuple[Image, Any]:
        """Return a new image and the loops that fill it, rows shared among cores."""
        height, width = self.reach
        batch = tir.shape_of(self.data)[0]
        memory = tir.buffer([batch * self.blocks * height * width * self.lanes], "padded", str(self.blank.ty.dtype))
        stride = (1, 1) if self.pointwise else self.stride
        image = Image(memory, height, width, self.lanes, stride, self.dilation)
        rows, elements = batch * self.blocks * height, tir.shape_of(memory)[0]
        return image, tir.shared(rows, elements, lambda number: self._row(image, number))

    def _row(self, image: Image, number: Any) -> Any:
        row, plane = number % image.height, number // image.height
        start = number * (image.width * self.lanes)
        (top, bottom), (left, right) = (self._inside(axis, size) for axis, size in enumerate(self.reach))
        blank = tir.sequence(self._blank(image, start, image.width))
        if bottom <= top or right <= left:
            return blank
        where = (plane // self.blocks, plane % self.blocks)

        def pixel(number: Any) -> Any:
            column = left + number
            return self._pixel(image, where, (row, column), start + column * self.lanes)

        before = self._blank(image, start, left)
        after = self._blank(image, start + right * self.lanes, image.width - right)
        copied = tir.sequence([*before, tir.loop(right - left, pixel), *after])
        if (top, bottom) == (0, image.height):
            return copied
        return tirx.IfThenElse(tirx.all(row >= top, row < bottom), copied, blank)

    def _pixel(self, image: Image, where: tuple[Any, Any], at: tuple[Any, Any], start: Any) -> Any:
        step = self.stride if self.pointwise else (1, 1)
        y, x = (place * step[axis] - self.padding[axis] for axis, place in enumerate(at))
        if self.plain:  # neighbours in memory are pixels there, and channels here
            return tir.sequence([
                tir.store(image.buffer, [start + lane], self._plain(where[0], lane, y, x))
                for lane in range(self.lanes)
            ])  # fmt: skip
        return tir.vector(
            self.lanes, lambda lane: tir.store(image.buffer, [start + lane], self.data[where[0], where[1], y, x, lane])
        )

    def _plain(self, image: Any, lane: int, y: Any, x: Any) -> Any:
        """Return an element of ``[n, c, h, w]``; of integers, a few channels are one."""
        kind = np.dtype(str(self.data.dtype))
        if kind.kind == "f":
            return self.data[image, tir.index(lane), y, x]
        element = tirx.const(0, "int32")
        together, channels = 4 // kind.itemsize, tir.shape_of(self.data)[1]
        for channel in range(lane * together, min((lane + 1) * together, channels)):
            bits = self.data[image, tir.index(channel), y, x].astype(f"uint{8 * kind.itemsize}").astype("int32")
            element = element | (bits << tirx.const(8 * kind.itemsize * (channel % together), "int32"))
        return element

    def _blank(self, image: Image, start: Any, pixels: int) -> list[Any]:
        if pixels <= 0:
            return []
        return [tir.for_vectors(pixels * self.lanes, 16, lambda i: tir.store(image.buffer, [start + i], self.blank))]

    def _inside(self, axis: int, size: int) -> Pair:
        """Return which positions of an axis lie in the data: first, and one past the last."""
        stride = self.stride[axis] if self.pointwise else 1
        first = min(size, -(-self.padding[axis] // stride))
        last = min(size, (self.image[axis] - 1 + self.padding[axis]) // stride + 1)
        return first, max(first, last)
