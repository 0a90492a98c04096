"""DATA that is a ``.npz``: an array of inputs, or an array for each input of the model, and labels."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnncc.calibration.npy_rows import NpyRows
from cnncc.calibration.source import FileState, Row, check_batch, draw, label_of
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import TensorSpec

_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What zipfile, zlib and NumPy raise of a damaged or hostile file."""


@dataclass(frozen=True)
class ArchiveRows:
    """Rows in the order drawn, each read out of the archive when it is asked for."""

    path: Path
    state: FileState
    arrays: dict[str, NpyRows]
    labels: NpyRows | None
    title: str
    order: tuple[int, ...]
    values: bool = False

    @property
    def count(self) -> int:
        """How many rows were drawn."""
        return len(self.order)

    @property
    def identity(self) -> Any:
        """Name, size and time of the file, and the order."""
        return [self.path.name, self.state.size, self.state.modified, list(self.order)]

    def rows(self, start: int) -> Iterator[Row]:
        """Read one row after the other.

        Raises:
            DataRefused: The file is damaged, or changed since it was opened.
        """
        with _readable(self.path, self.state):
            file = self.path.open("rb")
        with file:
            for index in self.order[start:]:
                name = f"{self.title}[{index}]"
                with _readable(self.path, self.state):
                    feeds = {key: array.row(file.fileno(), index) for key, array in self.arrays.items()}
                    found = None if self.labels is None else self.labels.row(file.fileno(), index)[0]
                self.state.check(self.path)
                yield Row(name, feeds, None if found is None else label_of(name, np.asarray(found), values=self.values))


@contextlib.contextmanager
def _readable(path: Path, state: FileState) -> Iterator[None]:
    """Refuse a damaged file, or say that it was changed."""
    try:
        yield
    except _DAMAGE as exc:
        state.check(path)
        raise DataRefused(f"{path} is not a .npz file that can be read: {str(exc) or type(exc).__name__}") from exc


def open_archive(
    path: Path, specs: tuple[TensorSpec, ...], limit: int | None, seed: int, *, values: bool = False
) -> ArchiveRows:
    """Read the headers of an archive's arrays, and draw from its rows.

    A model's only input is the array ``x``, or one of the input's name; several inputs are arrays of their names.
    ``y``, where there is one and no input is called so, holds the labels: ``[N]``, or ``[N, H, W]``.

    Args:
        path: The file.
        specs: The inputs, batch size 1.
        limit: Rows at most.
        seed: Of the draw.
        values: Whether labels are values, for regression.

    Raises:
        DataRefused: Damaged, pickled, stored by columns, or not what the model takes.
    """
    try:
        state = FileState.of(path)
    except OSError as exc:
        raise DataRefused(f"{path} is not a .npz file that can be read: {exc}") from exc
    with _readable(path, state), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        names = _names(path, held, specs)
        arrays = {key: NpyRows(file, archive, f"{name}.npy") for key, name in names.items()}
        labelled = "y" in held and "y" not in names.values()
        labels = NpyRows(file, archive, "y.npy") if labelled else None
    total = check_batch(str(path), {names[key]: array for key, array in arrays.items()}, labels, values=values)
    for spec in specs:
        _check_rows(path, names[spec.name], arrays[spec.name], spec)
    title = names[specs[0].name] if len(specs) == 1 else "row"
    return ArchiveRows(path, state, arrays, labels, title, draw(total, limit, seed), values)


def _names(path: Path, held: list[str], specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Return which array feeds which input."""
    if len(specs) == 1:
        if name := next((name for name in ("x", specs[0].name) if name in held), None):
            return {specs[0].name: name}
        raise DataRefused(
            f"{path} holds {', '.join(held) or 'nothing'}, not 'x'",
            hint="save the inputs as 'x': numpy.savez('data.npz', x=x, y=y)",
        )
    if missing := [spec.name for spec in specs if spec.name not in held]:
        raise DataRefused(
            f"{path} holds {', '.join(held) or 'nothing'}, and the model's input {', '.join(missing)} is missing",
            hint=f"save an array for each input: numpy.savez('data.npz', {', '.join(f'{s.name}=…' for s in specs)})",
        )
    return {spec.name: spec.name for spec in specs}


def _check_rows(path: Path, name: str, array: NpyRows, spec: TensorSpec) -> None:
    """Refuse an array none of whose rows the model takes, before any is read."""
    if 0 in array.shape[1:]:
        raise DataRefused(f"{path}: the rows of '{name}' are empty: its shape is {list(array.shape)}")
    try:
        spec.check(np.broadcast_to(np.zeros((), array.dtype), (1, *array.shape[1:])))
    except ValueError as exc:  # more dimensions, or more elements, than NumPy has
        raise DataRefused(f"{path}: '{name}' has an impossible shape: {exc}") from exc
    except DataRefused as exc:
        raise DataRefused(f"{path}: {name}: {exc.message}", hint="one sample is one row of the input") from exc
