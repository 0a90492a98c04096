"""Runs engines for ARM and RISC-V under qemu, by ``cnncc-run``; and a board's RPC server, of TVM's AArch64 wheels."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from cnncc.compiler.cache import Cache
from cnncc.compiler.emulation import EMULATORS, emulator_for, make_runner
from cnncc.compiler.reporting import Silent
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions, Engine, Profile
from cnncc.targets.llvm.target import LlvmTarget
from cnncc_runtime.bundle import TargetRecord, write_bundle
from cnncc_runtime.errors import DependencyMissing
from cnncc_runtime.specs import TensorSpec
from tests.conftest import ROOT
from tests.runtime.c_runner import RUNTIMES, Runner
from tests.runtime.engine_files import manifest

WHEELS = ROOT / "build" / "aarch64"
"""Where `make aarch64` puts TVM's wheels."""
EMULATOR = EMULATORS["aarch64"]
_LIBRARIES = {"apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so", "apache-tvm": "tvm/lib/libtvm_runtime.so"}
_OBJDUMP = "aarch64-linux-gnu-objdump"
_THREADS = "2"


def problem(machine: str = "aarch64") -> str:
    """Return what is missing here for a machine, or an empty text."""
    try:
        emulator_for(TargetRecord("llvm", "", "", "", machine, ()))
    except DependencyMissing as exc:
        return f"{exc.message}: `make aarch64` brings them"
    if machine != "aarch64":
        return ""
    missing = [
        *(f"{package}'s wheel in {WHEELS}" for package in _LIBRARIES if _wheel(package) is None),
        *([] if shutil.which(_OBJDUMP) else [_OBJDUMP]),
    ]
    return f"{', '.join(missing)} not found: `make aarch64` brings them" if missing else ""


def _wheel(package: str) -> Path | None:
    found = f"{package.replace('-', '_')}-{version(package)}-*manylinux_2_28_aarch64.whl"
    return next(iter(sorted(WHEELS.glob(found))), None)


def require(machine: str = "aarch64") -> None:
    """Skip the test where there is no board, but in CI fail it: there, nothing may go untested unnoticed."""
    if found := problem(machine):
        if os.environ.get("CI"):
            pytest.fail(found)
        pytest.skip(found)


class Described(Protocol):
    """What says what an engine takes and returns: a graph, or a manifest."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


@dataclass(frozen=True)
class Board:
    """A machine that qemu emulates.

    Attributes:
        runner: ``cnncc-run`` on it.
        folder: Holds the runner and TVM's runtime.
        cpu: As QEMU names it.
    """

    runner: Runner
    folder: Path
    cpu: str

    def run(self, engine: Engine, described: Described, feeds: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run an engine on two threads.

        Args:
            engine: Its files where the build left them; it has one entry.
            described: What it takes and returns.
            feeds: Its inputs, in that order.

        Returns:
            The outputs.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bundle = self.bundle(folder / "engine.cnncc", engine, described)
            arguments: list[str | Path] = []
            for number, array in enumerate(feeds):
                np.save(folder / f"{number}.npy", np.asarray(array, order="C"))
                arguments += ["--input", folder / f"{number}.npy"]
            made = self.runner(bundle, *arguments, "--output", folder / "made", "--threads", _THREADS, "--json")
            return [np.load(folder / "made" / one["file"]) for one in made.document["outputs"]]

    @staticmethod
    def bundle(folder: Path, engine: Engine, described: Described) -> Path:
        """Write an engine's bundle into a folder, which is made."""
        folder.mkdir()
        made = manifest(described.inputs, described.outputs, target=engine.target, engine=engine.record)
        write_bundle(folder, made, engine.files)
        return folder

    def libraries(self) -> list[str]:
        """Return the files of TVM's libraries for an RPC server, out of its wheels."""
        folder = self.folder / "wheels"
        folder.mkdir(exist_ok=True)
        for package, name in _LIBRARIES.items():
            wheel = _wheel(package)
            assert wheel is not None, package
            with zipfile.ZipFile(wheel) as archive:
                (folder / Path(name).name).write_bytes(archive.read(name))
        return [str(folder / Path(name).name) for name in _LIBRARIES.values()]

    def command(self, modalias: str) -> list[str]:
        """Return what runs a program on the board; the board's kernel says ``modalias`` of its CPU."""
        root = self.folder / "root"
        cpus = root / "sys/devices/system/cpu"
        cpus.mkdir(parents=True, exist_ok=True)
        (cpus / "modalias").write_text(modalias + "\n")
        (cpus / "online").write_text("0-1\n")
        if not (root / "lib").exists():
            (root / "lib").symlink_to(EMULATOR.sysroot / "lib")
        return ["qemu-aarch64", "-cpu", self.cpu, "-L", str(root)]

    def server(self) -> Path:
        """Return `server.c`, compiled."""
        program = self.folder / "server"
        if not program.exists():
            _compile("server.c", program)
        return program

    def run_graph(
        self, graph: OnnxGraph, feeds: Mapping[str, NDArray[Any]], profile: Profile, workdir: Path
    ) -> list[NDArray[Any]]:
        """Build a graph as the target does and run it; see `run`."""
        return self.run(build(graph, profile, workdir), graph, [feeds[spec.name] for spec in graph.inputs])


def build(graph: OnnxGraph, profile: Profile, workdir: Path) -> Engine:
    """Build a graph's engine in a folder, which is made."""
    workdir.mkdir(exist_ok=True)
    return LlvmTarget(profile).build(graph, BuildOptions(profile), workdir)


def make_board(folder: Path, cpu: str, machine: str = "aarch64") -> Board:
    """Return a board of a CPU by QEMU's name; an empty folder becomes its disk."""
    emulator = EMULATORS[machine]
    program = folder / "cnncc-run"
    if not program.exists():
        make_runner(emulator, folder, Cache(RUNTIMES), Silent())
    command = (emulator.qemu, "-cpu", cpu, "-L", str(emulator.sysroot))
    return Board(Runner(program, command, {"CNNCC_TVM_RUNTIME": ""}), folder, cpu)


def _compile(source: str, program: Path) -> None:
    import tvm_ffi.libinfo

    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", tvm_ffi.libinfo.find_include_path()]
    path = Path(__file__).with_name(source)
    subprocess.run(["aarch64-linux-gnu-gcc", *options, str(path), "-o", str(program)], check=True)


@functools.cache
def disassembly(payload: Path) -> str:
    """Return an engine's machine code as text."""
    command = [_OBJDUMP, "--disassemble", "--no-show-raw-insn", str(payload)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
