"""What benchmarks that train say while they do."""

from __future__ import annotations

import click


class Told:
    """A watcher that writes a line for each epoch, to standard error.

    Args:
        who: What is trained, for the line's beginning.
    """

    def __init__(self, who: str) -> None:
        self._who = who

    def step(self, epoch: int, done: float) -> None:
        """Say nothing."""

    def epoch(self, number: int, facts: object) -> None:
        """Write the epoch."""
        self.note(f"epoch {number} {facts}")

    def stage(self, name: str, seconds: float | None, detail: str) -> None:
        """Write the stage."""
        self.note(f"{name} {detail}")

    def note(self, text: str) -> None:
        """Write the note."""
        click.echo(f"{self._who}: {text}", err=True)
