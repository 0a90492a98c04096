"""Engines that are measured without being built, of a small network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from cnncc.compiler.model_reference import ModelRequest
from cnncc.compression.latency import Engines, Measured
from cnncc.targets.devices import resolve_profile

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(384, 4),
    )
"""
"""Stands in ``net.py`` for `REQUEST`."""
REQUEST = ModelRequest("net.py:build", None, ("1,3,12,12",))


class Jumpy(Engines):
    """Engines that take a nanosecond for each parameter; at each measurement another layer is the slow one."""

    def build(self, module: object, bundle: Path, *_: object) -> None:
        count = sum(parameter.numel() for parameter in module.parameters())  # type: ignore[attr-defined]
        bundle.write_text(str(count))

    def layers(self, bundle: Path) -> dict[str, float]:
        assert bundle.exists()
        slow = next(SLOW)
        return {layer: 1e-2 if layer == slow else 1e-6 for layer in ("0", "4", "7")}

    def compare(self, bundles: Mapping[str, Path]) -> dict[str, Measured]:
        return {name: Measured(int(path.read_text()) * 1e-9, 1) for name, path in bundles.items()}


SLOW = itertools.cycle(("0", "7"))


def jumpy() -> Engines:
    """Return engines whose layers take other times at each measurement."""
    return Jumpy(REQUEST, resolve_profile("host"))
