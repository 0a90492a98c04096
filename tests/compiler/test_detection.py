"""A detection head: unequal splits, shape arithmetic, grids, several outputs; the forms that break exporters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cnncc_runtime
from cnncc.compiler.cache import Cache
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.pipeline import CompileRequest, compile
from cnncc.targets.devices import resolve_profile

HEAD = """
import torch
from torch import nn

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.fine = nn.Conv2d(32, 3 * 8, 1)
        self.coarse = nn.Conv2d(32, 3 * 8, 3, 2, 1)

    def decode(self, y, stride):
        n, _, h, w = y.shape
        y = y.view(n, 3, 8, h, w).permute(0, 1, 3, 4, 2)
        xy, wh, scores = y.sigmoid().split((2, 2, 4), 4)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((columns, rows), 2).to(y.dtype)
        return torch.cat(((xy * 2 - 0.5 + grid) * stride, (wh * 2) ** 2, scores), 4).reshape(n, -1, 8)

    def forward(self, image):
        y = self.body(image)
        boxes = torch.cat((self.decode(self.fine(y), 4), self.decode(self.coarse(y), 8)), 1)
        return {"boxes": boxes[..., :4], "scores": boxes[..., 4:]}

def build():
    return Head()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "batches"), [("1,3,64,64", ()), ("N,3,64,64", (1, 2))], ids=["static", "batches"])
def test_a_detection_head_compiles(shape: str, batches: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "head.py").write_text(HEAD)
    request = CompileRequest(
        ModelRequest(f"{tmp_path / 'head.py'}:build", input_shapes=(shape,)),
        resolve_profile("host"),
        tmp_path / "head.cnncc",
        batches=batches,
    )
    result = compile(request, cache=Cache(tmp_path / "cache"))
    assert result.parity == "passed"
    with cnncc_runtime.open(result.bundle) as session:
        for batch in batches or (1,):
            outputs = session.run({"image": np.zeros((batch, 3, 64, 64), np.float32)})
            assert {name: array.shape for name, array in outputs.items()} == {
                "boxes": (batch, 3 * (16 * 16 + 8 * 8), 4),
                "scores": (batch, 3 * (16 * 16 + 8 * 8), 4),
            }
