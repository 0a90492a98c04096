"""Images, moved about: one affine map a sample, drawn from a generator of the batch's own.

The same seed, epoch and batch give the same images, so that a training that was cut short goes on as it would have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from cnncc_runtime.errors import UsageError

_BOUNDS = {"shift": 1e4, "rotate": 180.0, "scale": 0.9, "noise": 1e4}
IGNORED = 255
"""The class of a pixel that came from outside of a map of classes: losses and metrics leave it out."""


@dataclass(frozen=True)
class Augment:
    """How far images are moved.

    Attributes:
        flip: Whether every second one is mirrored, left to right.
        shift: Pixels, at most, either way along both axes.
        rotate: Degrees, at most, either way.
        scale: Share of the size, at most, larger or smaller.
        noise: Standard deviation of what is added to each value.
    """

    flip: bool = False
    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    noise: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether pixels change their places."""
        return bool(self.flip or self.shift or self.rotate or self.scale)

    def apply(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images moved about, and maps of classes with them; what comes from outside repeats the border.

        Args:
            images: ``[n, c, h, w]``, floating.
            labels: ``[n]``, or maps of classes ``[n, h, w]``, where what comes from outside is `IGNORED`.
            generator: Every draw is from it.
        """
        if self.moves:
            grid = functional.affine_grid(self._maps(images, generator), list(images.shape), align_corners=False)
            images = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
            if labels.ndim == images.ndim - 1:
                labels = _moved(labels, grid)
        if self.noise:
            images = images + self.noise * torch.randn(images.shape, generator=generator)
        return images, labels

    def _maps(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return, for each image, where in it a pixel of the result lies: ``[n, 2, 3]``, in halves of the image."""
        count, _, height, width = images.shape

        def draw(most: float) -> torch.Tensor:
            return most * (2 * torch.rand(count, generator=generator) - 1)

        angle, size = draw(math.radians(self.rotate)), 1 + draw(self.scale)
        right, down = draw(2 * self.shift / width), draw(2 * self.shift / height)
        mirror = 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float() if self.flip else torch.ones(count)
        cosine, sine = torch.cos(angle) * size, torch.sin(angle) * size
        rows = (cosine * mirror, -sine * height / width, right, sine * mirror * width / height, cosine, down)
        return torch.stack(rows, dim=1).view(count, 2, 3)


def _moved(labels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return maps of classes where `grid` says; shifted by one, so that what lies outside, 0, is told apart."""
    found = functional.grid_sample(labels[:, None].double() + 1, grid.double(), mode="nearest", align_corners=False)
    found = found[:, 0].round().to(labels.dtype)
    return torch.where(found == 0, torch.full_like(found, IGNORED), found - 1)


def parse_augment(text: str) -> Augment:
    """Return the augmentation that a text names: ``flip,shift:2,rotate:10,scale:0.1,noise:0.05``; empty for none.

    Raises:
        UsageError: It names something else, or a number out of its bounds.
    """
    found: dict[str, float | bool] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition(":")
        try:
            value = float(number) if number else math.nan
        except ValueError:
            value = math.inf
        if name == "flip" and not number:
            found[name] = True
        elif name in _BOUNDS and 0 < value <= _BOUNDS[name]:
            found[name] = value
        else:
            raise UsageError(
                f"'{part}' is no augmentation",
                hint="flip, shift:PIXELS, rotate:DEGREES, scale:SHARE (0.1), noise:DEVIATION, joined by commas",
            )
    return Augment(**found)  # type: ignore[arg-type]
