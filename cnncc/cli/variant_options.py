"""What ``cnncc prune`` and ``cnncc shrink`` share: flags of variants and their engines, and what those become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cnncc.cli.options import open_cache
from cnncc.cli.render import Render
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.compiler.model_reference import ModelRequest
    from cnncc.compression.latency import Engines
    from cnncc.compression.train import Material

F = TypeVar("F", bound=Callable[..., Any])

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_BYTES = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def variant_options(function: F) -> F:
    """Add ``--latency``, ``--device``, ``--importance``, ``--multiple`` and ``--fresh``."""
    for decorate in (
        click.option("--fresh", is_flag=True, help="Begin anew although a run that was cut short lies there."),
        click.option(
            "--multiple", type=int, default=8, show_default=True, help="Channels that are left are a multiple of it."
        ),
        click.option(
            "--importance",
            type=click.Choice(["magnitude", "batchnorm", "taylor"]),
            default="taylor",
            show_default=True,
            help="What channels are worth: by their weights, by BatchNorm's scales, or by how much the loss would "
            "change.",
        ),
        click.option("--device", default="host", show_default=True, help="What the target's engines are for."),
        click.option("--latency", "latency_text", metavar="TIME", help="What a run of the engine may take: 4ms"),
    ):
        function = decorate(function)
    return function


def engines_of(
    request: ModelRequest, material: Material, target: str, device: str, cache_dir: Path | None, render: Render
) -> Engines:
    """Return what makes and measures engines of a model's variants."""
    from cnncc.compression.latency import Engines
    from cnncc.targets.devices import resolve_profile

    cache = open_cache(cache_dir, render)
    return Engines(request, resolve_profile(device), target, cache, preprocessing=material.preprocessing)


def parse_latency(text: str | None) -> float | None:
    """Return the seconds of ``4ms``, ``0.25 s`` or ``300us``; None for None.

    Raises:
        UsageError: It is no time.
    """
    return _parsed(text, _SECONDS, "time", "--latency 4ms")


def parse_size(text: str | None) -> int | None:
    """Return the bytes of ``2MB`` or ``500 kB``; None for None.

    Raises:
        UsageError: It is no size.
    """
    found = _parsed(text, _BYTES, "size", "--size 2MB")
    return None if found is None else round(found)


def _parsed(text: str | None, units: Mapping[str, float], what: str, example: str) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(units)})", text.strip())
    if found is None:
        raise UsageError(f"'{text}' is no {what}", hint=f"as in {example}")
    return float(found[1]) * units[found[2]]
