"""Objects to one shared library, with whatever linker this machine has."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cnncc.targets.devices.isa import gnu_triple
from cnncc_runtime.errors import BuildFailed, TargetUnavailable

EMULATIONS = {
    "x86_64": "elf_x86_64",
    "aarch64": "aarch64linux",
    "arm": "armelf_linux_eabi",
    "riscv64": "elf64lriscv",
}
"""ELF machine → the name that linkers have for its format."""

INSTALL = "pip install 'cnncc[cross]' (brings ld.lld), or install lld or binutils"


@dataclass(frozen=True)
class Linker:
    """A way to link.

    Attributes:
        name: ``ld.lld``, ``ld``, ``zig-lld`` or ``cc``.
        command: How it is called, up to its own options.
        version: What it says of itself.
    """

    name: str
    command: tuple[str, ...]
    version: str

    def arguments(self, machine: str, objects: Sequence[str], output: str) -> list[str]:
        """Return the whole command line."""
        if self.name == "cc":
            return [*self.command, "-shared", "-nostdlib", "-Wl,--build-id=none", "-o", output, *objects]
        emulation = ["-m", EMULATIONS[machine]]
        return [*self.command, *emulation, "-shared", "--build-id=none", "-z", "noexecstack", "-o", output, *objects]


def find_linker(machine: str, host: str) -> Linker:
    """Return the first linker that makes libraries of a machine.

    Args:
        machine: ELF machine of the engine.
        host: ELF machine of this computer.

    Raises:
        TargetUnavailable: None does.
    """
    for candidate in (_lld, _gnu_ld, _zig_lld, _cc):
        linker = candidate(machine, host)
        if linker is not None:
            return linker
    raise TargetUnavailable(f"no linker here makes {machine} libraries", hint=INSTALL)


def link(linker: Linker, machine: str, objects: Sequence[Path], output: Path) -> None:
    """Link objects that lie beside the output.

    They are named relative to their folder, so the library's bytes do not depend on where it was made.

    Raises:
        BuildFailed: The linker refused; its first line says why.
    """
    command = linker.arguments(machine, [path.name for path in objects], output.name)
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BuildFailed(
            f"{linker.name} could not link the engine: {lines[0] if lines else f'exit code {done.returncode}'}",
            hint=f"check {' '.join(linker.command)}, or use another linker: {INSTALL}",
        )


@cache
def _ask(*command: str) -> str:
    """Return what a command prints, or an empty text where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _first_line(text: str) -> str:
    return text.splitlines()[0].strip() if text.strip() else ""


def _lld(_machine: str, _host: str) -> Linker | None:
    path = shutil.which("ld.lld")
    banner = _first_line(_ask(path, "--version")) if path else ""
    return Linker("ld.lld", (path,), banner) if path and banner else None


def _gnu_ld(machine: str, _host: str) -> Linker | None:
    for name in (f"{machine}-linux-gnu-ld", f"{gnu_triple(machine)}-ld", "ld"):
        path = shutil.which(name)
        if path and EMULATIONS[machine] in _ask(path, "-V").split():
            return Linker("ld", (path,), _first_line(_ask(path, "-V")))
    return None


def _zig_lld(_machine: str, _host: str) -> Linker | None:
    if importlib.util.find_spec("ziglang") is None:
        return None
    try:
        found = version("ziglang")
    except PackageNotFoundError:
        return None
    return Linker("zig-lld", (sys.executable, "-m", "ziglang", "ld.lld"), f"ziglang {found}")


def _cc(machine: str, host: str) -> Linker | None:
    if machine != host:
        return None
    path = shutil.which("cc")
    banner = _first_line(_ask(path, "--version")) if path else ""
    return Linker("cc", (path,), banner) if path and banner else None
