"""Accuracy on validation data: what a user's budget is about, beside the SQNR of the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.calibration.judge import Noise
from cnncc.calibration.stream import DataStream, Sample, batches
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import Feeds, Tensors

TOP1 = "top-1"
MIOU = "mIoU"
AGREEMENT = "agreement"

_BATCH = 16
"""Samples that are run at once where the model allows it."""

_KEPT_BYTES = 256 << 20
"""Outputs of the float model that are kept between measurements; the others are computed again each time."""


@dataclass(frozen=True)
class Accuracy:
    """What a graph reaches on validation data.

    Attributes:
        metric: `TOP1`, `MIOU`, or `AGREEMENT` with the float model's top-1 where the data has no labels; empty where
            the outputs are no classes.
        value: Percent; 0 where there is no metric.
        sqnr_db: Of the outputs against the float model's, dB.
        samples: How many were measured.
    """

    metric: str
    value: float
    sqnr_db: float
    samples: int


class Validation:
    """Measures graphs on validation data, by their first output.

    Args:
        model: The float model.
        stream: The data.
        threads: That a run uses.
    """

    def __init__(self, model: OnnxGraph, stream: DataStream, *, threads: int = 0) -> None:
        self._stream = stream
        self._threads = threads
        self._batch, self._fixed = _batch(model)
        self._model = Reference(model, threads=threads)
        self._output = model.outputs[0].name
        self._kept: list[Tensors] = []
        self._room = _KEPT_BYTES

    def measure(self, graph: OnnxGraph | None = None) -> Accuracy:
        """Return what a graph reaches; what the float model itself reaches where none is given.

        Raises:
            DataRefused: Only some samples have labels, or the labels do not fit the output.
        """
        reference = Reference(graph, threads=self._threads) if graph is not None else None
        noise, tally = Noise(), _Tally()
        for number, (feeds, rows) in enumerate(batches(self._stream.samples(), self._batch)):
            full = _padded(feeds, self._batch) if self._fixed else feeds
            truth = _rows(self._truth(number, full), len(rows))
            found = truth if reference is None else _rows(reference.run(full), len(rows))
            noise.add(truth, found)
            for row, sample in enumerate(rows):
                tally.add(found[self._output][row : row + 1], truth[self._output][row : row + 1], sample)
        metric, value = tally.result()
        return Accuracy(metric, value, noise.db, tally.samples)

    def _truth(self, number: int, feeds: Feeds) -> Tensors:
        if number < len(self._kept):
            return self._kept[number]
        outputs = self._model.run(feeds)
        size = sum(array.nbytes for array in outputs.values())
        if number == len(self._kept) and size <= self._room:
            self._kept.append(outputs)
            self._room -= size
        return outputs


class _Tally:
    """Counts per class: hits for classes, and a confusion matrix's margins for maps of classes."""

    def __init__(self) -> None:
        self._metric: str | None = None
        self.samples = self._right = self._total = 0
        self._both = np.zeros(0, np.int64)
        self._either = np.zeros(0, np.int64)

    def add(self, found: NDArray[Any], truth: NDArray[Any], sample: Sample) -> None:
        self.samples += 1
        metric = _metric(found, sample)
        if self._metric not in (None, metric):
            raise DataRefused(
                f"{sample.name} has {'no label' if metric == AGREEMENT else 'a label'}, unlike the samples before it",
                hint="give labels for all samples or for none",
            )
        self._metric = metric
        if not metric:
            return
        classes = found.argmax(axis=1)
        if metric == MIOU:
            self._overlap(classes[0], np.asarray(sample.label), found.shape[1], sample.name)
            return
        if metric == TOP1:
            _check_label(sample, found)
        wanted = truth.argmax(axis=1) if metric == AGREEMENT else sample.label
        self._right += int((classes == wanted).sum())
        self._total += classes.size

    def _overlap(self, classes: NDArray[Any], wanted: NDArray[Any], count: int, name: str) -> None:
        if classes.shape != wanted.shape:
            raise DataRefused(f"{name}: the map of classes is {list(wanted.shape)}, the output {list(classes.shape)}")
        if not self._both.size:
            self._both, self._either = np.zeros(count, np.int64), np.zeros(count, np.int64)
        known = (wanted >= 0) & (wanted < count)  # maps mark what is not to be judged by 255 or -1
        classes, wanted = classes[known].astype(np.intp), wanted[known].astype(np.intp)
        same = np.bincount(classes[classes == wanted], minlength=count)
        self._both += same
        self._either += np.bincount(classes, minlength=count) + np.bincount(wanted, minlength=count) - same

    def result(self) -> tuple[str, float]:
        if self._metric == MIOU:
            seen = self._either > 0
            return MIOU, 100.0 * float((self._both[seen] / self._either[seen]).mean()) if seen.any() else 0.0
        return self._metric or "", 100.0 * self._right / self._total if self._total else 0.0


def _padded(feeds: Tensors, size: int) -> Tensors:
    """Fill up the last batch with its last sample."""
    return {name: np.concatenate([array, *[array[-1:]] * (size - len(array))]) for name, array in feeds.items()}


def _rows(outputs: Tensors, count: int) -> Tensors:
    return {name: array[:count] if array.ndim else array for name, array in outputs.items()}


def _batch(model: OnnxGraph) -> tuple[int, bool]:
    """Return how many samples to run at once, and whether the model demands it; several where the batch is free."""
    shapes = [spec.shape for spec in model.inputs if spec.shape]
    fixed = next((size for size in (shape[0] for shape in shapes) if isinstance(size, int)), 0)
    free = all(isinstance(size, int) for shape in shapes for size in shape[1:])
    return (fixed, True) if fixed else (_BATCH if free else 1, False)


def _check_label(sample: Sample, output: NDArray[Any]) -> None:
    if output.size > output.shape[1]:
        raise DataRefused(
            f"{sample.name} has one label, and the output is a map of classes {list(output.shape[2:])}",
            hint="give a map of classes [H, W] for each sample, or no labels",
        )
    if not 0 <= int(sample.label or 0) < output.shape[1]:
        raise DataRefused(
            f"{sample.name} has the label {sample.label}, and the output {output.shape[1]} classes",
            hint="labels count classes from 0, in the order of the outputs",
        )


def _metric(output: NDArray[Any], sample: Sample) -> str:
    """Return what an output can be measured by: empty for outputs that are no classes (regression)."""
    if output.dtype.kind != "f" or output.ndim < 2 or output.shape[1] < 2:
        return ""
    if sample.label is None:
        return AGREEMENT
    return MIOU if np.ndim(sample.label) else TOP1
