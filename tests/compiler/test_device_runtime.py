"""The runtime of a device as it is compiled; tests/runtime/test_c_runs.py and tests/cli/test_emulate.py run it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi.libinfo

from cnncc.compiler import device_runtime as module
from cnncc.compiler.cache import Cache
from cnncc.compiler.device_runtime import (
    Compilers,
    DeviceRuntime,
    device_runtime,
    find_compilers,
    gnu_compilers,
    oldest_glibc,
    package,
)
from cnncc.compiler.reporting import Silent
from cnncc.targets.devices.isa import gnu_triple
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.elf import read_elf
from cnncc_runtime.errors import BuildFailed, DependencyMissing, TargetUnavailable
from tests.runtime.c_runner import RUNTIMES, SANITIZED, SOURCE, require

MACHINES = ["x86_64", "aarch64", "arm", "riscv64"]
LIBC = re.compile(r"(libc|libm|libpthread|libdl)\.so\.\d|ld-linux.*\.so\.\d")


@pytest.fixture(params=MACHINES)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A machine, and a folder with its runtime."""
    machine = request.param
    if machine == host_machine():
        require("make", "cc", "c++")
        compilers = find_compilers(machine, machine)
    else:
        require("make", f"{gnu_triple(machine)}-g++")
        compilers = gnu_compilers(machine)
    device_runtime(compilers, Cache(RUNTIMES), Silent()).put(tmp_path)
    return machine, tmp_path


@pytest.mark.slow
def test_a_device_needs_nothing_but_its_c_library(built: tuple[str, Path]) -> None:
    machine, folder = built
    for name in ("cnncc-run", "libtvm_runtime.so"):
        elf = read_elf(folder / name)
        assert elf.machine == machine
        assert [one for one in elf.needed if not LIBC.fullmatch(one)] == []


@pytest.mark.slow
def test_the_library_shows_its_c_interface_alone_and_is_small(built: tuple[str, Path]) -> None:
    _machine, folder = built
    library = folder / "libtvm_runtime.so"
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^\S+ \w (\w+)$", listed, re.MULTILINE)) == set(
        re.findall(r"\bTVMFFI\w+(?=;)", (SOURCE / "tvm" / "exports.map").read_text())
    )
    assert library.stat().st_size < 2_200_000


@pytest.mark.slow
def test_the_library_does_not_say_where_it_was_built(built: tuple[str, Path]) -> None:
    _machine, folder = built
    data = (folder / "libtvm_runtime.so").read_bytes()
    assert b"src/runtime/vm/vm.cc" in data
    for place in (str(Path(tvm_ffi.libinfo.find_include_path()).parent), str(SOURCE), str(RUNTIMES)):
        assert place.encode() not in data


@pytest.mark.slow
def test_the_oldest_c_library_is_that_of_the_newest_symbol(built: tuple[str, Path]) -> None:
    _machine, folder = built
    for name in ("cnncc-run", "libtvm_runtime.so"):
        listed = subprocess.run(["readelf", "-V", folder / name], capture_output=True, text=True, check=True).stdout
        found = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([\d.]+)", listed)}
        assert tuple(map(int, oldest_glibc(folder / name).split("."))) == max(found)


@pytest.mark.slow
def test_the_headers_beside_those_of_the_wheels_do_what_the_sources_expect(tmp_path: Path) -> None:
    require("c++")
    include = tvm_ffi.libinfo.find_include_path()
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    program = tmp_path / "streams"
    command = ["c++", "-std=c++17", *SANITIZED.split(), "-Wall", "-Wextra", "-Werror", "-isystem", include]
    command += ["-I", str(SOURCE / "tvm"), "-I", str(SOURCE / "tvm" / "include")]
    command += [str(SOURCE.parents[1] / "tests/runtime/streams.cc"), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


class Known:
    """A stage whose value is known."""

    def __init__(self, glibc: str) -> None:
        self.value = {"glibc": glibc}


def test_a_runtime_that_is_too_new_for_the_device_is_refused() -> None:
    stages: Any = {"cnncc-run": Known("2.9"), "libtvm_runtime.so": Known("2.35")}
    made = DeviceRuntime(Compilers("arm", ("gcc",), ("g++",), "gcc 12"), stages)
    with pytest.raises(TargetUnavailable) as refused:
        made.check("2.31")
    assert refused.value.message == "the runtime that gcc 12 makes needs glibc 2.35, and the device may have 2.31"
    assert "cnncc[cross]" in refused.value.hint
    for good in ("2.35", "2.100", ""):
        made.check(good)


def test_what_is_missing_is_named_with_the_line_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyMissing) as refused:
        gnu_compilers("arm")
    for name in ("arm-linux-gnueabihf-gcc", "arm-linux-gnueabihf-g++", "make"):
        assert name in refused.value.message
    assert refused.value.hint == "apt-get install make g++-arm-linux-gnueabihf"
    with pytest.raises(DependencyMissing):
        find_compilers("riscv64", "x86_64")
    assert package("riscv64-linux-gnu-g++") == "g++-riscv64-linux-gnu"


def test_zig_is_told_the_machine_and_its_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(module, "_first_line", lambda *command: "0.17.1")
    found = find_compilers("arm", "x86_64", "2.31")
    assert found.cxx[-3:] == ("c++", "-target", "arm-linux-gnueabihf.2.31")
    assert found.version == "zig 0.17.1"
    assert find_compilers("riscv64", "x86_64").cc[-1] == "riscv64-linux-gnu.2.28"


def test_a_compiler_that_refuses_is_quoted(tmp_path: Path) -> None:
    require("make", "cc")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'main.c:1: error: no' >&2\nexit 1\n")
    broken.chmod(0o755)
    compilers = Compilers("x86_64", (str(broken),), ("c++",), "a broken one")
    with pytest.raises(BuildFailed) as refused:
        device_runtime(compilers, Cache(tmp_path / "cache"), Silent()).file("cnncc-run")
    assert "main.c:1: error: no" in refused.value.message
    assert not list((tmp_path / "cache").rglob("cnncc-run*"))


def test_the_cache_may_be_named_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("make")
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho made >"$2"\n')
    compiler.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    made = device_runtime(Compilers("arm", (str(compiler),), ("c++",), "a false one"), Cache(Path("cache")), Silent())
    assert made.file("cnncc-run").read_text() == "made\n"


def test_another_compiler_makes_another_runtime() -> None:
    compilers, cache = Compilers("arm", ("gcc",), ("g++",), "gcc 12"), Cache(Path("nowhere"))
    first, again, newer = (
        {name: stage.key for name, stage in device_runtime(one, cache, Silent()).stages.items()}
        for one in (compilers, compilers, replace(compilers, version="gcc 13"))
    )
    assert first == again
    assert not set(first.values()) & set(newer.values())
