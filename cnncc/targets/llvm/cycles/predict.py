"""Cycles of an engine's inner loops, by LLVM's scheduling models of CPUs."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc.targets.llvm.cycles.analyzer import INSTALL, Tools, analyze
from cnncc.targets.llvm.cycles.disassembly import Instruction, blocks_of, parse
from cnncc.targets.llvm.cycles.loops import heaviest_round, natural_loops
from cnncc.targets.llvm.cycles.products import Products, carries_sums, counted, peak_loop, peaks_of
from cnncc_runtime.elf import read_elf
from cnncc_runtime.errors import BundleRefused, ToolchainFailed, UsageError

_LIKELY = 8
"""Iterations that a loop of unknown length is taken to have, as by Wu and Larus, *Static Branch Frequency and Program
Profile Analysis* (1994), whose loops go on with a probability of 88 %."""

LIBRARY = ".a"
"""How static libraries' names end; what has another is an ELF file."""

_TIMEOUT = 600
"""Seconds."""


@dataclass(frozen=True)
class HotLoop:
    """The loop of a kernel that computes most of its products.

    Attributes:
        code: One iteration, loops inside left out.
        type: Of the factors of most of its products.
        products: Of that type, in an iteration.
        mix: Instruction that multiplies → how often it stands in the loop.
    """

    code: tuple[Instruction, ...]
    type: str
    products: int
    mix: dict[str, int]

    @property
    def lines(self) -> tuple[str, ...]:
        """The code as an assembler takes it."""
        return tuple(one.text for one in self.code)


@dataclass(frozen=True)
class Cpu:
    """A CPU that cycles are predicted for.

    Attributes:
        name: LLVM's.
        features: That code may use there.
    """

    name: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Cycles:
    """What one loop takes on one CPU.

    Attributes:
        cycles: Of an iteration.
        rate: Products a cycle.
        share: Of the CPU's peak for products of that type.
    """

    cycles: float
    rate: float
    share: float


@dataclass(frozen=True)
class Forecast:
    """What a CPU's model says.

    Attributes:
        by: CPU whose model was asked.
        units: How the units of that model are called, which tells the model.
        peaks: Type → the most products a cycle.
        kernels: Kernel → its loop's cycles, or why there are none.
    """

    by: str
    units: str
    peaks: dict[str, float]
    kernels: dict[str, Cycles | str]


def disassemble(tools: Tools, path: Path, machine: str, features: Sequence[str]) -> dict[str, tuple[Instruction, ...]]:
    """Return the code of each symbol of a library, shared or static.

    Args:
        tools: LLVM's.
        path: The library.
        machine: ELF machine that it is for.
        features: That its code uses.

    Raises:
        BundleRefused: It is damaged, or for another machine.
        ToolchainFailed: llvm-objdump broke.
    """
    if path.suffix != LIBRARY and (found := read_elf(path).machine) != machine:
        raise BundleRefused(f"the engine is for {found}, and its manifest says {machine}", where=[str(path)])
    attributes = ",".join(f"+{feature}" for feature in features)
    command = [tools.disassembler, "--disassemble", "--no-show-raw-insn", f"--mattr={attributes}", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ToolchainFailed(f"the engine cannot be disassembled: {exc}", hint=INSTALL) from exc
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise BundleRefused(
            f"the engine's code cannot be read: {said}", hint="copy the bundle again, or build it again"
        )
    return dict(parse(done.stdout))


def hot_loop(code: tuple[Instruction, ...]) -> HotLoop | None:
    """Return the loop that computes most of the products of some code; None where no loop multiplies.

    Nothing tells how often loops run: those whose sums go on from iteration to iteration come first, and each level of
    a nest is taken to run `_LIKELY` times. Where a loop forks, the way with most products is taken.
    """
    multiplied = counted(code)
    if not multiplied:
        return None
    blocks = blocks_of(code)
    loops = natural_loops(blocks.successors)

    def weight(block: int) -> tuple[int, int]:
        return _count(blocks.code[block], multiplied), -len(blocks.code[block])

    best: tuple[bool, int, tuple[Instruction, ...]] = (False, 0, ())
    for loop in loops:
        way = heaviest_round(loop, loops, blocks.successors, weight)
        code_of_way = tuple(one for block in way for one in blocks.code[block])
        likely = _count(code_of_way, multiplied) * _LIKELY ** (loop.depth - 1)
        rank = (likely > 0 and carries_sums(code_of_way), likely)
        if rank > best[:2]:
            best = (*rank, code_of_way)
    return _described(best[2], multiplied) if best[1] else None


def _count(code: Sequence[Instruction], multiplied: Mapping[int, Products]) -> int:
    return sum(multiplied[one.address].count for one in code if one.address in multiplied)


def _described(code: tuple[Instruction, ...], multiplied: Mapping[int, Products]) -> HotLoop:
    types: Counter[str] = Counter()
    mix: Counter[str] = Counter()
    for one in code:
        if one.address in multiplied:
            products = multiplied[one.address]
            types[products.type] += products.count
            mix[one.mnemonic] += 1
    kind, count = types.most_common(1)[0]
    return HotLoop(code, kind, count, dict(mix))


def forecast(tools: Tools, triple: str, machine: str, cpu: Cpu, loops: Mapping[str, HotLoop]) -> Forecast:
    """Ask a CPU's model for the cycles of kernels' loops, and for the CPU's peaks.

    Args:
        tools: LLVM's.
        triple: Of LLVM.
        machine: ELF machine of the triple.
        cpu: The CPU.
        loops: Kernel → its loop.

    Raises:
        UsageError: LLVM has no model of the CPU, or the CPU multiplies nothing of a type.
        DependencyMissing: Only a newer LLVM does.
        ToolchainFailed: llvm-mca broke.
    """
    types = list(dict.fromkeys(loop.type for loop in loops.values()))
    candidates = [(kind, *peak_loop(machine, peak)) for kind in types for peak in peaks_of(machine, cpu.features, kind)]
    lines = [lines for _kind, lines, _count in candidates]
    found = analyze(tools, triple, machine, cpu.name, cpu.features, [*lines, *(loop.lines for loop in loops.values())])
    peaks: dict[str, float] = {}
    for (kind, _lines, count), cycles in zip(candidates, found.cycles, strict=False):
        if not isinstance(cycles, str):
            peaks[kind] = max(peaks.get(kind, 0.0), count / cycles)
    if missing := [kind for kind in types if kind not in peaks]:
        raise UsageError(f"{cpu.name} has no known peak in {', '.join(missing)}", hint="leave this CPU out")
    kernels = dict(zip(loops, found.cycles[len(candidates) :], strict=True))
    return Forecast(
        found.by,
        found.units,
        peaks,
        {
            kernel: cycles if isinstance(cycles, str) else _cycles(loops[kernel], cycles, peaks)
            for kernel, cycles in kernels.items()
        },
    )


def _cycles(loop: HotLoop, cycles: float, peaks: Mapping[str, float]) -> Cycles:
    rate = loop.products / cycles
    return Cycles(cycles, rate, rate / peaks[loop.type])
