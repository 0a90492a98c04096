"""What emulates engines for other CPUs, and what is said where it is not there; tests/cli/test_emulate.py runs some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cnncc.compiler import emulation
from cnncc.compiler.emulation import EMULATORS, Emulator, emulator_for, qemu_command
from cnncc_runtime.bundle import TargetRecord
from cnncc_runtime.errors import DependencyMissing, EngineMismatch

A72 = TargetRecord("llvm", "board", "aarch64-linux-gnu", "cortex-a72", "aarch64", ("neon",))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            replace(A72, machine="x86_64", cpu="znver4"),
            "znver4 cannot be emulated, those for aarch64, arm",
        ),
        (replace(A72, gpu="8.7"), "sm87 cannot be emulated"),
    ],
)
def test_not_everything_can_be_emulated(target: TargetRecord, words: str) -> None:
    with pytest.raises(EngineMismatch) as refused:
        emulator_for(target)
    assert words in refused.value.message


@pytest.mark.parametrize("machine", ["aarch64", "arm", "riscv64"])
def test_what_is_missing_is_named_with_the_line_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Emulator, "sysroot", tmp_path)
    with pytest.raises(DependencyMissing) as refused:
        emulator_for(replace(A72, machine=machine))
    triple = {"arm": "arm-linux-gnueabihf"}.get(machine, f"{machine}-linux-gnu")
    for name in (f"qemu-{machine}", f"{triple}-gcc", f"{triple}-g++", "make", "libc.so.6"):
        assert name in refused.value.message
    assert refused.value.hint == f"apt-get install qemu-user make g++-{triple}"
    with pytest.raises(DependencyMissing) as refused:
        emulator_for(replace(A72, machine=machine), executable=True)
    assert refused.value.message.startswith(f"qemu-{machine} not found")
    assert refused.value.hint == "apt-get install qemu-user"


def test_qemu_is_told_the_cpu_that_the_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = frozenset({"cortex-a72", "cortex-a76", "cortex-a7", "sifive-u54", "max", "rv64"})
    monkeypatch.setattr(emulation, "_known_cpus", lambda qemu: known)

    def told(machine: str, **changes: str) -> list[str]:
        return qemu_command(EMULATORS[machine], replace(A72, machine=machine, **changes))[1:]

    assert told("aarch64") == ["-cpu", "cortex-a72"]
    assert told("aarch64", cpu="cortex-a78ae") == ["-cpu", "max"]
    assert told("riscv64", cpu="sifive-p870") == ["-cpu", "rv64"]
    # by its profile: it has the same features, and `max` has more
    assert told("aarch64", device="jetson-orin-cpu", cpu="cortex-a78ae") == ["-cpu", "cortex-a76"]
    assert told("aarch64", device="jetson-orin-cpu", cpu="cortex-a78") == ["-cpu", "max"]
    assert told("arm", device="cortex-a7", cpu="cortex-a7") == ["-cpu", "cortex-a7"]
