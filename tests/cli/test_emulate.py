"""Engines for ARM under emulation: ``cnncc verify --emulate``, and ``cnncc-run`` as on the device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cnncc.compiler.emulation import WHEELS
from cnncc.graph.reader import read_onnx
from cnncc.graph.reference import Reference
from cnncc_runtime.bundle import MANIFEST, REFERENCE, read_bundle, write_bundle
from cnncc_runtime.digests import canonical_json
from tests.cli.harness import DIGITS, apart
from tests.qemu import board
from tests.runtime.c_runner import Runner, build_runner, require

pytestmark = pytest.mark.slow

RANDOM = np.random.default_rng(5)
ARM_SYSROOT = "/usr/arm-linux-gnueabihf"


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
    apart("verify", bundle, "--emulate", env={WHEELS: str(board.WHEELS)})
    assert read_bundle(bundle).manifest.parity == "passed"


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
    monkeypatch.setenv(WHEELS, str(board.WHEELS))
    for cpu, bundle in bundles.items():
        copy = shutil.copytree(bundle, tmp_path / bundle.name)
        outcome = apart("verify", copy, "--emulate", "--json")
        assert any(f"under emulation: qemu-aarch64 -cpu {cpu}" in note for note in outcome.document["notes"])
        assert read_bundle(copy).manifest.parity == "passed"
        assert "under emulation" in (copy / "parity.json").read_text()
    assert "cannot be executed here" in apart("verify", copy, code=3).stderr


def test_verify_finds_a_wrong_engine_under_emulation(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WHEELS, str(board.WHEELS))
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
    apart("verify", wrong, "--emulate", code=1)
    assert read_bundle(wrong).manifest.parity == "failed"


def test_32_bit_arm_checks_bundles(bundles: dict[str, Path], tmp_path: Path) -> None:
    require("qemu-arm", "arm-linux-gnueabihf-gcc")
    program = build_runner(tmp_path, "arm-linux-gnueabihf-gcc")
    runner = Runner(program, ("qemu-arm", "-L", ARM_SYSROOT), {"CNNCC_TVM_RUNTIME": ""})
    assert "usage: cnncc-run" in runner("--help").stdout
    assert runner("--features", "--json").document["machine"] == "arm"
    bundle = shutil.copytree(bundles["cortex-a72"], tmp_path / "b.cnncc")
    assert "built for: aarch64" in runner(bundle, "--allow-unverified", code=3).stderr
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest["target"].update(machine="arm", features=["neon"])
    (bundle / MANIFEST).write_bytes(canonical_json(manifest))
    assert "'engine.so' was built for: aarch64, found: arm" in runner(bundle, "--allow-unverified", code=3).stderr
    (bundle / "engine.so").unlink()
    assert "'engine.so' cannot be read" in runner(bundle, "--allow-unverified", code=4).stderr
