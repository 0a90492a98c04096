"""DATA that is images: a folder per class, a flat folder, or one file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnncc.calibration.source import BadRow, FileState, Row, draw
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.preprocess import Preprocessing, open_image
from cnncc_runtime.specs import TensorSpec

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class _File:
    """An image that was drawn.

    Attributes:
        name: Path below the root, with ``/``; bytes that are not UTF-8 are escaped.
        path: To open it by.
        label: Class index.
        state: When it was listed; None where it is no regular file.
    """

    name: str
    path: Path
    label: int | None
    state: FileState | None


@dataclass(frozen=True)
class ImageRows:
    """Images in the order drawn, each decoded when it is asked for."""

    files: tuple[_File, ...]
    input_name: str
    preprocessing: Preprocessing

    @property
    def count(self) -> int:
        """How many files were drawn."""
        return len(self.files)

    @property
    def identity(self) -> Any:
        """Name, label, size and time of each file drawn, in order."""
        return [
            [file.name, file.label, [file.state.size, file.state.modified] if file.state else None]
            for file in self.files
        ]

    def rows(self, start: int) -> Iterator[Row | BadRow]:
        """Decode one file after the other; one that cannot be decoded is a `BadRow`.

        Raises:
            DataRefused: A file changed since it was listed.
        """
        for file in self.files[start:]:
            yield self._row(file)

    def _row(self, file: _File) -> Row | BadRow:
        if file.state is None:
            return BadRow(file.name, DataRefused(f"{file.path} is not a file that can be read"))
        row: Row | BadRow
        try:
            image = open_image(file.path)
        except DataRefused as exc:
            row = BadRow(file.name, exc)
        else:
            row = self._applied(file, image)
        file.state.check(file.path)
        return row

    def _applied(self, file: _File, image: Image.Image) -> Row | BadRow:
        try:
            return Row(file.name, {self.input_name: self.preprocessing.apply(image)}, file.label)
        except DataRefused as exc:
            return BadRow(file.name, DataRefused(f"{file.path}: {exc.message}", hint=exc.hint))
        except ValueError as exc:  # Pillow has no conversion from the image's mode (LAB) to the contract's
            return BadRow(file.name, DataRefused(f"{file.path}: {exc}", hint="save it as an RGB or grey image"))


def find_images(
    path: Path, spec: TensorSpec, preprocessing: Preprocessing | None, limit: int | None, seed: int
) -> ImageRows:
    """List images, and draw from them.

    In folders the classes are the folders right below the root, sorted by name, empty ones too, as in torchvision's
    ``ImageFolder``; images right in the root have no label. Hidden files and folders (``.name``) are left out;
    links are followed, and a folder that several lead to is read once.

    Args:
        path: A folder or an image.
        spec: The input, batch size 1.
        preprocessing: The contract.
        limit: Images at most.
        seed: Of the draw.

    Raises:
        DataRefused: No contract, one that makes another input than the model takes, or a folder that cannot be read.
    """
    if preprocessing is None:
        raise DataRefused(
            "images need a preprocessing contract, and the model has none",
            hint="add --preprocess imagenet, or --preprocess FILE.toml, or `preprocessing` beside the factory",
        )
    _check_contract(preprocessing, spec)
    if path.is_dir():
        names, classes = _listing(path)
        root = path
    else:
        names, classes, root = [path.name], {}, path.parent
    files = []
    for index in draw(len(names), limit, seed):
        name = names[index]
        top = name.partition("/")[0]
        label = classes[top] if "/" in name else None
        files.append(_File(_printable(name), root / name, label, _state(root / name)))
    return ImageRows(tuple(files), spec.name, preprocessing)


def _check_contract(preprocessing: Preprocessing, spec: TensorSpec) -> None:
    channels = 1 if preprocessing.channels == "L" else 3
    height, width = preprocessing.size
    shape = (1, channels, height, width) if preprocessing.layout == "NCHW" else (1, height, width, channels)
    try:
        spec.check(np.broadcast_to(np.zeros((), preprocessing.dtype), shape))
    except DataRefused as exc:
        raise DataRefused(
            f"the preprocessing does not make what the model takes: {exc.message}",
            hint="give --preprocess the size, channels, layout and dtype of the model's input",
        ) from exc


def _listing(root: Path) -> tuple[list[str], dict[str, int]]:
    """Return the images below a folder, sorted, and the index of each class."""
    names: list[str] = []
    classes: dict[str, int] = {}
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(root)
        if below == Path():
            classes = {name: index for index, name in enumerate(folders)}
        images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
        names += [(below / name).as_posix() for name in images]
    return sorted(names), classes


def _refuse_folder(error: OSError) -> None:
    raise DataRefused(f"{error.filename} cannot be read: {error.strerror}") from error


def _state(path: Path) -> FileState | None:
    """Return a file's state; None where opening it would fail, or wait for ever, as a pipe does."""
    try:
        return FileState.of(path) if stat.S_ISREG(path.stat().st_mode) else None
    except OSError:
        return None


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
