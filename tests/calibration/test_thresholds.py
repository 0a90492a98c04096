"""Thresholds: each method against a brute-force reference, at the edges, and against its neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from cnncc.calibration.histogram import BINS, Histogram
from cnncc.calibration.thresholds import (
    LEVELS,
    METHODS,
    SMALLEST_SCALE,
    _divergences,
    entropy,
    maximum,
    mean_squared_error,
    percentile,
    scale_of,
    squared_errors,
)

Array = NDArray[np.float32]

every_method = pytest.mark.parametrize("method", METHODS)


def histogram_of(values: object) -> Histogram:
    return Histogram.of(np.asarray(values, np.float32))


@st.composite
def tensors(draw: st.DrawFn) -> Array:
    """Tensors as networks have them: bell-shaped, rectified, long-tailed, a few values only, of any magnitude."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    size = draw(st.integers(1, 3000))
    kind = draw(st.sampled_from(["normal", "relu", "laplace", "cauchy", "uniform", "few"]))
    if kind == "few":
        x = random.choice(random.standard_normal(3), size)
    elif kind == "cauchy":
        x = random.standard_cauchy(size)
    else:
        x = {"normal": random.normal, "relu": random.normal, "laplace": random.laplace, "uniform": random.uniform}[
            kind
        ](size=size)
    if kind == "relu":
        x = np.maximum(x, 0)
    return np.asarray(x * 2.0 ** draw(st.integers(-20, 20)), np.float32)


def fake_quantized(x: NDArray[np.float64], scale: float, levels: int = LEVELS) -> NDArray[np.float64]:
    return np.clip(np.rint(x / scale), -levels, levels) * scale


def squared_error(histogram: Histogram, threshold: float, levels: int = LEVELS) -> float:
    [error] = squared_errors(histogram, np.array([threshold]), np.array([threshold / levels]))
    return float(error)


# ---- scales


@settings(deadline=None)
@given(st.floats(0.0, float(np.finfo(np.float32).max), width=32))
def test_a_scale_is_a_positive_normal_float32_of_a_127th(threshold: float) -> None:
    scale = scale_of(threshold)
    assert scale == float(np.float32(scale)) >= SMALLEST_SCALE
    assert math.isfinite(scale)
    if threshold / LEVELS > SMALLEST_SCALE:
        assert scale * LEVELS == pytest.approx(threshold, rel=2.0**-23)


@settings(deadline=None)
@given(arrays_of.arrays(np.float32, 50, elements=st.floats(-(2.0**60), 2.0**60, width=32)), st.floats(0.01, 1.0))
def test_quantizing_errs_by_half_a_step_in_range_and_by_what_is_clipped_beyond(x: Array, part: float) -> None:
    largest = float(np.abs(x).max())
    assume(largest > 1e-30)
    scale = scale_of(part * largest)
    wide = x.astype(np.float64)
    error = np.abs(fake_quantized(wide, scale) - wide)
    beyond = np.maximum(np.abs(wide) - LEVELS * scale, 0.0)
    assert (error <= np.where(beyond > scale / 2, beyond, scale / 2) * (1 + 1e-12)).all()


# ---- the expected error


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.02, 1.3), st.integers(1, 140), st.integers(-12, 12))
def test_the_squared_error_is_that_of_elements_spread_evenly_in_their_bins(
    seed: int, part: float, levels: int, power: int
) -> None:
    random = np.random.default_rng(seed)
    histogram = histogram_of(random.laplace(size=64) * 2.0**power)
    threshold = part * histogram.largest
    inside = (np.arange(512) + 0.5) / 512  # each bin by many points
    full = np.flatnonzero(histogram.counts)
    points = (full[:, None] + inside) * histogram.width
    errors = ((fake_quantized(points, threshold / levels, levels) - points) ** 2).mean(axis=1)
    brute = float((histogram.counts[full] * errors).sum() / histogram.total)
    assert squared_error(histogram, threshold, levels) == pytest.approx(brute, rel=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 1.0))
def test_the_squared_error_is_that_of_the_tensor_itself_to_within_a_bin(seed: int, part: float) -> None:
    x = np.random.default_rng(seed).normal(size=20_000).astype(np.float32)
    histogram = histogram_of(x)
    threshold = part * histogram.largest
    wide = x.astype(np.float64)
    measured = float(((fake_quantized(wide, threshold / LEVELS) - wide) ** 2).mean())
    assert squared_error(histogram, threshold) == pytest.approx(measured, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(tensors(), st.lists(st.tuples(st.floats(0.01, 1.2), st.floats(0.5, 300.0)), min_size=1, max_size=20))
def test_errors_together_are_those_of_each_by_the_formula(x: Array, tried: list[tuple[float, float]]) -> None:
    histogram = histogram_of(x)
    assume(histogram.largest > 0)
    tops = np.array([part for part, _ in tried]) * histogram.largest
    steps = tops / np.array([levels for _, levels in tried])
    edges = np.arange(BINS + 1) * histogram.width
    for top, step, found in zip(tops, steps, squared_errors(histogram, tops, steps), strict=True):
        inside = np.minimum(edges, top)
        whole = np.rint(inside / step)
        integral = whole * step**3 / 12 + (inside - whole * step) ** 3 / 3 + np.maximum(edges - top, 0) ** 3 / 3
        wanted = (histogram.counts * np.diff(integral)).sum() / (histogram.width * histogram.total)
        assert found == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(tensors(), st.floats(0.001, 1.0))
def test_with_equal_steps_more_levels_never_err_more(x: Array, part: float) -> None:
    histogram = histogram_of(x)
    assume(histogram.largest > 0)
    step = part * histogram.largest
    errors = [squared_error(histogram, step * levels, levels) for levels in range(1, LEVELS + 1)]
    assert (np.diff(errors) <= 1e-9 * errors[0]).all()


@settings(max_examples=15, deadline=None)
@given(tensors())
def test_the_error_of_the_best_threshold_falls_with_every_bit(x: Array) -> None:
    histogram = histogram_of(x)
    assume(histogram.largest > 0)
    steps = histogram.largest * np.geomspace(1 / 4096, 1.0, 60)
    best = [
        min(squared_error(histogram, step * levels, levels) for step in steps) for levels in (1, 3, 7, 15, 31, 63, 127)
    ]
    assert (np.diff(best) <= 1e-9 * best[0]).all()


def test_seven_bits_err_far_less_than_one() -> None:
    histogram = histogram_of(np.random.default_rng(0).normal(size=2000))
    steps = histogram.largest * np.geomspace(1 / 4096, 1.0, 60)
    one, seven = (min(squared_error(histogram, step * levels, levels) for step in steps) for levels in (1, 127))
    assert seven < one / 1000


# ---- methods


@every_method
@settings(max_examples=30, deadline=None)
@given(x=tensors())
def test_a_threshold_is_positive_and_clips_nothing_that_the_tensor_does_not_have(method: str, x: Array) -> None:
    histogram = histogram_of(x)
    threshold = METHODS[method](histogram)
    assert 0.0 <= threshold <= histogram.largest
    assert (threshold > 0.0) == (histogram.largest > 0.0)


@every_method
@settings(max_examples=15, deadline=None)
@given(x=tensors(), power=st.integers(-30, 30))
def test_a_threshold_grows_with_the_tensor(method: str, x: Array, power: int) -> None:
    small, large = histogram_of(x), histogram_of(np.ldexp(x, power))
    assume(large.largest < math.inf)
    assert METHODS[method](large) == pytest.approx(math.ldexp(METHODS[method](small), power), rel=1e-6)


@every_method
@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.7, 1e-42, 3e38])
def test_a_constant_is_not_clipped(method: str, value: float, size: int) -> None:
    x = np.full((1, size), value, np.float32)
    scale = scale_of(METHODS[method](histogram_of(x)))
    wide = float(abs(x[0, 0]))
    assert abs(float(fake_quantized(np.array(wide), scale)) - wide) <= max(0.006 * wide, SMALLEST_SCALE)


@every_method
def test_a_tensor_of_zeros_has_the_threshold_zero_and_a_normal_scale(method: str) -> None:
    threshold = METHODS[method](histogram_of(np.zeros((1, 3, 4))))
    assert threshold == 0.0
    assert scale_of(threshold) == SMALLEST_SCALE


@every_method
def test_a_threshold_does_not_depend_on_how_often_all_was_seen(method: str) -> None:
    histogram = histogram_of(np.random.default_rng(0).laplace(size=999))
    threefold = histogram.merge(histogram).merge(histogram)
    assert METHODS[method](threefold) == pytest.approx(METHODS[method](histogram), rel=1e-9)


def test_the_maximum_is_the_largest_magnitude() -> None:
    assert maximum(histogram_of([[0.5, -2.5, 1.0]])) == 2.5


@settings(max_examples=100, deadline=None)
@given(tensors(), st.floats(0.1, 100.0))
def test_a_percentile_is_that_of_numpy_to_within_a_bin(x: Array, percent: float) -> None:
    histogram = histogram_of(x)
    expected = float(np.percentile(np.abs(x).astype(np.float64), percent, method="inverted_cdf"))
    assert abs(percentile(histogram, percent) - expected) <= histogram.width * (1 + 1e-9)


@settings(deadline=None)
@given(tensors(), st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_a_higher_percentile_is_not_smaller(x: Array, one: float, other: float) -> None:
    histogram = histogram_of(x)
    low, high = sorted((one, other))
    assert percentile(histogram, low) <= percentile(histogram, high) + 1e-12 * histogram.largest


def test_the_hundredth_percentile_is_the_maximum() -> None:
    histogram = histogram_of(np.random.default_rng(0).normal(size=1000))
    assert percentile(histogram, 100.0) == histogram.largest


@settings(max_examples=20, deadline=None)
@given(tensors())
def test_no_threshold_errs_less_than_that_of_the_least_squares(x: Array) -> None:
    histogram = histogram_of(x)
    assume(histogram.largest > 0)
    found = squared_error(histogram, mean_squared_error(histogram))
    others = [squared_error(histogram, part * histogram.largest) for part in np.linspace(0.05, 1.0, 201)]
    assert found <= min(others) * 1.03 + 1e-12 * histogram.largest**2
    assert found <= squared_error(histogram, histogram.largest)


# ---- outliers


def long_tailed(count: int = 200_000) -> Histogram:
    """A bell with one element in ten thousand far away, as activations of trained networks have."""
    random = np.random.default_rng(1)
    x = random.normal(size=count)
    x[: count // 10_000] = random.uniform(15.0, 40.0, count // 10_000)
    return histogram_of(x)


@pytest.mark.parametrize(("method", "below"), [("percentile", 15.0), ("entropy", 15.0), ("mse", 30.0)])
def test_outliers_are_clipped_by_every_method_but_the_maximum(method: str, below: float) -> None:
    histogram = long_tailed()
    assert METHODS[method](histogram) < below < maximum(histogram)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("kind", ["lognormal", "student"])
def test_entropy_is_not_the_maximum_in_disguise(kind: str, rectified: bool) -> None:
    random = np.random.default_rng(2)
    size = 200_000
    x = (
        random.lognormal(0, 1, size) * random.choice([-1, 1], size)
        if kind == "lognormal"
        else random.standard_t(3, size)
    )
    histogram = histogram_of(np.maximum(x, 0) if rectified else x)
    threshold = entropy(histogram)
    assert threshold < 0.7 * histogram.largest
    assert histogram.beyond(threshold) < 0.01


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_zeros_do_not_move_the_entropy(share: float) -> None:
    """A ReLU's zeros are represented exactly by any scale."""
    x = np.abs(np.random.default_rng(3).laplace(size=50_000)) + 0.01
    zeros = np.zeros(int(share / (1 - share) * x.size))
    assert entropy(histogram_of(np.concatenate([x, zeros]))) == entropy(histogram_of(x))


def test_entropy_keeps_the_range_of_a_tensor_without_a_tail() -> None:
    histogram = histogram_of(np.random.default_rng(4).uniform(-1, 1, 200_000))
    assert entropy(histogram) > 0.95 * histogram.largest


def reference_divergence(counts: NDArray[np.float64], end: int) -> float:
    """Migacz's slide 38, in plain loops: KL(P ‖ Q), P with the clipped in its last bin, Q in 128 levels."""
    p = [float(count) for count in counts[:end]]
    p[-1] += float(counts[end:].sum())
    q = [0.0] * end
    for level in range(LEVELS + 1):
        members = [i for i in range(end) if i * (LEVELS + 1) // end == level]
        filled = [i for i in members if counts[i] > 0]
        for i in filled:
            q[i] = sum(float(counts[j]) for j in members) / len(filled)
    if not sum(q):
        return math.inf
    total_p, total_q = sum(p), sum(q)
    return sum(a / total_p * math.log(a / total_p / max(b / total_q, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("size", [3, 300, 30_000])
def test_divergences_together_are_those_of_the_definition(size: int) -> None:
    counts = np.bincount((np.abs(np.random.default_rng(6).laplace(size=size)) * 60).astype(int)).astype(np.float64)
    counts = np.concatenate([counts, np.zeros(max(200 - counts.size, 0)), [1.0]])
    ends = np.arange(LEVELS + 1, counts.size + 1, 7)
    wanted = [reference_divergence(counts, int(end)) for end in ends]
    np.testing.assert_allclose(_divergences(counts, ends), wanted, rtol=1e-9, atol=1e-13)


def test_where_all_is_clipped_the_divergence_is_infinite() -> None:
    counts = np.zeros(300)
    counts[250] = 5.0
    assert _divergences(counts, np.array([200, 251])).tolist() == [math.inf, 0.0]


def test_entropy_takes_the_threshold_of_the_least_divergence() -> None:
    random = np.random.default_rng(5)
    histogram = histogram_of(np.abs(random.laplace(size=3000)) + 0.002)
    counts = histogram.counts.astype(np.float64)
    counts[0] = min(counts[0], counts[1])
    ends = np.linspace(LEVELS + 1, int(histogram.largest / histogram.width) + 1, 24).astype(int)
    sampled = min(reference_divergence(counts, int(end)) for end in ends)
    chosen = round(entropy(histogram) / histogram.width) if entropy(histogram) < histogram.largest else int(ends[-1])
    assert reference_divergence(counts, chosen) <= sampled * (1 + 1e-9)
    assert chosen < BINS
