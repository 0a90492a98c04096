"""What becomes of a peer that fails: an error, or a line in the report where a benchmark goes on without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cnncc.compiler.bench.report import Refused
from cnncc.compiler.bench.subjects import OURS
from cnncc_runtime.errors import CnnccError


class Referee:
    """Lets a benchmark go on without peers that fail, and remembers why each left.

    Args:
        lenient: Whether it goes on; else the first failure is raised.
        refused: Peers that left before.
    """

    def __init__(self, *, lenient: bool, refused: tuple[Refused, ...] = ()) -> None:
        self._lenient = lenient
        self._refused = {peer.name: peer for peer in refused}

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Everyone who left, in order."""
        return tuple(self._refused.values())

    def copy(self) -> Referee:
        """Return another who knows the same: what a peer does in one run is not held against it in the next."""
        return Referee(lenient=self._lenient, refused=self.refused)

    def stays(self, name: str) -> bool:
        """Whether a subject has not left."""
        return name not in self._refused

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Do something with one subject: a peer that fails leaves, our own engine's failure is always an error.

        Raises:
            CnnccError: It failed, and the benchmark does not go on without it.
        """
        try:
            yield
        except CnnccError as exc:
            self.refuse(name, exc)

    def refuse(self, name: str, error: CnnccError, *, otherwise: CnnccError | None = None) -> None:
        """Send a peer away, or raise its error.

        Args:
            name: The subject.
            error: What was wrong with it.
            otherwise: Raised in its place, where the benchmark does not go on.

        Raises:
            CnnccError: The error, where the benchmark does not go on without this subject.
        """
        if not self._lenient or name == OURS:
            raise otherwise or error
        self._refused[name] = Refused(name, _reason(name, error))


def _reason(name: str, error: CnnccError) -> str:
    text = error.message.removeprefix(f"{name}: ")
    details = "; ".join(error.where)
    return " ".join([text, *([f"({details})"] if details else []), *([f"– {error.hint}"] if error.hint else [])])
