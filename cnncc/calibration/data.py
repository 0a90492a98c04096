"""DATA: image folders, ``.npz`` files and callables, as the batches of one that a model takes.

There is no default data set. What was read, in which order and through which preprocessing, is one digest.
"""

from __future__ import annotations

import importlib
import itertools
import random
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.digests import digest_array, digest_json
from cnncc_runtime.errors import DataRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing, open_image
from cnncc_runtime.specs import Tensors, TensorSpec

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Sample:
    """One input of a model, batch size 1.

    Attributes:
        name: The file, or ``x[3]`` of an array.
        feeds: Input name → ``[1, …]``.
        label: Class index; None where the data has none.
    """

    name: str
    feeds: Tensors
    label: int | None


@dataclass(frozen=True)
class DataSet:
    """Samples with the digest of their content and order.

    Attributes:
        source: The DATA argument.
        samples: In a seeded order.
        digest: Of every array, label and the order.
    """

    source: str
    samples: tuple[Sample, ...]
    digest: str


def load_data(
    source: str,
    inputs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing | None,
    *,
    limit: int,
    seed: int = 0,
) -> DataSet:
    """Read up to ``limit`` samples.

    Args:
        source: A folder of images (a folder per class, or flat), a ``.npz`` with ``x`` and optionally ``y``, or
            ``package.module:factory`` that yields batches (an array, or ``(x, y)``).
        inputs: The model's inputs; images and arrays feed the only one.
        preprocessing: The contract; images need it.
        limit: Samples at most, drawn without replacement.
        seed: Of the draw.

    Raises:
        DataRefused: Empty, damaged, or not what the model takes.
        UsageError: The source is of none of these forms.
    """
    if len(inputs) != 1:
        raise DataRefused(
            f"the model takes {len(inputs)} inputs, and DATA feeds one",
            hint="leave --data out; seeded random inputs are used",
        )
    samples = tuple(itertools.islice(_samples(source, inputs[0], preprocessing, limit, random.Random(seed)), limit))
    if not samples:
        raise DataRefused(f"{source} holds no samples", hint="give images, or a .npz with an array 'x'")
    for sample in samples:
        _check(sample, inputs[0])
    digest = digest_json([[digest_array(sample.feeds[inputs[0].name]), sample.label] for sample in samples])
    return DataSet(source, samples, digest)


def _samples(
    source: str, spec: TensorSpec, preprocessing: Preprocessing | None, limit: int, rng: random.Random
) -> Iterator[Sample]:
    path = Path(source)
    if path.is_dir():
        return _images(path, spec, preprocessing, limit, rng)
    if path.suffix == ".npz":
        return _arrays(path, spec, limit, rng)
    if ":" in source:
        return _callable(source, spec)
    if path.is_file():
        return _images(path, spec, preprocessing, limit, rng)
    raise UsageError(
        f"{source} is not data that cnncc reads",
        hint="give a folder of images, a .npz file, or package.module:factory",
    )


def _images(
    path: Path, spec: TensorSpec, preprocessing: Preprocessing | None, limit: int, rng: random.Random
) -> Iterator[Sample]:
    if preprocessing is None:
        raise DataRefused(
            "images need a preprocessing contract, and the model has none",
            hint="add --preprocess imagenet, or --preprocess FILE.toml, or `preprocessing` beside the factory",
        )
    root = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    classes = {name: index for index, name in enumerate(sorted({p.parent.name for p in files if p.parent != root}))}
    if len(files) > limit:
        files = rng.sample(files, limit)
    for file in files:
        feeds = {spec.name: preprocessing.apply(open_image(file))}
        yield Sample(str(file.relative_to(root)), feeds, classes.get(file.parent.name) if file.parent != root else None)


def _arrays(path: Path, spec: TensorSpec, limit: int, rng: random.Random) -> Iterator[Sample]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if "x" not in archive.files:
                raise DataRefused(
                    f"{path} holds {', '.join(archive.files) or 'nothing'}, not 'x'",
                    hint="save the inputs as 'x': numpy.savez('data.npz', x=x, y=y)",
                )
            x = archive["x"]
            y = archive["y"] if "y" in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DataRefused(f"{path} is not a .npz file that can be read: {exc}") from exc
    _check_batch(str(path), x, y)
    order = rng.sample(range(len(x)), min(limit, len(x)))
    return _split(x, y, order, spec)


def _check_batch(source: str, x: NDArray[Any], y: NDArray[Any] | None) -> None:
    if x.ndim == 0:
        raise DataRefused(
            f"{source}: x is a single {x.dtype}, not an array of inputs", hint="one row of x is one input"
        )
    if y is None:
        return
    if y.ndim != 1 or y.dtype.kind not in "iubf":
        raise DataRefused(f"{source}: y is {y.dtype}{list(y.shape)}, not a class index per input")
    if len(y) != len(x):
        raise DataRefused(f"{source} holds {len(x)} inputs and {len(y)} labels")


def _split(x: NDArray[Any], y: NDArray[Any] | None, order: Iterable[int], spec: TensorSpec) -> Iterator[Sample]:
    for index in order:
        label = None if y is None else int(y[index])
        yield Sample(f"x[{index}]", {spec.name: np.ascontiguousarray(x[index : index + 1])}, label)


def _callable(source: str, spec: TensorSpec) -> Iterator[Sample]:
    module_name, _, name = source.partition(":")
    try:
        factory: Callable[[], Iterable[Any]] = getattr(importlib.import_module(module_name), name)
        for number, batch in enumerate(factory()):
            x, y = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
            x, y = np.asarray(x), None if y is None else np.asarray(y)
            _check_batch(f"batch {number} of {source}", x, y)
            for sample in _split(x, y, range(len(x)), spec):
                yield Sample(f"batch {number} {sample.name}", sample.feeds, sample.label)
    except DataRefused:
        raise
    except Exception as exc:  # the user's code may raise anything
        raise DataRefused(f"{source} cannot be called: {type(exc).__name__}: {exc}") from exc


def _check(sample: Sample, spec: TensorSpec) -> None:
    array = sample.feeds[spec.name]
    try:
        TensorSpec(spec.name, (1, *spec.shape[1:]), spec.dtype).check(array)
    except DataRefused as exc:
        raise DataRefused(f"{sample.name}: {exc.message}", hint="one sample is one row of the input") from exc
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataRefused(f"{sample.name} holds NaN or Inf")
