"""A stream of samples: checked, counted, digested, resumable; each is read when it is asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cnncc.calibration.source import BadRow, Label, Row, Source
from cnncc_runtime.digests import digest_array, digest_json
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import Tensors, TensorSpec, check_feeds

_SHOWN = 10


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used.

    Attributes:
        name: As of a `Sample`.
        reason: The error it would have been.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Position:
    """Where an iteration stands after a sample: plain data, to be stored and resumed from.

    Attributes:
        drawn: Samples up to here, skipped ones included.
        digest: Of the samples up to here; None after an iteration that began in the middle.
        skipped: The bad samples up to here.
    """

    drawn: int = 0
    digest: str | None = ""
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One input of a model, batch size 1.

    Attributes:
        name: The file, or ``x[3]`` of an array.
        feeds: Input name → ``[1, …]``.
        label: Class index; an integer map of classes ``[H, W]`` for segmentation; None where the data has none.
        position: Behind this sample.
    """

    name: str
    feeds: Tensors
    label: Label
    position: Position = dataclasses.field(default=Position(), compare=False)


class DataStream:
    """Samples, each read when it is asked for; may be iterated over again.

    Order: drawn at random from the seed, without replacement, so that the first samples stand for all; a larger limit
    begins with the samples of a smaller one. A callable's samples come as they are yielded.

    Attributes:
        source: The DATA argument.
        identity: Digest of what is known before anything is read: the names, sizes and times of the files drawn,
            the order, the inputs, the preprocessing, the seed. It tells whether a `Position` may be resumed from.
        count: Samples drawn, bad ones included; None for a callable.
        random: Whether the samples are random numbers instead of data.
    """

    def __init__(
        self,
        source: str,
        reader: Source,
        specs: tuple[TensorSpec, ...],
        *,
        settings: object,
        skip_bad: bool,
        random: bool,
    ) -> None:
        """Make a stream of what a reader reads: see `cnncc.calibration.data.open_data`.

        Args:
            source: The DATA argument.
            reader: Of the source.
            specs: The inputs, batch size 1.
            settings: Plain data that the samples depend on besides: the preprocessing, the limit, the seed.
            skip_bad: Whether to leave out what cannot be used.
            random: Whether the reader makes the samples up.

        Raises:
            DataRefused: The reader found nothing.
        """
        if reader.count == 0:
            raise _no_samples(source, ())
        self.source, self.count, self.random = source, reader.count, random
        self.identity = digest_json([reader.identity, [str(spec) for spec in specs], settings, skip_bad])
        self._reader, self._specs, self._skip_bad = reader, specs, skip_bad
        self._digest: str | None = None
        self._skipped: tuple[Skipped, ...] = ()

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The bad samples that the latest iteration has met, in order."""
        return self._skipped

    @property
    def digest(self) -> str:
        """Digest of the names, arrays, labels and order of all samples; known once an iteration came to its end.

        Raises:
            RuntimeError: None has.
        """
        if self._digest is None:
            raise RuntimeError("the digest of a data stream is known once all its samples were read")
        return self._digest

    def __iter__(self) -> Iterator[Sample]:
        """Read all samples."""
        return self.samples()

    def samples(self, start: int | Position = 0) -> Iterator[Sample]:
        """Read the samples, or the rest of them.

        Args:
            start: How many of those drawn to leave out (skipped ones count); images and rows left out are not read.
                With the position of the last sample that was used, of a stream of equal `identity`, `digest` and
                `skipped` go on as well.

        Raises:
            DataRefused: A sample is damaged or not what the model takes, the data changed while it was read, or there
                are no samples that can be used.
        """
        position = start if isinstance(start, Position) else Position(start, None if start else "")
        self._skipped = position.skipped
        empty = position.drawn == 0
        for row in self._reader.rows(position.drawn):
            usable = self._checked(row) if isinstance(row, Row) else row
            if isinstance(usable, Row):
                empty = False
                position = _after(position, usable)
                yield Sample(usable.name, usable.feeds, usable.label, position)
            elif self._skip_bad:
                self._skipped = (*position.skipped, Skipped(usable.name, usable.error.message))
                position = Position(position.drawn + 1, position.digest, self._skipped)
            else:
                raise usable.error
        if empty:
            raise _no_samples(self.source, position.skipped)
        self._end(position.digest)

    def _checked(self, row: Row) -> Row | BadRow:
        """Refuse a row that the model does not take: no other will fit either. One with NaN or Inf is a bad one."""
        try:
            check_feeds(self._specs, row.feeds)
        except DataRefused as exc:
            raise DataRefused(f"{row.name}: {exc.message}", hint="one sample is one row of the input") from exc
        if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in row.feeds.values()):
            return BadRow(row.name, DataRefused(f"{row.name} holds NaN or Inf", hint="leave it out of the data"))
        return row

    def _end(self, digest: str | None) -> None:
        if digest is not None and self._digest not in (None, digest):
            raise DataRefused(
                f"{self.source} gave other samples than when it was first read",
                hint="run again when nothing writes to the data; let a callable seed its random generators",
            )
        self._digest = digest or self._digest


def _after(position: Position, row: Row) -> Position:
    """Return the position behind a row. Digests are chained, so that one can go on from a stored one."""
    digest = position.digest
    if digest is not None:
        label = digest_array(row.label) if isinstance(row.label, np.ndarray) else row.label
        arrays = {name: digest_array(array) for name, array in row.feeds.items()}
        digest = digest_json([digest, row.name, arrays, label])
    return Position(position.drawn + 1, digest, position.skipped)


def _no_samples(source: str, skipped: tuple[Skipped, ...]) -> DataRefused:
    if not skipped:
        return DataRefused(f"{source} holds no samples", hint="give images, or a .npz with an array 'x'")
    where = [f"{bad.name}: {bad.reason}" for bad in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        where.append(f"and {len(skipped) - _SHOWN} more")
    return DataRefused(f"{source}: all {len(skipped)} samples are bad", where=where, hint="give data that can be read")


def batches(samples: Iterable[Sample], size: int) -> Iterator[tuple[Tensors, tuple[Sample, ...]]]:
    """Group samples.

    Args:
        samples: A stream, or a part of one.
        size: Samples in a batch; the last may have fewer.

    Yields:
        Input name → ``[size, …]``, and the samples.

    Raises:
        DataRefused: Samples of a model with free sizes differ in shape.
    """
    iterator = iter(samples)
    while group := tuple(itertools.islice(iterator, size)):
        try:
            feeds = {name: np.concatenate([sample.feeds[name] for sample in group]) for name in group[0].feeds}
        except ValueError as exc:
            raise DataRefused(
                f"samples of different sizes make no batch: {group[0].name} to {group[-1].name}",
                hint="use batches of one, or bring the samples to one size",
            ) from exc
        yield feeds, group
