"""Statistics of latencies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.compiler.bench.statistics import SETTLE_WINDOW, geometric_mean, paired_ratio, percentile, settled, spread

seeds = st.integers(0, 2**32 - 1)


class TestSettled:
    def test_needs_two_windows(self):
        assert not settled([1.0] * (2 * SETTLE_WINDOW - 1))
        assert settled([1.0] * (2 * SETTLE_WINDOW))

    def test_sees_a_falling_latency(self):
        assert not settled([1.1] * SETTLE_WINDOW + [1.0] * SETTLE_WINDOW)
        assert settled([9.0] * 50 + [1.02] * SETTLE_WINDOW + [1.0] * SETTLE_WINDOW)

    def test_one_slow_run_does_not_unsettle(self):
        assert settled([1.0] * SETTLE_WINDOW + [1.0] * (SETTLE_WINDOW - 1) + [50.0])


class TestPercentile:
    @pytest.mark.parametrize(
        ("runs", "percent", "known"), [(9, 90, False), (10, 90, True), (99, 99, False), (100, 99, True)]
    )
    def test_is_given_only_when_a_run_lies_above_it(self, runs, percent, known):
        assert (percentile([1.0] * runs, percent) is not None) == known

    def test_orders(self):
        times = list(range(1000))
        assert percentile(times, 50) < percentile(times, 90) < percentile(times, 99)


class TestSpread:
    def test_of_equal_rounds_is_zero(self):
        assert spread([[1.0, 2.0, 3.0]] * 5) == 0

    def test_is_relative(self):
        rounds = [[1.0], [1.1], [0.9], [1.2], [0.8]]
        assert spread(rounds) == pytest.approx(0.1)
        assert spread([[t * 7 for t in times] for times in rounds]) == pytest.approx(0.1)


class TestPairedRatio:
    @given(seeds, st.floats(0.1, 10))
    @settings(max_examples=15, deadline=None)
    def test_of_a_multiple_is_that_multiple(self, seed, factor):
        times = np.random.default_rng(seed).uniform(1, 2, (8, 5))
        value, low, high = paired_ratio((times * factor).tolist(), times.tolist())
        assert value == pytest.approx(factor)
        assert low == pytest.approx(factor)
        assert high == pytest.approx(factor)

    def test_disturbance_that_hits_both_cancels(self):
        generator = np.random.default_rng(0)
        base = generator.normal(1, 0.01, (2, 20, 9))
        disturbed = np.exp(generator.normal(0, 0.5, (20, 1)))
        ours, theirs = (base * disturbed).tolist()
        _, low, high = paired_ratio(ours, theirs)
        assert low <= 1 <= high
        assert high - low < 0.2
        shuffled = [theirs[n] for n in generator.permutation(20)]
        _, wide_low, wide_high = paired_ratio(ours, shuffled)
        assert wide_high - wide_low > 2 * (high - low)

    def test_covers_the_true_ratio_about_as_often_as_it_says(self):
        covered = 0
        for seed in range(40):
            generator = np.random.default_rng(seed)
            ours, theirs = np.exp(generator.normal(0, 0.1, (2, 12, 15)))
            _, low, high = paired_ratio((0.8 * ours).tolist(), theirs.tolist(), seed=seed)
            covered += low <= 0.8 <= high
        assert 33 <= covered <= 40

    def test_accepts_rounds_with_different_numbers_of_runs_on_the_two_sides(self):
        assert paired_ratio([[2.0] * 3] * 4, [[1.0] * 50] * 4)[0] == 2


class TestGeometricMean:
    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
    def test_of_inverses_is_the_inverse(self, ratios):
        assert geometric_mean(ratios) == pytest.approx(1 / geometric_mean([1 / ratio for ratio in ratios]))
        assert min(ratios) * (1 - 1e-9) <= geometric_mean(ratios) <= max(ratios) * (1 + 1e-9)

    def test_of_two(self):
        assert geometric_mean([0.5, 8.0]) == pytest.approx(2.0)
