"""``cnncc quantize``: a calibration table and its model become Q/DQ ONNX, trained on the way where that is asked."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import METHODS, MODEL_HELP, given_flags, model_options, model_request, open_cache
from cnncc.cli.render import Render, size_text
from cnncc.cli.train_command import Narrator, material_of, recipe_of, training_options
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.compiler.calibration import Quantized
    from cnncc.compression.qat import Tuned

_TUNING = ("alpha", "temperature", "freeze_scales", "fresh")


@click.command(name="quantize", epilog=MODEL_HELP)
@model_options
@click.option("--calib", required=True, type=click.Path(path_type=Path), help="The table of `cnncc calibrate`.")
@click.option(
    "--method",
    type=click.Choice([method for method in METHODS if method != "auto"]),
    help="Other thresholds than the table's, from its histograms; costs no pass over the data.",
)
@click.option(
    "--qat",
    "epochs",
    type=click.IntRange(1),
    metavar="EPOCHS",
    help="Train weights and scales on --data while they are rounded as in the engine; --val keeps the best epoch.",
)
@click.option(
    "--alpha", type=float, default=0.5, show_default=True, help="With --qat: share of the float model, as a teacher."
)
@click.option("--temperature", type=float, default=4.0, show_default=True, help="With --qat: of the teacher's outputs.")
@click.option("--freeze-scales", is_flag=True, help="With --qat: train weights alone.")
@functools.partial(training_options, required=False)
@click.option("--fresh", is_flag=True, help="With --qat: begin anew although a checkpoint lies there.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file.  [default: MODEL's name .int8.onnx]")
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    calib: Path,
    method: str | None,
    epochs: int | None,
    alpha: float,
    temperature: float,
    freeze_scales: bool,
    fresh: bool,
    output: Path | None,
    cache_dir: Path | None,
    **given: Any,
) -> None:
    """Write MODEL as int8 Q/DQ ONNX: standard operators, which every runtime reads.

    A table that was made for another model, or for other weights of it, is refused. Where int8 costs too much accuracy,
    --qat trains: what it writes is as standard, and `cnncc compile` takes it as a MODEL.
    """
    from cnncc.compiler.calibration import quantize
    from cnncc.compiler.model_reference import parse_reference

    path = output or Path(f"{parse_reference(model).name}.int8.onnx")
    request = model_request(model, weights, input_shapes, input_dtypes)
    cache = open_cache(cache_dir, render)
    if epochs is None:
        if flags := given_flags((*given, *_TUNING)):
            raise UsageError(f"{flags[0]} says nothing without --qat", hint="add --qat 3, or leave it out")
        made = quantize(request, calib, path, method=method or "", cache=cache, reporter=render)
        render.result(_document(path, made), lambda: _text(render, path, made))
        return
    if method is not None or not given["data"]:
        raise UsageError(
            "--method says nothing with --qat" if method else "--qat needs labelled data to train on",
            hint="leave it out: training begins with the table's own scales" if method else "add --data train.npz",
        )
    from cnncc.compression.qat import Tuning, quantize_aware

    narrator = Narrator(render, epochs)
    try:
        made, tuned = quantize_aware(
            request,
            calib,
            material_of(given),
            recipe_of(given, epochs),
            Tuning(not freeze_scales, alpha, temperature, given["accelerator"], given["workers"]),
            path,
            narrator,
            fresh=fresh,
            cache=cache,
            reporter=render,
        )
    finally:
        narrator.close()
    render.result(_document(path, made) | {"qat": _course(tuned)}, lambda: _text(render, path, made, tuned))


def _document(path: Path, made: Quantized) -> dict[str, Any]:
    return {
        "onnx": str(path),
        "digest": made.digest,
        "bytes": made.size,
        "layers": made.layers,
        "float": list(made.kept),
    }


def _course(tuned: Tuned) -> dict[str, Any]:
    judged = tuned.reached == tuned.reached
    return {
        "metric": tuned.task.metric if judged else None,
        "fp32": tuned.fp32 if judged else None,
        "calibrated": tuned.calibrated if judged else None,
        "reached": tuned.reached if judged else None,
        "epochs": tuned.trained.epochs,
        "history": [dict(facts) for facts in tuned.trained.history],
    }


def _text(render: Render, path: Path, made: Quantized, tuned: Tuned | None = None) -> None:
    if tuned is not None and tuned.reached == tuned.reached:
        text = tuned.task.text
        render.line(f"float {text(tuned.fp32)}, calibrated {text(tuned.calibrated)}, trained {text(tuned.reached)}")
    render.line(f"{path}  {made.layers - len(made.kept)} of {made.layers} layers int8, {size_text(made.size)}")
