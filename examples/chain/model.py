"""A residual network that is roomier than handwritten digits need: what there is to take out is for `cnncc shrink`."""

from __future__ import annotations

import torch
from torch import nn

preprocessing = {"size": (28, 28), "interpolation": "bilinear", "channels": "L", "mean": (0.5,), "std": (0.5,)}
"""How a picture becomes an input; cnncc stores it in the bundle."""

labels = [str(digit) for digit in range(10)]


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015); a stride halves the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map ``float32[N, inputs, H, W]`` to ``float32[N, outputs, H / stride, W / stride]``."""
        inner = torch.relu(self.first_norm(self.first(image)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(image))


class Residual(nn.Module):
    """A stem, three residual blocks and a linear layer; input ``float32[N, 1, 28, 28]``, output ``float32[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32, 32, 2), Block(32, 64, 2), Block(64, 128, 2))
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class logits."""
        return self.classifier(self.blocks(self.stem(image)))


def build() -> nn.Module:
    """Return the network: the factory that ``cnncc train model.py:build`` calls."""
    return Residual()


def example_inputs() -> tuple[torch.Tensor, ...]:
    """Return an input of the shape that the engine is compiled for."""
    return (torch.zeros(1, 1, 28, 28),)
