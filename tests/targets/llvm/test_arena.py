"""The arena: nothing that is needed at the same time overlaps, and reuse pays."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from cnncc.targets.llvm.aot.arena import Lifetime, aligned, plan_arena
from cnncc_runtime.weights import ALIGNMENT


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    spans = st.tuples(st.integers(0, 2000), st.integers(0, 12), st.integers(0, 6))
    return [Lifetime(size, first, first + length) for size, first, length in draw(st.lists(spans, max_size=24))]


@given(lifetimes())
def test_what_is_needed_at_the_same_time_does_not_overlap(buffers: list[Lifetime]) -> None:
    arena = plan_arena(buffers)
    assert len(arena.offsets) == len(buffers)
    placed = list(zip(buffers, arena.offsets, strict=True))
    for (one, at), (other, there) in combinations(placed, 2):
        apart = at + one.size <= there or there + other.size <= at
        assert apart or not one.meets(other)
    assert all(offset % ALIGNMENT == 0 and offset + buffer.size <= arena.size for buffer, offset in placed)


@given(lifetimes())
def test_an_arena_is_no_larger_than_all_buffers_and_no_smaller_than_what_is_needed_at_once(
    buffers: list[Lifetime],
) -> None:
    arena = plan_arena(buffers)
    at_once = [sum(aligned(b.size) for b in buffers if b.first <= step <= b.last) for step in range(20)]
    assert max(at_once) <= arena.size <= sum(aligned(b.size) for b in buffers)


def test_a_chain_of_equal_layers_takes_two_buffers() -> None:
    arena = plan_arena([Lifetime(1000, step, step + 1) for step in range(20)])
    assert arena.size == 2 * aligned(1000)


def test_nothing_takes_no_memory() -> None:
    assert plan_arena([]).size == 0
