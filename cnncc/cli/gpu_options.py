"""The flags of ``--target cuda``, and what they become."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: dict[str, Callable[[F], F]] = {
    "backend": click.option(
        "--backend",
        type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
        default="auto",
        show_default=True,
        help="What builds for GPUs: auto takes TensorRT where the GPU is here, else TensorRT-RTX, which needs none.",
    ),
    "level": click.option(
        "--builder-level",
        "level",
        type=click.IntRange(0, 5),
        help="How long the GPU builder looks for fast kernels.  [default: the library's own, 3]",
    ),
    "workspace": click.option(
        "--workspace",
        type=click.IntRange(1),
        metavar="MIB",
        help="Scratch memory that GPU kernels may take.  [default: all that the device has]",
    ),
    "budget": click.option(
        "--build-budget",
        "budget",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="Give up a GPU build that takes longer.  [default: never]",
    ),
    "version_compatible": click.option(
        "--version-compatible", is_flag=True, help="TensorRT: an engine that newer versions of the same major run, too."
    ),
    "hardware": click.option(
        "--hardware-compatible",
        "hardware",
        type=click.Choice(["same", "ampere+"]),
        help="TensorRT: an engine for every GPU of the same compute capability, or of 8.0 and newer; it may be slower.",
    ),
    "refittable": click.option("--refittable", is_flag=True, help="An engine whose weights can be replaced."),
    "strip_weights": click.option(
        "--strip-weights", is_flag=True, help="An engine without weights; they lie beside it, and are loaded with it."
    ),
    "sparse": click.option("--sparse", is_flag=True, help="TensorRT: multiply 2:4 sparse weights as such."),
    "dla": click.option(
        "--dla",
        type=click.IntRange(0),
        metavar="CORE",
        help="TensorRT 10: run on this deep learning accelerator of a Jetson, in fp16 or int8.",
    ),
    "gpu_fallback": click.option("--gpu-fallback", is_flag=True, help="The GPU runs what the accelerator cannot."),
}
"""Field of `cnncc.targets.base.GpuOptions` → its flag."""

NAMES = tuple(_FLAGS)


def gpu_options(function: F) -> F:
    """Add the flags, and hand them to the command as one argument ``gpu``."""

    @functools.wraps(function)
    def command(*arguments: Any, **given: Any) -> Any:
        from cnncc.targets.base import GpuOptions

        gpu = GpuOptions(**{name: given.pop(name) for name in NAMES})
        return function(*arguments, gpu=gpu, **given)

    for decorate in reversed(_FLAGS.values()):
        command = decorate(command)
    return command  # type: ignore[return-value]
