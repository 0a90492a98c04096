"""How register tiles cover the pixels of an image, or the tiles of Winograd's method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """Register tiles of one size, one after the other. One that would reach beyond the pixels overlaps the one before.

    Attributes:
        rows: Of the image.
        wide: Pixels of a row.
        columns: Pixels of a tile.
        joined: Whether a tile may begin in one row and end in the next, so that only the last tile overlaps; otherwise
            the last of every row does.
    """

    rows: int
    wide: int
    columns: int
    joined: bool

    @staticmethod
    def of(rows: int, wide: int, columns: int, *, pointers: int) -> Tiling:
        """Return the tiling of an image.

        Args:
            rows: Of the image.
            wide: Pixels of a row.
            columns: Pixels of a tile; narrower where rows are, and tiles cannot be joined.
            pointers: Pixels of a tile that may have addresses of their own, as joined ones need.
        """
        joined = rows > 1 and wide % columns > 0 and columns <= pointers
        return Tiling(rows, wide, columns if joined else min(columns, wide), joined)

    @property
    def across(self) -> int:
        """Tiles of a row, where they are not joined."""
        return -(-self.wide // self.columns)

    @property
    def count(self) -> int:
        """All tiles."""
        return -(-self.rows * self.wide // self.columns) if self.joined else self.rows * self.across


def groups_of(tiles: int, most: int) -> list[int]:
    """Split Winograd's tiles into groups of a register tile as evenly as possible, larger ones first."""
    count = -(-tiles // most)
    return [tiles // count + (number < tiles % count) for number in range(count)]
