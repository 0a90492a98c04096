"""``cnncc train``: a model's weights, from labelled data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cnncc.cli.main import common
from cnncc.cli.options import MODEL_HELP, model_options, model_request
from cnncc.cli.render import Render

if TYPE_CHECKING:
    from cnncc.compression.recipe import Recipe
    from cnncc.compression.task import Task
    from cnncc.compression.train import Material
    from cnncc.compression.training import Trained

F = TypeVar("F", bound=Callable[..., Any])


def training_options(function: F, *, required: bool = True) -> F:
    """Add the flags that say on what and how a model is trained.

    Args:
        function: The command.
        required: Whether there must be data: else the command may do something else than train.
    """
    data_help = "Labelled: a folder per class, .npz with x and y, file.py:factory."
    for decorate in (
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read samples from disk."),
        click.option(
            "--accelerator",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="What trains.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same weights."),
        click.option(
            "--augment", default="", metavar="LIST", help="flip,shift:PIXELS,rotate:DEGREES,scale:0.1,noise:0.05"
        ),
        click.option("--patience", type=int, metavar="EPOCHS", help="End after so many without a better --val."),
        click.option(
            "--amp", "precision", type=click.Choice(["fp16", "bf16"]), help="Multiply in half precision.  [default: no]"
        ),
        click.option("--smoothing", type=float, default=0.0, show_default=True, help="Of labels: 0.1"),
        click.option("--ema", "average", type=float, metavar="DECAY", help="Deliver a moving average: 0.999"),
        click.option("--clip", type=float, metavar="NORM", help="Largest norm of the gradients."),
        click.option(
            "--warmup", type=float, default=0.0, show_default=True, metavar="EPOCHS", help="The rate rises over these."
        ),
        click.option(
            "--schedule",
            type=click.Choice(["cosine", "one-cycle", "constant"]),
            default="cosine",
            show_default=True,
            help="Of the learning rate, step by step.",
        ),
        click.option(
            "--weight-decay", type=float, default=0.0, show_default=True, help="Of weights, not of biases and norms."
        ),
        click.option("--lr", "rate", type=float, default=1e-3, show_default=True, help="Largest learning rate."),
        click.option(
            "--optimizer",
            type=click.Choice(["sgd", "adam", "adamw"]),
            default="adam",
            show_default=True,
            help="sgd has a momentum of 0.9.",
        ),
        click.option("--batch", "batch_size", type=int, default=32, show_default=True, help="Samples of a step."),
        click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read."),
        click.option("--metric", default="", metavar="REF", help="file.py:name that makes a metric of torchmetrics."),
        click.option("--loss", default="", metavar="REF", help="file.py:name, of outputs and targets."),
        click.option(
            "--task",
            type=click.Choice(["classification", "segmentation", "regression"]),
            help="[default: by the labels]",
        ),
        click.option("--preprocess", default="", help="How images become inputs: imagenet, or FILE.toml."),
        click.option("--val", default="", help="Labelled data that weights are chosen by."),
        click.option("--data", required=required, default=None if required else "", help=data_help),
    ):
        function = decorate(function)
    return function


def material_of(given: Mapping[str, Any]) -> Material:
    """Return what the flags of `training_options` say to train on."""
    from cnncc.calibration.contract import read_preprocessing
    from cnncc.compression.train import Material

    return Material(
        given["data"],
        given["val"],
        read_preprocessing(given["preprocess"]) if given["preprocess"] else None,
        given["task"] or "",
        given["loss"],
        given["metric"],
        given["skip_bad"],
    )


def recipe_of(given: Mapping[str, Any], epochs: int) -> Recipe:
    """Return how the flags of `training_options` say to train."""
    from cnncc.compression.recipe import Recipe

    names = ("optimizer", "rate", "weight_decay", "schedule", "warmup", "clip", "average", "smoothing", "patience")
    return Recipe(
        epochs=epochs,
        batch=given["batch_size"],
        precision=given["precision"] or "fp32",
        augment=given["augment"],
        seed=given["seed"],
        **{name: given[name] for name in names},
    )


class Narrator:
    """Tells a training as it goes: a bar for each epoch, a line after it, and TensorBoard's logs.

    Args:
        render: Writes.
        epochs: How many there will be; None where trainings of several lengths follow one another.
        log: TensorBoard's folder; None for none.
    """

    def __init__(self, render: Render, epochs: int | None, log: Path | None = None) -> None:
        self._render, self._of = render, "" if epochs is None else f" of {epochs}"
        self._board = _board(log) if log else None
        self.task: Task | None = None
        self._begin()

    def step(self, epoch: int, done: float) -> None:
        """Move the bar."""
        self._render.progress(f"epoch {epoch}{self._of}", done)

    def epoch(self, number: int, facts: Mapping[str, float]) -> None:
        """Say what came of an epoch."""
        judged = f", metric {facts['metric']:.4f}" if "metric" in facts else ""
        detail = f"{number}{self._of}: loss {facts['loss']:.4f}{judged}, rate {facts['rate']:.2g}"
        self._render.done("epoch", time.monotonic() - self._since, detail, reused=False)
        if self._board is not None:
            for name, value in facts.items():
                self._board.add_scalar(name, value, number)
            self._board.flush()
        self._begin()

    def stage(self, name: str, seconds: float | None, detail: str) -> None:
        """Say what came of a stage beside training."""
        self._render.done(name, seconds or 0.0, detail, reused=seconds is None)
        self._begin()

    def note(self, text: str) -> None:
        """Pass on."""
        self._render.note(text)

    def close(self) -> None:
        """Take the bar off the screen, and end the logs."""
        self._render.close()
        if self._board is not None:
            self._board.close()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._render.stage("epoch")


def _board(folder: Path) -> Any:
    from cnncc_runtime.errors import DependencyMissing

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise DependencyMissing("--log needs TensorBoard", hint="pip install 'cnncc[train]'") from exc
    return SummaryWriter(str(folder))


def tell_trained(render: Render, path: Path, trained: Trained, task: Task) -> None:
    """Say what came of a training."""
    judged = trained.best == trained.best
    document = {
        "weights": str(path),
        "task": task.kind,
        "metric": task.metric if judged else None,
        "best": trained.best if judged else None,
        "best_epoch": trained.best_epoch,
        "epochs": trained.epochs,
        "history": [dict(facts) for facts in trained.history],
    }

    def text() -> None:
        found = f"{task.text(trained.best)} in epoch {trained.best_epoch}" if judged else "the last epoch's"
        render.line(f"{path}  {trained.epochs} epochs, {found}")

    render.result(document, text)


@click.command(name="train", epilog=MODEL_HELP)
@model_options
@training_options
@click.option("--epochs", type=int, default=30, show_default=True, help="Passes over the data.")
@click.option("--log", type=click.Path(path_type=Path), metavar="DIR", help="Write TensorBoard's logs there.")
@click.option("--fresh", is_flag=True, help="Begin anew although a checkpoint lies there.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The weights.  [default: MODEL's name .safetensors]"
)
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    epochs: int,
    log: Path | None,
    fresh: bool,
    output: Path | None,
    **given: Any,
) -> None:
    """Train MODEL on labelled data, and write its weights.

    With --val, the weights of the best epoch are written, else the last. Interrupted or killed, the same command goes
    on from its checkpoint, and ends with the same weights as if it had not been.
    """
    from cnncc.compiler.model_reference import parse_reference
    from cnncc.compression.train import train

    path = output or Path(f"{parse_reference(model).name}.safetensors")
    request = model_request(model, weights, input_shapes, input_dtypes)
    narrator = Narrator(render, epochs, log)
    try:
        trained, task = train(
            request,
            material_of(given),
            recipe_of(given, epochs),
            path,
            narrator,
            accelerator=given["accelerator"],
            workers=given["workers"],
            fresh=fresh,
        )
    finally:
        narrator.close()
    tell_trained(render, path, trained, task)
