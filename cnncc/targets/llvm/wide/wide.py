"""Arithmetic of 64 bits as an object file: wide.ll, assembled for machines of 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnncc.targets.devices import machine_name
from cnncc.targets.llvm.threads.pool import assemble

SOURCE = Path(__file__).with_name("wide.c")
"""What to read and to change; `threads.generate` makes the text of it."""
TEXT = Path(__file__).with_name("wide.ll")
"""LLVM's assembly of `SOURCE`."""

_NARROW = frozenset({"arm"})
"""ELF machines of 32 bits that engines are built for."""


def write_objects(target: Any, folder: Path) -> list[Path]:
    """Assemble the arithmetic where a target needs it.

    Args:
        target: TVM's target.
        folder: Where the object goes.

    Returns:
        The object file; none for machines of 64 bits.
    """
    if machine_name(str(target.attrs["mtriple"])) not in _NARROW:
        return []
    return [assemble(TEXT.read_text("utf-8"), target, folder / "wide.o")]
