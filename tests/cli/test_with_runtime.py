"""Bundles that carry what runs them: ``cnncc compile --with-runtime``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnncc.graph.reader import read_onnx
from cnncc.graph.reference import Reference
from cnncc_runtime.bundle import MANIFEST, REFERENCE, RUNNER, RUNTIME_LIBRARY, read_bundle
from cnncc_runtime.digests import canonical_json, digest_bytes
from tests.cli.harness import DIGITS, apart, call
from tests.qemu import board
from tests.runtime.c_runner import RUNTIMES, Runner, require

MODEL = (f"{DIGITS}:build", "--input-shape", "1,3,28,28", "--with-runtime", "--cache-dir", RUNTIMES)


def carried(bundle: Path, *prefix: str) -> Runner:
    """The bundle's own ``cnncc-run``, where nothing says where another runtime is."""
    return Runner(bundle / RUNNER, prefix, {"CNNCC_TVM_RUNTIME": "", "LD_LIBRARY_PATH": "", "PATH": ""})


def replaced(bundle: Path, name: str, content: bytes) -> None:
    """Put another file into a bundle, whose manifest then lists it."""
    (bundle / name).write_bytes(content)

    def change(manifest: Any) -> None:
        manifest["files"][name].update(sha256=digest_bytes(content), size=len(content))

    rewrite(bundle, change)


def rewrite(bundle: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    change(manifest)
    (bundle / MANIFEST).write_bytes(canonical_json(manifest))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    require("make", "cc", "c++")
    made = tmp_path_factory.mktemp("carried") / "digits.cnncc"
    told = apart("compile", *MODEL, "--weights", weights, "-o", made, "--json").stderr
    assert "the bundle carries its runtime, which needs glibc 2." in told
    return made


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "digits.cnncc")


@pytest.mark.slow
def test_it_runs_itself(bundle: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).random((1, 3, 28, 28), np.float32)
    np.save(tmp_path / "x.npy", x)
    flags = ("--input", tmp_path / "x.npy", "--output", tmp_path, "--verify", "--json")
    told = carried(bundle)(bundle, *flags).document
    assert told["verify"] == {"problems": [], "passed": True}
    [wanted] = Reference(read_onnx(bundle / REFERENCE)).run({"image": x}).values()
    np.testing.assert_allclose(np.load(tmp_path / told["outputs"][0]["file"]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_manifest_pins_the_runtime_and_says_what_it_needs(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    roles = {name for name, record in manifest.files.items() if record.role == "runtime"}
    assert roles == {RUNNER, RUNTIME_LIBRARY}
    assert manifest.toolchain["runtime glibc"].startswith("2.")
    assert manifest.toolchain["runtime compiler"]


@pytest.mark.slow
def test_a_bundle_without_it_has_another_digest_and_the_same_one_again(
    bundle: Path, tmp_path: Path, weights: Path
) -> None:
    again = tmp_path / "digits.cnncc"
    apart("compile", *MODEL, "--weights", weights, "-o", again)
    assert read_bundle(again).digest == read_bundle(bundle).digest
    assert os.access(again / RUNNER, os.X_OK)
    plain = [flag for flag in MODEL if flag != "--with-runtime"]
    apart("compile", *plain, "--weights", weights, "-o", again)
    assert not (again / RUNNER).exists()
    assert read_bundle(again).digest != read_bundle(bundle).digest


@pytest.mark.slow
def test_a_library_that_was_changed_is_not_loaded(copy: Path) -> None:
    with (copy / RUNTIME_LIBRARY).open("r+b") as file:
        file.seek(100_000)
        file.write(b"changed")
    said = carried(copy)(copy, "--verify", code=4).stderr
    assert f"'{RUNTIME_LIBRARY}' was changed after it was built" in said
    (copy / RUNTIME_LIBRARY).unlink()
    assert f"'{RUNTIME_LIBRARY}' cannot be read" in carried(copy)(copy, "--verify", code=4).stderr


@pytest.mark.slow
def test_a_library_of_another_machine_or_half_of_one_is_not_loaded(copy: Path) -> None:
    whole = (copy / RUNTIME_LIBRARY).read_bytes()
    foreign = bytearray(whole)
    foreign[18] = 243
    replaced(copy, RUNTIME_LIBRARY, bytes(foreign))
    said = carried(copy)(copy, "--verify", code=3).stderr
    assert f"'{RUNTIME_LIBRARY}' was built for: riscv64" in said
    for size in (64, 5000, len(whole) // 2):
        replaced(copy, RUNTIME_LIBRARY, whole[:size])
        assert f"'{RUNTIME_LIBRARY}' is cut off" in carried(copy)(copy, "--verify", code=4).stderr
    replaced(copy, RUNTIME_LIBRARY, b"#!/bin/sh\n")
    assert f"'{RUNTIME_LIBRARY}' is not a shared library" in carried(copy)(copy, "--verify", code=4).stderr
    replaced(copy, RUNTIME_LIBRARY, (copy / "engine.so").read_bytes())
    assert f"the bundle's {RUNTIME_LIBRARY} cannot be loaded" in carried(copy)(copy, "--verify", code=3).stderr


@pytest.mark.slow
def test_a_runtime_that_is_named_is_taken_instead(copy: Path, tmp_path: Path) -> None:
    library = shutil.copy(copy / RUNTIME_LIBRARY, tmp_path)
    (copy / RUNTIME_LIBRARY).write_bytes(b"")
    assert "has 0 bytes" in carried(copy)(copy, "--verify", code=4).stderr
    carried(copy)(copy, "--verify", "--runtime", tmp_path)
    Path(library).unlink()
    assert "is not in" in carried(copy)(copy, "--verify", "--runtime", tmp_path, code=3).stderr


@pytest.mark.slow
def test_python_runs_such_a_bundle_as_any(bundle: Path) -> None:
    apart("verify", bundle)


@pytest.mark.slow
def test_for_another_machine_it_carries_that_ones(tmp_path: Path, weights: Path) -> None:
    board.require("riscv64")
    made = tmp_path / "digits.cnncc"
    apart("compile", *MODEL, "--weights", weights, "--device", "riscv64", "-o", made)
    runner = carried(made, str(shutil.which("qemu-riscv64")), "-cpu", "sifive-u54", "-L", "/usr/riscv64-linux-gnu")
    assert runner(made, "--allow-unverified", "--verify", "--json").document["verify"]["passed"]
    apart("verify", made, "--emulate", "--cache-dir", RUNTIMES)
    assert read_bundle(made).manifest.parity == "passed"
    assert os.access(made / RUNNER, os.X_OK), "recording the verdict writes the bundle again"
    assert runner(made, "--verify", "--json").document["verify"]["passed"]


@pytest.mark.parametrize("flags", [("--runtime", "aot-static"), ("--target", "cuda", "--device", "jetson-orin")])
def test_engines_that_need_no_such_runtime_are_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    said = call("compile", *MODEL, *flags, "-o", tmp_path / "x.cnncc", code=2).stderr
    assert "--with-runtime" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_device_whose_c_library_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("make", "arm-linux-gnueabihf-g++")
    monkeypatch.setitem(sys.modules, "ziglang", None)  # its compilers would build for the older one
    said = call("compile", *MODEL, "--device", "cortex-a7", "-o", tmp_path / "x.cnncc", code=3).stderr
    assert "needs glibc 2.34" in said
    assert "the device may have 2.31" in said
    assert "cnncc[cross]" in said
    assert not list(tmp_path.iterdir())
