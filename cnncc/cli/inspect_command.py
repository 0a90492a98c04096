"""``cnncc inspect``: what is inside a bundle or a model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import MODEL_HELP, model_options, model_request, open_cache
from cnncc.cli.render import Render, size_text

if TYPE_CHECKING:
    from cnncc.compiler.inspection import ModelSummary
    from cnncc.compiler.payoff import Payoff
    from cnncc_runtime.bundle import Bundle, Manifest


@click.command(name="inspect", epilog=MODEL_HELP)
@model_options
@cache_option
@common
def command(
    render: Render,
    *,
    model: str,
    weights: Path | None,
    input_shapes: tuple[str, ...],
    input_dtypes: tuple[str, ...],
    cache_dir: Path | None,
) -> None:
    """Show layers, precision, shapes and sizes of a bundle or of MODEL.

    A bundle's layers are the engine's kernels, with the PyTorch modules that each computes; a model's are its ONNX
    nodes. Every listed file of a bundle is checked against its digest.
    """
    from cnncc_runtime.bundle import read_bundle, to_plain

    if Path(model).is_dir() or Path(model).suffix == ".cnncc":
        bundle = read_bundle(Path(model))
        for name in bundle.manifest.files:
            bundle.file(name)
        render.result({"digest": bundle.digest, **to_plain(bundle.manifest)}, lambda: _bundle(render, bundle))
        return
    from cnncc.compiler.inspection import summarize
    from cnncc.compiler.pipeline import clean_graph

    request = model_request(model, weights, input_shapes, input_dtypes)
    summary = summarize(clean_graph(request, cache=open_cache(cache_dir, render), reporter=render))
    render.result(to_plain(summary), lambda: _model(render, summary))


def _bundle(render: Render, bundle: Bundle) -> None:
    import msgspec

    from cnncc.compiler.payoff import PAYOFF, Payoff

    manifest = bundle.manifest
    target = manifest.target
    render.table(
        ["", ""],
        [
            ["bundle", f"{manifest.name}  {bundle.digest}"],
            ["model", f"{manifest.model['source']}  {manifest.model['digest']}"],
            ["target", f"{target.name}  {target.device}: {', '.join(filter(None, (target.processor, target.triple)))}"],
            ["needs", _needs(manifest)],
            ["inputs", "  ".join(str(spec) for spec in manifest.inputs)],
            ["outputs", "  ".join(str(spec) for spec in manifest.outputs)],
            ["batches", ", ".join(map(str, manifest.batches)) or "as the inputs say"],
            ["precision", f"{manifest.precision} asked, {_executed(bundle)} executed"],
            ["parity", manifest.parity],
            ["toolchain", "  ".join(f"{name} {version}" for name, version in manifest.toolchain.items())],
            ["reproducible", "yes: same inputs, same bytes" if manifest.reproducible else "no"],
        ],
    )
    if bundle.has(PAYOFF):
        _payoff(render, msgspec.json.decode(bundle.file(PAYOFF).read_bytes(), type=Payoff))
    render.line()
    files = sorted(manifest.files.items())
    render.table(["file", "role", "size"], [[n, r.role, size_text(r.size)] for n, r in files], right=[2])
    render.line()
    render.table(
        ["modules", "operators", "precision", "schedule", "kernel"],
        [[", ".join(k.modules), ", ".join(k.ops), k.precision, k.schedule, k.kernel] for k in manifest.layers],
    )


def _needs(manifest: Manifest) -> str:
    """Return what a device must have, in a line."""
    target = manifest.target
    if target.gpu:
        core = "" if manifest.engine.dla is None else f", DLA core {manifest.engine.dla}"
        return f"{target.machine} with a GPU of compute capability {target.gpu}, {manifest.engine.abi}{core}"
    return f"{target.machine} with {' '.join(target.features) or 'nothing special'}"


def _payoff(render: Render, payoff: Payoff) -> None:
    """Show why the engine has its precision: what int8 gains, as a whole and layer by layer."""
    render.line()
    render.line(f"{payoff.chosen} was taken: {payoff}")
    if payoff.layers:
        render.table(
            ["layer", "fp32, ms", "int8, ms", "int8 / fp32"],
            [
                [layer.module, f"{layer.fp32 * 1e3:.3f}", f"{layer.int8 * 1e3:.3f}", f"{layer.int8 / layer.fp32:.2f}"]
                for layer in payoff.layers
            ],
            right=[1, 2, 3],
        )


def _executed(bundle: Bundle) -> str:
    from cnncc.compiler.audit import executed

    products = Counter(executed(bundle.manifest.layers).values())
    if len(products) > 1:
        return ", ".join(f"{precision} in {count} layers" for precision, count in sorted(products.items()))
    return ", ".join(products or sorted({layer.precision for layer in bundle.manifest.layers})) or "nothing"


def _model(render: Render, summary: ModelSummary) -> None:
    render.table(
        ["module", "operator", "output", "parameters", "MMACs"],
        [
            [
                layer.module,
                layer.op,
                "×".join(map(str, layer.shape)),
                f"{layer.parameters:,}" if layer.parameters else "",
                f"{layer.macs / 1e6:,.1f}" if layer.macs else "",
            ]
            for layer in summary.layers
        ],
        right=[3, 4],
    )
    render.line()
    render.line("inputs   " + "  ".join(str(spec) for spec in summary.inputs))
    render.line("outputs  " + "  ".join(str(spec) for spec in summary.outputs))
    render.line(f"{summary.parameters:,} parameters, {summary.macs / 1e6:,.1f} MMACs, opset {summary.opset}")
