"""``cnncc prune``: fewer channels, or zeros among the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import MODEL_HELP, model_options, model_request
from cnncc.cli.render import Render, size_text
from cnncc.cli.train_command import Narrator, material_of, recipe_of, training_options
from cnncc.cli.variant_options import engines_of, parse_latency, variant_options

if TYPE_CHECKING:
    from cnncc.compression.prune import Pruned, State


@click.command(name="prune", epilog=MODEL_HELP)
@model_options
@click.option(
    "--method",
    type=click.Choice(["structured", "unstructured", "2:4"]),
    default="structured",
    show_default=True,
    help="structured: channels go, and engines are faster. unstructured: weights become zero, and no engine is faster. "
    "2:4: half of the weights, for sparse tensor cores (`cnncc compile --target cuda --sparse`).",
)
@click.option("--amount", type=float, metavar="SHARE", help="Of channels or weights that go: 0.5")
@click.option("--target", help="Measure engines for it on this machine: channels cost what they take there.")
@click.option("--finetune", type=int, default=5, show_default=True, metavar="EPOCHS", help="After pruning, in all.")
@click.option("--steps", type=int, default=1, show_default=True, help="Prune and fine-tune a part at a time.")
@click.option("--distil", is_flag=True, help="Fine-tune by the outputs of MODEL as it was, and by the labels.")
@variant_options
@click.option("--most", type=float, default=0.9, show_default=True, help="Share of tied channels that may go.")
@training_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The weights.  [default: NAME-pruned.safetensors]"
)
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    method: str,
    amount: float | None,
    latency_text: str | None,
    target: str | None,
    device: str,
    finetune: int,
    steps: int,
    importance: str,
    multiple: int,
    most: float,
    distil: bool,
    fresh: bool,
    output: Path | None,
    cache_dir: Path | None,
    **given: Any,
) -> None:
    """Prune MODEL, fine-tune it on labelled data, and write its weights.

    A structurally pruned model has the code of MODEL and fewer channels: its weights file says so, and
    `cnncc compile MODEL --weights` takes it as it is. Interrupted or killed, the same command goes on, and ends with
    the same weights as if it had not been.
    """
    from cnncc.compiler.model_reference import parse_reference
    from cnncc.compression.distil import Lessons
    from cnncc.compression.prune import Pruning, prune

    path = output or Path(f"{parse_reference(model).name}-pruned.safetensors")
    pruning = Pruning(method, amount, steps, finetune, importance, multiple, most, parse_latency(latency_text))
    pruning.check()
    request = model_request(model, weights, input_shapes, input_dtypes)
    material = material_of(given)
    engines = engines_of(request, material, target, device, cache_dir, render) if target is not None else None
    narrator = Narrator(render, finetune if steps == 1 else None)
    try:
        pruned = prune(
            request,
            material,
            pruning,
            recipe_of(given, finetune),
            path,
            narrator,
            engines=engines,
            lessons=Lessons() if distil else None,
            accelerator=given["accelerator"],
            workers=given["workers"],
            fresh=fresh,
        )
    finally:
        narrator.close()
    if method == "unstructured":
        render.note("dense engines gain nothing from zeros that lie anywhere: they multiply by them all the same")
    render.result({"weights": str(path), "method": method, **_document(pruned)}, lambda: _text(render, path, pruned))


def _document(pruned: Pruned) -> dict[str, Any]:
    from cnncc_runtime.bundle import to_plain

    def plain(state: State) -> dict[str, Any]:
        found: dict[str, Any] = to_plain(state)
        return {**found, "metric": state.metric if state.metric == state.metric else None}

    return {
        "metric": pruned.task.metric,
        "states": [plain(state) for state in pruned.states],
        "dense": list(pruned.dense),
    }


def _text(render: Render, path: Path, pruned: Pruned) -> None:
    task = pruned.task
    rows = []
    for number, state in enumerate(pruned.states):
        engine = state.engine
        rows.append(
            [
                "before" if not number else f"{state.share:.0%} gone",
                f"{state.parameters:,}",
                f"{state.zeros:.1%}",
                task.text(state.metric) if state.metric == state.metric else "",
                f"{engine.seconds * 1e3:.3f} ms" if engine else "",
                f"{1 / engine.ratio[0]:.2f} ×" if engine and number else "",
            ]
        )
    render.table(["", "parameters", "zeros", "", "engine", "faster"], rows, right=[1, 2, 4, 5])
    for layer in pruned.dense:
        render.line(f"dense  {layer}: its input channels are no multiple of four")
    render.line(f"{path}  {size_text(path.stat().st_size)}")
