"""Builds and calls ``cnncc-run``, the C program of ``runtime/c``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi.libinfo

from cnncc.compiler.cache import Cache
from cnncc.compiler.device_runtime import device_runtime, find_compilers, gnu_compilers
from cnncc.compiler.reporting import Silent
from cnncc_runtime.errors import DependencyMissing
from cnncc_runtime.tvm_runtime import locate

SOURCE = Path(__file__).resolve().parents[2] / "runtime" / "c"
RUNTIMES = SOURCE.parents[1] / "build" / "runtimes"
"""A cache of the runtimes that the tests compile: half a minute each."""
EXIT_CODES = {0, 1, 2, 3, 4, 5}
BROKEN = 99
"""Exit code of the sanitizers."""
SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout, which must be one JSON document and nothing else."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


@dataclass(frozen=True)
class Runner:
    """The program, and what it is called by (an emulator)."""

    program: Path
    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str | Path, code: int | None = 0) -> Outcome:
        """Run it and check its exit code (None: any of the documented ones)."""
        done = subprocess.run(
            [*self.prefix, str(self.program), *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self.env},
            timeout=120,
        )
        wanted = EXIT_CODES if code is None else {code}
        assert done.returncode in wanted, f"exit code {done.returncode}\n{done.stderr}\n{done.stdout}"
        return Outcome(done.returncode, done.stdout, done.stderr)


def require(*tools: str) -> None:
    """Skip the test where a tool is missing, but in CI fail it."""
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not found: {', '.join(missing)}")


def build_runner(folder: Path, compiler: str = "cc", flags: str = "") -> Path:
    """Compile it into a folder; warnings are errors."""
    require("make", compiler)
    program = folder / "cnncc-run"
    options = [f"CC={compiler}", f"OUT={program}", f"TVM_FFI={tvm_ffi.libinfo.find_include_path()}"]
    options += [f"CFLAGS={flags}", "LDFLAGS="] if flags else []
    done = subprocess.run(["make", "-s", "-C", str(SOURCE), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def small_runner(folder: Path, machine: str, *prefix: str) -> Runner:
    """The program with the runtime that is compiled from TVM's sources, once a checkout, for a machine."""
    try:
        compilers = gnu_compilers(machine) if prefix else find_compilers(machine, machine)
    except DependencyMissing as exc:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(exc.message)
    program = device_runtime(compilers, Cache(RUNTIMES), Silent()).put(folder)
    return Runner(program, prefix, {"CNNCC_TVM_RUNTIME": ""})


def host_runner(folder: Path) -> Runner:
    """The program for this machine, with the TVM that is installed here."""
    return Runner(build_runner(folder), env={"CNNCC_TVM_RUNTIME": str(locate())})


def sanitized_runner(folder: Path) -> Runner:
    """The program as it finds its own faults; it has no TVM, so that it ends where it would load an engine."""
    (folder / "none").mkdir()
    options = f"detect_leaks=0:allocator_may_return_null=1:exitcode={BROKEN}"
    env = {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": f"exitcode={BROKEN}", "CNNCC_TVM_RUNTIME": str(folder / "none")}
    return Runner(build_runner(folder, flags=SANITIZED), env=env)
