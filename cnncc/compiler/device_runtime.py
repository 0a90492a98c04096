"""The runtime of a device, compiled for its machine: ``cnncc-run``, and TVM's runtime out of the sources in its wheels.

TVM's runtime is one library with the C++ library in it, so that a device needs nothing but its C library.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cnncc_runtime
from cnncc.compiler.cache import Cache
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc.targets.devices.isa import gnu_triple
from cnncc_runtime.bundle import RUNNER, RUNTIME_LIBRARY
from cnncc_runtime.digests import digest_file, digest_json
from cnncc_runtime.errors import BuildFailed, DependencyMissing, TargetUnavailable

SOURCES = Path(cnncc_runtime.__file__).with_name("c")
"""The sources of ``cnncc-run``, and what TVM's need beside those in the wheels."""

_TIMEOUT = 1800
"""Seconds: zig compiles a C and a C++ library first."""

_OLDEST = "2.28"
"""The C library that zig is told to build for, where nobody says which one the device has."""


@dataclass(frozen=True)
class Compilers:
    """A C and a C++ compiler of one machine.

    Attributes:
        machine: As ELF files name it.
        cc: How the C compiler is called, up to its own options.
        cxx: How the C++ compiler is called.
        version: What they say of themselves.
    """

    machine: str
    cc: tuple[str, ...]
    cxx: tuple[str, ...]
    version: str


def gnu_compilers(machine: str) -> Compilers:
    """Return GCC's cross compilers of a machine.

    Raises:
        DependencyMissing: They, or make, are not installed.
    """
    cc, cxx = (f"{gnu_triple(machine)}-{name}" for name in ("gcc", "g++"))
    if missing := [tool for tool in (cc, cxx, "make") if shutil.which(tool) is None]:
        raise DependencyMissing(
            f"{', '.join(missing)} not found, by which the runtime for {machine} is compiled",
            hint=f"apt-get install make {package(cxx)}",
        )
    return Compilers(machine, (cc,), (cxx,), _first_line(cxx, "--version"))


def package(program: str) -> str:
    """Return Debian's package of a cross compiler."""
    kind, triple = program.rpartition("-")[2], program.rpartition("-")[0]
    return f"{kind}-{triple}".replace("_", "-")


def find_compilers(machine: str, host: str, glibc: str = "") -> Compilers:
    """Return the first compilers here that make programs of a machine: zig's, which are told the C library's version.

    Args:
        machine: ELF machine of the device.
        host: ELF machine of this computer.
        glibc: The oldest C library that the device may have (``2.31``); empty where nobody knows.

    Raises:
        DependencyMissing: There are none, or no make.
    """
    if shutil.which("make") is None:
        raise DependencyMissing("make not found, by which the runtime is compiled", hint="apt-get install make")
    if importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        target = ("-target", f"{gnu_triple(machine)}.{glibc or _OLDEST}")
        return Compilers(machine, (*zig, "cc", *target), (*zig, "c++", *target), f"zig {_first_line(*zig, 'version')}")
    if machine == host and shutil.which("cc") and shutil.which("c++"):
        return Compilers(machine, ("cc",), ("c++",), _first_line("c++", "--version"))
    try:
        return gnu_compilers(machine)
    except DependencyMissing as exc:
        raise DependencyMissing(
            exc.message, hint=f"pip install 'cnncc[cross]' (brings ziglang), or {exc.hint}"
        ) from exc


@dataclass(frozen=True)
class DeviceRuntime:
    """What runs bundles on a machine without Python, made when it is first asked for.

    Attributes:
        compilers: What makes it.
        stages: File name → the stage that makes it: `RUNNER`, in a second, and `RUNTIME_LIBRARY`, in half a minute.
    """

    compilers: Compilers
    stages: dict[str, Stage]

    @property
    def glibc(self) -> str:
        """The oldest C library that it runs on."""
        return max((str(stage.value["glibc"]) for stage in self.stages.values()), key=_parts)

    @property
    def digests(self) -> dict[str, str]:
        """File name → digest."""
        return {name: stage.digests[name] for name, stage in self.stages.items()}

    def file(self, name: str) -> Path:
        """Return one of the files, to read and never to write."""
        return self.stages[name].file(name)

    def put(self, folder: Path) -> Path:
        """Put the files into a folder; return the program."""
        for name in self.stages:
            shutil.copyfile(self.file(name), folder / name)
        (folder / RUNNER).chmod(0o755)
        return folder / RUNNER

    def check(self, glibc: str) -> None:
        """Refuse a device whose C library is too old.

        Args:
            glibc: The oldest one that the device may have; empty where nobody knows.

        Raises:
            TargetUnavailable: It is too old.
        """
        if glibc and _parts(self.glibc) > _parts(glibc):
            raise TargetUnavailable(
                f"the runtime that {self.compilers.version} makes needs glibc {self.glibc}, "
                f"and the device may have {glibc}",
                hint="pip install 'cnncc[cross]' brings zig's compilers, which build for older C libraries; or leave "
                "--with-runtime out",
            )


def device_runtime(compilers: Compilers, store: Cache, reporter: Reporter) -> DeviceRuntime:
    """Return the runtime that compilers make.

    Asking for its files raises `BuildFailed` where a compiler refuses.
    """
    import tvm_ffi.libinfo

    stages = {RUNNER: _stage("cnncc-run", "OUT", (), compilers, store, reporter)}
    ffi, tvm = Path(tvm_ffi.libinfo.find_include_path()), _tvm()
    folders = (SOURCES / "tvm", tvm / "src" / "runtime", tvm / "include", ffi, ffi.parent / "src")
    stages[RUNTIME_LIBRARY] = _stage("runtime", "RUNTIME", folders, compilers, store, reporter)
    return DeviceRuntime(compilers, stages)


_NAMES = {"OUT": RUNNER, "RUNTIME": RUNTIME_LIBRARY}
"""The Makefile's variable for a file → the file."""


def _stage(
    name: str, variable: str, folders: Iterable[Path], compilers: Compilers, store: Cache, reporter: Reporter
) -> Stage:
    file = _NAMES[variable]
    sources = [*SOURCES.glob("*.[ch]")] if file == RUNNER else [path for one in folders for path in one.rglob("*")]
    key = store.key(
        name,
        machine=compilers.machine,
        compilers=[compilers.cc[-3:], compilers.cxx[-3:], compilers.version],
        sources=_digest(tuple(sorted([SOURCES / "Makefile", *sources]))),
        tvm={package: version(package) for package in ("apache-tvm", "apache-tvm-ffi")},
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        made = folder.resolve() / file  # make runs elsewhere
        _make(compilers, f"{variable}={made}", str(made))
        glibc = oldest_glibc(made)
        size = made.stat().st_size
        return {"glibc": glibc}, {file: made}, f"{compilers.machine}, {size / 1e6:.1f} MB, glibc {glibc} or newer"

    return Stage(name, key, compute, store, reporter)


def oldest_glibc(path: Path) -> str:
    """Return the oldest C library that a program or library runs on, by the versions of symbols that it names."""
    found = re.findall(rb"\0GLIBC_(2(?:\.\d+)+)(?=\0)", path.read_bytes())
    return max((name.decode() for name in found), key=_parts, default="2.0")


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _make(compilers: Compilers, *arguments: str) -> None:
    import tvm_ffi.libinfo

    options = [f"CC={shlex.join(compilers.cc)}", f"CXX={shlex.join(compilers.cxx)}"]
    options += [f"TVM_FFI={tvm_ffi.libinfo.find_include_path()}", f"TVM={_tvm()}"]
    command = ["make", "--silent", "-C", str(SOURCES), *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise BuildFailed(
            f"the runtime for {compilers.machine} cannot be compiled: {(said or [done.stderr.strip()])[0]}",
            hint=f"is {compilers.cxx[0]} ({compilers.version}) whole?",
        )


def _tvm() -> Path:
    """Return the folder of TVM's package, without importing the compiler."""
    found = importlib.util.find_spec("tvm")
    if found is None or not found.submodule_search_locations:
        raise DependencyMissing(
            "TVM is not installed, whose sources the runtime is compiled from", hint="pip install cnncc"
        )
    return Path(next(iter(found.submodule_search_locations)))


@cache
def _digest(files: tuple[Path, ...]) -> str:
    return digest_json([[path.name, digest_file(path)] for path in files if path.is_file()])


@cache
def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (done.stdout.splitlines() or [command[0]])[0].strip()
