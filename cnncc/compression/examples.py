"""Samples by number: what training draws its batches from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from cnncc.calibration.stream import DataStream, Sample
from cnncc.compression.augment import IGNORED
from cnncc.compression.task import CLASSIFICATION, REGRESSION, SEGMENTATION
from cnncc_runtime.digests import digest_json
from cnncc_runtime.errors import DataRefused

ROOM = 2 << 30
"""Bytes of samples that are kept in memory; of larger data each is read when it is asked for."""


@dataclass(frozen=True)
class Batch:
    """Samples, side by side.

    Attributes:
        inputs: One for each input of the model, ``[n, …]``, in its order.
        targets: ``int64[n]``, ``int64[n, h, w]``, or ``float32[n, …]`` for regression.
    """

    inputs: tuple[torch.Tensor, ...]
    targets: torch.Tensor


class Examples(Dataset[Batch]):
    """Samples of a `DataStream`, by number.

    Args:
        stream: The samples; each must have a label.
        values: Whether labels are values, for regression.
        room: Bytes that may be kept in memory.

    Attributes:
        kind: What such labels are good for: one of `cnncc.compression.task.TASKS`.
        identity: Of what is known without reading all: tells whether a training may go on.
        kept: Whether all samples are in memory.

    Raises:
        DataRefused: A sample is damaged, has no label, or one of another form than the others; or there are none.
    """

    def __init__(self, stream: DataStream, *, values: bool = False, room: int = ROOM) -> None:
        self._stream = stream
        self.identity = digest_json([stream.identity, values])
        first = next(iter(stream))
        self.kind = _kind(first, values)
        size = sum(array.nbytes for array in first.feeds.values()) + np.asarray(first.label).nbytes
        self.kept = stream.count is None or stream.count * size <= room
        self._names = tuple(first.feeds)
        self._samples: list[Sample] = []
        if self.kept:
            for sample in stream:
                self._samples.append(sample)
                if len(self._samples) * size > room:
                    raise DataRefused(
                        f"{stream.source} gives more than {room >> 30} GiB of samples, and no number of them",
                        hint="save them as a .npz or a folder of images: those are read piece by piece",
                    )

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self._samples) if self.kept else int(self._stream.count or 0)

    def __getitem__(self, number: int) -> Batch:
        """Return a batch of one sample."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Batch]:
        """Return a batch of samples, as the only item of a list: `torch` asks for lists."""
        samples = [self._sample(number) for number in numbers]
        try:
            inputs = tuple(
                torch.from_numpy(np.concatenate([sample.feeds[name] for sample in samples])) for name in self._names
            )
            targets = torch.from_numpy(np.stack([self._target(sample) for sample in samples]))
        except ValueError as exc:
            raise DataRefused(
                f"samples of different sizes make no batch: {samples[0].name} to {samples[-1].name}",
                hint="bring the samples to one size, or use --batch 1",
            ) from exc
        return [Batch(inputs, targets)]

    @property
    def single(self) -> int | None:
        """The only class that there is; None for several, for values, and where not all samples are in memory."""
        if self.kind == REGRESSION or not self.kept:
            return None
        found: set[int] = set()
        for sample in self._samples:
            found |= set(np.unique(self._target(sample)).tolist()) - ({IGNORED} if self.kind == SEGMENTATION else set())
            if len(found) > 1:
                return None
        return next(iter(found), None)

    def _sample(self, number: int) -> Sample:
        return self._samples[number] if self.kept else next(self._stream.samples(number))

    def _target(self, sample: Sample) -> NDArray[Any]:
        if _kind(sample, self.kind == REGRESSION) != self.kind:
            raise DataRefused(f"{sample.name} has another form of label than the samples before it")
        if self.kind == REGRESSION:
            return np.asarray(sample.label, np.float32)
        found = np.asarray(sample.label, np.int64)
        return np.where(found < 0, IGNORED, found) if found.ndim else found


def _kind(sample: Sample, values: bool) -> str:
    if sample.label is None:
        raise DataRefused(
            f"{sample.name} has no label, and training needs one for each sample",
            hint="a folder for each class, or an array 'y' in the .npz, or (x, y) of a callable",
        )
    if values:
        return REGRESSION
    return SEGMENTATION if np.ndim(sample.label) else CLASSIFICATION
