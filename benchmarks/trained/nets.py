"""Small networks of the kinds that quantizers differ on; `cnncc` takes the factories as ``nets.py:resnet``.

They need torch and nothing else, so tests import them too; ``width`` and ``classes`` make them smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Residual(nn.Module):
    """He et al. 2016's basic block: two convolutions beside a skip, which is a 1×1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return ReLU(block + skip)."""
        inner = self.relu(self.norm1(self.conv1(image)))
        return self.relu(self.norm2(self.conv2(inner)) + self.skip(image))


class ResNet(nn.Module):
    """A residual network; input ``float32[N, 3, 32, 32]``, output logits.

    Args:
        width: Channels of the stem.
        classes: Logits.
        depth: Blocks of each of the three sizes.
        stride: Of the stem.
    """

    def __init__(self, width: int = 16, classes: int = 36, *, depth: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for outputs, first in ((width, 1), (2 * width, 2), (4 * width, 2)):
            blocks += [Residual(inputs, outputs, first), *(Residual(outputs, outputs, 1) for _ in range(depth - 1))]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class logits."""
        return self.head(self.blocks(self.stem(image)))


def _conv(
    inputs: int,
    outputs: int,
    size: int,
    act: Callable[[], nn.Module] | None,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: bool = True,
) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=not norm),
    ]
    layers += [nn.BatchNorm2d(outputs)] if norm else []
    return [*layers, act()] if act else layers


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: expand, depthwise, project; a skip where shapes allow it."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, expand: int, act: Callable[[], nn.Module], norm: bool
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *_conv(inputs, hidden, 1, act, norm=norm),
            *_conv(hidden, hidden, 3, act, stride=stride, groups=hidden, norm=norm),
            *_conv(hidden, outputs, 1, None, norm=norm),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        inner = self.layers(image)
        return image + inner if self.adds else inner


class MobileNet(nn.Module):
    """MobileNetV2 in small; input ``float32[N, 3, 32, 32]``, output logits.

    Args:
        width: Channels of the stem, a multiple of 2.
        classes: Logits.
        act: The activation.
        norm: With BatchNorm; without, its convolutions have biases, as after folding.
    """

    def __init__(
        self, width: int = 16, classes: int = 36, *, act: Callable[[], nn.Module] = nn.ReLU6, norm: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, width, 3, act, stride=2, norm=norm))
        blocks = []
        inputs = width
        for outputs, stride in (
            *((width, 1), (width * 3 // 2, 2), (width * 3 // 2, 1), (width * 3 // 2, 1)),
            *((width * 5 // 2, 2), (width * 5 // 2, 1), (width * 5 // 2, 1)),
        ):
            blocks.append(InvertedResidual(inputs, outputs, stride, expand=4, act=act, norm=norm))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_conv(inputs, 12 * width, 1, act, norm=norm))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12 * width, classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class logits."""
        return self.head(self.last(self.blocks(self.stem(image))))


class SqueezeExcite(nn.Module):
    """Hu et al. 2018: channels scaled by what their means say."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, reduced, 1),
            nn.SiLU(),
            nn.Conv2d(reduced, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image times its gate."""
        return image * self.gate(image)


class MBConv(nn.Module):
    """Tan and Le 2019: an inverted residual with SiLU and squeeze-and-excite."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        hidden = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *_conv(inputs, hidden, 1, nn.SiLU),
            *_conv(hidden, hidden, 3, nn.SiLU, stride=stride, groups=hidden),
            SqueezeExcite(hidden, max(4, inputs // 4)),
            *_conv(hidden, outputs, 1, None),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        inner = self.layers(image)
        return image + inner if self.adds else inner


class EfficientNet(nn.Module):
    """EfficientNet in small; input ``float32[N, 3, 32, 32]``, output logits."""

    def __init__(self, width: int = 16, classes: int = 36) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, width, 3, nn.SiLU, stride=2))
        blocks = []
        inputs = width
        for outputs, stride in (
            *((width, 1), (width * 3 // 2, 2), (width * 3 // 2, 1)),
            *((width * 5 // 2, 2), (width * 5 // 2, 1)),
        ):
            blocks.append(MBConv(inputs, outputs, stride))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_conv(inputs, 12 * width, 1, nn.SiLU))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12 * width, classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class logits."""
        return self.head(self.last(self.blocks(self.stem(image))))


class UNet(nn.Module):
    """U-Net of three levels (Ronneberger et al. 2015); input ``float32[N, 3, h, w]``, output logits per pixel."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        sizes = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip((3, *sizes), sizes, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * size, size, 2, stride=2) for size in (2 * width, width))
        self.merge = nn.ModuleList(self._double(2 * size, size) for size in (2 * width, width))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*_conv(inputs, outputs, 3, nn.ReLU), *_conv(outputs, outputs, 3, nn.ReLU))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return class logits per pixel."""
        skips = []
        for block in self.down:
            skips.append(block(image if not skips else self.pool(skips[-1])))
        found = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            found = merge(torch.cat([up(found), skips.pop()], dim=1))
        return self.head(found)


def resnet() -> nn.Module:
    """Return the residual network, of 13 convolutions beside its skips."""
    return ResNet()


def resnet20() -> nn.Module:
    """Return He et al.'s ResNet-20 for CIFAR: 19 convolutions of 3×3 and a linear layer."""
    return ResNet(depth=3, stride=1)


def mbv2() -> nn.Module:
    """Return the depthwise network with ReLU6."""
    return MobileNet()


def mbv2_relu() -> nn.Module:
    """Return the depthwise network with ReLU, which scales of channels pass through."""
    return MobileNet(act=nn.ReLU)


def mbv2h() -> nn.Module:
    """Return the depthwise network with ReLU and folded BatchNorm: its weights are those that `uneven` makes."""
    return MobileNet(act=nn.ReLU, norm=False)


def effnet() -> nn.Module:
    """Return the network with SiLU and squeeze-and-excite."""
    return EfficientNet()


def unet() -> nn.Module:
    """Return the segmentation network."""
    return UNet()
