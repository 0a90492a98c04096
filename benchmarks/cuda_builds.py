"""What engines for GPUs are made of, without a GPU: ``python benchmarks/cuda_builds.py``.

Builds each network in each precision for several GPUs with TensorRT-RTX and prints the engine's size, the time of the
build itself, and what its convolutions and products of matrices multiply, by the audit. Weights are random, but the
statistics of BatchNorm are those of the data: otherwise signals vanish on the way, and float16 makes zeros of them.
"""

from __future__ import annotations

import collections
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.models import find  # noqa: E402
from cnncc.compiler.audit import executed  # noqa: E402
from cnncc.compiler.zoo import build as zoo_build  # noqa: E402
from cnncc_runtime.bundle import read_bundle  # noqa: E402

NETWORKS = ("digits", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
DEVICES = ("sm80", "sm86", "sm89", "sm120")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
SEEDED = {"int8": ("--data", "random", "--calibration-samples", "8", "--allow-slow")}
"""Flags of a precision: what is calibrated on noise has scales of no use to anybody, and layers like any other."""


def settled(module: nn.Module) -> nn.Module:
    """Give every BatchNorm the statistics of seeded noise."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    generator = torch.Generator().manual_seed(0)
    module.train()
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(8, 3, 224, 224, generator=generator))
    return module.eval()


def _factory(name: str) -> Callable[[], nn.Module]:
    return lambda: settled(zoo_build("torchvision", name).module)


resnet18, resnet50, mobilenet_v2, efficientnet_b0 = map(_factory, NETWORKS[1:])


@dataclass(frozen=True)
class Built:
    """One engine.

    Attributes:
        size: Bytes.
        seconds: Of the build alone.
        executed: Element type → convolutions and products that multiply it.
    """

    size: int
    seconds: float
    executed: dict[str, int]


def compile_for(name: str, precision: str, devices: tuple[str, ...], folder: Path) -> dict[str, Built] | str:
    """Compile a network for several GPUs.

    Returns:
        By device; or what the compile said when it failed.
    """
    [network] = find([name])
    model = network.model if name == "digits" else f"{Path(__file__).resolve()}:{name}"
    shape = ("--input-shape", network.shape) if network.shape else ()
    flags = [flag for device in devices for flag in ("--device", device)]
    flags += [
        "--cache-dir",
        str(folder.parent / "cache"),
        "--precision",
        precision,
        *SEEDED.get(precision, ()),
        "-o",
        str(folder / "built.cnncc"),
    ]
    target = ("--target", "cuda", "--backend", "tensorrt-rtx")
    command = [sys.executable, "-m", "cnncc.cli", "compile", model, *shape, *target, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return next((line for line in done.stderr.splitlines() if line.startswith("✗")), done.stderr.strip()[-200:])
    seconds = {device: float(time) for time, device in re.findall(r"✓ build +([\d.]+) s +cuda (sm\d+)", done.stderr)}
    found: dict[str, Built] = {}
    for bundle in sorted(folder.glob("*.cnncc")):
        manifest = read_bundle(bundle).manifest
        types = collections.Counter(executed(manifest.layers).values())
        found[manifest.target.device] = Built(manifest.engine_bytes, seconds[manifest.target.device], dict(types))
    return found


def describe(built: Built) -> str:
    """Return a cell of the table."""
    types = " ".join(f"{count} {kind}" for kind, count in sorted(built.executed.items()))
    return f"{built.size / 1e6:.2f} MB, {built.seconds:.1f} s, {types}"


@click.command()
@click.argument("networks", nargs=-1, type=click.Choice(NETWORKS))
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), help="All by default.")
@click.option("--device", "devices", multiple=True, default=DEVICES, show_default=True)
def main(networks: tuple[str, ...], precisions: tuple[str, ...], devices: tuple[str, ...]) -> None:
    """Build NETWORKS for GPUs; all of them by default."""
    failed = False
    with tempfile.TemporaryDirectory(prefix="cnncc-builds-") as scratch:  # a cache of its own: nothing was built before
        for name, precision in itertools.product(networks or NETWORKS, precisions or PRECISIONS):
            folder = Path(scratch) / f"{name}-{precision}"
            folder.mkdir()
            found = compile_for(name, precision, devices, folder)
            if isinstance(found, str):
                failed = True
                print(f"{name} {precision}: failed: {found}", flush=True)
                continue
            for device in devices:
                print(f"{name} {precision} {device}: {describe(found[device])}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
