"""``cnncc export``: the first stages of a compile, on their own."""

from __future__ import annotations

from pathlib import Path

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import MODEL_HELP, model_options, model_request, open_cache
from cnncc.cli.render import Render, size_text


@click.command(name="export", epilog=MODEL_HELP)
@model_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file.  [default: MODEL's name .onnx]")
@click.option("--raw", is_flag=True, help="The graph as exported, before cnncc's passes.")
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    output: Path | None,
    raw: bool,
    cache_dir: Path | None,
) -> None:
    """Export MODEL to ONNX: checked, cleaned, every node named after its PyTorch module."""
    from cnncc.compiler.model_reference import parse_reference
    from cnncc.compiler.pipeline import export

    path = output or Path(f"{parse_reference(model).name}.onnx")
    request = model_request(model, weights, input_shapes, input_dtypes)
    exported = export(request, path, raw=raw, cache=open_cache(cache_dir, render), reporter=render)
    render.result(
        {"onnx": str(path), "digest": exported.digest, "bytes": exported.size, "nodes": exported.nodes},
        lambda: render.line(f"{path}  {exported.nodes} nodes, {size_text(exported.size)}"),
    )
