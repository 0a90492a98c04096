"""``cnncc distil``: a student's weights, by a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cnncc.cli.main import common
from cnncc.cli.options import MODEL_HELP, model_request
from cnncc.cli.render import Render
from cnncc.cli.train_command import Narrator, material_of, recipe_of, tell_trained, training_options
from cnncc_runtime.errors import UsageError


@click.command(name="distil", epilog=MODEL_HELP)
@click.option("--teacher", required=True, metavar="MODEL", help="What is known: file.py:factory, timm:NAME, …")
@click.option("--teacher-weights", type=click.Path(path_type=Path), help="The teacher's .safetensors or .pt.")
@click.option("--student", required=True, metavar="MODEL", help="What is trained.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights that the student begins with.")
@click.option("--input-shape", "input_shapes", multiple=True, metavar="[NAME=]N,C,H,W", help="Of both.")
@click.option("--input-dtype", "input_dtypes", multiple=True, metavar="[NAME=]DTYPE", help="Of both: float32, uint8, …")
@click.option("--temperature", type=float, default=4.0, show_default=True, help="Divides logits before the softmax.")
@click.option(
    "--alpha",
    type=float,
    default=0.9,
    show_default=True,
    help="Share of the teacher in the loss; labels have the rest.",
)
@click.option(
    "--features",
    multiple=True,
    metavar="LAYER[=LAYER]",
    help="Make a student's layer give what a teacher's does, through a 1×1 convolution where channels differ.",
)
@click.option(
    "--attention", multiple=True, metavar="LAYER[=LAYER]", help="Have a student's layer look where a teacher's does."
)
@click.option("--feature-weight", type=float, default=1.0, show_default=True, help="Of --features in the loss.")
@click.option("--attention-weight", type=float, default=10.0, show_default=True, help="Of --attention in the loss.")
@training_options
@click.option("--epochs", type=int, default=30, show_default=True, help="Passes over the data.")
@click.option("--log", type=click.Path(path_type=Path), metavar="DIR", help="Write TensorBoard's logs there.")
@click.option("--fresh", is_flag=True, help="Begin anew although a checkpoint lies there.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The weights.  [default: the student's name .safetensors]"
)
@common
def command(
    render: Render,
    *,
    teacher: str,
    teacher_weights: Path | None,
    student: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    temperature: float,
    alpha: float,
    features: tuple[str, ...],
    attention: tuple[str, ...],
    feature_weight: float,
    attention_weight: float,
    epochs: int,
    log: Path | None,
    fresh: bool,
    output: Path | None,
    **given: Any,
) -> None:
    """Train a student by a teacher's outputs, and by the labels, and write its weights.

    The teacher sees the same augmented images, and is never changed. As with `cnncc train`, the same command goes on
    where it was killed.
    """
    from cnncc.compiler.model_reference import parse_reference
    from cnncc.compression.distil import Lessons, distil

    path = output or Path(f"{parse_reference(student).name}.safetensors")
    lessons = Lessons(temperature, alpha, _pairs("--features", features), _pairs("--attention", attention),
                      feature_weight, attention_weight)  # fmt: skip
    narrator = Narrator(render, epochs, log)
    try:
        trained, task = distil(
            model_request(student, weights, input_shapes, input_dtypes),
            model_request(teacher, teacher_weights, input_shapes, input_dtypes),
            material_of(given),
            recipe_of(given, epochs),
            lessons,
            path,
            narrator,
            accelerator=given["accelerator"],
            workers=given["workers"],
            fresh=fresh,
        )
    finally:
        narrator.close()
    tell_trained(render, path, trained, task)


def _pairs(flag: str, texts: tuple[str, ...]) -> dict[str, str]:
    """Return the student's layer → the teacher's, of ``LAYER[=LAYER]``.

    Raises:
        UsageError: A layer is there twice, or has no name.
    """
    found: dict[str, str] = {}
    for text in texts:
        mine, equals, its = text.partition("=")
        if not mine or (equals and not its) or mine in found:
            raise UsageError(f"{flag} {text} names no pair of layers, or one again", hint=f"{flag} layer1=blocks.2")
        found[mine] = its or mine
    return found
