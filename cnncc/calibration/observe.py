"""One pass over the data: histograms of the tensors that layers read, in memory that does not grow with the data.

ONNX Runtime computes the tensors with its optimizations off; samples are computed side by side, each on one thread,
and their histograms are merged. Merging is exact, so the result depends on the samples alone: not on the number of
workers, nor on where an interrupted pass was taken up again.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import numpy as np

from cnncc.calibration.histogram import Histogram
from cnncc.calibration.observations import Observations, load_pass, save_pass
from cnncc.calibration.stream import DataStream, Sample, batches
from cnncc.calibration.taps import Taps
from cnncc.calibration.thresholds import percentile
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import side_by_side
from cnncc_runtime.errors import DataRefused, ModelRefused
from cnncc_runtime.specs import Tensors

_AHEAD = 4
"""Samples per worker that are read before their histograms are merged."""

_SAVE_EVERY = 10.0
"""Seconds between two savings of what was observed."""

Progress = Callable[[str, float], None]
"""Told what is being done, and what share of it is done."""

Batch = tuple[Tensors, tuple[Sample, ...]]
"""Inputs of one run, and the samples they are made of."""

Histograms = dict[str, Histogram]


def observe(
    graph: OnnxGraph,
    tensors: Sequence[str],
    stream: DataStream,
    *,
    workers: int = 1,
    resume: Path | None = None,
    progress: Progress = lambda what, fraction: None,
) -> Observations:
    """Observe tensors over all samples.

    Args:
        graph: In float32, every value's type known.
        tensors: Names of values that the graph makes or takes.
        stream: The samples.
        workers: Samples that are computed side by side.
        resume: Where a pass that is cut short leaves what it has, for the next to go on; its name must tell apart
            whatever changes the result. Removed at the end.
        progress: Told how far the pass is.

    Raises:
        DataRefused: There are no samples, or a sample does not fit the model.
        ModelRefused: A tensor becomes NaN or infinite on a sample.
    """
    seen = (load_pass(resume, tensors) if resume else None) or Observations()
    taps = Taps(graph, tensors)
    size = batch_of(graph)
    full = (batch for batch in batches(stream.samples(seen.position), size) if len(batch[1]) == size)
    saved = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            while chunk := list(itertools.islice(full, _AHEAD * workers)):
                for batch, found in zip(chunk, pool.map(partial(_histograms, taps), chunk), strict=True):
                    seen = _extended(seen, batch, found)
                progress(f"observed {seen.samples} samples", seen.samples / max(stream.count or 2 * seen.samples, 1))
                if resume and time.monotonic() - saved > _SAVE_EVERY:
                    save_pass(resume, seen)
                    saved = time.monotonic()
        except BaseException:  # Ctrl-C, a damaged image: the next run goes on from here
            if resume and seen.samples:
                save_pass(resume, seen)
            raise
    if not seen.samples:
        raise DataRefused("there are too few samples for one batch", hint="give more, or export with a batch of 1")
    if resume:
        resume.unlink(missing_ok=True)
    return _noted(seen)


def observe_batches(graph: OnnxGraph, tensors: Sequence[str], found: Sequence[Batch]) -> dict[str, Histogram]:
    """Observe tensors over a few samples, one at least, that are in memory already.

    Raises:
        ModelRefused: A tensor becomes NaN or infinite on a sample.
    """
    taps = Taps(graph, tensors, threads=0, beside=len(found))
    return reduce(_merged, side_by_side(partial(_histograms, taps), found))


def batch_of(graph: OnnxGraph) -> int:
    """Return how many samples a graph takes at once: 1 where its batch is symbolic."""
    sizes = [spec.shape[0] for spec in graph.inputs if spec.shape]
    return next((size for size in sizes if isinstance(size, int)), 1)


def _extended(seen: Observations, batch: Batch, found: Histograms) -> Observations:
    """Add what a batch showed; the course is noted where the number of samples passed a power of two."""
    _feeds, rows = batch
    merged = _merged(seen.histograms, found) if seen.histograms else found
    extended = Observations(merged, seen.samples + len(rows), rows[-1].position, seen.course)
    return _noted(extended) if extended.samples.bit_length() > seen.samples.bit_length() else extended


def _merged(one: Histograms, other: Histograms) -> Histograms:
    return {name: one[name].merge(other[name]) for name in one}


def _noted(seen: Observations) -> Observations:
    now = {name: percentile(histogram) for name, histogram in seen.histograms.items()}
    return replace(seen, course={**seen.course, seen.samples: now})


def _histograms(taps: Taps, batch: Batch) -> Histograms:
    feeds, rows = batch
    found = {}
    for name, array in taps.values(feeds):
        try:
            found[name] = Histogram.of(np.asarray(array, np.float32))
        except FloatingPointError as exc:
            samples = rows[0].name if len(rows) == 1 else f"{rows[0].name} to {rows[-1].name}"
            raise ModelRefused(
                f"'{name}' holds NaN or Inf on {samples}: no range can be found for it",
                where=[taps.place(name)],
                hint="run the float model on that sample; look for overflow, division by zero, or bad weights",
            ) from exc
    return found
