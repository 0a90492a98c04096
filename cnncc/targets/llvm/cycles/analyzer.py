"""llvm-mca: how many cycles a loop takes by LLVM's scheduling model of a CPU.

The model knows the pipes of a CPU, the latencies of its instructions and how many it dispatches. It knows no caches,
predicts every jump, and takes loads and stores to be of different memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from cnncc_runtime.errors import DependencyMissing, ToolchainFailed, UsageError

INSTALL = "apt-get install llvm-19, or any LLVM from 19 on (Debian 13 and newer: apt-get install llvm)"
_MCA, _OBJDUMP = "llvm-mca", "llvm-objdump"
_OLDEST = 14
_TIMEOUT = 600
"""Seconds; all loops of a ResNet-18 take two."""

_ROUNDS = 100
"""Iterations until a loop is in its stride, and then as many that are counted."""

_COMMENTS = {"aarch64": "//", "arm": "@", "riscv64": "#", "x86_64": "#"}
"""ELF machine → how comments begin in its assembly; marks of code to analyze are comments."""

_MODELS = {
    "cortex-a76": ("neoverse-n1", "N1"),
    "cortex-a76ae": ("neoverse-n1", "N1"),
    "cortex-a77": ("neoverse-n1", "N1"),
    "cortex-a78": ("neoverse-n1", "N1"),
    "cortex-a78ae": ("neoverse-n1", "N1"),
    "cortex-a78c": ("neoverse-n1", "N1"),
    "cortex-x1": ("neoverse-v1", "V1"),
    "cortex-x1c": ("neoverse-v1", "V1"),
    "neoverse-n1": ("neoverse-n1", "N1"),
    "neoverse-n2": ("neoverse-n2", "N2"),
    "neoverse-v1": ("neoverse-v1", "V1"),
    "neoverse-v2": ("neoverse-v2", "V2"),
}
"""CPU → whose model is asked, and how units of that model begin.

LLVM takes Cortex-A57's model for all of Arm's 64-bit CPUs that it has none of, and older LLVMs take it for the
Neoverses too. Neoverse N1 is made of Cortex-A76, and V1 of X1; A77 and A78 have A76's two vector pipes.
"""


@dataclass(frozen=True)
class Tools:
    """One LLVM's tools.

    Attributes:
        analyzer: Path of llvm-mca.
        disassembler: Path of llvm-objdump.
        version: Of both.
    """

    analyzer: str
    disassembler: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        """Return the name and version."""
        return f"llvm-mca {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class Analysis:
    """What a model says of some loops.

    Attributes:
        by: CPU whose model was asked.
        units: How the model's units are called in common (``A57``, ``N1``, ``SKX``): which model it is.
        cycles: Of an iteration of each loop; a text where there is none says why.
    """

    by: str
    units: str
    cycles: tuple[float | str, ...]


def find_tools() -> Tools:
    """Return the newest llvm-mca on the path that has an llvm-objdump beside it.

    Raises:
        DependencyMissing: There is none.
    """
    return _find_tools(os.environ.get("PATH", os.defpath))


@cache
def _find_tools(path: str) -> Tools:
    found = []
    for folder in dict.fromkeys(path.split(os.pathsep)):
        for analyzer in sorted(Path(folder).glob(f"{_MCA}*")) if folder else ():
            suffix = analyzer.name.removeprefix(_MCA)
            disassembler = shutil.which(f"{_OBJDUMP}{suffix}", path=path)
            if not re.fullmatch(r"(-\d+)?", suffix) or disassembler is None:
                continue
            versions = _version(str(analyzer)), _version(disassembler)
            if versions[0] == versions[1] and versions[0] >= (_OLDEST,):
                found.append(Tools(str(analyzer), disassembler, versions[0]))
    if not found:
        raise DependencyMissing(
            f"cycles are predicted by {_MCA} and {_OBJDUMP} of one LLVM, {_OLDEST} or newer, which are not here",
            hint=INSTALL,
        )
    return max(found, key=lambda tools: tools.version)


def _version(tool: str) -> tuple[int, ...]:
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"LLVM version (\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, match.groups())) if match else ()


def analyze(
    tools: Tools, triple: str, machine: str, cpu: str, features: Iterable[str], loops: Sequence[Sequence[str]]
) -> Analysis:
    """Ask for the cycles that one iteration of each loop takes when it is in its stride.

    Args:
        tools: LLVM's.
        triple: Of LLVM.
        machine: ELF machine of the triple.
        cpu: LLVM's name.
        features: That the code uses.
        loops: Lines of assembly of each, at least one loop.

    Raises:
        UsageError: LLVM has no model of the CPU.
        DependencyMissing: Only a newer LLVM does.
        ToolchainFailed: llvm-mca broke.
    """
    by, units = _MODELS.get(cpu, (cpu, ""))
    attributes = ",".join(f"+{feature}" for feature in sorted(features))
    command = [tools.analyzer, "-json", f"-mtriple={triple}", f"-mcpu={by}", f"-mattr={attributes}",
               "-instruction-info=false", "-resource-pressure=false"]  # fmt: skip
    found = _cycles(command, machine, loops)
    if isinstance(found, str):
        _check(tools, cpu, by, found)
        alone = [_cycles(command, machine, [loop]) for loop in loops]
        reports = [one for one in alone if not isinstance(one, str)]
        if not reports:
            raise ToolchainFailed(f"{tools} failed: {found}", hint=f"use another LLVM: {INSTALL}")
        names = reports[0][0]
        cycles = tuple(one if isinstance(one, str) else one[1][0] for one in alone)
    else:
        names, cycles = found[0], tuple(found[1])
    common = _model_of(names)
    if units and common != units:
        raise _too_old(tools, cpu, by, f"{tools} takes that of {common or 'another'}")
    return Analysis(by, common, cycles)


def _model_of(units: Iterable[str]) -> str:
    """Return what the names of a model's units have in common: ``N1`` of ``N1UnitB`` and ``N1UnitL``."""
    stems = [re.split(r"Unit|Port", name)[0] for name in units]
    pairs = zip(min(stems), max(stems), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _cycles(command: list[str], machine: str, loops: Sequence[Sequence[str]]) -> tuple[list[str], list[float]] | str:
    """Return the names of the model's units, and each loop's cycles; a text where it fails says why."""
    mark = _COMMENTS[machine]
    lines = [line for loop in loops for line in (f"{mark} LLVM-MCA-BEGIN", *loop, f"{mark} LLVM-MCA-END")]
    totals: list[list[float]] = []
    for rounds in (_ROUNDS, 2 * _ROUNDS):
        report = _ask([*command, f"-iterations={rounds}"], "\n".join(lines) + "\n")
        if isinstance(report, str):
            return report
        try:
            names = [str(name) for name in report["TargetInfo"]["Resources"]]
            totals.append([float(region["SummaryView"]["TotalCycles"]) for region in report["CodeRegions"]])
        except (KeyError, TypeError, ValueError):
            return "its report has another form"
        if len(totals[-1]) != len(loops) or not names:
            return f"{len(totals[-1])} loops were analyzed of {len(loops)}"
    warm, both = totals
    return names, [(b - a) / _ROUNDS for a, b in zip(warm, both, strict=True)]


def _ask(command: list[str], assembly: str) -> Any:
    """Return llvm-mca's report, or what it says where it fails."""
    try:
        done = subprocess.run(command, input=assembly, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ToolchainFailed(f"{_MCA} failed: {exc}", hint=INSTALL) from exc
    said = [line.strip() for line in done.stderr.splitlines() if re.search(r"error:|note:|not a recognized proc", line)]
    if done.returncode or "not a recognized processor" in done.stderr:
        return " ".join(said[:2]).partition("error: ")[2] or " ".join(said[:1]) or f"exit code {done.returncode}"
    try:
        return json.loads(done.stdout)
    except ValueError:
        return "it gave no JSON"


def _check(tools: Tools, cpu: str, by: str, said: str) -> None:
    """Refuse CPUs that the analyzer cannot analyze for, by what it says."""
    if "not a recognized processor" in said:
        raise _too_old(tools, cpu, by, f"{tools} does not know it")
    if "scheduling information" in said:
        raise UsageError(
            f"LLVM has no scheduling model of {cpu}: {tools} cannot predict its cycles",
            hint="name one that resembles it and has its features: --cpu cortex-a72 for ARM, sifive-u54 for RISC-V",
        )


def _too_old(tools: Tools, cpu: str, by: str, why: str) -> DependencyMissing:
    wanted = cpu if by == cpu else f"{by}, for {cpu},"
    return DependencyMissing(f"a scheduling model of {wanted} is needed, and {why}", hint=INSTALL)
