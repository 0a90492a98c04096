"""Blocks of channels: shapes, and constants packed into them.

An image ``[n, c, h, w]`` is held as ``[n, ⌈c / b⌉, h, w, b]``: the b channels of a block lie side by side, as wide as a
vector, so that every operator on pixels is a vector operation whatever the image's size. The lanes after the last
channel hold whatever their producer wrote, NaN included; no operator may let them reach a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blocks_of(channels: int, block: int) -> int:
    """Return how many blocks hold some channels."""
    return -(-channels // block)


def blocked_shape(shape: Sequence[int], block: int) -> tuple[int, int, int, int, int]:
    """Return the blocked shape of an image ``[n, c, h, w]``."""
    batch, channels, height, width = shape
    return batch, blocks_of(channels, block), height, width, block


def pack_channels(values: NDArray[Any], block: int, axis: int = 0, fill: float = 0.0) -> NDArray[Any]:
    """Split an axis of channels into blocks and lanes; the lanes go last.

    Args:
        values: Any shape.
        block: Channels of a block.
        axis: The axis of channels.
        fill: Value of the lanes after the last channel.

    Returns:
        ``[…, ⌈c / block⌉, …, block]``, contiguous.
    """
    axis %= values.ndim
    channels = values.shape[axis]
    count = blocks_of(channels, block)
    missing = [(0, 0)] * values.ndim
    missing[axis] = (0, count * block - channels)
    full = np.pad(values, missing, constant_values=fill)
    split = full.reshape(*values.shape[:axis], count, block, *values.shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(split, axis + 1, -1))
