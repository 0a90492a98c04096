"""Engines for other machines need no library, whichever linker makes them, and are the same bytes every time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import host_machine, machine_name, resolve_profile
from cnncc.targets.llvm import link
from cnncc.targets.llvm.compile import compile_graph
from cnncc.targets.llvm.link import Linker
from cnncc.targets.llvm.target import LlvmTarget
from cnncc_runtime.elf import read_elf
from tests.targets.conformance import small_graph

pytestmark = pytest.mark.slow

DEVICES = ("raspberry-pi-5", "cortex-a7", "riscv64")
LINKERS = {"ld.lld": link._lld, "ld": link._gnu_ld, "zig-lld": link._zig_lld}

HARD_FLOAT = {"cortex-a7": 0x400, "riscv64": 0x4}
"""Device → the bit of ``e_flags`` that says that registers pass floats: EF_ARM_ABI_FLOAT_HARD,
EF_RISCV_FLOAT_ABI_DOUBLE."""

BUILD = """
import pathlib, sys
from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.target import LlvmTarget
from tests.targets.conformance import small_graph
profile = resolve_profile(sys.argv[1])
LlvmTarget(profile).build(small_graph(), BuildOptions(profile), pathlib.Path(sys.argv[2]))
"""


def flags_of(path: Path) -> int:
    """Return ``e_flags`` of an ELF file."""
    content = path.read_bytes()
    return int.from_bytes(content[36:40] if content[4] == 1 else content[48:52], "little")


@pytest.mark.parametrize("device", DEVICES)
def test_separate_processes_make_the_same_bytes(device: str, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "another_longer_name"):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-c", BUILD, device, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
        assert done.stderr == ""
        digests.add(hashlib.sha256((folder / "engine.so").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("find", LINKERS.values(), ids=LINKERS)
def test_every_linker_makes_engines_that_need_no_library(
    device: str, find: Callable[[str, str], Linker | None], tmp_path: Path
) -> None:
    profile = resolve_profile(device)
    machine = machine_name(profile.triple)
    linker = find(machine, host_machine())
    if linker is None:
        pytest.skip(f"this machine has no such linker for {machine}")
    compiled = compile_graph({"main": small_graph()}, BuildOptions(profile), tmp_path)
    link.link(linker, machine, compiled.objects, tmp_path / "engine.so")
    found = read_elf(tmp_path / "engine.so")
    assert (found.machine, found.kind, found.needed) == (machine, "shared", ())
    assert not any(segment.writable and segment.executable for segment in found.segments)
    assert flags_of(tmp_path / "engine.so") & HARD_FLOAT.get(device, 0) == HARD_FLOAT.get(device, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_toolchain_of_an_engine_names_its_linker(device: str, tmp_path: Path) -> None:
    profile = resolve_profile(device)
    engine = LlvmTarget(profile).build(small_graph(), BuildOptions(profile), tmp_path)
    assert engine.toolchain["linker"] == link.find_linker(engine.target.machine, host_machine()).version != "missing"
