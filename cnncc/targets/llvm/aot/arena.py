"""One block of memory for all that a network computes on its way: what is not needed at once lies in one place.

Greedy by size, as in Pisarchyk and Lee, *Efficient Memory Management for Deep Neural Net Inference* (2020): the largest
buffer first, each in the smallest gap that it fits, among those that are needed while it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cnncc_runtime.weights import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """When a buffer is needed.

    Attributes:
        size: Bytes.
        first: The call that writes it.
        last: The last call that reads it.
    """

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are needed at some time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where buffers lie.

    Attributes:
        size: Bytes.
        offsets: Of each buffer, in the order in which they were given; multiples of `ALIGNMENT`.
    """

    size: int
    offsets: tuple[int, ...]


def plan_arena(lifetimes: Sequence[Lifetime]) -> Arena:
    """Return a place for every buffer; no two that are needed at the same time overlap."""
    placed: dict[int, tuple[int, int]] = {}
    for position in sorted(range(len(lifetimes)), key=lambda at: (-lifetimes[at].size, at)):
        lifetime = lifetimes[position]
        taken = sorted(place for other, place in placed.items() if lifetime.meets(lifetimes[other]))
        size = aligned(lifetime.size)
        offset = _smallest_gap(taken, size)
        placed[position] = (offset, offset + size)
    return Arena(max((end for _, end in placed.values()), default=0), tuple(placed[n][0] for n in range(len(placed))))


def aligned(size: int) -> int:
    """Return the bytes that a buffer takes up beside others."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _smallest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return where the smallest gap begins that holds so many bytes; the end of all where none does."""
    gaps: list[tuple[int, int]] = []
    end = 0
    for start, past in taken:
        if start - end >= size:
            gaps.append((start - end, end))
        end = max(end, past)
    return min(gaps)[1] if gaps else end
