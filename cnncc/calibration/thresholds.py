"""Thresholds: where a tensor's int8 range ends. Pure arithmetic on histograms; another method costs no new pass.

A tensor x becomes q = clip(round(x / s), −128, 127) with s = T / 127: what lies beyond T is clipped, what lies
within is rounded to steps of s. A larger T clips less and rounds more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cnncc.calibration.histogram import BINS, Histogram

LEVELS = 127
"""Positive steps of a symmetric int8 scale."""

PERCENTILE = 99.99
"""Of the magnitudes, in percent: what lies above is clipped by the method ``percentile``."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: devices flush subnormal scales to zero."""

_GRID = 96
"""Thresholds that a search tries, evenly from `_LOWEST` of the largest magnitude up to it."""

_LOWEST = 0.05

Array = NDArray[np.float64]


def scale_of(threshold: float) -> float:
    """Return the float32 scale of a threshold, positive and normal: a tensor that is always zero has one too."""
    return float(np.float32(max(threshold / LEVELS, SMALLEST_SCALE)))


def maximum(histogram: Histogram) -> float:
    """Return the largest magnitude: nothing is clipped (the min-max calibration of every toolchain)."""
    return histogram.largest


def percentile(histogram: Histogram, percent: float = PERCENTILE) -> float:
    """Return the magnitude below which a share of the elements lies, interpolated within its bin.

    Source: Wu et al., *Integer Quantization for Deep Learning Inference* (arXiv 2004.09602), section 3.4.
    """
    if histogram.exponent is None:
        return 0.0
    wanted = percent / 100.0 * histogram.total
    summed = np.cumsum(histogram.counts)
    index = min(int(np.searchsorted(summed, wanted)), BINS - 1)
    inside = max(int(histogram.counts[index]), 1)
    reached = (wanted - float(summed[index] - histogram.counts[index])) / inside
    return min(histogram.largest, (index + min(max(reached, 0.0), 1.0)) * histogram.width)


def mean_squared_error(histogram: Histogram) -> float:
    """Return the threshold with the least expected squared error of quantizing.

    Source: Banner et al., *Post Training 4-bit Quantization* (NeurIPS 2019), section 3, on a histogram instead of
    an assumed distribution.
    """
    if histogram.exponent is None:
        return 0.0
    candidates = np.linspace(_LOWEST, 1.0, _GRID) * histogram.largest
    errors = np.array([squared_error(histogram, threshold) for threshold in candidates])
    best = int(errors.argmin())
    around = candidates[max(best - 1, 0)], candidates[min(best + 1, _GRID - 1)]
    finer = np.linspace(*around, 17)
    return float(finer[np.array([squared_error(histogram, threshold) for threshold in finer]).argmin()])


def squared_error(histogram: Histogram, threshold: float, levels: int = LEVELS) -> float:
    """Return the expected (x − q(x)·s)² of an element, with elements spread evenly within each bin.

    The integral over a bin is exact: over whole steps the error adds s³/12 each, and clipping (x − T)³/3.
    """
    if histogram.exponent is None:
        return 0.0
    step = max(threshold / levels, SMALLEST_SCALE)
    edges = np.arange(BINS + 1) * histogram.width
    whole = np.minimum(np.rint(edges / step), levels)
    rest = edges - whole * step
    integral = whole * (step**3 / 12.0) + rest * rest * rest / 3.0
    return float((histogram.counts * np.diff(integral)).sum() / (histogram.width * histogram.total))


def entropy(histogram: Histogram) -> float:
    """Return the threshold whose int8 distribution is nearest to the tensor's by the Kullback-Leibler divergence.

    Source: Migacz, *8-bit Inference with TensorRT* (GTC 2017), slides 36 to 40, on |x|. Unlike a calibrator that
    starts from 128 bins, which can only answer "the maximum", there are `BINS` to choose from. Exact zeros, half of
    what a ReLU gives, say nothing of the range: the first bin is taken as full as the second.
    """
    if histogram.exponent is None:
        return 0.0
    counts = histogram.counts.astype(np.float64)
    counts[0] = min(counts[0], counts[1])
    last = int(histogram.largest / histogram.width) + 1
    ends = np.unique(np.linspace(LEVELS + 1, last, 4 * _GRID).astype(int))
    divergences = [_divergence(counts[:last], int(end)) for end in ends]
    end = int(ends[int(np.argmin(divergences))])
    return min(histogram.largest, end * histogram.width)


def _divergence(counts: Array, end: int) -> float:
    """Return KL(P ‖ Q) for the first ``end`` bins: P with what is clipped in its last bin, Q in 128 levels."""
    inside = counts[:end]
    reference = inside.copy()
    reference[-1] += counts[end:].sum()
    level = np.arange(end) * (LEVELS + 1) // end
    sums = np.bincount(level, inside, LEVELS + 1)
    filled = np.bincount(level, inside > 0, LEVELS + 1)
    expanded = np.where(inside > 0, (sums / np.maximum(filled, 1))[level], 0.0)
    total = expanded.sum()
    if total == 0.0:
        return float("inf")
    seen = reference > 0
    p = reference[seen] / reference.sum()
    # the last bin may hold only what was clipped: the tiny share keeps the divergence finite, and large
    q = np.maximum(expanded[seen] / total, 1e-9)
    return float((p * np.log(p / q)).sum())


METHODS: dict[str, Callable[[Histogram], float]] = {
    "max": maximum,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mean_squared_error,
}
"""Name → threshold of a histogram. ``auto`` picks one of them for each tensor by what its readers compute."""

AUTO = "auto"
