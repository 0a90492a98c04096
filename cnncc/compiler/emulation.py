"""An engine for another CPU, run here: by ``cnncc-run`` under QEMU's user-mode emulation.

What is emulated is the CPU, instruction by instruction: one that the CPU lacks ends the run, and arithmetic is the
device's. How long it takes says nothing. An engine that is an executable needs no ``cnncc-run``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cnncc.compiler.cache import Cache
from cnncc.compiler.child import how_it_ended
from cnncc.compiler.device_runtime import device_runtime, gnu_compilers, package
from cnncc.compiler.reporting import Reporter
from cnncc.targets.devices.isa import gnu_triple
from cnncc.targets.devices.profile_files import our_devices
from cnncc_runtime import errors
from cnncc_runtime.aot_session import AotSession
from cnncc_runtime.bundle import Bundle, TargetRecord, read_bundle
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.errors import CnnccError, DependencyMissing, EngineMismatch, RunFailed
from cnncc_runtime.golden import Runs
from cnncc_runtime.specs import Feeds, Tensors


@dataclass(frozen=True)
class Emulator:
    """What runs engines of a machine here.

    Attributes:
        machine: As ELF files name it.
        qemu: QEMU's program.
        default: The CPU that QEMU is given where it knows none that is the engine's: one that has it all.
    """

    machine: str
    qemu: str
    default: str

    @property
    def sysroot(self) -> Path:
        """Holds the machine's C and C++ libraries."""
        return Path("/usr", gnu_triple(self.machine))

    @property
    def tools(self) -> tuple[str, ...]:
        """What an engine that is a library takes here."""
        return (self.qemu, "make", *(f"{gnu_triple(self.machine)}-{kind}" for kind in ("gcc", "g++")))

    @property
    def packages(self) -> tuple[str, ...]:
        """Debian's packages of them; the compiler's libraries are the machine's."""
        return ("qemu-user", "make", package(f"{gnu_triple(self.machine)}-g++"))


EMULATORS = {
    one.machine: one
    for one in (
        Emulator("aarch64", "qemu-aarch64", "max"),
        Emulator("arm", "qemu-arm", "max"),
        Emulator("riscv64", "qemu-riscv64", "rv64"),
    )
}
"""ELF machine → what emulates it."""


def can_emulate(target: TargetRecord) -> bool:
    """Tell whether engines for a target's machine can be emulated, where what does it is installed."""
    return not target.gpu and target.machine in EMULATORS and target.machine != host_machine()


def emulator_for(target: TargetRecord, *, executable: bool = False) -> Emulator:
    """Return what emulates a target's CPU.

    Args:
        target: What the engine was built for.
        executable: Whether the engine is one, which needs QEMU alone.

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
    tools = (emulator.qemu,) if executable else emulator.tools
    missing = [tool for tool in tools if shutil.which(tool) is None]
    library = emulator.sysroot / "lib" / "libc.so.6"
    missing += [] if executable or library.exists() else [str(library)]
    if missing:
        raise DependencyMissing(
            f"{', '.join(missing)} not found, by which engines for {target.machine} are emulated",
            hint=f"apt-get install {' '.join(('qemu-user',) if executable else emulator.packages)}",
        )
    return emulator


def qemu_command(emulator: Emulator, target: TargetRecord) -> list[str]:
    """Return how QEMU is told which CPU to emulate.

    The device's profile says so, where the engine is for one of ours; else it is the target's CPU by LLVM's name, or,
    where QEMU knows none such, one that has it all.
    """
    device = our_devices().get(target.device)
    known = _known_cpus(emulator.qemu)
    if device and device.emulator and device.profile.cpu == target.cpu and device.emulator.cpu in known:
        return [emulator.qemu, "-cpu", device.emulator.cpu]
    return [emulator.qemu, "-cpu", target.cpu if target.cpu in known else emulator.default]


@cache
def _known_cpus(qemu: str) -> frozenset[str]:
    listed = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True, check=False, timeout=60)
    return frozenset(listed.stdout.split())


def make_runner(emulator: Emulator, folder: Path, store: Cache, reporter: Reporter) -> Path:
    """Put ``cnncc-run`` for an emulated machine into a folder, TVM's runtime beside it; return the program.

    Args:
        emulator: From `emulator_for`.
        folder: An empty folder.
        store: Where what was compiled is kept.
        reporter: Told of what is compiled.

    Raises:
        BuildFailed: The program or the runtime could not be compiled.
    """
    return device_runtime(gnu_compilers(emulator.machine), store, reporter).put(folder)


@contextmanager
def emulated(path: Path, *, runner: Path | None) -> Iterator[Runs]:
    """Open a bundle's engine under emulation.

    Args:
        path: The bundle's folder; its parity may still be pending.
        runner: From `make_runner`; an engine that is an executable needs none.

    Raises:
        EngineMismatch: Nothing emulates the engine's CPU.
        DependencyMissing: What does is not installed.
        CnnccError: The bundle cannot be opened there.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    if runner is not None:
        yield EmulatedProcess(bundle, runner=runner)
        return
    command = qemu_command(emulator_for(manifest.target, executable=True), manifest.target)
    with bundle.open(manifest.engine.file) as file, AotSession(bundle, file, threads=1, emulator=command) as session:
        yield session


class EmulatedProcess:
    """Runs a bundle's engine by ``cnncc-run`` under emulation, a process for each run.

    Args:
        bundle: Its parity may still be pending.
        runner: From `make_runner`.

    Raises:
        EngineMismatch: Nothing emulates the engine's CPU.
        DependencyMissing: What does is not installed.
        CnnccError: The bundle cannot be opened there, as ``cnncc-run`` says it.
    """

    def __init__(self, bundle: Bundle, *, runner: Path) -> None:
        manifest = bundle.manifest
        emulator = emulator_for(manifest.target)
        self._inputs = [spec.name for spec in manifest.inputs]
        self._command = [*qemu_command(emulator, manifest.target), "-L", str(emulator.sysroot)]
        self._command += [str(runner), str(bundle.path.resolve()), "--allow-unverified", "--json"]
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


def _error_of(told: dict[str, str]) -> CnnccError:
    kind: type[CnnccError] = getattr(errors, told["error"], RunFailed)
    return kind(f"under emulation: {told['message']}", hint=told["hint"])
