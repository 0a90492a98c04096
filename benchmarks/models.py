"""The networks that benchmarks measure: name → MODEL and input shape."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cnncc.compiler.model_reference import ModelRequest  # noqa: E402
from cnncc.compiler.zoo import build as zoo_build  # noqa: E402
from tests.zoo.factories import lively, reference  # noqa: E402  # the tests own the list of architectures


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: As tables show it.
        model: The MODEL argument.
        shape: Of its input; empty where the model says it itself.
    """

    name: str
    model: str
    shape: str = ""

    @property
    def request(self) -> ModelRequest:
        """What cnncc compiles."""
        return ModelRequest(self.model, input_shapes=(self.shape,) if self.shape else ())


def regnet_y_800mf() -> nn.Module:
    """Return a RegNetY of 0.8 GFLOP (in multiply-adds)."""
    return lively(zoo_build("torchvision", "regnet_y_800mf").module)


def _zoo(name: str, shape: str = "1,3,224,224") -> Network:
    return Network(name, reference(name), shape)


NETWORKS = (
    Network("digits", f"{ROOT / 'examples' / 'digits' / 'model.py'}:build"),
    _zoo("resnet18"),
    _zoo("resnet50"),
    _zoo("mobilenet_v2"),
    _zoo("mobilenet_v3_large"),
    _zoo("efficientnet_b0"),
    _zoo("squeezenet1_1"),
    _zoo("shufflenet_v2_x1_0"),
    _zoo("densenet121"),
    _zoo("inception_v3", "1,3,299,299"),
    _zoo("vgg16"),
    Network("regnet_y_800mf", f"{Path(__file__).resolve()}:regnet_y_800mf", "1,3,224,224"),
    _zoo("convnext_tiny"),
    _zoo("unet", "1,3,256,256"),
)
"""All of them; `make bench` takes them in this order."""


def find(names: tuple[str, ...]) -> tuple[Network, ...]:
    """Return networks by name; what is no name is a MODEL, whose shape is its own or a zoo's."""
    known = {network.name: network for network in NETWORKS}
    return tuple(known.get(name) or Network(Path(name).name, name) for name in names) or NETWORKS
