"""DATA: image folders, ``.npz`` files and callables, as a stream of the batches of one that a model takes.

There is no default data set. What was read, in which order and through which preprocessing, is one digest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cnncc.calibration.archives import open_archive
from cnncc.calibration.callables import open_callable
from cnncc.calibration.images import IMAGE_SUFFIXES, find_images
from cnncc.calibration.random_rows import RandomRows
from cnncc.calibration.source import Source
from cnncc.calibration.stream import DataStream, Sample
from cnncc_runtime.errors import DataRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import TensorSpec

RANDOM = "random"
"""DATA that asks for seeded random inputs; a folder of that name is ``./random``."""


def open_data(
    source: str,
    inputs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing | None,
    *,
    limit: int | None,
    seed: int = 0,
    skip_bad: bool = False,
    values: bool = False,
) -> DataStream:
    """Find the data and draw from it; samples are read later.

    Args:
        source: A folder of images (a folder per class, or flat), an image, a ``.npz`` with ``x`` (or arrays of the
            inputs' names) and optionally ``y``, ``package.module:factory`` or ``file.py:factory`` that yields batches
            (an array, a dict by input name, or a pair of that and labels), or ``random``.
        inputs: The model's inputs; a sample is one row of them, also where the batch is fixed.
        preprocessing: The contract; images need it.
        limit: Samples at most; None takes all.
        seed: Of the draw, and of ``random``.
        skip_bad: Whether to leave out images that cannot be decoded and samples with NaN or Inf, and count them. They
            are not replaced by others.
        values: Whether labels are values ``[N, …]``, for regression, and not classes.

    Raises:
        DataRefused: Empty, damaged, or not what the model takes.
        UsageError: The source is of none of these forms, or random and without a limit.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} samples are too few", hint="ask for one at least")
    specs = tuple(dataclasses.replace(spec, shape=(1, *spec.shape[1:])) for spec in inputs)
    reader = _reader(source, specs, preprocessing, limit, seed, values=values)
    settings = [dataclasses.asdict(preprocessing) if preprocessing else None, limit, seed]
    return DataStream(source, reader, specs, settings=settings, skip_bad=skip_bad, random=source == RANDOM)


def _reader(
    source: str,
    specs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing | None,
    limit: int | None,
    seed: int,
    *,
    values: bool,
) -> Source:
    if source == RANDOM:
        if limit is None:
            raise UsageError("random data has no end", hint="say how many samples: --samples 512")
        return RandomRows(specs, limit, seed)
    path = Path(source)
    try:
        folder, file = bool(source) and path.is_dir(), path.is_file()
    except OSError:  # a name too long
        folder = file = False
    if file and path.suffix == ".npz":
        return open_archive(path, specs, limit, seed, values=values)
    if folder or (file and path.suffix.lower() in IMAGE_SUFFIXES):
        if len(specs) != 1:
            raise DataRefused(
                f"the model takes {len(specs)} inputs, and images feed one",
                hint="give a .npz with an array for each input, or a callable that yields dicts by input name",
            )
        return find_images(path, specs[0], preprocessing, limit, seed)
    if ":" in source and not file:
        return open_callable(source, specs, limit, values=values)
    raise UsageError(
        f"{source or 'nothing'} is not data that cnncc reads" + ("" if file else ": there is no such file or folder"),
        hint="give a folder of images, a .npz file, package.module:factory, file.py:factory, or random",
    )


@dataclass(frozen=True)
class DataSet:
    """Samples in memory, with the digest of their content and order.

    Attributes:
        source: The DATA argument.
        samples: In a seeded order.
        digest: See `DataStream.digest`.
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
    """Read up to ``limit`` samples into memory: see `open_data`.

    Raises:
        DataRefused: Empty, damaged, or not what the model takes.
        UsageError: The source is of none of these forms.
    """
    stream = open_data(source, inputs, preprocessing, limit=limit, seed=seed)
    return DataSet(source, tuple(stream), stream.digest)
