"""What the readers of DATA share: the rows they give, the draw, and files that must not change meanwhile."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import Tensors

Label: TypeAlias = "int | NDArray[Any] | None"
"""A class index, an integer map of classes ``[H, W]`` (segmentation), values (regression), or None for no labels."""


@dataclass(frozen=True)
class Row:
    """One input as it was read, not yet checked against the model.

    Attributes:
        name: What an error calls it.
        feeds: Input name → ``[1, …]``.
        label: See `Label`.
    """

    name: str
    feeds: Tensors
    label: Label


@dataclass(frozen=True)
class BadRow:
    """One input that cannot be used, while the others can.

    Attributes:
        name: What an error calls it.
        error: Why; raised unless bad inputs are skipped.
    """

    name: str
    error: DataRefused


class Source(Protocol):
    """A reader of one form of DATA."""

    @property
    def count(self) -> int | None:
        """How many rows there will be, bad ones included; None where only reading them all tells."""

    @property
    def identity(self) -> Any:
        """Plain data that says which rows they will be, without reading them: names, sizes, times, order."""

    def rows(self, start: int) -> Iterator[Row | BadRow]:
        """Read one row after the other, without the first ``start``.

        Raises:
            DataRefused: The data is damaged, or changed since it was opened.
        """


class Shaped(Protocol):
    """An array, or what describes one that was not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""


def draw(total: int, limit: int | None, seed: int) -> tuple[int, ...]:
    """Return up to ``limit`` of ``range(total)`` in random order, without replacement.

    Fisher and Yates' shuffle, from the front, so that a larger limit begins with the draw of a smaller one. It uses
    ``Random.random`` alone, whose numbers Python promises to keep from version to version.
    """
    numbers = random.Random(seed)
    moved: dict[int, int] = {}
    order = []
    for place in range(total if limit is None else min(limit, total)):
        taken = place + int(numbers.random() * (total - place))
        order.append(moved.get(taken, taken))
        moved[taken] = moved.get(place, place)
    return tuple(order)


@dataclass(frozen=True)
class FileState:
    """By what a change of a file is noticed.

    Attributes:
        size: In bytes.
        modified: Time of the last change, in ns.
    """

    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Look at a file.

        Raises:
            OSError: It is not there.
        """
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Refuse a file that is not as it was.

        Raises:
            DataRefused: Names the file.
        """
        try:
            now = FileState.of(path)
        except OSError as exc:
            raise _changed(path, f"it cannot be found any more ({os.strerror(exc.errno or 0)})") from exc
        if now.size != self.size:
            raise _changed(path, f"it had {self.size} bytes, now {now.size}")
        if now.modified != self.modified:
            raise _changed(path, "it was written to")


def _changed(path: Path, how: str) -> DataRefused:
    return DataRefused(
        f"{path} changed while the data was read: {how}", hint="run again when nothing writes to the data any more"
    )


def check_batch(source: str, arrays: Mapping[str, Shaped], labels: Shaped | None, *, values: bool = False) -> int:
    """Return how many rows arrays of inputs, with their labels, have.

    Args:
        source: What an error calls them.
        arrays: Of inputs.
        labels: Of their labels.
        values: Whether labels are values, for regression, and not classes.

    Raises:
        DataRefused: No rows, as many of one array as of another, or labels that are not one to a row.
    """
    for name, array in arrays.items():
        if not array.shape:
            raise DataRefused(
                f"{source}: {name} is a single {array.dtype}, not an array of inputs",
                hint=f"one row of {name} is one input",
            )
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise DataRefused(
            f"{source} does not hold as many rows of each input: "
            + (", ".join(f"{count} of {name}" for name, count in counts.items()) or "it holds none"),
            hint="row i of every array belongs to sample i",
        )
    [count] = set(counts.values())
    if labels is not None:
        _check_labels(source, count, labels, values=values)
    return count


def _check_labels(source: str, count: int, labels: Shaped, *, values: bool) -> None:
    rank, kind = len(labels.shape), labels.dtype.kind
    if values:
        if not rank or kind not in "iubf":
            raise DataRefused(f"{source}: y is {labels.dtype}{list(labels.shape)}, not values for each input")
    elif not (rank == 1 and kind in "iubf") and not (rank == 3 and kind in "iub"):
        raise DataRefused(
            f"{source}: y is {labels.dtype}{list(labels.shape)}, not a class index per input",
            hint="give y as [N], or for segmentation integers [N, H, W]; leave it out where there are no labels",
        )
    if labels.shape[0] != count:
        raise DataRefused(f"{source} holds {count} inputs and {labels.shape[0]} labels")


def label_of(name: str, value: NDArray[Any], *, values: bool = False) -> int | NDArray[Any]:
    """Return one row of the labels as a class index or a map of them; or as it is, where labels are values.

    Raises:
        DataRefused: A fraction instead of a class, or NaN.
    """
    if values:
        if not np.isfinite(value).all():
            raise DataRefused(f"{name}: its label holds NaN or Inf")
        return np.array(value)
    if value.ndim:
        return np.array(value)
    if value.dtype.kind == "f" and not float(value).is_integer():
        raise DataRefused(f"{name}: its label {value} is not a class index")
    return int(value)
