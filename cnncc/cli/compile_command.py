"""``cnncc compile``: the main job."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cnncc.cli.gpu_options import NAMES, gpu_options
from cnncc.cli.main import cache_option, common
from cnncc.cli.options import (
    MODEL_HELP,
    calibration_of,
    calibration_options,
    given_flags,
    model_options,
    model_request,
    open_cache,
    parse_batches,
)
from cnncc.cli.render import Render, size_text
from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.compiler.calibration import Calibration
    from cnncc.compiler.compile_request import Retraining
    from cnncc.compiler.pipeline import Compiled
    from cnncc.targets.base import GpuOptions


AUTO_DROP, AUTO_SQNR = 0.5, 20.0
"""What ``--precision auto`` asks for: points of accuracy on ``--val``, or dB of the outputs where there is none."""

_CUDA = "cuda"
_KERNEL_FLAGS = ("runtime", "with_runtime", "winograd", "direct", "winograd_growth")


@click.command(name="compile", epilog=MODEL_HELP)
@model_options
@click.option("--target", "targets", multiple=True, default=("llvm",), show_default=True, help="See `cnncc targets`.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("host",),
    show_default=True,
    help="What to build for: a name that `cnncc targets` lists, or a device's FILE.toml.",
)
@click.option("--mtriple", help="LLVM target triple instead of the profile's.")
@click.option("--mcpu", help="LLVM CPU instead of the profile's: x86-64-v3, cortex-a76, …")
@click.option("--mattr", default="", help="Features to add or take away: +avx2,-avx512f.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle.  [default: MODEL's name .cnncc]")
@click.option("--batch", "batch_text", default="", help="Batch sizes to build for, where --input-shape starts with N.")
@click.option(
    "--data",
    default="",
    help="Real inputs, for the parity check, to calibrate int8 on, to find what overflows in fp16: image folder, .npz, "
    "package.module:factory.",
)
@click.option(
    "--samples", type=click.IntRange(1), default=32, show_default=True, help="Samples of --data for the parity check."
)
@click.option("--preprocess", default="", help="How images become inputs: imagenet, or FILE.toml.")
@click.option("--labels", type=click.Path(path_type=Path), help="Class names, one a line.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "auto"]),
    default="fp32",
    show_default=True,
    help="fp16: GPUs, and ARM CPUs with fullfp16; bf16: --target cuda only. int8 is calibrated on --data, or made by "
    "--calib; auto keeps in float what costs accuracy or time.",
)
@click.option(
    "--float-type",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="What is not int8 computes in, with --precision int8 and auto; fp16, bf16: --target cuda only.",
)
@click.option("--calib", type=click.Path(path_type=Path), help="A table of `cnncc calibrate`, instead of calibrating.")
@click.option(
    "--max-fallback",
    type=click.IntRange(0),
    metavar="LAYERS",
    help="Layers that may be computed wider than the model has them.  [default: any with auto, else 0]",
)
@click.option(
    "--allow-slow", is_flag=True, help="Take int8 without comparing it with fp32; otherwise slower int8 is refused."
)
@calibration_options
@click.option(
    "--qat",
    "qat_epochs",
    type=click.IntRange(1),
    metavar="EPOCHS",
    help="Train the int8 model where calibration alone loses more than --max-accuracy-drop; always where that is not "
    "given.",
)
@click.option("--qat-data", default="", help="Labelled data to train on.  [default: --data]")
@click.option("--qat-lr", type=float, metavar="RATE", help="Largest learning rate.  [default: 0.001]")
@click.option(
    "--winograd/--no-winograd",
    default=True,
    show_default=True,
    help="Let 3×3 convolutions use Winograd's method where it is faster.",
)
@click.option("--direct", multiple=True, help="Modules whose convolutions stay direct: layer4.*")
@click.option(
    "--winograd-growth",
    type=click.FloatRange(0, 10),
    metavar="SHARE",
    help="What Winograd's weights may add to the memory of all weights: 0 nothing, 1 as much again.  [default: 2]",
)
@click.option(
    "--runtime",
    type=click.Choice(["vm", "aot-static"]),
    default="vm",
    show_default=True,
    help="vm: a library that cnncc-runtime loads. aot-static: an executable without libraries, and a C library and "
    "header, on one thread, for static shapes; takes a C compiler.",
)
@click.option(
    "--with-runtime",
    is_flag=True,
    help="Put cnncc-run and TVM's runtime for the device into the bundle, which then needs nothing but libc there; "
    "takes C and C++ compilers for it.",
)
@click.option(
    "--optimize",
    type=click.Choice(["rules", "measured"]),
    default="rules",
    show_default=True,
    help="Choose kernels by rule, in no time; or also time the rule's neighbours on this machine.",
)
@click.option(
    "--optimize-budget",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="How long measuring may take.  [default: 60]",
)
@click.option(
    "--kernel-database",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measured kernels: read, and with --optimize measured added to.  [default: in the cache folder]",
)
@gpu_options
@click.option("--keep-failed", is_flag=True, help="Keep a bundle whose parity failed, marked as failed.")
@click.option("--no-reference", is_flag=True, help="Leave the ONNX model out of the bundle: half the size, less proof.")
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    targets: tuple[str, ...],
    devices: tuple[str, ...],
    mtriple: str | None,
    mcpu: str | None,
    mattr: str,
    output: Path | None,
    batch_text: str,
    data: str,
    samples: int,
    preprocess: str,
    labels: Path | None,
    precision: str,
    float_type: str,
    calib: Path | None,
    max_fallback: int | None,
    allow_slow: bool,
    qat_epochs: int | None,
    qat_data: str,
    qat_lr: float | None,
    winograd: bool,
    direct: tuple[str, ...],
    winograd_growth: float | None,
    runtime: str,
    with_runtime: bool,
    optimize: str,
    optimize_budget: float | None,
    kernel_database: Path | None,
    gpu: GpuOptions,
    keep_failed: bool,
    no_reference: bool,
    cache_dir: Path | None,
    **given: Any,
) -> None:
    """Compile MODEL into a bundle: export, build, prove, publish.

    The engine is checked against PyTorch and ONNX Runtime before the bundle appears; an engine that computes
    something else leaves none. Stages are cached, so a rerun makes only what changed.
    """
    from cnncc.calibration.contract import read_labels, read_preprocessing
    from cnncc.compiler.compile_request import CALIBRATED
    from cnncc.compiler.kernel_stage import BUDGET, RULES, Optimize
    from cnncc.compiler.model_reference import parse_reference
    from cnncc.compiler.pipeline import AUTO, FP32, CompileRequest, compile_all
    from cnncc.targets.base import GpuOptions, KernelOptions
    from cnncc.targets.devices import oldest_glibc, resolve_profile

    base = output or Path(f"{parse_reference(model).name}.cnncc")
    pairs = list(itertools.product(dict.fromkeys(targets), dict.fromkeys(devices)))
    features = tuple(part for part in mattr.split(",") if part)
    if optimize == RULES and optimize_budget is not None:
        raise UsageError("--optimize-budget is for measuring", hint="add --optimize measured")
    if not winograd and winograd_growth is not None:
        raise UsageError("--winograd-growth says nothing with --no-winograd", hint="leave one of them out")
    calibration = _calibration(precision, data, calib, preprocess, given)
    if (allow_slow and precision not in CALIBRATED) or (max_fallback is not None and precision == FP32):
        flag = "--allow-slow" if allow_slow else "--max-fallback"
        raise UsageError(f"{flag} says nothing with --precision {precision}", hint="add --precision int8")
    if float_type != FP32 and precision not in CALIBRATED:
        raise UsageError(f"--float-type says nothing with --precision {precision}", hint=f"--precision {float_type}")
    if precision not in (FP32, AUTO) and max_fallback is None:
        max_fallback = 0
    _check_target_flags(set(targets))
    if qat_epochs is None and (qat_data or qat_lr is not None):
        raise UsageError(f"{'--qat-data' if qat_data else '--qat-lr'} says nothing without --qat", hint="add --qat 3")
    retraining = _retraining(qat_epochs, qat_data or data, qat_lr, given) if qat_epochs is not None else None
    growth = KernelOptions.growth if winograd_growth is None else winograd_growth
    name = base.name.removesuffix(".cnncc")
    requests = []
    for target, device in pairs:
        label = Path(device).stem if device.endswith(".toml") else device
        requests.append(
            CompileRequest(
                model=model_request(model, weights, input_shapes, input_dtypes),
                profile=resolve_profile(device, mtriple=mtriple, mcpu=mcpu, mattr=features),
                output=base if len(pairs) == 1 else base.with_name(f"{name}-{target}-{label}.cnncc"),
                name=name,
                target=target,
                batches=parse_batches(batch_text),
                kernels=KernelOptions(winograd, direct, growth),
                runtime=runtime,
                with_runtime=with_runtime and target != _CUDA,
                glibc=oldest_glibc(device, foreign=mtriple is not None) if with_runtime else "",
                optimize=Optimize(optimize, optimize_budget or BUDGET, kernel_database),
                gpu=gpu if target == _CUDA else GpuOptions(),
                data=data,
                samples=samples,
                preprocessing=read_preprocessing(preprocess) if preprocess else None,
                labels=read_labels(labels) if labels else (),
                keep_failed=keep_failed,
                reference=not no_reference,
                precision=precision,
                calibration=calibration,
                table=calib,
                retraining=retraining,
                float_type=float_type,
                max_fallback=max_fallback,
                allow_slow=allow_slow,
            )
        )
    results = compile_all(requests, cache=open_cache(cache_dir, render), reporter=render)
    render.result({"bundles": [_document(result) for result in results]}, lambda: _text(render, results))


def _check_target_flags(targets: set[str]) -> None:
    """Refuse flags that say nothing to any of the targets.

    Raises:
        UsageError: Names the flag.
    """
    if _CUDA not in targets and (given := given_flags(NAMES)):
        raise UsageError(f"{given[0]} is for --target {_CUDA}", hint=f"leave it out, or add --target {_CUDA}")
    if targets == {_CUDA} and (given := given_flags(_KERNEL_FLAGS)):
        raise UsageError(
            f"{given[0]} says nothing to --target {_CUDA}", hint="leave it out: TensorRT brings what it needs"
        )


def _retraining(epochs: int, data: str, rate: float | None, given: Mapping[str, Any]) -> Retraining:
    """Return what trains an int8 model on DATA.

    Raises:
        UsageError: There is no data, or the rate is out of its bounds.
    """
    from cnncc.compression.qat import Tuning, retraining
    from cnncc.compression.recipe import Recipe
    from cnncc.compression.train import Material

    if not data:
        raise UsageError("--qat needs labelled data to train on", hint="add --qat-data train.npz")
    recipe = Recipe(epochs=epochs, seed=given["seed"], rate=Recipe.rate if rate is None else rate)
    return retraining(Material(data, given["val"], skip_bad=given["skip_bad"]), recipe, Tuning())


def _calibration(
    precision: str, data: str, calib: Path | None, preprocess: str, given: Mapping[str, Any]
) -> Calibration:
    """Return how to calibrate.

    Raises:
        UsageError: Flags that say nothing beside the others.
    """
    from cnncc.compiler.compile_request import CALIBRATED

    asked = _asked(given)
    if precision not in CALIBRATED and (asked or calib is not None):
        flag = asked[0] if asked else "--calib"
        raise UsageError(
            f"{flag} says nothing with --precision {precision}", hint="add --precision int8, or leave it out"
        )
    if calib is not None and asked:
        raise UsageError(f"{asked[0]} says nothing beside --calib", hint="give it to `cnncc calibrate`")
    calibration = calibration_of(data, preprocess, given)
    if precision == "auto" and calibration.max_accuracy_drop is None and calibration.min_sqnr is None:
        labelled = bool(calibration.validation)
        calibration = replace(
            calibration, max_accuracy_drop=AUTO_DROP if labelled else None, min_sqnr=None if labelled else AUTO_SQNR
        )
    return calibration


def _asked(given: Mapping[str, Any]) -> list[str]:
    """Return the flags of calibration that were given, as they were given."""
    context = click.get_current_context()
    return [
        parameter.secondary_opts[0] if given[parameter.name] is False else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in given and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]


def _document(result: Compiled) -> dict[str, Any]:
    from cnncc_runtime.bundle import MEMORY

    manifest = result.bundle.manifest
    return {
        "bundle": str(result.bundle.path),
        "digest": result.bundle.digest,
        "target": manifest.target.name,
        "device": manifest.target.device,
        "cpu": manifest.target.cpu,
        "gpu": manifest.target.gpu,
        "toolchain": manifest.toolchain,
        "precision": manifest.precision,
        "parity": result.parity,
        "unchanged": result.unchanged,
        "engine_bytes": manifest.engine_bytes,
        "memory": json.loads(result.bundle.file(MEMORY).read_bytes()) if result.bundle.has(MEMORY) else {},
    }


def _text(render: Render, results: list[Compiled]) -> None:
    for result in results:
        manifest = result.bundle.manifest
        size = sum(record.size for record in manifest.files.values())
        state = "unchanged" if result.unchanged else "written"
        render.line(
            f"{result.bundle.path}  {state}: {manifest.target.name} {manifest.target.processor}, {manifest.precision}, "
            f"parity {result.parity}, {size_text(size)}"
        )
