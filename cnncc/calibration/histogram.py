"""`Histogram`: the magnitudes of one tensor, in bounded memory, whatever the number of images.

Counts lie over [0, 2^e), where 2^e is the smallest power of two above the largest magnitude seen. When a larger one
comes, neighbouring bins are joined until it fits; because the ranges are powers of two, a value falls into the same
bin whichever order the values came in. So merging is exact, associative and commutative: batches may be observed in
parallel, and a calibration that was cut short goes on to the same result to the last count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

BINS = 4096
"""Bins of a histogram: 16 to 32 for each of the 127 steps of an int8 scale that covers the whole range."""

_CHUNK = 1 << 18
"""Elements that are counted at a time: their bin numbers stay in the second-level cache."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Magnitudes |x| of a tensor's elements.

    Attributes:
        exponent: e: bins lie over [0, 2^e); None where every element was zero.
        counts: int64[`BINS`]: how many elements fell into each bin; zeros are in the first.
        largest: The largest |x|.
        lowest: The smallest x.
        channels: float32[C]: the largest |x| of each channel (axis 1); float32[1] for a tensor without one.
    """

    exponent: int | None
    counts: Counts
    largest: float
    lowest: float
    channels: NDArray[np.float32]

    @classmethod
    def of(cls, array: NDArray[np.float32]) -> Histogram:
        """Count one array.

        Args:
            array: float32, any shape but empty; ``[N, C, …]`` where it has channels.

        Raises:
            FloatingPointError: An element is NaN or infinite.
        """
        magnitude = np.abs(array)
        axes = (0, *range(2, array.ndim))
        channels = magnitude.max(axis=axes) if array.ndim > 1 else magnitude.max(keepdims=True)
        largest = float(channels.max())
        if not math.isfinite(largest):
            raise FloatingPointError("NaN or Inf")
        lowest = float(array.min())
        if largest == 0.0:
            counts = np.zeros(BINS, np.int64)
            counts[0] = array.size
            return cls(None, counts, 0.0, 0.0, channels)
        exponent = math.frexp(largest)[1]
        return cls(exponent, _count(magnitude.reshape(-1), exponent), largest, lowest, channels)

    @property
    def total(self) -> int:
        """Elements counted."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin; 0 where every element was zero."""
        return 0.0 if self.exponent is None else math.ldexp(1.0 / BINS, self.exponent)

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both tensors' elements."""
        channels = np.maximum(self.channels, other.channels)
        largest = max(self.largest, other.largest)
        known = [e for e in (self.exponent, other.exponent) if e is not None]
        exponent = max(known) if known else None
        counts = _widened(self, exponent) + _widened(other, exponent)
        return Histogram(exponent, counts, largest, min(self.lowest, other.lowest), channels)

    def beyond(self, threshold: float) -> float:
        """Return the share of elements whose magnitude exceeds a threshold, to within a bin."""
        if self.exponent is None or threshold >= self.largest:
            return 0.0
        first = min(int(threshold / self.width) + 1, BINS)
        return float(self.counts[first:].sum()) / self.total


def pool(histograms: Iterable[Histogram]) -> Histogram:
    """Return the histogram of several tensors' elements together; their channels, which may differ, are left out."""
    nothing = np.zeros(1, np.float32)
    return reduce(Histogram.merge, [replace(histogram, channels=nothing) for histogram in histograms])


def _count(magnitude: NDArray[np.float32], exponent: int) -> Counts:
    counts = np.zeros(BINS, np.int64)
    # a power of two times a float32 is exact; only a power for subnormals leaves float32's range
    scale = math.ldexp(float(BINS), -exponent)
    wide = scale > 2.0**127
    for start in range(0, magnitude.size, _CHUNK):
        part = magnitude[start : start + _CHUNK]
        scaled = part.astype(np.float64) * scale if wide else part * np.float32(scale)
        counts += np.bincount(scaled.astype(np.intp), minlength=BINS)
    return counts


def _widened(histogram: Histogram, exponent: int | None) -> Counts:
    """Return the counts over a larger power of two."""
    if exponent is None or histogram.exponent is None or histogram.exponent == exponent:
        return histogram.counts
    factor = 1 << min(exponent - histogram.exponent, BINS.bit_length() - 1)
    joined = histogram.counts.reshape(-1, factor).sum(axis=1)
    return np.concatenate([joined, np.zeros(BINS - joined.size, np.int64)])
