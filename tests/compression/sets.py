"""Small data sets and networks that train in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from cnncc.calibration.data import open_data
from cnncc.compression.examples import Examples
from cnncc_runtime.specs import TensorSpec

SPECS = (TensorSpec("x", (1, 3, 12, 12)),)
CLASSES = 4


class Silence:
    """Keeps what a training tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.epochs: list[dict[str, float]] = []
        self.stages: list[tuple[str, str]] = []
        self.steps = 0

    def step(self, epoch: int, done: float) -> None:
        self.steps += 1

    def epoch(self, number: int, facts: object) -> None:
        self.epochs.append(dict(facts))  # type: ignore[call-overload]

    def stage(self, name: str, seconds: float | None, detail: str) -> None:
        self.stages.append((name if seconds is not None else f"{name} reused", detail))

    def note(self, text: str) -> None:
        self.notes.append(text)


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw noisy bars: the class says which quarter of the image is bright. ``float32[n, 3, 12, 12]``, ``int64[n]``."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % CLASSES
    x = random.standard_normal((count, 3, 12, 12)).astype(np.float32) * 0.5
    for image, label in zip(x, y, strict=True):
        image[:, :, 3 * label : 3 * label + 3] += 1.0
    return x, y.astype(np.int64)


def examples(folder: Path, count: int = 64, seed: int = 0, **arrays: np.ndarray) -> Examples:
    """Return bars as examples, in a file; ``arrays`` replace x and y."""
    x, y = bars(count, seed)
    path = folder / f"bars-{count}-{seed}-{len(list(folder.iterdir()))}.npz"
    np.savez(path, **{"x": x, "y": y, **arrays})
    return Examples(open_data(str(path), SPECS, None, limit=None))


def net(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    """Return a small network with BatchNorm and dropout: both are state, and both are random or averaged."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(8 * 36, CLASSES),
    )


def check_same_weights(one: str | Path, other: str | Path) -> None:
    """Hold two files of weights to each other, bit for bit."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert np.array_equal(tensor.numpy(), second[name].numpy()), name
