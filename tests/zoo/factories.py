"""The architectures that cnncc promises to compile, with random weights and BatchNorm statistics that matter.

Fresh BatchNorm has mean 0 and variance 1, which a wrong folding would survive; these have statistics as training
leaves them, yet mild enough that signals neither vanish nor explode over a hundred layers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cnncc.compiler.zoo import build as zoo_build


def lively(module: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and affine parameters that are not trivial."""
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0.0, 0.1, generator=generator)
            part.running_var.uniform_(0.6, 1.4, generator=generator)
            with torch.no_grad():
                part.weight.uniform_(0.7, 1.3, generator=generator)
                part.bias.normal_(0.0, 0.1, generator=generator)
    return module.eval()


class DoubleConv(nn.Sequential):
    """U-Net's block: two convolutions with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015, four levels, transposed convolutions on one side and resizing on the other."""

    def __init__(self, width: int = 32, classes: int = 4) -> None:
        super().__init__()
        sizes = [width, width * 2, width * 4, width * 8]
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([3, *sizes], sizes, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.middle = DoubleConv(sizes[-1], sizes[-1] * 2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(size * 2, size, 2, stride=2) for size in reversed(sizes))
        self.merge = nn.ModuleList(DoubleConv(size * 2, size) for size in reversed(sizes))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits per pixel."""
        skips = []
        x = image
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


def unet() -> nn.Module:
    """Return the U-Net."""
    return lively(UNet())


class Residual(nn.Module):
    """He et al. 2016 for small images: three stages, the latter two with strides and a projection beside."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        sizes = [width, width, width * 2, width * 4]
        self.stem = _convolution(3, width)
        self.first = nn.ModuleList(_convolution(a, b, 1 + (a != b)) for a, b in itertools.pairwise(sizes))
        self.second = nn.ModuleList(_convolution(b, b) for b in sizes[1:])
        self.beside = nn.ModuleList(
            nn.Identity() if a == b else nn.Conv2d(a, b, 1, stride=2) for a, b in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.stem(image).relu()
        for first, second, beside in zip(self.first, self.second, self.beside, strict=True):
            x = (second(first(x).relu()) + beside(x)).relu()
        return self.head(x.mean((2, 3)))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


def residual() -> nn.Module:
    """Return the small residual network."""
    return lively(Residual())


def _factory(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return lively(zoo_build("torchvision", name).module)

    return build


def reference(name: str) -> str:
    """Return the MODEL argument of an architecture."""
    return f"{Path(__file__)}:{name}"


TORCHVISION = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "vgg16",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "densenet121",
    "inception_v3",
    "convnext_tiny",
    "regnet_y_400mf",
    "lraspp_mobilenet_v3_large",
)
for _name in TORCHVISION:
    setattr(sys.modules[__name__], _name, _factory(_name))
