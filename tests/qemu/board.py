"""Runs engines for AArch64 under `qemu-aarch64`, by `runner.c`, on the libraries of TVM's AArch64 wheels."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions, Engine, Profile
from cnncc.targets.llvm.target import LlvmTarget
from tests.conftest import ROOT
from tests.targets.llvm.running import weights_of

WHEELS = ROOT / "build" / "aarch64"
"""Where `make aarch64` puts TVM's wheels."""
SYSROOT = Path("/usr/aarch64-linux-gnu")
TOOLS = ("qemu-aarch64", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump")
_LIBRARIES = {"apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so", "apache-tvm": "tvm/lib/libtvm_runtime.so"}
_THREADS = 2
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLPack's type codes
_KINDS = {code: kind for kind, code in _CODES.items()}


def problem() -> str:
    """Return what is missing here, or an empty text."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    missing += [str(path) for path in (SYSROOT / "lib" / "libstdc++.so.6",) if not path.exists()]
    missing += [f"{package}'s wheel in {WHEELS}" for package in _LIBRARIES if _wheel(package) is None]
    return f"{', '.join(missing)} not found: `make aarch64` brings them" if missing else ""


def require() -> None:
    """Skip the test where there is no board, but in CI fail it: there, nothing may go untested unnoticed."""
    if found := problem():
        if os.environ.get("CI"):
            pytest.fail(found)
        pytest.skip(found)


@dataclass(frozen=True)
class Died(Exception):
    """The runner ended badly.

    Attributes:
        code: Its exit code; negative for a signal.
        said: What it wrote to stderr.
    """

    code: int
    said: str

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.said}"


@dataclass(frozen=True)
class Board:
    """A machine that qemu emulates.

    Attributes:
        folder: Holds the runner and TVM's libraries, and files of a run meanwhile.
        cpu: As qemu names it: an instruction that this CPU lacks ends a run with SIGILL.
    """

    folder: Path
    cpu: str

    def run(self, engine: Engine, feeds: Sequence[NDArray[Any]], entry: str = "main") -> list[NDArray[Any]]:
        """Run one entry of an engine on two threads.

        Args:
            engine: Its files where the build left them.
            feeds: The entry's inputs, in the graph's order.
            entry: Its name.

        Returns:
            The outputs.

        Raises:
            Died: The engine crashed, or TVM refused it.
        """
        given, made = self.folder / "input", self.folder / "output"
        with given.open("wb") as file:
            for array in [*feeds, *weights_of(engine, entry)]:
                _write(file, array)
        command = ["qemu-aarch64", "-cpu", self.cpu, "-L", str(SYSROOT), str(self.folder / "runner"), *self.libraries,
                   str(engine.payload), entry, str(_THREADS), str(given), str(made)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            raise Died(done.returncode, done.stderr.strip())
        with made.open("rb") as file:
            return list(_read(file))

    @property
    def libraries(self) -> list[str]:
        """The files of TVM's libraries."""
        return [str(self.folder / Path(name).name) for name in _LIBRARIES.values()]

    def command(self, modalias: str) -> list[str]:
        """Return what runs a program on the board; the board's kernel says ``modalias`` of its CPU."""
        root = self.folder / "root"
        cpus = root / "sys/devices/system/cpu"
        cpus.mkdir(parents=True, exist_ok=True)
        (cpus / "modalias").write_text(modalias + "\n")
        (cpus / "online").write_text("0-1\n")
        if not (root / "lib").exists():
            (root / "lib").symlink_to(SYSROOT / "lib")
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
        return self.run(build(graph, profile, workdir), [feeds[spec.name] for spec in graph.inputs])


def build(graph: OnnxGraph, profile: Profile, workdir: Path) -> Engine:
    """Build a graph's engine in a folder, which is made."""
    workdir.mkdir(exist_ok=True)
    return LlvmTarget(profile).build(graph, BuildOptions(profile), workdir)


def make_board(folder: Path, cpu: str) -> Board:
    """Return a board; an empty folder becomes its disk."""
    if not (folder / "runner").exists():
        for package, name in _LIBRARIES.items():
            wheel = _wheel(package)
            assert wheel is not None
            with zipfile.ZipFile(wheel) as archive:
                (folder / Path(name).name).write_bytes(archive.read(name))
        _compile("runner.c", folder / "runner")
    return Board(folder, cpu)


def _compile(source: str, program: Path) -> None:
    import tvm_ffi.libinfo

    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", tvm_ffi.libinfo.find_include_path()]
    path = Path(__file__).with_name(source)
    subprocess.run(["aarch64-linux-gnu-gcc", *options, str(path), "-o", str(program)], check=True)


@functools.cache
def disassembly(payload: Path) -> str:
    """Return an engine's machine code as text."""
    command = ["aarch64-linux-gnu-objdump", "--disassemble", "--no-show-raw-insn", str(payload)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _wheel(package: str) -> Path | None:
    name = f"{package.replace('-', '_')}-{version(package)}-*aarch64.whl"
    return next(iter(sorted(WHEELS.glob(name))), None)


def _write(file: BinaryIO, array: NDArray[Any]) -> None:
    head = [_CODES[array.dtype.kind], 8 * array.itemsize, array.ndim, *array.shape]
    file.write(np.array(head, "<i8").tobytes())
    file.write(np.ascontiguousarray(array).tobytes())


def _read(file: BinaryIO) -> Iterator[NDArray[Any]]:
    while head := file.read(24):
        code, bits, rank = np.frombuffer(head, "<i8").tolist()
        shape = np.frombuffer(file.read(8 * rank), "<i8").tolist()
        dtype = np.dtype(f"<{_KINDS[code]}{bits // 8}")
        yield np.frombuffer(file.read(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
