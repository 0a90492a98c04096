"""``cnncc calibrate``: int8 scales, found on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import (
    MODEL_HELP,
    calibration_of,
    calibration_options,
    model_options,
    model_request,
    open_cache,
)
from cnncc.cli.render import MARKS, Render
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.calibration.table import CalibrationTable


@click.command(name="calibrate", epilog=MODEL_HELP)
@model_options
@click.option("--data", default="", help="What to calibrate on: image folder, .npz, package.module:factory, or random.")
@click.option(
    "--import",
    "cache_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the scales of a TensorRT calibration cache instead; no data is read.",
)
@click.option("--preprocess", default="", help="How images become inputs: imagenet, or FILE.toml.")
@calibration_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The table.  [default: MODEL's name .calib.json]")
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    data: str,
    cache_file: Path | None,
    preprocess: str,
    output: Path | None,
    cache_dir: Path | None,
    **given: Any,
) -> None:
    """Find MODEL's int8 scales on your data, and write them as a calibration table.

    One pass over the data, in memory that does not grow with it. Each step (equalizing channels, choosing thresholds,
    shifting tensors, correcting biases) is kept only where it brings the outputs nearer to the float model's.
    Interrupted, the same command goes on where it was.
    """
    from cnncc.compiler.calibration import calibrate, import_cache
    from cnncc.compiler.model_reference import parse_reference

    path = output or Path(f"{parse_reference(model).name}.calib.json")
    request = model_request(model, weights, input_shapes, input_dtypes)
    cache = open_cache(cache_dir, render)
    if cache_file is None:
        table = calibrate(request, calibration_of(data, preprocess, given), path, cache=cache, reporter=render)
    elif data:
        raise UsageError("--import says nothing beside --data", hint="leave one of them out")
    else:
        table = import_cache(request, cache_file, path, cache=cache, reporter=render)
    render.result(_document(path, table), lambda: _text(render, path, table))


def _document(path: Path, table: CalibrationTable) -> dict[str, Any]:
    from cnncc_runtime.bundle import to_plain

    return {
        "table": str(path),
        "digest": table.digest,
        "layers": len(table.layers),
        "float": [{"module": layer.module, "why": layer.why} for layer in table.kept],
        "steps": to_plain(table.steps),
        "sqnr_db": table.sqnr_db,
        "accuracy": to_plain(table.accuracy),
        "course": table.course,
        "health": to_plain(table.health),
    }


def _text(render: Render, path: Path, table: CalibrationTable) -> None:
    rows = [
        [
            MARKS["ok" if step.kept else "note"],
            step.step,
            f"{step.before:.1f} dB",
            f"{step.after:.1f} dB",
            "kept" if step.kept else "left out",
        ]
        for step in table.steps
    ]
    if rows:
        render.table(["", "step", "SQNR before", "after", ""], rows, right=[2, 3])
    if len(table.course) > 1:
        course = "  ".join(f"{count}: {share:.1%}" for count, share in sorted(table.course.items()))
        render.line(f"ranges by samples  {course}")
    for layer in table.kept:
        render.line(f"float  {layer.module} ({layer.op}), {layer.why}")
    if table.accuracy is not None:
        reached = table.accuracy
        if reached.metric:
            render.line(
                f"{reached.metric} on {reached.samples} samples: float {reached.fp32:.2f} %, int8 {reached.int8:.2f} %"
            )
        render.line(f"output SQNR on validation data {reached.sqnr_db:.1f} dB")
    quantized = len(table.layers) - len(table.kept)
    judged = "" if table.sqnr_db is None else f", output SQNR {table.sqnr_db:.1f} dB"
    render.line(f"{path}  {quantized} of {len(table.layers)} layers int8{judged}")
