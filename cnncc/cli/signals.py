"""Ctrl-C and SIGTERM: a command that was told to stop unwinds, and says that it was stopped, whatever unwinding met."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, which user code and toolchains let pass where they would swallow SystemExit."""


_KINDS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_received: list[KeyboardInterrupt] = []


def unwind_on_signals() -> None:
    """Have Ctrl-C and SIGTERM raise, so that partial outputs are removed; a background job's Ctrl-C stays off."""
    for number in _KINDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _unwind)


def _unwind(number: int, _frame: object) -> NoReturn:
    _received.append(stop := _KINDS[number]())
    raise stop


@contextlib.contextmanager
def stops_as_stops() -> Iterator[None]:
    """Tell what fails after a signal as the signal.

    An exception that a signal raises can come out as another: an extension module that it interrupts while it is
    being imported says ``ImportError: initialization failed``, a library that catches everything says what it likes.

    Raises:
        KeyboardInterrupt: For whatever was raised inside, once a signal was received.
    """
    try:
        yield
    except Exception as exc:
        if _received:
            raise _received[-1] from exc
        raise
