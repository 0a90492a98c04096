"""Flags that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cnncc.cli.render import Render
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.compiler.cache import Cache
    from cnncc.compiler.model_reference import ModelRequest

F = TypeVar("F", bound=Callable[..., Any])

MODEL_HELP = """\b
MODEL is one of
  file.py:factory            a callable that returns an nn.Module
  package.module:factory
  model.pt2                  a torch.export archive
  model.onnx
  timm:NAME, torchvision:NAME
"""


def model_options(function: F) -> F:
    """Add MODEL, ``--weights``, ``--input-shape`` and ``--input-dtype``."""
    for decorate in (
        click.option(
            "--input-dtype", "input_dtypes", multiple=True, metavar="[NAME=]DTYPE", help="float32, uint8, int64, …"
        ),
        click.option(
            "--input-shape",
            "input_shapes",
            multiple=True,
            metavar="[NAME=]1,3,224,224",
            help="Shape of an input; repeat for several. N as the first size makes the batch symbolic (see --batch).",
        ),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A state dict, .safetensors or .pt; pickled modules are refused.",
        ),
        click.argument("model"),
    ):
        function = decorate(function)
    return function


def model_request(
    model: str, weights: Path | None, input_shapes: tuple[str, ...], input_dtypes: tuple[str, ...]
) -> ModelRequest:
    """Return the request that the model flags make."""
    from cnncc.compiler.model_reference import ModelRequest

    return ModelRequest(model, weights, input_shapes, input_dtypes)


def open_cache(folder: Path | None, render: Render) -> Cache:
    """Return the cache that ``--cache-dir`` names."""
    from cnncc.compiler.cache import Cache, default_cache_folder

    return Cache(folder or default_cache_folder(), render.note)


def usable_threads(threads: int | None) -> int:
    """Return ``--threads``, or the usable cores."""
    from cnncc_runtime.cpu import host_cpu

    return threads or host_cpu().cores


def parse_batches(text: str) -> tuple[int, ...]:
    """Return the sizes of ``--batch 1,8``.

    Raises:
        UsageError: Not positive numbers, or one twice.
    """
    if not text:
        return ()
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise UsageError(f"--batch {text} is not a list of different batch sizes", hint="--batch 1,8")
    return sizes
