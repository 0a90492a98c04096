"""What long work leaves when it is cut short: everything that the rest of it depends on.

A file of ``torch.save`` that holds tensors and plain data alone, and is read as such: nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import atomic_file, storage_errors

State = dict[str, Any]


@dataclass
class Kept:
    """What every checkpoint has.

    Attributes:
        FORM: Of the file.
        WORK: What it is called.
        identity: Of everything that the work depends on: name → digest or value.
    """

    FORM: ClassVar[str]
    WORK: ClassVar[str]

    identity: dict[str, str]


K = TypeVar("K", bound=Kept)


@dataclass
class Checkpoint(Kept):
    """Where a training stands.

    Attributes:
        epoch: Epochs that are over.
        step: Steps of the epoch that is not.
        total: Sum of the losses of those steps, each times its samples.
        parts: Name → state dict: model, optimizer, schedule, precision, average, what is trained beside the model.
        generator: State of torch's random numbers, on the CPU.
        best: The best value of the metric so far; NaN before there is one.
        best_epoch: Whose that is; 0 for none.
        best_weights: The weights then.
        history: Of each epoch: loss, metric, learning rate.
    """

    FORM = "cnncc.training/1"
    WORK = "training"

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    parts: dict[str, State] = field(default_factory=dict)
    generator: torch.Tensor | None = None
    best: float = float("nan")
    best_epoch: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def checkpoint_of(output: Path) -> Path:
    """Return where the checkpoint lies of what makes a file."""
    return output.with_name(f"{output.name}.checkpoint")


@contextlib.contextmanager
def resumable(*paths: Path, note: Callable[[str], None], fresh: bool = False) -> Iterator[None]:
    """Do work that keeps checkpoints, which are removed once what came of it is written.

    Args:
        paths: Of the checkpoints; the first is there whenever another is.
        note: Told how to go on where the work is interrupted.
        fresh: Whether to begin anew where there are some.

    Raises:
        StorageFailed: They cannot be removed.
    """
    if fresh:
        _remove(paths)
    with tells_how_to_go_on(paths[0], note):
        yield
    _remove(paths)


@contextlib.contextmanager
def tells_how_to_go_on(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Say, where work is interrupted, that it goes on from what it keeps."""
    try:
        yield
    except KeyboardInterrupt:
        if path.exists():
            note(f"the same command goes on from {path}")
        raise


def _remove(paths: tuple[Path, ...]) -> None:
    for path in reversed(paths):
        with storage_errors(path):
            path.unlink(missing_ok=True)


def write_checkpoint(checkpoint: Kept, path: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        StorageFailed: The disk is full, or the folder cannot be written.
    """
    data = io.BytesIO()  # on a full disk, torch.save says RuntimeError, and of another thing
    torch.save({"form": checkpoint.FORM, **vars(checkpoint)}, data)
    with atomic_file(path) as partial:
        partial.write_bytes(data.getbuffer())


def read_checkpoint(kind: type[K], path: Path, identity: dict[str, str]) -> K | None:
    """Read the checkpoint of work that was cut short; None where there is none.

    Args:
        kind: What it is of.
        path: The file.
        identity: Of the work that is to go on.

    Raises:
        UsageError: The file is damaged, or of other work; it says what differs.
        StorageFailed: It cannot be read.
    """
    with storage_errors(path):
        if not path.exists():
            return None
    fresh = "--fresh begins anew, and replaces it"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(held, dict) or held.pop("form", None) != kind.FORM:
            raise ValueError(f"it is no checkpoint of a {kind.WORK} of cnncc")
        found = kind(**held)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, KeyError, OSError) as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise UsageError(f"the checkpoint {path} cannot be read: {reason[:200]}", hint=fresh) from exc
    names = [name for name in identity.keys() | found.identity.keys() if identity.get(name) != found.identity.get(name)]
    if names:
        raise UsageError(
            f"{path} is the checkpoint of another {kind.WORK}: it differs in {', '.join(sorted(names))}",
            where=[
                f"{name}: {found.identity.get(name, 'none')[:60]} there, {identity.get(name, 'none')[:60]} now"
                for name in sorted(names)
            ],
            hint=f"the command that it began with goes on from it; {fresh}",
        )
    return found
