"""`Observations`: what a pass over the data saw, and the file that an interrupted pass leaves for the next to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cnncc.calibration.histogram import BINS, Histogram
from cnncc.calibration.stream import Position
from cnncc_runtime.files import atomic_file, storage_errors


@dataclass(frozen=True, eq=False)
class Observations:
    """What one pass saw.

    Attributes:
        histograms: Of each tensor.
        samples: How many were observed.
        position: Of the data, behind the last sample.
        course: Samples → tensor → 99.99th percentile, at every power of two and at the end: how ranges settled.
    """

    histograms: dict[str, Histogram] = field(default_factory=dict)
    samples: int = 0
    position: Position = field(default_factory=Position)
    course: dict[int, dict[str, float]] = field(default_factory=dict)


class _Note(msgspec.Struct, frozen=True):
    """What the file holds beside arrays."""

    names: list[str]
    samples: int
    position: Position
    course: dict[int, dict[str, float]]
    exponents: list[int | None]
    lowest: list[float]


def save_pass(path: Path, seen: Observations) -> None:
    """Write what was observed.

    Raises:
        StorageFailed: The disk is full, or the folder cannot be written.
    """
    found = list(seen.histograms.values())
    note = _Note(
        names=list(seen.histograms),
        samples=seen.samples,
        position=seen.position,
        course=seen.course,
        exponents=[histogram.exponent for histogram in found],
        lowest=[histogram.lowest for histogram in found],
    )
    arrays: dict[str, Any] = {f"channels_{index}": histogram.channels for index, histogram in enumerate(found)}
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            note=np.frombuffer(msgspec.json.encode(note), np.uint8),
            counts=np.stack([histogram.counts for histogram in found]),
            largest=np.array([histogram.largest for histogram in found]),
            **arrays,
        )


def load_pass(path: Path, tensors: Sequence[str]) -> Observations | None:
    """Return what an interrupted pass left, or None where there is nothing that can be gone on with.

    A file that is damaged is worth no more than none: the pass begins anew.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            note = msgspec.json.decode(stored["note"].tobytes(), type=_Note)
            counts, largest = stored["counts"], stored["largest"]
            channels = [stored[f"channels_{index}"] for index in range(len(note.names))]
        rows = zip(note.names, note.exponents, counts, largest, note.lowest, channels, strict=True)
        histograms = {name: Histogram(e, c, float(most), low, each) for name, e, c, most, low, each in rows}
    except Exception:  # zipfile and NumPy raise anything on damaged files
        return None
    if set(note.names) != set(tensors) or counts.shape[1:] != (BINS,) or counts.dtype != np.int64:
        return None
    return Observations(histograms, note.samples, note.position, note.course)
