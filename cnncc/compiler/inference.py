"""Runs a bundle on files: images through the stored preprocessing, arrays as they are."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cnncc_runtime
from cnncc_runtime.bundle import Manifest, read_bundle
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.files import atomic_file
from cnncc_runtime.preprocess import open_image
from cnncc_runtime.specs import Tensors


@dataclass(frozen=True)
class Class:
    """One class of a classifier's answer.

    Attributes:
        index: Of the output.
        label: Its name, or the index where the bundle stores none.
        probability: 0 to 1.
    """

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the engine says of one input.

    Attributes:
        source: The file.
        milliseconds: Of the engine alone, warm.
        shapes: Output name → shape.
        classes: The most probable classes; empty where the model is no classifier.
    """

    source: str
    milliseconds: float
    shapes: dict[str, tuple[int, ...]]
    classes: tuple[Class, ...]


def infer(
    path: Path, sources: Sequence[Path], *, threads: int | None = None, top: int = 3, output: Path | None = None
) -> list[Prediction]:
    """Run a bundle on files, one after another.

    Args:
        path: The bundle.
        sources: Images, ``.npy`` or ``.npz`` files.
        threads: Of the engine.
        top: Classes to return.
        output: Where to write the outputs (``.npz``: ``NAME``, or ``NAME.0``, ``NAME.1``, … for several files).

    Raises:
        BundleRefused: The bundle is damaged.
        EngineMismatch: The engine was built for another machine.
        DataRefused: A file does not hold what the model takes.
        StorageFailed: The outputs cannot be written.
    """
    manifest = read_bundle(path).manifest
    found = []
    kept: Tensors = {}
    with cnncc_runtime.open(path, threads=threads) as session:
        for number, source in enumerate(sources):
            feeds = read_feeds(source, manifest)
            if number == 0:
                session.run(feeds)  # the first run fills caches and starts threads: its time says nothing
            start = time.perf_counter()
            outputs = session.run(feeds)
            elapsed = (time.perf_counter() - start) * 1e3
            shapes = {name: array.shape for name, array in outputs.items()}
            found.append(Prediction(str(source), elapsed, shapes, _classes(outputs, manifest.labels, top)))
            suffix = f".{number}" if len(sources) > 1 else ""
            kept |= {name + suffix: array for name, array in outputs.items()} if output else {}
    if output is not None:
        with atomic_file(output) as partial, partial.open("wb") as file:
            np.savez(file, **kept)  # type: ignore[arg-type]  # numpy types the names' keyword allow_pickle only
    return found


def read_feeds(source: Path, manifest: Manifest) -> Tensors:
    """Return the inputs that a file holds.

    Raises:
        DataRefused: Missing, damaged, or not what the model takes.
    """
    if not source.is_file():
        raise DataRefused(f"{source} does not exist", hint="give an image, a .npy or a .npz")
    names = [spec.name for spec in manifest.inputs]
    if source.suffix == ".npz":
        arrays = _load(source)
        # the data sets of `compile --data` call their only input "x"
        return {names[0]: arrays["x"]} if len(names) == 1 and list(arrays) == ["x"] else arrays
    if len(names) != 1:
        raise DataRefused(
            f"the model takes {len(names)} inputs: {', '.join(names)}", hint="give a .npz with all of them"
        )
    if source.suffix == ".npy":
        return {names[0]: _load(source)[""]}
    if manifest.preprocessing is None:
        raise DataRefused(
            "the bundle stores no preprocessing, so an image cannot become an input",
            hint="compile with --preprocess, or give a .npy",
        )
    return {names[0]: manifest.preprocessing.apply(open_image(source))}


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:  # np.load does not close what it refuses
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as exc:
        raise DataRefused(f"{path} is not a NumPy file that can be read: {exc}") from exc


def _classes(outputs: Tensors, labels: Sequence[str], top: int) -> tuple[Class, ...]:
    """Return the most probable classes of a classifier: one float output ``[1, classes]``."""
    values = next(iter(outputs.values()))
    if len(outputs) != 1 or values.ndim != 2 or values.shape[0] != 1 or values.shape[1] < 2 or values.dtype.kind != "f":
        return ()
    scores = values[0].astype(np.float64)
    if not _is_distribution(scores):
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    order = np.argsort(-scores, kind="stable")[:top]
    return tuple(Class(int(i), labels[i] if i < len(labels) else str(i), float(scores[i])) for i in order)


def _is_distribution(scores: NDArray[np.float64]) -> bool:
    return bool((scores >= 0).all() and abs(scores.sum() - 1) < 1e-3)
