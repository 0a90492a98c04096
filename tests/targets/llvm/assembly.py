"""Kernels of one operator as assembly, and the loops in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from cnncc.targets.base import Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm import codegen, pipeline
from cnncc.targets.llvm.cycles.disassembly import blocks_of, instruction
from cnncc.targets.llvm.cycles.loops import natural_loops
from cnncc.targets.llvm.machine import Machine, machine_of, target_options
from cnncc.targets.llvm.quiet import quiet
from cnncc.targets.llvm.schedule.driver import schedule
from cnncc.targets.llvm.schedule.rules import RULES

ISAS = {
    "avx2": ("x86_64-linux-gnu", "x86-64-v3"),
    "avx512": ("x86_64-linux-gnu", "x86-64-v4"),
    "neon": ("aarch64-linux-gnu", "cortex-a76"),
}
EMBEDDED = {
    "armv7": ("armv7l-linux-gnueabihf", "cortex-a7"),
    "riscv64": ("riscv64-linux-gnu", "sifive-u54"),
}

"""Those whose transforms of Winograd's method may spill."""

_LABEL = re.compile(r"(\.?L\w+):")

Emit = Callable[[Any, Any, Machine], Any]
"""Takes the block builder, the data and the machine; returns the call of the operator."""


def isa_profile(isa: str) -> Profile:
    """Return the profile of an instruction set, whether this machine has it or not."""
    triple, cpu = {**ISAS, **EMBEDDED}[isa]
    return named(resolve_profile(mtriple=triple, mcpu=cpu))


def kernel_assembly(profile: Profile, data: tuple[int, ...], emit: Emit, dtype: str = "float32") -> str:
    """Compile one operator, with a ReLU behind it where it gives floats, and return its assembly.

    Args:
        profile: What to compile for.
        data: Shape of the operator's input.
        emit: The operator.
        dtype: Of its input.
    """
    machine = machine_of(profile)
    target = tvm.target.Target(target_options(profile))
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(data, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(emit(builder, x, machine))
            floats = str(y.ty.dtype) == "float32"
            done = builder.emit_output(relax.op.maximum(y, relax.const(np.float32(0))) if floats else y)
        builder.emit_func_output(done)
    module = builder.finalize()
    with quiet(), target, tvm.transform.PassContext(opt_level=3):
        for passes in (pipeline.legalize_passes(machine), pipeline.fuse_passes(), pipeline.merge_passes()):
            module = pipeline.run(module, passes)
        module, _ = schedule(module, RULES, machine, lambda _fraction: None)
        kernels = {var.name_hint: f for var, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
        tirx.register_tir_pipeline("cnncc-test", lambda: codegen._pipeline())
        named_kernels = {name: f.with_attr("global_symbol", name) for name, f in kernels.items()}
        built = tirx.build(tvm.IRModule(named_kernels), target=target, pipeline="cnncc-test")
    return str(built.inspect_source("asm"))


@dataclass(frozen=True)
class Loop:
    """A loop without loops in it.

    Attributes:
        label: Where it starts.
        lines: Its instructions.
    """

    label: str
    lines: tuple[str, ...]

    @property
    def multiply_adds(self) -> int:
        """Vector multiply-adds in it."""
        return sum(bool(re.search(r"\b(vfmadd\d+ps|fmla|vfma\.f32|fmadd\.s)\b", line)) for line in self.lines)

    def count(self, instruction: str) -> int:
        """Return how many lines hold an instruction, a regular expression."""
        return sum(bool(re.search(instruction, line)) for line in self.lines)

    @property
    def stores(self) -> list[str]:
        """Vector stores to memory other than the stack."""
        return [line for line in self.lines if re.search(r"mov[au]ps\s+%[xyz]mm\d+, .*\((?!%rsp)", line)
                or re.search(r"\b(str|stp|stur|st1)\s+[{]?[qv]\d+(?!.*\[sp)", line)
                or re.search(r"\bvst1\.|\bfsw\s(?!.*\(sp\))", line)]  # fmt: skip

    @property
    def stack_traffic(self) -> list[str]:
        """Vector loads and stores at the stack pointer: registers that were spilt."""
        return [line for line in self.lines if re.search(r"[xyz]mm\d.*\(%rsp|\(%rsp.*[xyz]mm\d", line)
                or re.search(r"\b(ldr|str|ldp|stp|ldur|stur)\s+[qvd]\d+.*\[sp", line)
                # 32-bit ARM has no such addresses for vectors: a register gets one first
                or re.search(r"\b(add|sub|mov)\s+r\d+, sp\b|\bv(ldr|str|ld|st)\w*[.\s].*\[sp", line)
                or re.search(r"\bf(lw|sw|ld|sd)\s.*\(sp\)", line)]  # fmt: skip


def inner_loops(assembly: str) -> Iterator[Loop]:
    """Yield the loops that have no loop inside."""
    labels, lines = _instructions(assembly)
    blocks = blocks_of(tuple(instruction(address, _with_targets(line, labels)) for address, line in enumerate(lines)))
    names = {address: label for label, address in labels.items()}
    loops = natural_loops(blocks.successors)
    for loop in loops:
        if not any(other.body < loop.body for other in loops):
            code = [one for block in sorted(loop.body) for one in blocks.code[block]]
            label = names[blocks.code[loop.header][0].address]
            yield Loop(label, tuple(lines[one.address] for one in code))


def _instructions(assembly: str) -> tuple[dict[str, int], list[str]]:
    """Return label → the position of what it stands before, and the instructions."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(lines)
        elif re.match(r"\s+[a-z{]", line):
            lines.append(line.strip())
    return labels, lines


def _with_targets(line: str, labels: dict[str, int]) -> str:
    """Return an instruction as a disassembler writes it: an address, and then its name."""
    return re.sub(r"(?<![\w.])(\.?L\w+)$", lambda match: f"{labels.get(match[1], -1):x} <{match[1]}>", line)
