"""Statistics of latencies: percentiles, paired ratios with their uncertainty, whether a machine was quiet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SETTLE_WINDOW = 10
"""Runs per window of the warm-up's criterion."""

SETTLE_CHANGE = 0.03
"""Warm-up ends when the medians of the last two windows differ by less than this fraction.

Below the 5 % to which interleaved measurements on shared machines can be trusted at all.
"""

BOOTSTRAP_DRAWS = 2000
"""Resamplings for a confidence interval: the ends of a 95 % interval are then themselves good to about 0.5 %
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3, asks for at least 1000)."""

CONFIDENCE = 0.95


def settled(times: Sequence[float]) -> bool:
    """Whether a warm-up's latencies have stopped changing.

    Args:
        times: Seconds per run, in order.
    """
    if len(times) < 2 * SETTLE_WINDOW:
        return False
    last = float(np.median(times[-SETTLE_WINDOW:]))
    before = float(np.median(times[-2 * SETTLE_WINDOW : -SETTLE_WINDOW]))
    return abs(last - before) <= SETTLE_CHANGE * before


def percentile(times: Sequence[float], percent: float) -> float | None:
    """Return a percentile, or None where there are too few runs for one run to lie above it.

    Args:
        times: Seconds per run.
        percent: Between 0 and 100.
    """
    if len(times) * (100 - percent) < 100:
        return None
    return float(np.percentile(times, percent))


def spread(rounds: Sequence[Sequence[float]]) -> float:
    """Return the median absolute deviation of the rounds' medians, relative to their median.

    Args:
        rounds: Seconds per run, a sequence per round.
    """
    medians = np.array([np.median(times) for times in rounds])
    centre = float(np.median(medians))
    return float(np.median(np.abs(medians - centre))) / centre if centre else 0.0


def paired_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the ratio of two medians and its bootstrap confidence interval.

    Rounds are resampled in pairs (ours and theirs of the same round together), because what disturbs a round
    disturbs both.

    Args:
        ours: Seconds per run, a sequence per round; every round has equally many runs.
        theirs: Likewise, with as many rounds.
        seed: Of the resampling.

    Returns:
        The ratio of the medians over all runs, and the lower and upper ends of the 95 % interval.
    """
    a, b = _matrix(ours), _matrix(theirs)
    picks = np.random.default_rng(seed).integers(0, len(a), (BOOTSTRAP_DRAWS, len(a)))
    draws = [float(np.median(a[pick]) / np.median(b[pick])) for pick in picks]
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def _matrix(rounds: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array([list(times) for times in rounds], dtype=np.float64)


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean: the one mean of ratios that says the same of them and of their inverses.

    Args:
        ratios: Positive, at least one.
    """
    return float(np.exp(np.mean(np.log(np.asarray(ratios, dtype=np.float64)))))
