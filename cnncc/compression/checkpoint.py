"""What a training leaves when it is cut short: everything that the rest of it depends on.

A file of ``torch.save`` that holds tensors and plain data alone, and is read as such: nothing in it is executed.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import atomic_file, storage_errors

_FORM = "cnncc.training/1"

State = dict[str, Any]


@dataclass
class Checkpoint:
    """Where a training stands.

    Attributes:
        identity: Of everything that it depends on: name → digest or value.
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

    identity: dict[str, str]
    epoch: int = 0
    step: int = 0
    total: float = 0.0
    parts: dict[str, State] = field(default_factory=dict)
    generator: torch.Tensor | None = None
    best: float = float("nan")
    best_epoch: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        StorageFailed: The disk is full, or the folder cannot be written.
    """
    with atomic_file(path) as partial:
        torch.save({"form": _FORM, **vars(checkpoint)}, partial)


def read_checkpoint(path: Path, identity: dict[str, str]) -> Checkpoint | None:
    """Read the checkpoint of a training that was cut short; None where there is none.

    Args:
        path: The file.
        identity: Of the training that is to go on.

    Raises:
        UsageError: The file is damaged, or of another training; it says what differs.
        StorageFailed: It cannot be read.
    """
    with storage_errors(path):
        if not path.exists():
            return None
    fresh = "--fresh begins anew, and replaces it"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(held, dict) or held.pop("form", None) != _FORM:
            raise ValueError("it is no checkpoint of cnncc")
        found = Checkpoint(**held)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, KeyError, OSError) as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise UsageError(f"the checkpoint {path} cannot be read: {reason[:200]}", hint=fresh) from exc
    names = [name for name in identity.keys() | found.identity.keys() if identity.get(name) != found.identity.get(name)]
    if names:
        raise UsageError(
            f"{path} is the checkpoint of another training: it differs in {', '.join(sorted(names))}",
            where=[
                f"{name}: {found.identity.get(name, 'none')[:60]} there, {identity.get(name, 'none')[:60]} now"
                for name in sorted(names)
            ],
            hint=f"the command that it began with goes on from it; {fresh}",
        )
    return found
