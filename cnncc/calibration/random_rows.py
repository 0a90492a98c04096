"""DATA that is none: seeded random inputs, for whoever asks for them by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cnncc.calibration.source import Row
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.specs import TensorSpec

_STRIDE = 2654435761
"""Odd, near 2³² divided by the golden ratio (Knuth, TAOCP 6.4): the seeds of neighbouring streams lie far apart."""


@dataclass(frozen=True)
class RandomRows:
    """Standard normal floats, small integers, fair booleans: see `random_feeds`."""

    specs: tuple[TensorSpec, ...]
    count: int
    seed: int

    @property
    def identity(self) -> Any:
        """Nothing but what the inputs and the seed say."""
        return ["random", self.count]

    def rows(self, start: int) -> Iterator[Row]:
        """Draw one row after the other."""
        for index in range(start, self.count):
            yield Row(f"random[{index}]", random_feeds(self.specs, self.seed * _STRIDE + index), None)
