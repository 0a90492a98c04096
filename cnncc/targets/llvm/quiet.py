"""Keeps the compiler's own chatter away from the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings, logging and ``print`` of the compiler while it works.

    The importer prints the inputs of a node that it fails on, and TVM warns of names that it changes; what matters
    of both reaches the user as an error of ours.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
