"""Flags that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from cnncc.cli.render import Render
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.compiler.cache import Cache
    from cnncc.compiler.calibration import Calibration
    from cnncc.compiler.model_reference import ModelRequest
    from cnncc.compiler.remote.address import BoardAddress

F = TypeVar("F", bound=Callable[..., Any])

METHODS = ("auto", "max", "percentile", "entropy", "mse")
"""As `cnncc.calibration.thresholds` has them, without importing NumPy for ``--help``."""

MODEL_HELP = """\b
MODEL is one of
  file.py:factory            a callable that returns an nn.Module
  package.module:factory
  model.pt2                  a torch.export archive
  model.onnx
  timm:NAME, torchvision:NAME
"""


def model_options(function: F) -> F:
    """Add MODEL, ``--weights``, ``--input-shape`` and ``--input-dtype``."""
    for decorate in (
        click.option(
            "--input-dtype", "input_dtypes", multiple=True, metavar="[NAME=]DTYPE", help="float32, uint8, int64, …"
        ),
        click.option(
            "--input-shape",
            "input_shapes",
            multiple=True,
            metavar="[NAME=]1,3,224,224",
            help="Shape of an input; repeat for several. N as the first size makes the batch symbolic (see --batch).",
        ),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A state dict, .safetensors or .pt; pickled modules are refused.",
        ),
        click.argument("model"),
    ):
        function = decorate(function)
    return function


def calibration_options(function: F) -> F:
    """Add the flags that say how a model is calibrated, but for DATA itself."""
    for decorate in (
        click.option(
            "--min-sqnr",
            type=float,
            metavar="DB",
            help="Keep as few layers in float as reach this signal to quantization noise ratio of the outputs.",
        ),
        click.option(
            "--max-accuracy-drop",
            type=click.FloatRange(0),
            metavar="POINTS",
            help="Keep as few layers in float as hold the accuracy on --val to this: top-1, or mIoU for class maps.",
        ),
        click.option("--val", default="", help="Labelled data that accuracy is measured on; forms as --data."),
        click.option(
            "--float-adds",
            is_flag=True,
            help="Residual additions read float tensors: more accurate, but these are written in float and in int8.",
        ),
        click.option("--keep", multiple=True, metavar="PATTERN", help="Modules that stay in float: features.0, head.*"),
        click.option(
            "--bias-correction/--no-bias-correction",
            default=True,
            show_default=True,
            help="Correct biases layer by layer, where that helps.",
        ),
        click.option(
            "--shift/--no-shift",
            default=True,
            show_default=True,
            help="Shift tensors that are hardly ever negative to the middle of int8's range, where that helps.",
        ),
        click.option(
            "--equalize/--no-equalize",
            default=True,
            show_default=True,
            help="Equalize channels across layers, where that helps.",
        ),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            default="auto",
            show_default=True,
            help="Where int8 ranges end; auto measures, tensor by tensor.",
        ),
        click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read, and count them."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the draw of calibration samples."),
        click.option(
            "--calibration-samples",
            type=click.IntRange(1),
            default=512,
            show_default=True,
            help="Samples that int8 ranges are found on, at most.",
        ),
    ):
        function = decorate(function)
    return function


def calibration_of(data: str, preprocess: str, given: Mapping[str, Any]) -> Calibration:
    """Return the calibration that DATA and the flags of `calibration_options` make."""
    from cnncc.calibration.contract import read_preprocessing
    from cnncc.compiler.calibration import Calibration

    return Calibration(
        data=data,
        validation=given["val"],
        samples=given["calibration_samples"],
        seed=given["seed"],
        skip_bad=given["skip_bad"],
        preprocessing=read_preprocessing(preprocess) if preprocess else None,
        method=given["method"],
        equalize=given["equalize"],
        shift=given["shift"],
        correct_bias=given["bias_correction"],
        float_adds=given["float_adds"],
        keep=given["keep"],
        max_accuracy_drop=given["max_accuracy_drop"],
        min_sqnr=given["min_sqnr"],
    )


def model_request(
    model: str, weights: Path | None, input_shapes: tuple[str, ...], input_dtypes: tuple[str, ...]
) -> ModelRequest:
    """Return the request that the model flags make."""
    from cnncc.compiler.model_reference import ModelRequest

    return ModelRequest(model, weights, input_shapes, input_dtypes)


def given_flags(names: Collection[str]) -> list[str]:
    """Return the flags that the user gave, among parameters of the command that runs."""
    context = click.get_current_context()
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]


def open_cache(folder: Path | None, render: Render) -> Cache:
    """Return the cache that ``--cache-dir`` names."""
    from cnncc.compiler.cache import Cache, default_cache_folder

    return Cache(folder or default_cache_folder(), render.note)


def usable_threads(threads: int | None) -> int:
    """Return ``--threads``, or the usable cores."""
    from cnncc_runtime.cpu import host_cpu

    return threads or host_cpu().cores


def parse_batches(text: str) -> tuple[int, ...]:
    """Return the sizes of ``--batch 1,8``.

    Raises:
        UsageError: Not positive numbers, or one twice.
    """
    if not text:
        return ()
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise UsageError(f"--batch {text} is not a list of different batch sizes", hint="--batch 1,8")
    return sizes


def remote_options(function: F) -> F:
    """Add ``--remote``, ``--key`` and ``--timeout``."""
    for decorate in (
        click.option(
            "--timeout", type=click.FloatRange(0.1), metavar="SECONDS", help="Of any step of the board.  [default: 60]"
        ),
        click.option("--key", help="The board's key, where --remote is a tracker and not a server."),
        click.option(
            "--remote",
            metavar="HOST:PORT",
            help="Run the engine on a board, through TVM's RPC: a server, or with --key a tracker. RPC has neither "
            "encryption nor a password, so HOST must be this machine's loopback; tunnel by SSH.",
        ),
    ):
        function = decorate(function)
    return function


def board_address(remote: str | None, key: str | None, timeout: float | None) -> BoardAddress | None:
    """Return where the board is; None where none was asked for.

    Raises:
        UsageError: Not an address on loopback, or flags that mean nothing without ``--remote``.
    """
    from cnncc.compiler.remote.address import DEFAULT_TIMEOUT, parse_address

    if remote is None:
        if key is not None or timeout is not None:
            raise UsageError("--key and --timeout are of boards", hint="give --remote HOST:PORT too")
        return None
    if key == "":
        raise UsageError("--key is empty", hint="leave it out to speak to a server")
    return parse_address(remote, key or "", DEFAULT_TIMEOUT if timeout is None else timeout)
