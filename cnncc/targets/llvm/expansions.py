"""Constants that an engine makes when it first runs: a matrix times what its file of weights holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.weights import expand

Key = tuple[str, tuple[int, ...], bytes]


def key_of(array: NDArray[Any]) -> Key:
    """Return what tells a row-major array from every other."""
    return array.dtype.name, array.shape, hashlib.sha256(array.data).digest()


@dataclass(frozen=True)
class Expanded:
    """A constant and what it is made of.

    Attributes:
        matrix: ``[rows, columns]``, float64.
        stored: ``[parts, columns, n]``, float32.
    """

    matrix: NDArray[np.float64]
    stored: NDArray[np.float32]

    def made(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the constant: ``[parts, rows, n]`` in another shape."""
        parts, _, width = self.stored.shape
        found = np.empty((parts, self.matrix.shape[0], width), np.float32)
        expand(self.matrix, self.stored, found)
        return found.reshape(shape)


class Expansions:
    """The expanded constants of a program; passes may copy them, so they are known by what they hold."""

    def __init__(self) -> None:
        self._found: dict[Key, Expanded] = {}

    def add(self, expanded: Expanded, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return a constant for the program, and remember what it is made of."""
        made = expanded.made(shape)
        self._found[key_of(made)] = expanded
        return made

    def find(self, key: Key) -> Expanded | None:
        """Return what a constant is made of; None where the file is to hold it as it is."""
        return self._found.get(key)
