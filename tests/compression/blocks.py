"""Small networks of the blocks that real ones are made of: each ties channels together in another way."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """Additions tie what is added, over several blocks; one way there is a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16)
        self.first = nn.Sequential(_conv(16, 24), _conv(24, 16))
        self.second = nn.Sequential(_conv(16, 16, stride=2), _conv(16, 32))
        self.project = nn.Conv2d(16, 32, 1, stride=2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = torch.relu(self.second(x) + self.project(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Depthwise convolutions tie what they read to what they make; gates (squeeze and excite) what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16)
        self.expand = _conv(16, 48)
        self.depthwise = _conv(48, 48, groups=48)
        self.squeeze = nn.Conv2d(48, 16, 1)
        self.excite = nn.Conv2d(16, 48, 1)
        self.project = nn.Conv2d(48, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inner = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(inner.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(inner * gate)).mean((2, 3)))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Concatenations: a reader's channels are several writers'. Flattened images: a channel is many inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _conv(3, 16)
        self.second = _conv(16, 24)
        self.third = _conv(40, 16)
        self.pool = nn.AdaptiveMaxPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.PReLU(32), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.pool(self.third(torch.cat([x, self.second(x)], 1))))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """Grouped convolutions lose the same number in each group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32)
        self.grouped = _conv(32, 64, groups=4)
        self.last = nn.Conv2d(64, 32, 1)
        self.norm = nn.GroupNorm(2, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.last(self.grouped(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Segmenter(nn.Module):
    """The output is an image of classes, enlarged: its channels must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(_conv(3, 16, stride=2), _conv(16, 32))
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.classes = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.classes(torch.relu(self.up(self.down(x))))
        return nn.functional.interpolate(made, scale_factor=2.0)


class Plain(nn.Module):
    """The last layer is a convolution, and nothing comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 24)
        self.last = nn.Conv2d(24, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.stem(x))  # type: ignore[no-any-return]


NETWORKS: tuple[type[nn.Module], ...] = (Residual, Bottleneck, Dense, Grouped, Segmenter, Plain)


def build(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """Return a network with seeded weights and running statistics that are not the initial ones, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = kind()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return network.eval()


def _conv(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
