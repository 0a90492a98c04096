"""``cnncc run``: inference with the preprocessing that the bundle stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnncc.cli.main import common
from cnncc.cli.render import Render

if TYPE_CHECKING:
    from cnncc.compiler.inference import Prediction


@click.command(name="run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="An image, a .npy, or a .npz with the inputs by name; repeat for several.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of the engine.  [default: usable cores]")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Classes to show.")
@common
def command(
    render: Render, *, bundle: Path, inputs: tuple[Path, ...], output: Path | None, threads: int | None, top: int
) -> None:
    """Run BUNDLE on images or arrays and show what it says."""
    from cnncc.compiler.inference import infer

    found = infer(bundle, inputs, threads=threads, top=top, output=output)
    render.result({"results": [_document(prediction) for prediction in found]}, lambda: _text(render, found))


def _document(prediction: Prediction) -> dict[str, Any]:
    return {
        "input": prediction.source,
        "milliseconds": prediction.milliseconds,
        "outputs": {name: list(shape) for name, shape in prediction.shapes.items()},
        "classes": [{"index": c.index, "label": c.label, "probability": c.probability} for c in prediction.classes],
    }


def _text(render: Render, found: list[Prediction]) -> None:
    for prediction in found:
        render.line(f"[bold]{prediction.source}[/]  [dim]{prediction.milliseconds:.2f} ms[/]")
        for number, item in enumerate(prediction.classes):
            style = "green" if number == 0 else "dim"
            render.line(f"  [{style}]{item.label:<24} {item.probability:7.2%}[/]")
        if not prediction.classes:
            for name, shape in prediction.shapes.items():
                render.line(f"  {name}  {list(shape)}")
