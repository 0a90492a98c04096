"""The seed CNN: the small network that cnncc's examples, demos and tests share."""

from __future__ import annotations

import torch
from torch import nn

preprocessing = {"size": (28, 28), "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
"""How a picture becomes an input; cnncc stores it in the bundle."""

labels = [str(digit) for digit in range(10)]


class Digits(nn.Module):
    """Two convolution blocks and two linear layers; input ``float32[N, 3, 28, 28]``, output ``float32[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class logits."""
        return self.classifier(self.features(image))


def build() -> nn.Module:
    """Return the network: the factory that ``cnncc compile model.py:build`` calls."""
    return Digits()


def example_inputs() -> tuple[torch.Tensor, ...]:
    """Return an input of the shape that the engine is compiled for."""
    return (torch.zeros(1, 3, 28, 28),)
