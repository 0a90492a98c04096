"""The preprocessing contract and the class names as the user gives them on the command line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import msgspec

from cnncc_runtime.errors import DataRefused, UsageError
from cnncc_runtime.preprocess import PRESETS, Preprocessing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_LABELS = 1_000_000


def read_preprocessing(text: str) -> Preprocessing:
    """Return the contract that ``--preprocess`` names: a preset, or a TOML file with the contract's fields.

    Raises:
        UsageError: Neither.
        DataRefused: The file's fields are not valid.
    """
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if path.suffix != ".toml":
        raise UsageError(
            f"'{text}' is no preprocessing preset", hint=f"{', '.join(PRESETS)}, or a FILE.toml with {_fields()}"
        )
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Strict).contract()
    except (OSError, ValueError) as exc:  # tomllib's and msgspec's errors are ValueErrors
        raise DataRefused(f"{path} is no preprocessing contract: {exc}", hint=f"its fields are {_fields()}") from exc


def _fields() -> str:
    return ", ".join(field.name for field in dataclasses.fields(Preprocessing))


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """The contract's fields; a misspelt one is an error, not a default."""

    size: tuple[int, int]
    resize: int = 0
    interpolation: str = "bilinear"
    channels: str = "RGB"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "NCHW"
    dtype: str = "float32"

    def contract(self) -> Preprocessing:
        count = 1 if self.channels == "L" else 3
        fields = msgspec.structs.asdict(self)
        return Preprocessing(**{**fields, "mean": self.mean or (0.0,) * count, "std": self.std or (1.0,) * count})


def read_labels(path: Path) -> tuple[str, ...]:
    """Return class names, one a line.

    Raises:
        DataRefused: The file cannot be read, is not text, or is absurdly long.
    """
    try:
        labels = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as exc:
        raise DataRefused(f"{path} holds no class names: {exc}", hint="one name a line, UTF-8") from exc
    if not labels or len(labels) > MAX_LABELS:
        raise DataRefused(
            f"{path} holds {len(labels)} class names", hint="one name a line, in the order of the outputs"
        )
    return labels
