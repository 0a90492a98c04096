"""What emulates engines for other CPUs, and what is said where it is not there; tests/cli/test_emulate.py runs some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cnncc.compiler import emulation
from cnncc.compiler.emulation import EMULATORS, WHEELS, emulator_for, make_runner, qemu_command
from cnncc_runtime.bundle import TargetRecord
from cnncc_runtime.errors import DependencyMissing, EngineMismatch

A72 = TargetRecord("llvm", "board", "aarch64-linux-gnu", "cortex-a72", "aarch64", ("neon",))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (replace(A72, machine="x86_64", cpu="znver4"), "znver4 cannot be emulated, those for aarch64 can"),
        (replace(A72, gpu="8.7"), "sm87 cannot be emulated"),
    ],
)
def test_not_everything_can_be_emulated(target: TargetRecord, words: str) -> None:
    with pytest.raises(EngineMismatch) as refused:
        emulator_for(target)
    assert words in refused.value.message


def test_what_is_missing_is_named_with_the_line_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(EMULATORS, "aarch64", replace(EMULATORS["aarch64"], sysroot=tmp_path))
    with pytest.raises(DependencyMissing) as refused:
        emulator_for(A72)
    for name in ("qemu-aarch64", "aarch64-linux-gnu-gcc", "make", "libstdc++.so.6"):
        assert name in refused.value.message
    assert refused.value.hint.startswith("apt-get install make qemu-user gcc-aarch64-linux-gnu")


def test_missing_wheels_are_named_with_the_line_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WHEELS, raising=False)
    with pytest.raises(DependencyMissing) as refused:
        make_runner(EMULATORS["aarch64"], tmp_path / "wheels", tmp_path)
    assert str(tmp_path / "wheels") in refused.value.message
    assert "pip download --no-deps" in refused.value.hint
    assert "apache-tvm-ffi==" in refused.value.hint


def test_a_cpu_that_qemu_does_not_know_is_emulated_by_one_that_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_known_cpus", lambda qemu: frozenset({"cortex-a72", "max"}))
    assert qemu_command(EMULATORS["aarch64"], A72) == ["qemu-aarch64", "-cpu", "cortex-a72"]
    assert qemu_command(EMULATORS["aarch64"], replace(A72, cpu="cortex-a78ae"))[-1] == "max"
