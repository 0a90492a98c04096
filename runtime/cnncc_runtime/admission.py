"""What a session lets in: whether feeds fit the model, and which batch size they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from cnncc_runtime.errors import DataRefused, RunFailed
from cnncc_runtime.specs import Feeds, TensorSpec, check_feeds


class Admission:
    """Checks feeds; those of types and shapes that were let in before pass quickly.

    Args:
        inputs: Specs; the batch dimension is symbolic where several sizes were built.
        batches: Batch sizes that were built; empty when the model has no batch dimension.
    """

    def __init__(self, inputs: tuple[TensorSpec, ...], batches: tuple[int, ...]) -> None:
        self._inputs, self._batches = inputs, batches
        self._names = [spec.name for spec in inputs]
        self._admitted: dict[tuple[Any, ...], int] = {}

    def batch(self, feeds: Feeds) -> int:
        """Return the batch size of feeds; 0 where the model has none.

        Raises:
            DataRefused: An input is missing, unknown, or of another dtype or shape.
            RunFailed: The batch size was not built.
        """
        known = self._before(feeds)
        return self._check(feeds) if known is None else known

    def _before(self, feeds: Feeds) -> int | None:
        """Return the batch of feeds of these very types and shapes: small networks take less than the checks."""
        if len(feeds) != len(self._names):
            return None
        try:
            return self._admitted.get(_signature([feeds[name] for name in self._names]))
        except (KeyError, AttributeError, TypeError):  # the checks say what is wrong
            return None

    def _check(self, feeds: Feeds) -> int:
        check_feeds(self._inputs, feeds)
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self._inputs:
            for size, have in zip(spec.shape, feeds[spec.name].shape, strict=True):
                if isinstance(size, str) and sizes.setdefault(size, (have, spec.name))[0] != have:
                    raise DataRefused(
                        f"'{size}' is {sizes[size][0]} in input '{sizes[size][1]}' and {have} in '{spec.name}'",
                        hint="give all inputs the same batch size",
                    )
        batch = next((size for size, _ in sizes.values()), 0) if self._batches else 0
        if self._batches and batch not in self._batches:
            raise RunFailed(
                f"batch size {batch} was not built, the bundle holds {', '.join(map(str, self._batches))}",
                hint="pad or split the batch, or compile with that size too",
            )
        self._admitted[_signature([feeds[name] for name in self._names])] = batch
        return batch


def _signature(arrays: Sequence[NDArray[Any]]) -> tuple[Any, ...]:
    return tuple([(type(array), array.shape, array.dtype) for array in arrays])
