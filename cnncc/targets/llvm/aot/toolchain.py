"""C compilers that make static executables of a machine."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cnncc.targets.devices.isa import gnu_triple
from cnncc_runtime.errors import BuildFailed, TargetUnavailable

_ZIG = {"arm": "arm-linux-musleabihf"}
"""ELF machine → the triple of its musl, where that is not ``MACHINE-linux-musl``."""

_TIMEOUT = 600
"""Seconds; zig compiles its libc first."""


@dataclass(frozen=True)
class CCompiler:
    """A C compiler with its archiver.

    Attributes:
        command: How the compiler is called, up to its own options.
        archiver: How the archiver is called.
        version: What the compiler says of itself.
    """

    command: tuple[str, ...]
    archiver: tuple[str, ...]
    version: str

    def compile(self, sources: Sequence[str], folder: Path) -> list[str]:
        """Compile sources that lie in a folder; returns the objects, which lie there too.

        Raises:
            BuildFailed: The compiler refused.
        """
        objects = [f"{Path(source).stem}.o" for source in sources]
        # no position-independent code is needed in a static executable, but shared libraries of apps may want it
        options = ["-std=c99", "-O2", "-fPIC", "-g0"]
        for source, made in zip(sources, objects, strict=True):
            self._do([*self.command, *options, "-c", source, "-o", made], folder)
        return objects

    def archive(self, objects: Sequence[str], library: str, folder: Path) -> None:
        """Make a static library.

        Raises:
            BuildFailed: The archiver refused.
        """
        self._do([*self.archiver, "rcsD", library, *objects], folder)

    def link(self, objects: Sequence[str], output: str, folder: Path) -> None:
        """Make a static executable.

        Raises:
            BuildFailed: The linker refused.
        """
        self._do([*self.command, "-static", "-s", "-Wl,--build-id=none", "-o", output, *objects, "-lm"], folder)

    def _do(self, command: list[str], folder: Path) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
            raise BuildFailed(
                f"the C compiler failed: {said[0] if said else f'exit code {done.returncode}'}",
                hint=f"check {' '.join(self.command)} ({self.version}), or use another: {install_hint()}",
            )


def find_compiler(machine: str, host: str) -> CCompiler:
    """Return the first compiler here that makes static executables of a machine.

    Args:
        machine: ELF machine of the engine.
        host: ELF machine of this computer.

    Raises:
        TargetUnavailable: None does.
    """
    candidates = [_gnu(f"{gnu_triple(machine)}-gcc")]
    candidates += [_gnu("cc")] if machine == host else []
    candidates.append(_zig(_ZIG.get(machine, f"{machine}-linux-musl")))
    found = next((one for one in candidates if one is not None and _works(one)), None)
    if found is None:
        raise TargetUnavailable(
            f"no C compiler here makes static executables for {machine}", hint=install_hint(machine)
        )
    return found


def install_hint(machine: str = "MACHINE") -> str:
    """Return how to get a compiler."""
    package = f"gcc-{gnu_triple(machine)}".replace("_", "-")
    return f"pip install 'cnncc[cross]' (brings ziglang), or install {package}"


def _gnu(name: str) -> CCompiler | None:
    path = shutil.which(name)
    if path is None:
        return None
    archiver = _ask(path, "-print-prog-name=ar").strip()
    return CCompiler((path,), (archiver or "ar",), (_ask(path, "--version").splitlines() or [name])[0])


def _zig(triple: str) -> CCompiler | None:
    if importlib.util.find_spec("ziglang") is None:
        return None
    zig = (sys.executable, "-m", "ziglang")
    version = _ask(*zig, "version").strip()
    return CCompiler((*zig, "cc", "-target", triple), (*zig, "ar"), f"zig {version}") if version else None


@cache
def _works(compiler: CCompiler) -> bool:
    """Whether a compiler makes a static executable: many lack the libraries for it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.c").write_text("#include <math.h>\nint main(int n, char **v) { return v && sin(n) > 2; }\n")
        try:
            compiler.link(compiler.compile(["probe.c"], Path(folder)), "probe", Path(folder))
        except (BuildFailed, OSError, subprocess.TimeoutExpired):
            return False
    return True


@cache
def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
