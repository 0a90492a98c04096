"""An engine for another CPU, run here: by ``cnncc-run`` under QEMU's user-mode emulation.

What is emulated is the CPU, instruction by instruction: one that the CPU lacks ends the run, and arithmetic is the
device's. How long it takes says nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import numpy as np

import cnncc_runtime
from cnncc.compiler.child import how_it_ended
from cnncc_runtime import errors
from cnncc_runtime.bundle import TargetRecord, read_bundle
from cnncc_runtime.errors import BuildFailed, CnnccError, DependencyMissing, EngineMismatch, RunFailed
from cnncc_runtime.specs import Feeds, Tensors

_LIBRARIES = {"apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so", "apache-tvm": "tvm/lib/libtvm_runtime.so"}
_RUNNER = "cnncc-run"

WHEELS = "CNNCC_TVM_WHEELS"
"""Environment variable: a folder that holds the wheels of TVM for other machines."""


SOURCES = Path(cnncc_runtime.__file__).with_name("c")
"""The sources of ``cnncc-run``."""


@dataclass(frozen=True)
class Emulator:
    """What runs engines of a machine here.

    Attributes:
        qemu: QEMU's program.
        compiler: A cross compiler.
        sysroot: Holds the machine's C and C++ libraries.
        packages: Debian's packages of all that.
        platform: What PyPI calls the machine; wheels of TVM are taken from there.
    """

    qemu: str
    compiler: str
    sysroot: Path
    packages: tuple[str, ...]
    platform: str


EMULATORS = {
    "aarch64": Emulator(
        "qemu-aarch64",
        "aarch64-linux-gnu-gcc",
        Path("/usr/aarch64-linux-gnu"),
        ("qemu-user", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "libstdc++6-arm64-cross"),
        "manylinux_2_28_aarch64",
    ),
}
"""ELF machine → what emulates it."""


def emulator_for(target: TargetRecord) -> Emulator:
    """Return what emulates a target's CPU.

    Raises:
        EngineMismatch: Nothing does.
        DependencyMissing: It is not installed.
    """
    emulator = EMULATORS.get(target.machine)
    if emulator is None or target.gpu:
        raise EngineMismatch(
            f"engines for {target.processor or target.machine} cannot be emulated, those for "
            f"{', '.join(sorted(EMULATORS))} can",
            hint="run `cnncc verify` on the device",
        )
    missing = [tool for tool in (emulator.qemu, emulator.compiler, "make") if shutil.which(tool) is None]
    library = emulator.sysroot / "lib" / "libstdc++.so.6"
    missing += [] if library.exists() else [str(library)]
    if missing:
        raise DependencyMissing(
            f"{', '.join(missing)} not found, by which engines for {target.machine} are emulated",
            hint=f"apt-get install make {' '.join(emulator.packages)}",
        )
    return emulator


def qemu_command(emulator: Emulator, target: TargetRecord) -> list[str]:
    """Return how QEMU is told which CPU to emulate: the target's, or, where it knows none such, one that has it all."""
    return [emulator.qemu, "-cpu", target.cpu if target.cpu in _known_cpus(emulator.qemu) else "max"]


@cache
def _known_cpus(qemu: str) -> frozenset[str]:
    listed = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True, check=False, timeout=60)
    return frozenset(listed.stdout.split())


def make_runner(emulator: Emulator, wheels: Path, folder: Path) -> Path:
    """Put ``cnncc-run`` for an emulated machine into a folder, TVM's libraries beside it; return the program.

    Args:
        emulator: From `emulator_for`.
        wheels: Where TVM's wheels for that machine are, unless `WHEELS` names another folder.
        folder: An empty folder.

    Raises:
        DependencyMissing: A wheel is not there.
        BuildFailed: The program could not be compiled.
    """
    wheels = Path(os.environ.get(WHEELS) or wheels)
    found = {package: _wheel(package, emulator, wheels) for package in _LIBRARIES}
    if missing := [f"{package}=={version(package)}" for package, wheel in found.items() if wheel is None]:
        raise DependencyMissing(
            f"TVM's libraries for {emulator.platform} are not in {wheels}",
            hint="pip download --no-deps --only-binary=:all: --platform "
            f"{emulator.platform} --dest {wheels} {' '.join(missing)}",
        )
    for package, wheel in found.items():
        assert wheel is not None
        with zipfile.ZipFile(wheel) as archive:
            (folder / Path(_LIBRARIES[package]).name).write_bytes(archive.read(_LIBRARIES[package]))
    _compile(emulator, folder / _RUNNER)
    return folder / _RUNNER


def _wheel(package: str, emulator: Emulator, wheels: Path) -> Path | None:
    name = f"{package.replace('-', '_')}-{version(package)}-*{emulator.platform}.whl"
    return next(iter(sorted(wheels.glob(name))), None)


def _compile(emulator: Emulator, program: Path) -> None:
    import tvm_ffi.libinfo

    options = [f"CC={emulator.compiler}", f"OUT={program}", f"TVM_FFI={tvm_ffi.libinfo.find_include_path()}"]
    command = ["make", "--silent", "-C", str(SOURCES), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise BuildFailed(f"{_RUNNER} cannot be compiled: {done.stderr.strip()}", hint=f"is {emulator.compiler} whole?")


class EmulatedProcess:
    """Runs a bundle's engine under emulation, a process for each run.

    Args:
        bundle: The bundle's folder; its parity may still be pending.
        runner: From `make_runner`.

    Raises:
        EngineMismatch: Nothing emulates the engine's CPU.
        DependencyMissing: What does is not installed.
        CnnccError: The bundle cannot be opened there, as ``cnncc-run`` says it.
    """

    def __init__(self, bundle: Path, *, runner: Path) -> None:
        manifest = read_bundle(bundle).manifest
        emulator = emulator_for(manifest.target)
        self._inputs = [spec.name for spec in manifest.inputs]
        self._command = [*qemu_command(emulator, manifest.target), "-L", str(emulator.sysroot)]
        self._command += [str(runner), str(bundle.resolve()), "--allow-unverified", "--json"]
        self._call()

    def run(self, feeds: Feeds) -> Tensors:
        """Return the outputs by name.

        Raises:
            DataRefused: The feeds do not fit.
            RunFailed: The engine failed or crashed.
        """
        with tempfile.TemporaryDirectory(prefix="cnncc-emulated-") as scratch:
            arguments = ["--output", f"{scratch}/outputs"]
            for number, name in enumerate(self._inputs):
                path = Path(scratch, f"{number}.npy")
                np.save(path, np.asarray(feeds[name], order="C"))
                arguments += ["--input", str(path)]
            made = self._call(*arguments)["outputs"]
            return {one["name"]: np.load(Path(scratch, "outputs", one["file"])) for one in made}

    def _call(self, *arguments: str) -> dict[str, list[dict[str, str]]]:
        done = subprocess.run(
            [*self._command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        try:
            told = json.loads(done.stdout)
        except ValueError:
            said = done.stderr.strip().partition("\n")[0]
            raise RunFailed(f"the emulated engine {how_it_ended(done.returncode)}: {said}") from None
        if done.returncode:
            raise _error_of(told)
        found: dict[str, list[dict[str, str]]] = told
        return found

    def __enter__(self) -> EmulatedProcess:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing runs between runs."""


def _error_of(told: dict[str, str]) -> CnnccError:
    kind: type[CnnccError] = getattr(errors, told["error"], RunFailed)
    return kind(f"under emulation: {told['message']}", hint=told["hint"])
