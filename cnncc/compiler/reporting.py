"""How the pipeline tells what it does: events for whoever renders them."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Told of stages, progress and of everything that the user did not ask for but should know."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def progress(self, what: str, fraction: float) -> None:
        """The current stage is doing ``what`` and is ``fraction`` (0 to 1) done."""
        ...

    def done(self, name: str, seconds: float, detail: str, *, reused: bool) -> None:
        """A stage ended; ``reused`` when the cache had its result."""
        ...

    def note(self, text: str) -> None:
        """Something happened that the user did not ask for: a fallback, a default, a damaged cache entry."""
        ...


class Silent:
    """A reporter that keeps only the notes, for callers of the Python API.

    Attributes:
        notes: In order.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str) -> None:
        """Ignore."""

    def progress(self, what: str, fraction: float) -> None:
        """Ignore."""

    def done(self, name: str, seconds: float, detail: str, *, reused: bool) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Keep."""
        self.notes.append(text)
