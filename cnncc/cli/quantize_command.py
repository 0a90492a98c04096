"""``cnncc quantize``: a calibration table and its model become Q/DQ ONNX."""

from __future__ import annotations

from pathlib import Path

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import METHODS, MODEL_HELP, model_options, model_request, open_cache
from cnncc.cli.render import Render, size_text


@click.command(name="quantize", epilog=MODEL_HELP)
@model_options
@click.option("--calib", required=True, type=click.Path(path_type=Path), help="The table of `cnncc calibrate`.")
@click.option(
    "--method",
    type=click.Choice([method for method in METHODS if method != "auto"]),
    help="Other thresholds than the table's, from its histograms; costs no pass over the data.",
)
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
    output: Path | None,
    cache_dir: Path | None,
) -> None:
    """Write MODEL as int8 Q/DQ ONNX: standard operators, which every runtime reads.

    A table that was made for another model, or for other weights of it, is refused.
    """
    from cnncc.compiler.calibration import quantize
    from cnncc.compiler.model_reference import parse_reference

    path = output or Path(f"{parse_reference(model).name}.int8.onnx")
    request = model_request(model, weights, input_shapes, input_dtypes)
    made = quantize(request, calib, path, method=method or "", cache=open_cache(cache_dir, render), reporter=render)
    render.result(
        {
            "onnx": str(path),
            "digest": made.digest,
            "bytes": made.size,
            "layers": made.layers,
            "float": list(made.kept),
        },
        lambda: render.line(
            f"{path}  {made.layers - len(made.kept)} of {made.layers} layers int8, {size_text(made.size)}"
        ),
    )
