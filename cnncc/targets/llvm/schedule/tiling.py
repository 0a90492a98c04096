"""How register tiles cover a rectangle of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.schedule import tir

Place = tuple[Any, Any]
"""Row and column of a pixel."""
Each = Callable[[Any, Callable[[Any], Place]], Any]
"""Takes the number of a tile and pixel of the tile → its place in the rectangle; returns what is done there."""


@dataclass(frozen=True)
class Tiling:
    """Register tiles of one size. Where the last one would reach beyond the pixels it overlaps the one before.

    Attributes:
        rows: Of the rectangle.
        wide: Pixels of a row.
        columns: Pixels of a tile.
        joined: Whether a tile may begin in one row and end in the next, so that only the last tile overlaps; each of
            its pixels then needs an address of its own.
    """

    rows: int
    wide: int
    columns: int
    joined: bool

    @property
    def across(self) -> int:
        """Tiles of a row, where they are not joined."""
        return -(-self.wide // self.columns)

    @property
    def count(self) -> int:
        """All tiles."""
        return -(-self.rows * self.wide // self.columns) if self.joined else self.rows * self.across

    def each(self, body: Each) -> Any:
        """Return the loops over all tiles."""
        if self.joined:
            return tir.loop(self.count, lambda number: body(number, self._joined(number)), name="tile")

        def row(down: Any) -> Any:
            def tile(number: Any) -> Any:
                return body(down * self.across + number, self._in_row(down, number))

            return tir.loop(self.across, tile, name="tile")

        return tir.loop(self.rows, row, name="row")

    def _joined(self, number: Any) -> Callable[[Any], Place]:
        start = _first(number, self.columns, self.rows * self.wide)
        return lambda pixel: ((start + pixel) // self.wide, (start + pixel) % self.wide)

    def _in_row(self, down: Any, number: Any) -> Callable[[Any], Place]:
        start = _first(number, self.columns, self.wide)
        return lambda pixel: (down, start + pixel)


def _first(number: Any, size: int, extent: int) -> Any:
    """Return where a tile starts."""
    return tirx.min(number * size, tir.index(extent - size)) if extent % size else number * size
