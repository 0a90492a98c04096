"""Words for names that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from cnncc_runtime.errors import UsageError


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UsageError:
    """Return the error of an unknown name; near matches are suggested.

    Args:
        kind: What it would be the name of.
        name: The name.
        known: Names that there are.
        where: File and field that hold it.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 4, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names[:12])}"
    return UsageError(f"unknown {kind} '{name}'", where=[where] if where else (), hint=hint)
