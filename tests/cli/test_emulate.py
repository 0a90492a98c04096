"""Engines for ARM under emulation: ``cnncc verify --emulate``, and ``cnncc-run`` as on the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnncc.graph.reader import read_onnx
from cnncc.graph.reference import Reference
from cnncc.targets.devices import machine_name, our_devices
from cnncc_runtime.bundle import MANIFEST, REFERENCE, read_bundle, write_bundle
from cnncc_runtime.digests import canonical_json, digest_bytes
from tests.cli.harness import DIGITS, apart
from tests.qemu import board
from tests.runtime.c_runner import RUNTIMES, Runner, small_runner

pytestmark = pytest.mark.slow

RANDOM = np.random.default_rng(5)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> dict[str, Path]:
    """The digits CNN for a CPU without products of int8, in float32, and for one with them, in int8; both pending."""
    board.require()
    folder = tmp_path_factory.mktemp("arm")
    precisions = {"cortex-a72": (), "cortex-a76": ("--precision", "int8", "--data", "random", "--allow-slow")}
    made = {}
    for cpu, flags in precisions.items():
        made[cpu] = folder / f"{cpu}.cnncc"
        model = (f"{DIGITS}:build", "--weights", weights, "--input-shape", "N,3,28,28", "--batch", "1,3")
        apart("compile", *model, "--mtriple", "aarch64-linux-gnu", "--mcpu", cpu, *flags, "-o", made[cpu])
    return made


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the devices."""
    board.require()
    return tmp_path_factory.mktemp("disk")


@pytest.mark.parametrize(("cpu", "tolerance"), [("cortex-a72", 1e-5), ("cortex-a76", 2e-2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_computes_what_onnx_runtime_computes(
    bundles: dict[str, Path], disk: Path, tmp_path: Path, cpu: str, tolerance: float, batch: int
) -> None:
    x = RANDOM.random((batch, 3, 28, 28), np.float32)
    np.save(tmp_path / "x.npy", x)
    told = (
        board.make_board(disk, cpu)
        .runner(
            bundles[cpu],
            "--allow-unverified",
            "--input",
            tmp_path / "x.npy",
            "--output",
            tmp_path,
            "--verify",
            "--json",
        )
        .document
    )
    assert told["verify"] == {"problems": [], "passed": True}
    found = np.load(tmp_path / told["outputs"][0]["file"])
    [wanted] = Reference(read_onnx(bundles[cpu] / REFERENCE)).run({"image": x}).values()
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


def test_an_engine_in_float16_is_proven_under_emulation(tmp_path: Path, weights: Path) -> None:
    board.require()
    bundle = tmp_path / "half.cnncc"
    model = (f"{DIGITS}:build", "--weights", weights, "--input-shape", "N,3,28,28", "--batch", "1,3")
    apart("compile", *model, "--device", "raspberry-pi-5", "--precision", "fp16", "-o", bundle)
    manifest = read_bundle(bundle).manifest
    assert (manifest.precision, manifest.parity) == ("fp16", "pending")
    assert {layer.precision for layer in manifest.layers} == {"float16"}
    apart("verify", bundle, "--emulate", "--cache-dir", RUNTIMES)
    assert read_bundle(bundle).manifest.parity == "passed"


def test_aarch64_runs_on_the_runtime_that_was_compiled_too(bundles: dict[str, Path], tmp_path: Path) -> None:
    runner = small_runner(tmp_path, "aarch64", "qemu-aarch64", "-cpu", "max", "-L", str(board.EMULATOR.sysroot))
    for bundle in bundles.values():
        told = runner(bundle, "--allow-unverified", "--verify", "--threads", "2", "--json").document
        assert told["verify"] == {"problems": [], "passed": True}


def test_an_engine_of_a_newer_cpu_is_refused_before_it_can_die(bundles: dict[str, Path], disk: Path) -> None:
    said = (
        board.make_board(disk, "cortex-a72")
        .runner(bundles["cortex-a76"], "--allow-unverified", "--verify", code=3)
        .stderr
    )
    assert "built for: cortex-a76, found: a CPU which lacks dotprod" in said


def test_each_cpu_has_the_features_that_arm_gave_it(disk: Path) -> None:
    def features(cpu: str) -> set[str]:
        return set(board.make_board(disk, cpu).runner("--features", "--json").document["features"])

    assert features("cortex-a72") == {"fp-armv8", "neon", "aes", "sha2", "crc"}
    assert features("cortex-a76") - features("cortex-a72") >= {"dotprod", "fullfp16", "lse", "rcpc", "rdm"}
    assert features("max") - features("cortex-a76") >= {"sve", "i8mm", "bf16", "fp16fml", "complxnum"}


def test_verify_records_what_emulation_proved(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, bundle in bundles.items():
        copy = shutil.copytree(bundle, tmp_path / bundle.name)
        outcome = apart("verify", copy, "--emulate", "--json", "--cache-dir", RUNTIMES)
        assert any(f"under emulation: qemu-aarch64 -cpu {cpu}" in note for note in outcome.document["notes"])
        assert read_bundle(copy).manifest.parity == "passed"
        assert "under emulation" in (copy / "parity.json").read_text()
    assert "cannot be executed here" in apart("verify", copy, code=3).stderr


def test_verify_finds_a_wrong_engine_under_emulation(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_bundle(bundles["cortex-a72"])
    record = whole.manifest.engine.weights
    assert record is not None
    data = bytearray((whole.path / record.file).read_bytes())
    part = np.frombuffer(data, np.float32, 64)
    part *= 1.001
    files = {name: (known.role, whole.path / name) for name, known in whole.manifest.files.items()}
    wrong = tmp_path / "wrong.cnncc"
    wrong.mkdir()
    write_bundle(wrong, whole.manifest, {**files, record.file: ("weights", bytes(data))})
    apart("verify", wrong, "--emulate", "--cache-dir", RUNTIMES, code=1)
    assert read_bundle(wrong).manifest.parity == "failed"


# ---- machines that PyPI has no TVM for: its runtime is compiled


@dataclass(frozen=True)
class Away:
    """A machine, and the digits CNN for it, in float32 and int8; both pending."""

    machine: str
    cpu: str
    disk: Path
    bundles: dict[str, Path]

    @property
    def runner(self) -> Runner:
        return board.make_board(self.disk, self.cpu, self.machine).runner


@pytest.fixture(scope="module", params=["cortex-a7", "riscv64"])
def away(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Away:
    device = our_devices()[request.param]
    assert device.emulator is not None
    machine = machine_name(device.profile.triple)
    board.require(machine)
    folder = tmp_path_factory.mktemp(request.param)
    made = {}
    for name, flags in {"fp32": (), "int8": ("--precision", "int8", "--data", "random", "--allow-slow")}.items():
        made[name] = folder / f"{name}.cnncc"
        model = (f"{DIGITS}:build", "--weights", weights, "--input-shape", "N,3,28,28", "--batch", "1,3")
        apart("compile", *model, "--device", request.param, *flags, "-o", made[name])
    (folder / "disk").mkdir()
    return Away(machine, device.emulator.cpu, folder / "disk", made)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("int8", 2e-2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_runs_on_the_runtime_that_was_compiled(
    away: Away, tmp_path: Path, precision: str, tolerance: float, batch: int
) -> None:
    x = RANDOM.random((batch, 3, 28, 28), np.float32)
    np.save(tmp_path / "x.npy", x)
    bundle = away.bundles[precision]
    flags = ("--allow-unverified", "--input", tmp_path / "x.npy", "--output", tmp_path, "--verify", "--json")
    told = away.runner(bundle, *flags, "--threads", "2").document
    assert told["verify"] == {"problems": [], "passed": True}
    found = np.load(tmp_path / told["outputs"][0]["file"])
    [wanted] = Reference(read_onnx(bundle / REFERENCE)).run({"image": x}).values()
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


def test_verify_emulates_it(away: Away, tmp_path: Path) -> None:
    for bundle in away.bundles.values():
        copy = shutil.copytree(bundle, tmp_path / bundle.name)
        outcome = apart("verify", copy, "--emulate", "--json", "--cache-dir", RUNTIMES)
        words = f"under emulation: qemu-{away.machine} -cpu {away.cpu}"
        assert any(words in note for note in outcome.document["notes"])
        assert read_bundle(copy).manifest.parity == "passed"


def test_what_is_wrong_is_refused_on_the_compiled_runtime(away: Away, bundles: dict[str, Path], tmp_path: Path) -> None:
    """An exception inside the library that was compiled must end the program by an exit code, too."""
    runner, bundle = away.runner, shutil.copytree(away.bundles["fp32"], tmp_path / "b.cnncc")
    assert "usage: cnncc-run" in runner("--help").stdout
    assert runner("--features", "--json").document["machine"] == away.machine
    assert "built for: aarch64" in runner(bundles["cortex-a72"], "--allow-unverified", code=3).stderr

    def rewrite(change: Callable[[dict[str, Any]], object]) -> None:
        manifest = json.loads((bundle / MANIFEST).read_bytes())
        change(manifest)
        (bundle / MANIFEST).write_bytes(canonical_json(manifest))

    rewrite(lambda manifest: manifest["engine"]["entries"].update({"1": "absent"}))
    said = runner(bundle, "--allow-unverified", code=4).stderr  # thrown in C++, caught behind the C interface
    assert "the engine cannot be started" in said
    engine = bytearray((bundles["cortex-a72"] / "engine.so").read_bytes())
    (bundle / "engine.so").write_bytes(engine)
    rewrite(lambda manifest: manifest["files"]["engine.so"].update(sha256=digest_bytes(engine), size=len(engine)))
    said = runner(bundle, "--allow-unverified", code=3).stderr
    assert f"'engine.so' was built for: aarch64, found: {away.machine}" in said
    engine = bytearray((away.bundles["fp32"] / "engine.so").read_bytes())[:5000]
    (bundle / "engine.so").write_bytes(engine)
    rewrite(lambda manifest: manifest["files"]["engine.so"].update(sha256=digest_bytes(engine), size=len(engine)))
    assert "'engine.so' is cut off" in runner(bundle, "--allow-unverified", code=4).stderr
    (bundle / "engine.so").unlink()
    assert "'engine.so' cannot be read" in runner(bundle, "--allow-unverified", code=4).stderr


def test_a_library_that_is_cut_off_is_no_runtime(away: Away, tmp_path: Path) -> None:
    away.runner("--help")  # which puts the runtime on the disk
    library = (away.disk / "libtvm_runtime.so").read_bytes()
    flags = ("--allow-unverified", "--runtime", tmp_path)
    for size, words in (
        (0, f"is no library for {away.machine}"),
        (100, "is cut off"),
        (len(library) // 2, "is cut off"),
    ):
        (tmp_path / "libtvm_runtime.so").write_bytes(library[:size])
        assert f"libtvm_runtime.so {words}" in away.runner(away.bundles["fp32"], *flags, code=3).stderr


# ---- executables


@pytest.mark.parametrize("device", ["raspberry-pi-4", "cortex-a7"])
def test_verify_emulates_executables(device: str, tmp_path: Path, weights: Path) -> None:
    board.require(machine_name(our_devices()[device].profile.triple))
    made = tmp_path / "digits.cnncc"
    model = (f"{DIGITS}:build", "--weights", weights, "--input-shape", "1,3,28,28")
    apart("compile", *model, "--device", device, "--runtime", "aot-static", "-o", made)
    assert read_bundle(made).manifest.parity == "pending"
    apart("verify", made, "--emulate", "--layers")
    assert read_bundle(made).manifest.parity == "passed"
    wrong = shutil.copytree(made, tmp_path / "wrong.cnncc")
    manifest = json.loads((wrong / MANIFEST).read_bytes())
    engine = (made / manifest["engine"]["file"]).read_bytes()[:3000]
    (wrong / manifest["engine"]["file"]).write_bytes(engine)
    assert "bytes, the manifest says" in apart("verify", wrong, "--emulate", code=4).stderr
