"""``cnncc shrink``: the smallest model that keeps its accuracy and is really faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import MODEL_HELP, model_options, model_request
from cnncc.cli.render import MARKS, Render, size_text
from cnncc.cli.train_command import Narrator, material_of, recipe_of, training_options
from cnncc.cli.variant_options import engines_of, parse_latency, parse_size, variant_options
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.compression.shrink import Point, Shrunk


@click.command(name="shrink", epilog=MODEL_HELP)
@model_options
@click.option("--size", "size_text_", metavar="BYTES", help="What the engine and its weights may take: 2MB")
@click.option(
    "--max-accuracy-drop",
    "drop",
    type=float,
    metavar="POINTS",
    help="What may be lost of the metric on --val.  [default: 1 where nothing else is bounded]",
)
@click.option(
    "--shares", default="0.25,0.4,0.55,0.7", show_default=True, help="Of the channels: each is tried in turn."
)
@click.option("--precisions", default="fp32,int8", show_default=True, help="Of the engines of each size.")
@click.option("--epochs", type=int, default=5, show_default=True, help="Of fine-tuning, of each size.")
@click.option(
    "--qat",
    type=int,
    default=2,
    show_default=True,
    metavar="EPOCHS",
    help="Train int8 where calibration alone loses more than --max-accuracy-drop and fp32 does not; 0 for never.",
)
@click.option("--target", default="llvm", show_default=True, help="Whose engines are built and measured, here.")
@variant_options
@training_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder.  [default: MODEL's name -shrunk]")
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    latency_text: str | None,
    size_text_: str | None,
    drop: float | None,
    shares: str,
    precisions: str,
    epochs: int,
    qat: int,
    target: str,
    device: str,
    importance: str,
    multiple: int,
    fresh: bool,
    output: Path | None,
    cache_dir: Path | None,
    **given: Any,
) -> None:
    """Make MODEL smaller and smaller: prune, fine-tune by what it was, quantize, compile, measure.

    Every size is an engine in the folder, timed in turns with the whole model's; the best of those that hold to the
    budgets is named. int8 is calibrated, and where that loses too much also trained, as a point of its own (int8 qat).
    Interrupted, the same command goes on where it was, and what was made so far is of use.
    """
    from cnncc.compiler.model_reference import parse_reference
    from cnncc.compression.shrink import PLOT, Budget, Plan, describe, shrink

    folder = output or Path(f"{parse_reference(model).name}-shrunk")
    latency, size = parse_latency(latency_text), parse_size(size_text_)
    budget = Budget(latency, size, 1.0 if drop is None and latency is None and size is None else drop)
    names = tuple(each.strip() for each in precisions.split(","))
    plan = Plan(_shares(shares), names, importance, multiple, qat=qat)
    request = model_request(model, weights, input_shapes, input_dtypes)
    material = material_of(given)
    engines = engines_of(request, material, target, device, cache_dir, render)
    narrator = Narrator(render, None)

    try:
        shrunk = shrink(
            request,
            material,
            budget,
            plan,
            recipe_of(given, epochs),
            folder,
            narrator,
            engines,
            accelerator=given["accelerator"],
            workers=given["workers"],
            fresh=fresh,
        )
    finally:
        narrator.close()
    whole, best = shrunk.points[0], shrunk.best
    document = {
        "folder": str(folder),
        "metric": shrunk.task.metric,
        "points": [_document(point, shrunk) for point in shrunk.points],
        "best": {"bundle": str(folder / best.bundle), "weights": str(folder / best.weights) if best.weights else None},
        "plot": str(folder / PLOT),
    }

    def text() -> None:
        rows = [
            [
                MARKS["ok"] if point is best else ("·" if point in shrunk.front else ""),
                point.name,
                point.form,
                shrunk.task.text(point.metric),
                f"{point.seconds * 1e3:.3f} ms",
                f"{1 / point.ratio[0]:.2f} ×",
                size_text(point.size),
                f"{point.parameters:,}",
            ]
            for point in shrunk.points
        ]
        render.table(
            ["", "channels", "engine", "", "latency", "faster", "size", "parameters"], rows, right=[4, 5, 6, 7]
        )
        render.line(f"{folder / best.bundle}  {describe(best, whole, shrunk.task)}")

    render.result(document, text)


def _document(point: Point, shrunk: Shrunk) -> dict[str, Any]:
    from msgspec import to_builtins

    return {**to_builtins(point), "front": point in shrunk.front, "best": point is shrunk.best}


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as exc:
        raise UsageError(f"--shares {text} is no list of shares", hint="--shares 0.25,0.5") from exc
