"""Histograms of magnitudes: what they count, and that merging them is exact."""

from __future__ import annotations

import math
import tracemalloc
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from cnncc.calibration.histogram import BINS, Histogram, pool

Array = NDArray[np.float32]

TINY = float(np.finfo(np.float32).tiny)
HUGE = float(np.finfo(np.float32).max)
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, 2.0**-126, TINY / 2, 2.0**127, HUGE, -HUGE, 3.0, 4096.0, 1.0 / 4096]

floats = st.one_of(
    st.sampled_from(EDGES),
    st.integers(-149, 127).map(lambda power: 2.0**power),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-2, 2, width=32),
)


@st.composite
def batches(draw: st.DrawFn) -> list[Array]:
    """Batches of one tensor, ``[1, 2, n]``, of magnitudes that differ by up to 2^277."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    return [draw(arrays_of.arrays(np.float32, (1, 2, size), elements=floats)) for size in sizes]


def same(one: Histogram, other: Histogram) -> bool:
    return (
        one.exponent == other.exponent
        and one.largest == other.largest
        and one.lowest == other.lowest
        and np.array_equal(one.counts, other.counts)
        and np.array_equal(one.channels, other.channels)
    )


# ---- counting


@settings(deadline=None)
@given(batches())
def test_every_element_falls_into_the_bin_that_its_magnitude_lies_in(found: list[Array]) -> None:
    x = np.concatenate(found, axis=2)
    histogram = Histogram.of(x)
    magnitude = np.abs(x).astype(np.float64).ravel()
    assert histogram.largest == magnitude.max()
    assert histogram.total == x.size
    assert histogram.lowest == float(x.min())
    np.testing.assert_array_equal(histogram.channels, np.abs(x).max(axis=(0, 2)))
    if histogram.exponent is None:
        assert not magnitude.any()
        assert histogram.counts[0] == x.size
        assert histogram.width == 0.0
        return
    assert 2.0 ** (histogram.exponent - 1) <= histogram.largest < 2.0**histogram.exponent
    index = np.floor(magnitude / histogram.width).astype(int)
    np.testing.assert_array_equal(histogram.counts, np.bincount(index, minlength=BINS))


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_channels_are_the_second_axis(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    channels = Histogram.of(x).channels
    expected = [np.abs(x).max()] if len(shape) == 1 else [np.abs(x[:, c]).max() for c in range(3)]
    np.testing.assert_array_equal(channels, np.float32(expected))


def test_arrays_larger_than_a_chunk_and_not_contiguous_are_counted_whole() -> None:
    x = np.random.default_rng(0).standard_normal((700, 1, 900)).astype(np.float32)
    histogram = Histogram.of(x.transpose(2, 1, 0))
    assert same(histogram, Histogram.of(x))
    assert histogram.total == x.size


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_nan_and_infinity_are_no_magnitudes(value: float, place: int) -> None:
    x = np.ones((1, 3, 4), np.float32)
    x.reshape(-1)[place] = value
    with pytest.raises(FloatingPointError):
        Histogram.of(x)


# ---- merging


@settings(max_examples=200)
@given(batches(), st.randoms(use_true_random=False))
def test_merging_in_any_order_and_grouping_gives_the_histogram_of_all(found: list[Array], random: Any) -> None:
    whole = Histogram.of(np.concatenate(found, axis=2))
    parts = [Histogram.of(x) for x in found]
    random.shuffle(parts)
    while len(parts) > 1:  # neighbours, in a random tree
        place = random.randrange(len(parts) - 1)
        parts[place : place + 2] = [parts[place].merge(parts[place + 1])]
    assert same(parts[0], whole)


@settings(deadline=None)
@given(st.lists(batches(), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(found: list[list[Array]]) -> None:
    a, b, c = (reduce(Histogram.merge, map(Histogram.of, part)) for part in found)
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))


@settings(deadline=None)
@given(batches())
def test_merging_zeros_adds_to_the_first_bin_only(found: list[Array]) -> None:
    histogram = Histogram.of(np.concatenate(found, axis=2))
    merged = histogram.merge(Histogram.of(np.zeros((1, 2, 5), np.float32)))
    first = np.eye(1, BINS, dtype=np.int64)[0] * 10
    np.testing.assert_array_equal(merged.counts, histogram.counts + first)
    assert (merged.exponent, merged.largest) == (histogram.exponent, histogram.largest)


def test_merging_leaves_its_operands_as_they_were() -> None:
    small, large = Histogram.of(np.full((1, 1, 3), 0.7, np.float32)), Histogram.of(np.full((1, 1, 3), 9.0, np.float32))
    before = small.counts.copy(), large.counts.copy()
    small.merge(large)
    np.testing.assert_array_equal(small.counts, before[0])
    np.testing.assert_array_equal(large.counts, before[1])


def test_pooling_tensors_of_different_channels_counts_all_their_elements() -> None:
    random = np.random.default_rng(0)
    tensors = [random.standard_normal((1, c, 5)).astype(np.float32) * c for c in (2, 3, 7)]
    pooled = pool(Histogram.of(x) for x in tensors)
    flat = Histogram.of(np.concatenate([x.ravel() for x in tensors]))
    np.testing.assert_array_equal(pooled.counts, flat.counts)
    assert (pooled.exponent, pooled.largest, pooled.total) == (flat.exponent, flat.largest, flat.total)


def test_memory_does_not_grow_with_what_is_counted() -> None:
    random = np.random.default_rng(0)
    merged = Histogram.of(random.standard_normal((1, 4, 64)).astype(np.float32))
    tracemalloc.start()
    try:
        for _ in range(50):
            merged = merged.merge(Histogram.of(random.standard_normal((1, 4, 64)).astype(np.float32)))
        early = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            merged = merged.merge(Histogram.of(random.standard_normal((1, 4, 64)).astype(np.float32)))
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert merged.total == 551 * 256
    assert late <= early + 4 * 8 * BINS


# ---- beyond


@settings(deadline=None)
@given(batches(), st.floats(0.0, 1.2))
def test_the_share_beyond_a_threshold_is_right_to_within_a_bin(found: list[Array], part: float) -> None:
    x = np.concatenate(found, axis=2)
    histogram = Histogram.of(x)
    threshold = part * histogram.largest
    magnitude = np.abs(x).astype(np.float64)
    share = histogram.beyond(threshold)
    assert float((magnitude > threshold + histogram.width).mean()) <= share
    assert share <= float((magnitude > threshold).mean())


def test_nothing_lies_beyond_the_largest() -> None:
    x = np.float32([[0.25, 1.0, -3.0]])
    assert Histogram.of(x).beyond(3.0) == 0.0
    assert Histogram.of(x).beyond(0.0) == 1.0
    assert Histogram.of(np.zeros((1, 3), np.float32)).beyond(0.0) == 0.0
