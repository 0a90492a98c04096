"""``cnncc doctor``: what this machine can do, and how to get the rest."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import open_cache
from cnncc.cli.render import MARKS, Render


@click.command(name="doctor")
@cache_option
@common
def command(render: Render, *, cache_dir: Path | None) -> None:
    """Say what this machine can build and run, and what to install for the rest.

    Exits with 3 when something that every compile needs is missing.
    """
    from cnncc.compiler.doctor import examine
    from cnncc_runtime.bundle import to_plain

    findings = examine(open_cache(cache_dir, render).folder)
    broken = any(finding.state == "missing" and finding.required for finding in findings)

    def text() -> None:
        marks = {"ready": MARKS["ok"], "missing": MARKS["failed"], "optional": MARKS["note"]}
        render.table(
            ["", "", "found"],
            [
                [marks[f.state], f.name, escape(f.detail) + (f"\n[cyan]try:[/] {escape(f.fix)}" if f.fix else "")]
                for f in findings
            ],
        )
        render.line()
        render.line("This machine cannot compile yet." if broken else "This machine can compile, verify and benchmark.")

    render.result({"ready": not broken, "findings": to_plain(findings)}, text)
    if broken:
        raise click.exceptions.Exit(3)
