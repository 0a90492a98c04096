"""What the user names as MODEL, parsed: nothing here imports torch or onnx.

MODEL is one of ``file.py:factory``, ``package.module:factory``, ``model.pt2``, ``model.onnx``, ``timm:NAME`` and
``torchvision:NAME``.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from cnncc_runtime.errors import ModelRefused, UsageError
from cnncc_runtime.specs import DTYPES

BATCH = "N"
"""The one symbolic dimension: the batch, in dimension 0."""

FORMS = (
    "file.py:factory, package.module:factory, model.pt2, model.onnx, timm:NAME or torchvision:NAME; "
    "see `cnncc compile --help`"
)

_MAX_ELEMENTS = 2**31
"""More elements in one input than any engine takes; stops a slip of the finger from eating all memory."""

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
_ZOOS = ("timm", "torchvision")


@dataclass(frozen=True)
class ModelRequest:
    """What the user asked to be read.

    Attributes:
        reference: MODEL as given.
        weights: State dict to load into the factory's module.
        input_shapes: ``1,3,28,28`` by position or ``name=1,3,28,28``; ``N`` first is the symbolic batch.
        input_dtypes: ``uint8`` by position or ``name=uint8``.
    """

    reference: str
    weights: Path | None = None
    input_shapes: tuple[str, ...] = ()
    input_dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelReference:
    """MODEL, taken apart.

    Attributes:
        kind: ``file``, ``module``, ``pt2``, ``onnx``, ``timm`` or ``torchvision``.
        target: The file's path, the module's dotted name, or the zoo's model name.
        factory: Name of the callable; empty for kinds that have none.
    """

    kind: str
    target: str
    factory: str = ""

    @property
    def path(self) -> Path | None:
        """The file that MODEL names, or None."""
        return Path(self.target) if self.kind in ("file", "pt2", "onnx") else None

    @property
    def label(self) -> str:
        """MODEL without the folders: what is stored and shown."""
        head = self.path.name if self.path else self.target
        if self.kind in _ZOOS:
            return f"{self.kind}:{head}"
        return f"{head}:{self.factory}" if self.factory else head

    @property
    def name(self) -> str:
        """A short name for the model."""
        return self.factory.rpartition(".")[2] or (self.path.stem if self.path else self.target)


def parse_reference(text: str) -> ModelReference:
    """Take MODEL apart; looks at no file's content except to suggest a factory.

    Raises:
        UsageError: Not one of the forms; says which is nearest.
        ModelRefused: The file is missing or is a folder.
    """
    if not text:
        raise UsageError("no model was given", hint=FORMS)
    head, colon, tail = text.rpartition(":")
    if colon and head in _ZOOS:
        if not tail:
            raise UsageError(f"'{text}' names no model", hint=f"{head}:resnet50, for example")
        return ModelReference(head, tail)
    if colon and head.endswith(".py"):
        return _file_factory(Path(head), tail)
    if Path(text).suffix in (".pt2", ".onnx"):
        return ModelReference(Path(text).suffix[1:], str(existing_file(Path(text))))
    if colon and _DOTTED.fullmatch(head):
        _check_factory_name(tail)
        return ModelReference("module", head, tail)
    raise _unknown_form(text)


def existing_file(path: Path) -> Path:
    """Return the path of a regular file.

    Raises:
        ModelRefused: Missing, a folder, or not a regular file.
    """
    try:
        if path.is_file():
            return path
        what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
    except (OSError, ValueError) as exc:  # a name too long, a null byte
        raise ModelRefused(f"the path cannot be used: {exc}") from exc
    raise ModelRefused(f"{path} {what}", hint=FORMS)


def _file_factory(path: Path, factory: str) -> ModelReference:
    existing_file(path)
    if not factory:
        raise _no_factory(path)
    _check_factory_name(factory)
    return ModelReference("file", str(path), factory)


def _check_factory_name(name: str) -> None:
    if not _DOTTED.fullmatch(name):
        raise UsageError(f"'{name}' is not the name of a factory", hint="for example model.py:build")


def _unknown_form(text: str) -> UsageError | ModelRefused:
    path = Path(text)
    if path.suffix == ".py":
        existing_file(path)
        return _no_factory(path)
    if path.suffix in _WEIGHT_SUFFIXES:
        return UsageError(
            f"{path.name} holds weights, not a model", hint=f"file.py:factory --weights {path.name}, or a model.pt2"
        )
    if path.exists():
        return ModelRefused(f"{path} is not a model that cnncc reads", hint=FORMS)
    return UsageError(f"'{text}' is not a model", hint=FORMS)


def _no_factory(path: Path) -> UsageError:
    names = factory_names(path)
    hint = " or ".join(f"{path}:{name}" for name in names[:3]) or f"{path}:factory"
    return UsageError(f"{path} holds code: say which callable makes the model", hint=hint)


def factory_names(path: Path) -> list[str]:
    """List the public functions and classes that a file defines, without running it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def parse_shapes(texts: tuple[str, ...]) -> dict[str | int, tuple[int | str, ...]]:
    """Parse ``--input-shape`` values: name, or position among the unnamed, → shape.

    Raises:
        UsageError: Says which value is wrong and how to write it.
    """
    return {key: _parse_shape(text, value) for key, text, value in _keyed(texts, "--input-shape")}


def parse_dtypes(texts: tuple[str, ...]) -> dict[str | int, str]:
    """Parse ``--input-dtype`` values: name, or position among the unnamed, → NumPy name.

    Raises:
        UsageError: Not one of `DTYPES`.
    """
    found: dict[str | int, str] = {}
    for key, text, value in _keyed(texts, "--input-dtype"):
        if value not in DTYPES:
            raise UsageError(f"--input-dtype {text}: '{value}' is not a dtype", hint=", ".join(DTYPES))
        found[key] = value
    return found


def _keyed(texts: tuple[str, ...], flag: str) -> list[tuple[str | int, str, str]]:
    found: list[tuple[str | int, str, str]] = []
    position = 0
    for text in texts:
        name, equals, value = text.rpartition("=")
        key: str | int = name.strip()
        if not equals:
            key, position = position, position + 1
        elif not key:
            raise UsageError(f"{flag} {text}: the name before '=' is empty", hint=f"{flag} name=…")
        if any(key == other for other, _, _ in found):
            raise UsageError(f"{flag} gives '{key}' twice")
        found.append((key, text, value.strip()))
    return found


def _parse_shape(text: str, value: str) -> tuple[int | str, ...]:
    hint = "comma-separated sizes, batch first: --input-shape 1,3,224,224, or N,3,224,224 for any batch"
    sizes: list[int | str] = []
    elements = 1
    for index, part in enumerate(piece.strip() for piece in value.split(",")):
        if part == BATCH and index == 0:
            sizes.append(BATCH)
        elif re.fullmatch(r"[0-9]{1,10}", part) and int(part) > 0:
            sizes.append(int(part))
            elements *= int(part)
        else:
            raise UsageError(f"--input-shape {text}: '{part}' is not a size", hint=hint)
    if elements > _MAX_ELEMENTS:
        raise UsageError(f"--input-shape {text}: {elements} elements are more than an engine takes", hint=hint)
    return tuple(sizes)
