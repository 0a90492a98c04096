"""Images made ready for vectors: padded, and split by stride so that each kernel tap reads neighbours.

A convolution of stride s reads every s-th column. Split into s phases (columns 0, s, 2s…; 1, s+1…), each tap finds its
columns side by side. A row of the padded plane is as wide as every tap needs; output pixel (y, x) then sits at
``y · width + x`` and a tap reads at a constant distance from it, so pixels of all rows form one long vector loop. What
is computed between rows is never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Tail


@dataclass(frozen=True)
class Window:
    """A window that slides over an image.

    Attributes:
        image: Height and width.
        kernel: Height and width.
        stride: Down and right.
        padding: Top, left (bottom and right follow from the output).
        dilation: Down and right.
        output: Height and width.
    """

    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows of a phase."""
        return self.output[0] + (self.kernel[0] - 1) * self.dilation[0] // self.stride[0]

    @property
    def width(self) -> int:
        """Columns of a phase."""
        return self.output[1] + (self.kernel[1] - 1) * self.dilation[1] // self.stride[1]

    @property
    def phases(self) -> tuple[int, int]:
        """Phases that taps read, down and right."""
        down, right = (
            max((tap * self.dilation[axis]) % self.stride[axis] for tap in range(self.kernel[axis])) + 1
            for axis in (0, 1)
        )
        return down, right

    @property
    def size(self) -> int:
        """Elements of one image's plane, all phases."""
        return self.phases[0] * self.phases[1] * self.rows * self.width

    @property
    def slack(self) -> int:
        """Elements after a plane that its last taps may read, without a vector's own length."""
        return ((self.kernel[0] - 1) * self.dilation[0] // self.stride[0] + 1) * self.width + self.kernel[1]

    @property
    def plain(self) -> bool:
        """Whether the image itself is such a plane already."""
        return self.stride == (1, 1) and self.padding == (0, 0) and (self.rows, self.width) == self.image

    def tap(self, row: Any, column: Any) -> Any:
        """Return the distance of a tap from the output pixel; takes constants and loop variables."""
        down, right = row * self.dilation[0], column * self.dilation[1]
        phase = (down % self.stride[0]) * self.phases[1] + right % self.stride[1]
        return phase * (self.rows * self.width) + (down // self.stride[0]) * self.width + right // self.stride[1]

    def pack(self, source: Any, outer: Sequence[Any], target: Any, base: Any, fill: Any) -> Any:
        """Return the loops that fill one plane.

        Args:
            source: Image buffer.
            outer: Indices of the image in it.
            target: One-dimensional buffer.
            base: Where the plane begins in it.
            fill: Value of the padding.
        """
        statements = []
        for down in range(self.phases[0]):
            for right in range(self.phases[1]):
                statements.append(self._pack_phase(source, outer, target, base, fill, (down, right)))
        return tir.sequence(statements)

    def _pack_phase(
        self, source: Any, outer: Sequence[Any], target: Any, base: Any, fill: Any, phase: tuple[int, int]
    ) -> Any:
        start = base + (phase[0] * self.phases[1] + phase[1]) * (self.rows * self.width)
        top, bottom = self._inside(0, phase[0], self.rows)
        left, right = self._inside(1, phase[1], self.width)
        width = self.width

        def blank(count: int, where: Any) -> list[Any]:
            return [tir.loop(count, lambda i: tir.store(target, [where + i], fill))] if count else []

        def row(number: Any) -> Any:
            line = start + number * width
            y = number * self.stride[0] + (phase[0] - self.padding[0])
            x = phase[1] - self.padding[1]
            copy = tir.loop(
                right - left,
                lambda i: tir.store(
                    target, [line + left + i], tir.at(source, *outer, y, (left + i) * self.stride[1] + x)
                ),
            )
            return tir.sequence([*blank(left, line), copy, *blank(width - right, line + right)])

        middle = [tir.loop(bottom - top, lambda i: row(top + i))] if bottom > top and right > left else []
        if not middle:
            return tir.sequence(blank(self.rows * width, start))
        return tir.sequence([*blank(top * width, start), *middle, *blank((self.rows - bottom) * width,
                                                                         start + bottom * width)])  # fmt: skip

    def _inside(self, axis: int, phase: int, count: int) -> tuple[int, int]:
        """Return which positions of a phase lie in the image: first, and one past the last."""
        stride, offset = self.stride[axis], phase - self.padding[axis]
        first = max(0, -(offset // stride))
        last = (self.image[axis] - 1 - offset) // stride + 1
        return min(first, count), max(min(first, count), min(last, count))


def finish(window: Window, tail: Tail, place: Place, rows: tuple[int, Any], lanes: int) -> Any:
    """Return the loops that take computed rows, apply what follows the operation and store.

    Args:
        window: How the rows were computed.
        tail: What follows.
        place: Where the rows are.
        rows: How many, and the number of the first.
        lanes: Elements of a vector.
    """
    count, first = rows
    width = window.output[1]
    flat = place.flat
    if flat is not None:
        start = first * width
        return tir.for_vectors(count * width, lanes, lambda i: flat.at((*place.outer, start + i), place.result(i)))

    def row(y: Any) -> Any:
        return tir.for_vectors(
            width, lanes, lambda x: tail.at((*place.outer, first + y, x), place.result(y * window.width + x))
        )

    return tir.loop(count, row, name="y")


@dataclass(frozen=True)
class Place:
    """Where computed rows are and go.

    Attributes:
        outer: Indices of the output before the row.
        result: Returns the computed value at a distance from the first row's start.
        flat: The tail with rows joined; only where computed rows are as wide as the output's.
    """

    outer: tuple[Any, ...]
    result: Callable[[Any], Any]
    flat: Tail | None
