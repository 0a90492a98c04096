"""The one object that owns what the user sees: wording, tables, progress, JSON and exit codes.

Results go to stdout, everything else to stderr; with ``--json`` stdout is exactly one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cnncc_runtime.errors import CnnccError

MARKS = {"ok": "[green]✓[/]", "reused": "[cyan]=[/]", "note": "[yellow]![/]", "failed": "[red]✗[/]"}

_PIPE_WIDTH = 1000
"""Columns where stdout is no terminal: whoever greps a table wants its rows whole."""


class Render:
    """Writes results and events.

    Args:
        as_json: One JSON document on stdout instead of text.
        verbosity: -1 quiet (results and errors), 0 normal, 1 verbose.
    """

    def __init__(self, *, as_json: bool = False, verbosity: int = 0) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        # without emoji: `package.module:factory:` is no picture
        self.out = _Stdout(file=sys.stdout, highlight=False, soft_wrap=True, width=width, emoji=False)
        self.err = Console(file=sys.stderr, highlight=False, soft_wrap=True, emoji=False)
        self.notes: list[str] = []
        self._answered = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    # ---- results

    def result(self, document: dict[str, Any], text: Callable[[], None]) -> None:
        """Write a command's result: the document with ``--json``, else what ``text`` prints."""
        self.close()
        if self.as_json:
            self._write({**document, **({"notes": self.notes} if self.notes else {})})
        else:
            text()

    def line(self, text: str = "") -> None:
        """Print one line of a result; rich markup allowed."""
        self.out.print(text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
        """Print a table; ``right`` lists the columns to align right."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    # ---- events (`cnncc.compiler.reporting.Reporter`)

    def stage(self, name: str) -> None:
        """Show a stage's progress bar, when stderr is a terminal."""
        self.close()
        if not self.err.is_terminal or self.verbosity < 0:
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=self.err,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(name, total=None)

    def progress(self, what: str, fraction: float) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=escape(what), total=1.0, completed=fraction)

    def done(self, name: str, seconds: float, detail: str, *, reused: bool) -> None:
        """Say that a stage ended, and whether the cache had it."""
        self.close()
        if self.verbosity >= 0:
            mark, when = (MARKS["reused"], "reused") if reused else (MARKS["ok"], f"{seconds:.1f} s")
            self.err.print(f"{mark} {name:<8} [dim]{when:>7}[/]  {escape(detail)}")

    def note(self, text: str) -> None:
        """Say something that the user did not ask for but should know."""
        self.notes.append(text)
        if self.verbosity >= 0:
            self.err.print(f"{MARKS['note']} {escape(text)}")

    def verbose(self, text: str) -> None:
        """Print to stderr with ``--verbose``."""
        if self.verbosity > 0:
            self.err.print(f"[dim]{escape(text)}[/]")

    def close(self) -> None:
        """Take the progress bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    # ---- errors

    def error(self, error: CnnccError, exit_code: int | None = None) -> None:
        """Write a refusal: what, where, what next; and the JSON document with ``--json``.

        Args:
            error: The refusal.
            exit_code: Where it is not the error's own.
        """
        self.close()
        self.document(error, exit_code)
        self.err.print(f"{MARKS['failed']} [bold]{escape(error.message)}[/]")
        for place in error.where:
            self.err.print(f"  at {escape(place)}")
        if error.hint:
            self.err.print(f"  [cyan]try:[/] {escape(error.hint)}")

    def document(self, error: CnnccError, exit_code: int | None = None) -> None:
        """Write a refusal's JSON document, with ``--json`` and unless the command has written its result."""
        if self.as_json and not self._answered:
            self._write(
                {
                    "error": type(error).__name__,
                    "message": error.message,
                    "where": list(error.where),
                    "hint": error.hint,
                    "exit_code": error.exit_code if exit_code is None else exit_code,
                    "notes": self.notes,
                }
            )

    def _write(self, document: dict[str, Any]) -> None:
        self._answered = True
        try:
            json.dump(document, sys.stdout, indent=2, ensure_ascii=False, default=str)
            sys.stdout.write("\n")
            sys.stdout.flush()
        except BrokenPipeError:
            _stop_writing()


class _Stdout(Console):
    """Stdout; a reader that has seen enough (``cnncc inspect … | head``) is no failure of the command."""

    def on_broken_pipe(self) -> None:
        """Write no more."""
        _stop_writing()


def _stop_writing() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def size_text(size: float) -> str:
    """Return bytes as ``3.4 MB`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def time_text(milliseconds: float) -> str:
    """Return a latency as ``0.214 ms`` or ``12.3 ms``."""
    return f"{milliseconds:.3f} ms" if milliseconds < 1 else f"{milliseconds:.2f} ms"
