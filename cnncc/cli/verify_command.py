"""``cnncc verify``: the proof again, on this machine, layer by layer on demand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import board_address, open_cache, remote_options
from cnncc.cli.render import MARKS, Render

if TYPE_CHECKING:
    from cnncc.compiler.parity import ParityReport


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Compare every layer, and name the first that differs.")
@click.option("--data", default="", help="Real inputs: image folder, .npz, package.module:factory.")
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Samples of --data at most.")
@click.option("--emulate", is_flag=True, help="Run an engine for another CPU (AArch64, 32-bit ARM, RISC-V) under QEMU.")
@remote_options
@cache_option
@common
def command(
    render: Render,
    *,
    bundle: Path,
    layers: bool,
    data: str,
    samples: int,
    emulate: bool,
    remote: str | None,
    key: str | None,
    timeout: float | None,
    cache_dir: Path | None,
) -> None:
    """Check that BUNDLE's engine computes what its model computes.

    The truth is the model in float64; the tolerance is a multiple of the error that float32 itself makes. Exits with
    1 when the engine lies outside it.
    """
    from cnncc.compiler.proof import prove_bundle
    from cnncc_runtime.bundle import to_plain
    from cnncc_runtime.errors import ParityFailed

    report = prove_bundle(
        bundle,
        data=data,
        samples=samples,
        layers=layers,
        emulate=emulate,
        board=board_address(remote, key, timeout),
        cache=open_cache(cache_dir, render).folder,
        reporter=render,
    )
    render.result(to_plain(report), lambda: _text(render, report))
    if not report.passed:
        raise ParityFailed(
            "the engine does not compute what the model computes",
            where=report.failures,
            hint="" if layers or remote else f"`cnncc verify {bundle} --layers` finds the layer",
        )


def _text(render: Render, report: ParityReport) -> None:
    rows = []
    for subject in report.subjects:
        for output in subject.outputs:
            allowed = output.tolerance.rel_l2 if output.tolerance else None
            mark = MARKS["failed"] if output.failures else MARKS["ok"] if subject.judged else ""
            rows.append(
                [
                    mark,
                    f"{subject.subject} – {subject.against}",
                    output.output,
                    _number(output.rel_l2),
                    _number(allowed),
                    f"{output.max_abs:.1e}",
                    "exact" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB",
                    "" if output.top1_agreement is None else f"{output.top1_agreement:.1%}",
                ]
            )
    columns = ["", "compared", "output", "rel L2", "allowed", "max abs", "SQNR", "top-1"]
    render.table(columns, rows, right=[3, 4, 5, 6, 7])
    if report.layers:
        render.line()
        render.table(
            ["", "module", "op", "rel L2", "floor", "SQNR"],
            [
                [
                    MARKS["ok" if layer.within else "failed"],
                    layer.module,
                    layer.op,
                    _number(layer.rel_l2),
                    _number(layer.floor_rel_l2),
                    "exact" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
                ]
                for layer in report.layers
            ],
            right=[3, 4, 5],
        )
    for note in report.notes:
        render.line(f"{MARKS['note']} {note}")
    verdict = "passed" if report.passed else "failed"
    render.line(f"parity {verdict} on {len(report.samples)} samples")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
