"""Where the pixels of a register tile lie."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.tiling import Tiling


def place_of(tiling: Tiling, number: Any, pixel: Any) -> tuple[Any, Any]:
    """Return row and column of a pixel.

    Args:
        tiling: How tiles cover the image.
        number: Of the tile.
        pixel: Of the tile.
    """
    if tiling.joined:
        point = _first(number, tiling.columns, tiling.rows * tiling.wide) + pixel
        return point // tiling.wide, point % tiling.wide
    row, tile = (tir.index(0), number) if tiling.rows == 1 else (number // tiling.across, number % tiling.across)
    return row, _first(tile, tiling.columns, tiling.wide) + pixel


def _first(number: Any, size: int, extent: int) -> Any:
    """Return where a tile starts."""
    return tirx.min(number * size, tir.index(extent - size)) if extent % size else number * size
