"""Copies of channels between blocked tensors by a constant map: whole vectors where lanes stay, shuffles elsewhere.

Each block of the result is a vector, put together from the vectors that hold its channels. The map is known, so every
shuffle is; blocks that are put together alike share one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, find_anchor
from cnncc.targets.llvm.schedule.pixels import Pixels

CHANNELS = "channels"

Lane = tuple[int, int, int]
"""Where a lane comes from: source, block, lane."""


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks of the result that come from neighbouring blocks of the sources.

    Attributes:
        first: Number of the first block.
        count: How many blocks.
        lanes: Where the lanes of the first block come from.
    """

    first: int
    count: int
    lanes: tuple[Lane, ...]


def runs_of(places: Sequence[tuple[int, int]], block: int) -> list[Run]:
    """Return a map of channels as runs of blocks.

    Args:
        places: For each channel its source and its number there.
        block: Channels of a block.
    """
    found: list[Run] = []
    for start in range(0, len(places), block):
        lanes = _filled([(source, *divmod(channel, block)) for source, channel in places[start : start + block]], block)
        if found and _follows(found[-1], lanes):
            found[-1] = Run(found[-1].first, found[-1].count + 1, found[-1].lanes)
        else:
            found.append(Run(start // block, 1, lanes))
    return found


def _filled(lanes: list[Lane], block: int) -> tuple[Lane, ...]:
    """Return a block's lanes; those after the last channel continue as they can be had for nothing."""
    source, number, _ = lanes[-1]
    return (*lanes, *((source, number, lane) for lane in range(len(lanes), block)))


def _follows(run: Run, lanes: tuple[Lane, ...]) -> bool:
    return all(
        (source, block + run.count, lane) == next_lane
        for (source, block, lane), next_lane in zip(run.lanes, lanes, strict=True)
    )


@dataclass(frozen=True)
class GatherChannels:
    """Schedules concatenations, splits and shuffles of channels."""

    name: str = "channels"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the copy's kernel, or None where the function is not one."""
        anchor = find_anchor(function, CHANNELS)
        return None if anchor is None else _Builder(anchor, machine).function(function)


class _Builder:
    """Writes one copy's loops."""

    def __init__(self, anchor: Anchor, machine: Machine) -> None:
        self.block, *numbers = anchor.parameters
        self.machine = machine
        self.runs = runs_of(list(zip(numbers[::2], numbers[1::2], strict=True)), self.block)
        # The first of the reads in the definition's order is the table of places, which is known here.
        self.sources = [read for read in anchor.reads if len(read.shape) == 5]
        self.pixels = Pixels(anchor.tail, machine, [*self.sources])

    def function(self, like: Any) -> Any:
        def plane(image: Any, number: Any, pixels: Callable[[tir.Body], Any]) -> Any:
            chain = None
            for run in reversed(self.runs):
                body = self._run(run, image, number, pixels)
                chain = body if chain is None else tirx.IfThenElse(number < run.first + run.count, body, chain)
            return chain

        return self.pixels.function(like, plane)

    def _run(self, run: Run, image: Any, number: Any, pixels: Callable[[tir.Body], Any]) -> Any:
        """Return the loop over pixels of one block of a run."""
        shift = number - run.first
        vectors = list(dict.fromkeys((source, block) for source, block, _ in run.lanes))

        def vector(which: tuple[int, int], point: Any) -> tuple[Any, list[Any]]:
            return self.pixels.view(self.sources[which[0]]), [image, shift + which[1], *point]

        def copied(point: Any) -> Any:
            source, indices = vector(vectors[0], point)
            return self.pixels.store([image, number, *point], lambda lane: tir.at(source, *indices, lane))

        def shuffled(point: Any) -> Any:
            made = tir.buffer([self.block], "made", str(self.sources[0].dtype), "local")
            loads = []
            for which in vectors:
                source, indices = vector(which, point)
                loads.append(tir.at(source, *indices, tirx.Ramp(tir.index(0), tir.index(1), self.block)))
            value = _shuffle(loads, [vectors.index((source, block)) for source, block, _ in run.lanes],
                             [lane for _, _, lane in run.lanes])  # fmt: skip
            put = tir.store(made, [tirx.Ramp(tir.index(0), tir.index(1), self.block)], value)
            last = self.pixels.store([image, number, *point], lambda lane: made[lane])
            return tir.block(tir.sequence([put, last]), [made], "shuffle")

        straight = len(vectors) == 1 and [lane for *_, lane in run.lanes] == list(range(self.block))
        return pixels(copied if straight else shuffled)


def _shuffle(vectors: Sequence[Any], which: Sequence[int], lanes: Sequence[int]) -> Any:
    """Return the vector whose lanes are some lanes of some vectors; two vectors are shuffled at a time.

    Args:
        vectors: Vectors of as many lanes as the result.
        which: For each lane of the result, the number of its vector.
        lanes: For each lane of the result, the lane there.
    """
    width = len(lanes)
    if len(vectors) == 1:
        return _picked([vectors[0]], lanes)
    first = [
        lane + (width if number == 1 else 0) if number < 2 else 0 for number, lane in zip(which, lanes, strict=True)
    ]
    made = _picked(vectors[:2], first)
    for number in range(2, len(vectors)):
        into = [
            width + lane if of == number else place for place, (of, lane) in enumerate(zip(which, lanes, strict=True))
        ]
        made = _picked([made, vectors[number]], into)
    return made


def _picked(vectors: Sequence[Any], lanes: Sequence[int]) -> Any:
    return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", lane) for lane in lanes])
