"""The threads of an engine as an object file: pool.ll, assembled for a target."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from cnncc.targets.devices import machine_name

SOURCE = Path(__file__).with_name("pool.c")
"""What to read and to change; `generate` makes the text of it."""
TEXT = Path(__file__).with_name("pool.ll")
"""LLVM's assembly of `SOURCE`, the same for all targets."""

_PAUSE = {"x86_64": "pause", "aarch64": "isb", "arm": "isb", "riscv64": ""}
"""ELF machine → the instruction that spends a moment of a spinning thread. ARM's own `yield` does nothing on most
cores, `isb` takes about as long as x86's `pause`; RISC-V has none that every processor knows."""

_PAUSE_DECLARED = "declare void @cnncc_pause()"


def write_object(target: Any, path: Path) -> Path:
    """Assemble the pool; see `assemble`."""
    neutral = TEXT.read_text("utf-8")
    [declared] = [line for line in neutral.splitlines() if line.startswith(_PAUSE_DECLARED)]
    pause = _PAUSE[machine_name(str(target.attrs["mtriple"]))]
    body = f'call void asm sideeffect "{pause}", ""()\n  ' if pause else ""
    return assemble(
        neutral.replace(declared, f"define internal void @cnncc_pause() {{\n  {body}ret void\n}}"), target, path
    )


def assemble(neutral: str, target: Any, path: Path) -> Path:
    """Make an object of a text that is the same for all targets.

    Args:
        neutral: LLVM's assembly, without what depends on the target.
        target: TVM's target.
        path: The object file to write; its assembly is written beside it meanwhile.

    Returns:
        The path.
    """
    text = path.with_suffix(".ll")
    text.write_text(_text_for(neutral, target), "utf-8")
    tvm.runtime.load_module(str(text)).write_to_file(str(path), "o")
    text.unlink()
    return path


def source_digest(source: Path = SOURCE) -> str:
    """Return the digest that the text of a source names if it was made of it."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def _text_for(neutral: str, target: Any) -> str:
    """Return the text with what depends on the target: data layout, triple, and what TVM notes of it.

    All are taken from a function that does nothing, as TVM compiles it for the target.
    """
    nothing = tirx.PrimFunc([], tirx.Evaluate(tirx.IntImm("int32", 0))).with_attr("global_symbol", "nothing")
    compiled = str(tirx.build(tvm.IRModule({"nothing": nothing}), target).inspect_source("ll"))
    layout = [line for line in compiled.splitlines() if line.startswith("target ")]
    [noted] = re.findall(r'^!\d+ = (!\{i32 \d+, !"tvm_target", .*\})$', compiled, re.MULTILINE)
    flags = ["!llvm.module.flags = !{!0, !1}", f"!0 = {noted}", '!1 = !{i32 8, !"PIC Level", i32 2}']
    return "\n".join([*layout, neutral, *flags]) + "\n"
