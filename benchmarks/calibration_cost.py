"""Measures what calibration costs, ours beside ONNX Runtime's calibrators: ``python benchmarks/calibration_cost.py``.

The network is torchvision's ResNet-50 with random weights and BatchNorm statistics, the images are noise: neither says
anything about accuracy, and both cost what a trained network and photographs cost. Every figure is of one process, from
its start to its end: ONNX Runtime's ends with the last tensor's range, cnncc's with its table, so equalizing, choosing
thresholds and correcting biases count. Images per second are the most images over their whole time; beside them stands
what further images cost, from the fewest to the most, without what is done once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quantizers.field import HERE, OURS  # noqa: E402
from benchmarks.quantizers.process import Cost, run  # noqa: E402
from cnncc.compiler.cache import Cache, default_cache_folder  # noqa: E402
from cnncc.compiler.model_reference import ModelRequest  # noqa: E402
from cnncc.compiler.pipeline import export  # noqa: E402
from cnncc_runtime.bundle import to_plain  # noqa: E402
from cnncc_runtime.errors import CnnccError, RunFailed  # noqa: E402
from cnncc_runtime.files import atomic_file  # noqa: E402
from tests.zoo.factories import reference  # noqa: E402

METHODS = ("MinMax", "Entropy", "Percentile")
"""ONNX Runtime's calibrators. Its entropy needs about 110 MB for each image of ResNet-50."""


@dataclass(frozen=True)
class Measured:
    """One calibrator.

    Attributes:
        name: ``cnncc`` or ``ort-METHOD``.
        costs: By number of images; fewer where it failed.
        failure: Why; empty otherwise.
    """

    name: str
    costs: dict[int, Cost]
    failure: str = ""

    @property
    def rate(self) -> float | None:
        """Images per second of the whole process, for the most images; None where it failed on the first."""
        return max(self.costs) / self.costs[max(self.costs)].seconds if self.costs else None

    @property
    def further(self) -> float | None:
        """Images per second between the fewest and the most.

        None with fewer than two figures, and where more images took no longer: that was the machine's noise.
        """
        if len(self.costs) < 2:
            return None
        fewest, most = min(self.costs), max(self.costs)
        longer = self.costs[most].seconds - self.costs[fewest].seconds
        return (most - fewest) / longer if longer > 0 else None


def parse_counts(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """Read numbers of images, separated by commas."""
    pieces = value.split(",")
    if not all(piece.isdigit() and int(piece) > 0 for piece in pieces):
        raise click.BadParameter("give positive numbers, separated by commas")
    return tuple(sorted({int(piece) for piece in pieces}))


@click.command()
@click.option("--images", default="16,32,64", callback=parse_counts, show_default=True, help="How many, repeatedly.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="ONNX Runtime's; '' for none.")
@click.option("--ours/--no-ours", default=True, help="Whether cnncc itself is run.  [default: ours]")
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Pixels of an image's side.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "calibration-cost",
    help="Where the network and the images are written.  [default: build/calibration-cost]",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure to this JSON file.")
def main(images: tuple[int, ...], methods: str, ours: bool, size: int, folder: Path, output: Path | None) -> None:
    """Print seconds, images per second and peak memory of calibrating ResNet-50."""
    folder.mkdir(parents=True, exist_ok=True)
    network = folder / f"resnet50-{size}.onnx"
    try:
        request = ModelRequest(reference("resnet50"), input_shapes=(f"N,3,{size},{size}",))
        export(request, network, cache=Cache(default_cache_folder()))
    except CnnccError as exc:
        raise click.ClickException(str(exc)) from exc
    names = (*(["cnncc"] if ours else []), *(f"ort-{method}" for method in methods.split(",") if method))
    click.echo(f"ResNet-50 at {size}×{size}")
    heads = "".join(f"{f'{count} images: s, MB':>24}" for count in images)
    click.echo(f"  {'calibrator':18}{heads}{'images/s':>10}{'further':>9}")
    found = []
    for name in names:
        found.append(measure(name, network, images, folder))
        click.echo(line(found[-1], images))
        if output is not None:  # an interrupted benchmark keeps what it measured
            with atomic_file(output) as partial:
                partial.write_text(json.dumps([to_plain(each) for each in found], indent=1))
    raise SystemExit(1 if any(each.failure for each in found) else 0)


def measure(name: str, network: Path, images: tuple[int, ...], folder: Path) -> Measured:
    """Calibrate with each number of images, until one fails."""
    costs: dict[int, Cost] = {}
    for count in images:
        data, written = folder / f"{count}.npz", folder / f"{name}.onnx"
        shape = network.stem.rpartition("-")[2]
        random = np.random.default_rng(0).standard_normal((count, 3, int(shape), int(shape)), np.float32)
        np.savez(data, x=random)
        try:
            costs[count] = run([_command(name, network, f"N,3,{shape},{shape}", data, written)])
        except RunFailed as exc:
            return Measured(name, costs, exc.message)
        finally:
            data.unlink()
    return Measured(name, costs)


def line(found: Measured, images: tuple[int, ...]) -> str:
    """Return a calibrator's line."""
    text = f"  {found.name:18}"
    for count in images:
        cost = found.costs.get(count)
        text += f"{f'{cost.seconds:.1f}, {cost.peak_resident / 1e6:.0f}' if cost else '–':>24}"
    for rate, width in ((found.rate, 10), (found.further, 9)):
        text += f"{rate:>{width}.1f}" if rate is not None else f"{'–':>{width}}"
    return text + (f"  failed: {found.failure}" if found.failure else "")


def _command(name: str, network: Path, shape: str, data: Path, written: Path) -> list[str]:
    if name == "cnncc":
        return OURS[0].commands(network, shape, data, written)[0]
    method = name.removeprefix("ort-")
    return [sys.executable, str(HERE / "ort_worker.py"), str(network), str(data), str(written), method, "--ranges"]


if __name__ == "__main__":
    main()
