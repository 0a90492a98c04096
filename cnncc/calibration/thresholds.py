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

_TOGETHER = 8
"""Candidates whose errors are computed at a time: their bins stay in the second-level cache."""

_LEAST = 1e-9
"""Smallest probability that a divergence takes a bin to have."""

_EQUAL = 1e-12
"""Divergences nearer than this differ by rounding: the lowest threshold of them is taken."""

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
    best = int(_quantizing_errors(histogram, candidates).argmin())
    finer = np.linspace(candidates[max(best - 1, 0)], candidates[min(best + 1, _GRID - 1)], 17)
    return float(finer[_quantizing_errors(histogram, finer).argmin()])


def _quantizing_errors(histogram: Histogram, thresholds: Array) -> Array:
    steps = np.maximum(thresholds / LEVELS, SMALLEST_SCALE)
    return squared_errors(histogram, LEVELS * steps, steps)


def squared_errors(histogram: Histogram, tops: Array, steps: Array) -> Array:
    """Return the expected squared error of an element clipped to a top and rounded to a step, for several of them.

    The integral over a bin, in which elements are spread evenly, is exact: over whole steps the error adds s³/12 each,
    over the rest of a step r³/3, and by clipping (x − top)³/3.

    Args:
        histogram: Not of zeros alone.
        tops: float64[n].
        steps: float64[n], positive.

    Returns:
        float64[n].
    """
    used = int(histogram.largest / histogram.width) + 1
    edges = np.arange(used + 1.0)
    # Σ countᵦ·(I(edgeᵦ₊₁) − I(edgeᵦ)), summed by edges: a product with the integral I, in a third of the time
    jumps = -np.diff(histogram.counts[:used].astype(np.float64), prepend=0.0, append=0.0)
    errors = np.empty(len(steps))
    for start in range(0, len(steps), _TOGETHER):
        chunk = slice(start, start + _TOGETHER)
        step = steps[chunk, np.newaxis]
        beyond = edges * (histogram.width / step)  # lengths are in steps from here on
        inside = np.minimum(beyond, tops[chunk, np.newaxis] / step)
        beyond -= inside
        whole = np.rint(inside)
        rest = inside - whole
        errors[chunk] = (whole / 4 + rest * rest * rest + beyond * beyond * beyond) @ jumps
    return errors * steps**3 / (3 * histogram.width * histogram.total)


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
    divergences = _divergences(counts[:last], ends)
    end = int(ends[np.argmax(divergences <= divergences.min() + _EQUAL)])
    return min(histogram.largest, end * histogram.width)


def _divergences(counts: Array, ends: NDArray[np.int64]) -> Array:
    """Return KL(P ‖ Q) for several numbers of first bins: P with what is clipped in its last bin, Q in 128 levels.

    Within a level all filled bins have one q, so Σ p·log q is a sum over levels, and Σ p·log p one that grows with the
    number of bins: no candidate looks at every bin.

    Args:
        counts: float64[bins], the last positive.
        ends: int64[n], 128 at least.

    Returns:
        float64[n]; infinite where all elements are clipped.
    """
    p = counts / counts.sum()
    mass, filled, information = (np.concatenate([[0.0], np.cumsum(each)]) for each in (p, p > 0, _times_log(p)))
    bounds = -(-np.arange(LEVELS + 2) * ends[:, np.newaxis] // (LEVELS + 1))
    inside = mass[ends]
    clipped = np.where(ends < counts.size, 1.0 - inside, 0.0)
    sums = np.diff(mass[bounds], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = sums / np.diff(filled[bounds], axis=1) / inside[:, np.newaxis]
    q = np.maximum(np.where(sums > 0, q, 1.0), _LEAST)
    last = p[ends - 1]
    # the last bin may hold only what was clipped: the tiny share keeps the divergence finite, and large
    q_last = np.where(last > 0, q[:, -1], _LEAST)
    own = information[ends - 1] + _times_log(last + clipped)
    cross = (sums * np.log(q)).sum(axis=1) + clipped * np.log(q_last)
    return np.where(inside > 0, own - cross, np.inf)


def _times_log(p: Array) -> Array:
    """Return p·log p, which is 0 for 0."""
    return p * np.log(np.where(p > 0, p, 1.0))


METHODS: dict[str, Callable[[Histogram], float]] = {
    "max": maximum,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mean_squared_error,
}
"""Name → threshold of a histogram. ``auto`` picks one of them for each tensor by what its readers compute."""

AUTO = "auto"
