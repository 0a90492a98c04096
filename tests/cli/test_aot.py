"""``--runtime aot-static``: bundles whose engine is an executable are bundles like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import cnncc_runtime
from cnncc.targets.devices import host_machine
from cnncc_runtime.bundle import AOT_STATIC, MEMORY, read_bundle
from cnncc_runtime.errors import BundleRefused, DataRefused, EngineMismatch, RunFailed
from cnncc_runtime.golden import read_golden
from tests.cli.conftest import Digits
from tests.cli.harness import DIGITS, call

pytestmark = pytest.mark.slow

MODEL = f"{DIGITS}:build"


@pytest.fixture(scope="module")
def bundle(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits CNN as an executable."""
    path = tmp_path_factory.mktemp("aot") / "digits.cnncc"
    outcome = call("compile", MODEL, "--weights", digits.weights, "--runtime", "aot-static", "--json", "-o", path)
    [made] = outcome.document["bundles"]
    assert made["parity"] == "passed"
    assert made["memory"] == json.loads((path / MEMORY).read_bytes())
    assert made["memory"].keys() == {"arena", "weights", "code"}
    return path


def noise() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)


def test_the_bundle_holds_an_executable_and_what_apps_link(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert (manifest.engine.format, manifest.engine.file) == (AOT_STATIC, "digits")
    assert os.access(bundle / "digits", os.X_OK)
    roles = {name: record.role for name, record in manifest.files.items()}
    assert (roles["libdigits.a"], roles["digits.h"], roles[MEMORY]) == ("library", "library", "report")
    assert manifest.toolchain["c-compiler"]


def test_a_session_computes_what_the_model_does(bundle: Path, digits: Digits) -> None:
    with cnncc_runtime.load(bundle) as engine:
        for factor in (1, 2):
            np.testing.assert_allclose(engine(noise() * factor), digits.expected(noise() * factor), atol=1e-5)
        assert engine.session.threads == 1
        with pytest.raises(DataRefused):
            engine(noise()[:, :2])
        engine(noise())


def test_the_executable_alone_does_too(bundle: Path, digits: Digits, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise())
    np.save(tmp_path / "want.npy", digits.expected(noise()))
    command = [bundle / "digits", "x.npy", "--verify", "want.npy", "-o", "got.npy"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    np.testing.assert_allclose(np.load(tmp_path / "got.npy"), digits.expected(noise()), atol=1e-5)


def test_it_is_verified_layer_by_layer(bundle: Path) -> None:
    call("verify", bundle)
    assert "classifier.3" in call("verify", bundle, "--layers").stdout


def test_compiling_again_changes_nothing(bundle: Path, digits: Digits) -> None:
    outcome = call("compile", MODEL, "--weights", digits.weights, "--runtime", "aot-static", "-o", bundle)
    assert "unchanged" in outcome.stdout


def test_a_process_that_dies_is_told(bundle: Path) -> None:
    with cnncc_runtime.open(bundle) as session:
        child = session._child  # type: ignore[attr-defined]
        child.kill()
        child.wait()
        for _ in range(2):
            with pytest.raises(RunFailed, match="was killed by SIGKILL"):
                session.run({session.inputs[0].name: noise()})


def test_a_closed_session_leaves_no_process(bundle: Path) -> None:
    session = cnncc_runtime.open(bundle)
    child = session._child  # type: ignore[attr-defined]
    session.close()
    session.close()
    assert child.returncode == 0
    with pytest.raises(RunFailed, match="closed"):
        session.run({session.inputs[0].name: noise()})


def test_what_was_changed_or_is_of_another_version_is_not_executed(bundle: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.cnncc"
    shutil.copytree(bundle, changed)
    with (changed / "digits").open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    with pytest.raises(BundleRefused, match="was changed"):
        cnncc_runtime.open(changed)
    newer = tmp_path / "newer.cnncc"
    shutil.copytree(bundle, newer)
    text = (newer / "manifest.json").read_text().replace("aot-static 1", "aot-static 9")
    (newer / "manifest.json").write_text(text)
    with pytest.raises(EngineMismatch, match="built for: aot-static 9, found: aot-static 1"):
        cnncc_runtime.open(newer)


@pytest.mark.skipif(host_machine() != "x86_64", reason="the other machine is this one")
def test_for_another_machine_parity_is_pending_and_the_golden_data_says_the_same_there(
    digits: Digits, tmp_path: Path
) -> None:
    if shutil.which("qemu-aarch64") is None or shutil.which("aarch64-linux-gnu-gcc") is None:
        assert not os.environ.get("CI")
        pytest.skip("`make aarch64` brings qemu and a compiler")
    path = tmp_path / "pi.cnncc"
    triple = ("--mtriple", "aarch64-linux-gnu", "--mcpu", "cortex-a72")
    call("compile", MODEL, "--weights", digits.weights, "--runtime", "aot-static", *triple, "-o", path)
    assert read_bundle(path).manifest.parity == "pending"
    golden = read_golden(path / "golden.npz")
    [x], [want] = golden.feeds.values(), golden.outputs.values()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "want.npy", want)
    command = ["qemu-aarch64", path / "pi", "x.npy", "--verify", "want.npy", "--tolerance", "1e-5"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--input-shape", "N,3,28,28", "--batch", "1,2"), "2 batch sizes were asked for"),
        (("--target", "cuda", "--device", "rtx4090"), "--runtime says nothing to --target cuda"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    outcome = call("compile", MODEL, "--runtime", "aot-static", *flags, "-o", tmp_path / "x.cnncc", code=2)
    assert said in outcome.stderr
    assert "export" not in outcome.stderr


def test_without_a_c_compiler_it_says_how_to_get_one(tmp_path: Path) -> None:
    triple = ("--mtriple", "armv7-linux-gnueabihf", "--mcpu", "cortex-a7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        outcome = call("compile", MODEL, "--runtime", "aot-static", *triple, "-o", tmp_path / "x.cnncc", code=3)
    assert "gcc-arm-linux-gnueabihf" in outcome.stderr


def test_a_benchmark_says_that_it_runs_apart(bundle: Path) -> None:
    outcome = call("bench", bundle, "--against", "ort", "--json")
    assert "through pipes" in outcome.stdout


def test_an_executable_is_run_as_any_engine_is(bundle: Path, digits: Digits, image: Path) -> None:
    ours, theirs = (call("run", each, "--input", image, "--json").document for each in (bundle, digits.bundle))
    [own], [other] = ours["results"], theirs["results"]
    assert [one["label"] for one in own["classes"]] == [one["label"] for one in other["classes"]]
