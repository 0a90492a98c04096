"""What a teacher gives a small network: ``python benchmarks/distil.py`` trains one alone and distilled, seed by seed.

The teacher is the resnet of ``benchmarks/trained``, the student the same network with half of its channels. Both ways
see the same images in the same order, and are judged on fonts that neither network saw.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.told import Told  # noqa: E402
from benchmarks.trained.nets import ResNet  # noqa: E402
from benchmarks.trained.recipes import RECIPES, trained  # noqa: E402
from benchmarks.trained.training import single_thread  # noqa: E402
from cnncc.calibration.data import open_data  # noqa: E402
from cnncc.compiler.ingest import ingest  # noqa: E402
from cnncc.compiler.model_reference import ModelRequest  # noqa: E402
from cnncc.compression.distil import Distillation, Lessons  # noqa: E402
from cnncc.compression.examples import Examples  # noqa: E402
from cnncc.compression.recipe import Recipe  # noqa: E402
from cnncc.compression.task import task_of  # noqa: E402
from cnncc.compression.training import Job, evaluate, fit  # noqa: E402
from cnncc_runtime.specs import TensorSpec  # noqa: E402


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build" / "accuracy", show_default=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
@click.option("--images", type=click.IntRange(1), default=6000, show_default=True, help="To train on.")
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option(
    "--width", type=click.IntRange(1), default=8, show_default=True, help="Of the student; the teacher's is 16."
)
@click.option("--temperature", type=float, default=4.0, show_default=True)
@click.option("--alpha", type=float, default=0.9, show_default=True)
@click.option("--attention/--no-attention", default=False, show_default=True, help="Also of each pair of blocks.")
def main(
    folder: Path,
    seeds: int,
    images: int,
    epochs: int,
    width: int,
    temperature: float,
    alpha: float,
    attention: bool,
) -> None:
    """Print top-1 of the teacher, of students alone and of students that were distilled."""
    folder.mkdir(parents=True, exist_ok=True)
    found = trained(RECIPES["resnet"], 0, folder, calibration_images=512)
    teacher = ingest(ModelRequest(found.recipe.model, folder / "resnet-0.safetensors", (found.shape,))).module
    assert teacher is not None
    part = found.data.train.take(np.arange(images))
    np.savez(folder / "distil-train.npz", x=part.inputs, y=part.y)
    spec = (TensorSpec("image", ("N", *found.data.shape)),)
    train, test = (Examples(open_data(str(path), spec, None, limit=None))
                   for path in (folder / "distil-train.npz", found.test))  # fmt: skip
    task = task_of("classification")
    layers = {f"blocks.{index}": f"blocks.{index}" for index in (1, 3, 5)} if attention else {}
    lessons = Lessons(temperature, alpha, attention=layers)
    reached: dict[str, list[float]] = {"alone": [], "distilled": []}
    with single_thread():
        for seed in range(seeds):
            for way, values in reached.items():
                torch.manual_seed(seed)
                student = ResNet(width)
                inputs = train[0].inputs
                objective = Distillation(teacher, student, task, lessons, inputs) if way == "distilled" else None
                recipe = Recipe(epochs=epochs, batch=64, rate=4e-3, schedule="one-cycle", seed=seed)
                fit(
                    Job(student, recipe, task, train, objective=objective, accelerator="cpu"),
                    Told(f"{way}, seed {seed}"),
                )
                values.append(100 * evaluate(student, task, test))
        click.echo(f"teacher    {100 * evaluate(teacher, task, test):.2f} %")
    for way, values in reached.items():
        listed = ", ".join(f"{value:.2f}" for value in values)
        click.echo(f"{way:10} {np.mean(values):.2f} % ± {np.std(values, ddof=1):.2f}  ({listed})")


if __name__ == "__main__":
    main()
