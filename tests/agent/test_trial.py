"""Trials of engines that are right, wrong, slow, crash, hang, or are none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnncc_runtime.agent.trial import Verdict, slower, try_engine
from cnncc_runtime.bundle import write_bundle
from cnncc_runtime.golden import GoldenLimit, golden_bytes
from tests.runtime.engine_files import ENGINE, conv, conv_reference, manifest


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv(tmp_path_factory.mktemp("engine") / ENGINE)


def bundle(folder: Path, engine: Path | bytes, *, wrong: bool = False, parity: str = "passed") -> Path:
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype("f")
    y = conv_reference(x) + (1 if wrong else 0)
    golden = golden_bytes({"x": x}, {"y": y}, {"y": GoldenLimit(1e-4, 1e-4)})
    path = folder / "model.cnncc"
    path.mkdir()
    write_bundle(path, manifest(parity=parity), {ENGINE: ("engine", engine), "golden.npz": ("golden", golden)})
    return path


@pytest.mark.parametrize("parity", ["passed", "pending"])
def test_an_engine_that_is_right_is_trusted_and_timed(engine: Path, tmp_path: Path, parity: str) -> None:
    verdict = try_engine(bundle(tmp_path, engine, parity=parity))
    assert verdict.problems == ()
    assert verdict.latency > 0
    assert verdict.runs >= 5


def test_an_engine_that_computes_something_else_is_not(engine: Path, tmp_path: Path) -> None:
    [problem] = try_engine(bundle(tmp_path, engine, wrong=True)).problems
    assert "output 'y'" in problem


UD2 = b"\x0f\x0b"  # (Intel SDM)


def with_code(engine: Path, instruction: bytes) -> bytes:
    """Return an engine, all of whose code is one instruction."""
    data = bytearray(engine.read_bytes())
    listing = subprocess.run(["readelf", "-S", "-W", str(engine)], capture_output=True, text=True, check=True).stdout
    line = next(line for line in listing.splitlines() if " .text " in line).split()
    at = line.index(".text")
    offset, size = int(line[at + 3], 16), int(line[at + 4], 16)
    data[offset : offset + size] = (instruction * size)[:size]
    return bytes(data)


def test_an_engine_that_crashes_is_not(engine: Path, tmp_path: Path) -> None:
    [problem] = try_engine(bundle(tmp_path, with_code(engine, UD2))).problems
    assert "crashed: SIG" in problem


def test_an_engine_whose_numbers_overflow_is_not(engine: Path, tmp_path: Path) -> None:
    path = bundle(tmp_path, engine)
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype("f")
    y = conv_reference(x)
    x[0, 0, 8, 8] = np.inf
    golden = golden_bytes({"x": x}, {"y": y}, {"y": GoldenLimit(1e30, 1e30)})
    shutil.rmtree(path)
    path.mkdir()
    write_bundle(path, manifest(), {ENGINE: ("engine", engine), "golden.npz": ("golden", golden)})
    [problem] = try_engine(path).problems
    assert "output 'y' is NaN or Inf where the golden one is not" in problem


def test_what_is_no_engine_is_not(tmp_path: Path) -> None:
    path = bundle(tmp_path, b"\x7fELF, but no more")
    assert try_engine(path).problems
    shutil.rmtree(path)
    [problem] = try_engine(path).problems
    assert "is not a bundle folder" in problem


def test_an_engine_that_hangs_is_given_up_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a Python that sleeps, as an engine would that never ends, and whose child would hold the pipe
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nsleep 600 &\nsleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    [problem] = try_engine(tmp_path, patience=0.5).problems
    assert "did not end within" in problem


@pytest.mark.parametrize("says", ["", "[]", '{"latency": "fast"}', "x" * 100_000])
def test_a_verdict_that_is_none_counts_against_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    strange = tmp_path / "python"
    (tmp_path / "says").write_text(says)
    strange.write_text(f"#!/bin/sh\ncat {tmp_path / 'says'}\necho what happened >&2\nexit 3\n")
    strange.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(strange))
    [problem] = try_engine(tmp_path).problems
    assert problem == "the engine ended with exit code 3: what happened"


def test_an_engine_is_too_slow_only_beside_another_one() -> None:
    assert not slower(Verdict(latency=0.02), Verdict(), 1.5)
    assert not slower(Verdict(latency=0.02), Verdict(latency=0.019), 1.5)
    assert "more than 1.5 times as long" in slower(Verdict(latency=0.02), Verdict(latency=0.01), 1.5)
