"""``cnncc cache``: what the compile cache holds, and how to empty it."""

from __future__ import annotations

from pathlib import Path

import click

from cnncc.cli.main import cache_option, common
from cnncc.cli.options import open_cache
from cnncc.cli.render import Render, size_text


@click.command(name="cache")
@click.argument("action", type=click.Choice(["info", "clear"]))
@cache_option
@common
def command(render: Render, *, action: str, cache_dir: Path | None) -> None:
    """Show what the compile cache holds (info), or remove it all (clear)."""
    cache = open_cache(cache_dir, render)
    found = cache.info() if action == "info" else cache.clear()
    document = {
        "action": action,
        "folder": str(found.folder),
        "entries": found.entries,
        "files": found.blobs,
        "bytes": found.size,
    }

    def text() -> None:
        render.line(
            f"{found.folder}  {'removed ' if action == 'clear' else ''}{found.blobs} files, {size_text(found.size)}"
        )
        if found.entries:
            render.table(
                ["stage", "entries"], [[stage, str(count)] for stage, count in found.entries.items()], right=[1]
            )

    render.result(document, text)
