"""What pruning loses and gains: ``python benchmarks/pruning.py`` takes channels out of trained networks.

Networks are those of ``benchmarks/trained``, on rendered glyphs. Epochs are chosen on pictures of the fonts that were
trained on; what is reported is on fonts that no network saw. Both engines are timed in turns, in one run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.told import Told  # noqa: E402
from benchmarks.trained.data import Part  # noqa: E402
from benchmarks.trained.recipes import RECIPES, RESNET20, Trained, trained  # noqa: E402
from cnncc.calibration.data import open_data  # noqa: E402
from cnncc.compiler.cache import Cache  # noqa: E402
from cnncc.compiler.ingest import ingest  # noqa: E402
from cnncc.compiler.model_reference import ModelRequest  # noqa: E402
from cnncc.compression.distil import Lessons  # noqa: E402
from cnncc.compression.examples import Examples  # noqa: E402
from cnncc.compression.latency import Engines  # noqa: E402
from cnncc.compression.prune import Pruned, Pruning, prune  # noqa: E402
from cnncc.compression.recipe import Recipe  # noqa: E402
from cnncc.compression.train import Material  # noqa: E402
from cnncc.compression.training import evaluate  # noqa: E402
from cnncc.targets.devices import resolve_profile  # noqa: E402
from cnncc_runtime.specs import TensorSpec  # noqa: E402


@click.command()
@click.argument("networks", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build" / "accuracy", show_default=True)
@click.option("--amount", type=float, default=0.55, show_default=True, help="Share of the channels that goes.")
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True, help="Of fine-tuning, in all.")
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True)
@click.option("--images", type=click.IntRange(1), default=18_000, show_default=True, help="To fine-tune on.")
@click.option("--multiple", type=click.IntRange(1), default=8, show_default=True)
@click.option("--rate", type=float, default=2e-3, show_default=True)
@click.option("--costs/--no-costs", default=True, show_default=True, help="Channels cost what they take, or all alike.")
def main(
    networks: tuple[str, ...],
    folder: Path,
    amount: float,
    epochs: int,
    steps: int,
    images: int,
    multiple: int,
    rate: float,
    costs: bool,
) -> None:
    """Print top-1 and latency of NETWORKS (resnet20, mbv2) before and after."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in networks or ("resnet20", "mbv2"):
        found = trained({**RECIPES, RESNET20.name: RESNET20}[name], 0, folder, calibration_images=512, tell=_say)
        fits, judges = (folder / f"pruning-{name}-{which}.npz" for which in ("train", "chosen"))
        _save(fits, found.data.train.take(np.arange(min(images, len(found.data.train.x)))))
        _save(judges, found.data.pool)
        request = ModelRequest(found.recipe.model, folder / f"{name}-0.safetensors", ("1," + found.shape[2:],))
        engines = Engines(request, resolve_profile(), cache=Cache(folder / "cache"))
        small = folder / f"{name}-pruned.safetensors"
        pruned = prune(
            request,
            Material(str(fits), str(judges)),
            Pruning(amount=amount, steps=steps, finetune=epochs, multiple=multiple, costs=costs),
            Recipe(batch=64, rate=rate, schedule="one-cycle"),
            small,
            Told(name),
            engines=engines,
            lessons=Lessons(),
            accelerator="cpu",
        )
        _tell(name, found, pruned, request.weights, small)


def _tell(name: str, found: Trained, pruned: Pruned, before: Path | None, after: Path) -> None:
    spec = (TensorSpec("image", ("N", *found.data.shape)),)
    test = Examples(open_data(str(found.test), spec, None, limit=None))
    for what, weights, state in (("whole", before, pruned.states[0]), ("pruned", after, pruned.states[-1])):
        module = ingest(ModelRequest(found.recipe.model, weights, (found.shape,))).module
        engine = state.engine
        assert module is not None
        assert engine is not None
        value, low, high = (1 / each for each in (engine.ratio[0], engine.ratio[2], engine.ratio[1]))
        reached = 100 * evaluate(module, pruned.task, test)
        click.echo(
            f"{name:8} {what:7} top-1 {reached:6.2f} %  {engine.seconds * 1e3:7.3f} ms  {value:.2f} × as fast "
            f"({low:.2f} to {high:.2f})  {state.parameters:8,} parameters"
        )


def _say(line: str) -> None:
    click.echo(line, err=True)


def _save(path: Path, part: Part) -> None:
    np.savez(path, x=part.inputs, y=part.y)


if __name__ == "__main__":
    main()
