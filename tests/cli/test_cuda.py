"""``cnncc compile --target cuda`` on a machine without a GPU: built for real, executed never, and said so."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import helper, numpy_helper

from cnncc.compiler.verify import read_reference
from cnncc.graph.half import half_types
from cnncc.graph.jitter import is_quantized
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.gpu import host_gpus
from tests.calibration.rtx import tensorrt_rtx
from tests.cli.conftest import Digits
from tests.cli.harness import call, finish, leftovers, start
from tests.cli.test_faults import DEFAULT_SIGINT, PATIENCE
from tests.cli.test_payoff import convolution
from tests.targets.conformance import graph_of

pytestmark = pytest.mark.skipif(bool(host_gpus()), reason="these tests are about machines without a GPU")

LONG = 1000
"""Convolutions that TensorRT-RTX takes some seconds for."""

BUILT = "built, not executed here (built for: a GPU of compute capability 8.9 (rtx4090), found: no NVIDIA GPU)"


def compile_digits(digits: Digits, bundle: Path, *flags: str | Path, code: int = 0) -> Any:
    arguments = ("compile", digits.model, "--weights", digits.weights, "--target", "cuda", "-o", bundle)
    return call(*arguments, *flags, code=code)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide every library that builds for GPUs."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("tensorrt") else find(name, *rest)
    )


def test_a_bundle_is_built_and_its_parity_is_pending(digits: Digits, tmp_path: Path) -> None:
    tensorrt_rtx()
    bundle = tmp_path / "d.cnncc"
    outcome = compile_digits(digits, bundle, "--device", "rtx4090")
    assert (
        "TensorRT-RTX 1.7.1.116 builds for rtx4090: TensorRT builds on the GPU itself, and this machine has none"
        in (outcome.stderr)
    )
    assert BUILT in outcome.stderr
    assert "parity passed" not in outcome.stderr + outcome.stdout
    assert "written: cuda sm89, fp32, parity pending" in outcome.stdout
    manifest = read_bundle(bundle).manifest
    assert (manifest.parity, manifest.target.gpu, manifest.target.device) == ("pending", "8.9", "rtx4090")
    assert (manifest.engine.file, manifest.engine.format) == ("engine.plan", "tensorrt-rtx")
    assert manifest.engine.abi == "tensorrt-rtx 1.7.1.116"
    assert manifest.toolchain["tensorrt-rtx"] == "1.7.1.116"
    again = compile_digits(digits, bundle, "--device", "rtx4090")
    assert "unchanged: cuda sm89" in again.stdout
    assert BUILT not in again.stderr, "nothing was proven again"

    for peers in ((), ("--against", "ort-cuda,torch-cuda"), ("--against", "ort")):
        refused = call("bench", bundle, *peers, code=3)
        assert "built for: a GPU of compute capability 8.9 (rtx4090), found: no NVIDIA GPU" in refused.stderr
        assert "opening" not in refused.stderr
    refused = call("verify", bundle, code=3)
    assert "the engine cannot be executed here: built for: a GPU of compute capability 8.9" in refused.stderr
    assert "parity is 'pending'" in call("run", bundle, "--input", "x.npy", code=1).stderr
    shown = call("inspect", bundle).stdout
    assert "cuda  rtx4090: sm89" in shown
    assert "a GPU of compute capability 8.9, tensorrt-rtx 1.7.1.116" in shown
    assert "fp32 asked, float32 executed" in shown


def test_several_gpus_from_one_export(digits: Digits, tmp_path: Path) -> None:
    tensorrt_rtx()
    outcome = compile_digits(digits, tmp_path / "d.cnncc", "--device", "sm80", "--device", "rtx5090", "--json")
    assert [(each["device"], each["gpu"], each["parity"]) for each in outcome.document["bundles"]] == [
        ("sm80", "8.0", "pending"),
        ("rtx5090", "12.0", "pending"),
    ]
    assert {each["toolchain"]["tensorrt-rtx"] for each in outcome.document["bundles"]} == {"1.7.1.116"}


def test_a_build_that_takes_too_long_is_stopped(digits: Digits, tmp_path: Path) -> None:
    tensorrt_rtx()
    bundle = tmp_path / "d.cnncc"
    flags = ("--device", "sm86", "--cache-dir", tmp_path / "cache")
    outcome = compile_digits(digits, bundle, *flags, "--build-budget", "1e-6", code=5)
    assert "the builder did not finish within 1e-06 s (--build-budget)" in outcome.stderr
    assert "try: allow more" in outcome.stderr
    assert leftovers(tmp_path) == []
    assert not bundle.exists()
    compile_digits(digits, bundle, *flags, "--build-budget", "600")
    again = compile_digits(digits, bundle, *flags)
    assert "unchanged" in again.stdout, "the budget is no part of the engine"


@pytest.mark.slow
def test_ctrl_c_stops_the_library_in_the_middle_of_a_step(tmp_path: Path) -> None:
    tensorrt_rtx()
    made = [convolution(f"c{i}", "x" if i == 0 else f"c{i - 1}.out", 3, (16, 16)) for i in range(LONG)]
    nodes, weights = [node for node, _ in made], [weight for _, weight in made]
    model, cache = tmp_path / "m.onnx", tmp_path / "cache"
    last = f"c{LONG - 1}.out"
    model.write_bytes(graph_of(nodes, {"x": [1, 16, 8, 8]}, {last: [1, 16, 8, 8]}, weights).serialized)
    arguments = ("compile", model, "--target", "cuda", "--device", "sm89", "-o", tmp_path / "m.cnncc")
    process = start(*arguments, "--cache-dir", cache, prefix=DEFAULT_SIGINT)
    builder = builder_of(psutil.Process(process.pid))
    time.sleep(1.0)  # into the builder's longest step, of several seconds
    os.killpg(process.pid, signal.SIGINT)
    outcome = finish(process, code=130)
    assert "interrupted" in outcome.stderr
    psutil.wait_procs([builder], timeout=10)
    assert not builder.is_running()
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "m.cnncc").exists()


def builder_of(command: psutil.Process) -> psutil.Process:
    """Return the child that has loaded the library, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            for child in command.children():
                if any("libtensorrt_rtx" in mapped.path for mapped in child.memory_maps()):
                    return child
        time.sleep(0.02)
    raise AssertionError("no child loaded the library")


def test_int8_is_audited_and_not_weighed(digits: Digits, tmp_path: Path) -> None:
    tensorrt_rtx()
    bundle = tmp_path / "d.cnncc"
    flags = ("--device", "rtx4090", "--precision", "int8", "--data", "random", "--calibration-samples", "4")
    outcome = compile_digits(digits, bundle, *flags)
    assert "int8 is not weighed against fp32: it cannot be measured here" in outcome.stderr
    assert "int8 asked, int8 executed" in call("inspect", bundle).stdout
    assert not read_bundle(bundle).has("payoff.json")


@pytest.mark.parametrize(("kind", "code"), [("fp16", 10), ("bf16", 16)])
def test_int8_with_its_float_part_in_half_precision(digits: Digits, tmp_path: Path, kind: str, code: int) -> None:
    tensorrt_rtx()
    bundle = tmp_path / "d.cnncc"
    flags = ("--device", "rtx4090", "--precision", "int8", "--data", "random", "--calibration-samples", "4")
    outcome = compile_digits(digits, bundle, *flags, "--float-type", kind)
    assert f" nodes in {kind}, output SQNR " in outcome.stderr
    assert "dB with float32) on 4 batches of random" not in outcome.stderr, "32 samples, whatever calibration took"
    assert "dB with float32) on 32 batches of random" in outcome.stderr
    assert "int8 asked, int8 executed" in call("inspect", bundle).stdout, "and none in float, which would be refused"
    reference = read_reference(read_bundle(bundle))
    assert half_types(reference) == {code}
    assert is_quantized(reference)


def test_int8_that_an_old_gpu_computes_in_float_is_refused(tmp_path: Path) -> None:
    """TensorRT-RTX computes quantized convolutions in float on Turing, and says nothing of it."""
    tensorrt_rtx()
    made = convolution("first", "x", 3, (16, 16)), convolution("second", "first.out", 3, (16, 16))
    nodes, weights = [node for node, _ in made], [weight for _, weight in made]
    model = tmp_path / "m.onnx"
    model.write_bytes(graph_of(nodes, {"x": [1, 16, 8, 8]}, {"second.out": [1, 16, 8, 8]}, weights).serialized)
    flags = ("--precision", "int8", "--data", "random", "--calibration-samples", "4")
    arguments = ("compile", model, "--target", "cuda", "--device", "t4", *flags, "-o", tmp_path / "m.cnncc")
    outcome = call(*arguments, code=1)
    assert "cuda computes 2 of 2 int8 layers in float32" in outcome.stderr
    assert "at first (first)" in outcome.stderr
    assert not (tmp_path / "m.cnncc").exists()
    allowed = call(*arguments, "--max-fallback", "2", "--no-reference")
    assert "! cuda computes 2 of 2 int8 layers in float32: first (first), second (second)" in allowed.stderr
    assert "int8 asked, float32 executed" in call("inspect", tmp_path / "m.cnncc").stdout


@pytest.mark.parametrize(("precision", "executed", "kind"), [("fp16", "float16", 10), ("bf16", "bfloat16", 16)])
def test_half_precision_is_the_graphs_own_and_audited(
    digits: Digits, tmp_path: Path, precision: str, executed: str, kind: int
) -> None:
    tensorrt_rtx()
    bundle = tmp_path / "d.cnncc"
    outcome = compile_digits(digits, bundle, "--device", "rtx4090", "--precision", precision)
    assert f"10 of 10 nodes in {precision}, output SQNR " in outcome.stderr
    assert f"written: cuda sm89, {precision}, parity pending" in outcome.stdout
    assert f"{precision} asked, {executed} executed" in call("inspect", bundle).stdout
    fp32 = compile_digits(digits, tmp_path / "f.cnncc", "--device", "rtx4090", "--json").document["bundles"][0]
    assert read_bundle(bundle).manifest.engine_bytes < 0.8 * fp32["engine_bytes"]
    assert half_types(read_reference(read_bundle(bundle))) == {kind}, "it is proven against what it was built from"


def test_what_overflows_in_float16_is_looked_for_in_the_users_data(tmp_path: Path) -> None:
    """Random inputs stay far from float16's largest value; real ones of a model without normalization need not."""
    tensorrt_rtx()
    made = convolution("first", "x", 3, (16, 16)), convolution("second", "first.out", 3, (16, 16))
    nodes, weights = [node for node, _ in made], [weight for _, weight in made]
    model, data = tmp_path / "m.onnx", tmp_path / "x.npz"
    model.write_bytes(graph_of(nodes, {"x": [1, 16, 8, 8]}, {"second.out": [1, 16, 8, 8]}, weights).serialized)
    large = 7000 * np.random.default_rng(0).standard_normal((40, 16, 8, 8)).astype(np.float32)
    np.savez(data, x=large)
    arguments = ("compile", model, "--target", "cuda", "--device", "sm80", "-o", tmp_path / "m.cnncc")
    random = call(*arguments, "--precision", "fp16")
    assert "! what overflows in float16 was looked for on random inputs only: --data gives real ones" in random.stderr
    assert "2 of 2 nodes in fp16" in random.stderr
    real = call(*arguments, "--precision", "fp16", "--data", data)
    assert "random inputs" not in real.stderr
    assert "0 of 2 nodes in fp16, output SQNR" in real.stderr
    assert f"on 32 batches of {data}; in float32: first (first), second (second)" in real.stderr
    np.savez(data, x=large / 7000)
    assert "2 of 2 nodes in fp16" in call(*arguments, "--precision", "fp16", "--data", data).stderr, "other data"


def test_half_precision_that_loses_the_outputs_is_refused(tmp_path: Path) -> None:
    """Values below float16's smallest become 0; bfloat16 has float32's range."""
    tensorrt_rtx()
    node, weights = convolution("first", "x", 3, (16, 16))
    tiny = numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(1e-9), weights.name)
    model = tmp_path / "m.onnx"
    model.write_bytes(graph_of([node], {"x": [1, 16, 8, 8]}, {"first.out": [1, 16, 8, 8]}, [tiny]).serialized)
    arguments = ("compile", model, "--target", "cuda", "--device", "sm80", "-o", tmp_path / "m.cnncc", "--precision")
    outcome = call(*arguments, "fp16", code=1)
    assert "fp16 leaves 0.0 dB for the outputs" in outcome.stderr
    assert "try: bf16, which has float32's range" in outcome.stderr
    call(*arguments, "bf16")
    assert "bf16 asked, bfloat16 executed" in call("inspect", tmp_path / "m.cnncc").stdout


def test_what_a_gpu_cannot_compute_at_all_is_named_by_module(digits: Digits, tmp_path: Path) -> None:
    tensorrt_rtx()
    outcome = compile_digits(digits, tmp_path / "d.cnncc", "--device", "t4", code=5)
    assert "for Turing (SM75): FP32 GEMM is not supported" in outcome.stderr
    assert "at classifier.1 (Gemm 'node_linear')" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("flags", [(), ("--device", "rtx4090"), ("--device", "sm86", "--backend", "tensorrt-rtx")])
def test_without_any_library_one_command_is_named(digits: Digits, tmp_path: Path, flags: tuple[str, ...]) -> None:
    outcome = compile_digits(digits, tmp_path / "d.cnncc", *flags, code=3)
    assert "try: pip install tensorrt-rtx-cu13==1.7.1.116\n" in outcome.stderr
    assert "export" not in outcome.stderr, "told before any work"
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("nothing_installed")
def test_targets_and_doctor_say_what_is_missing() -> None:
    shown = call("targets").stdout
    assert "neither TensorRT nor TensorRT-RTX is installed" in shown
    assert "pip install tensorrt-rtx-cu13==1.7.1.116" in shown
    document = call("doctor", "--json").document
    [found] = [finding for finding in document["findings"] if finding["name"] == "target cuda"]
    assert (found["state"], found["required"]) == ("optional", False)
    assert document["ready"] is True


def test_targets_list_gpus_by_compute_capability() -> None:
    document = call("targets", "--json").document
    devices = {device["name"]: device["gpu"] for device in document["devices"]}
    assert devices["a100"] == "8.0"
    assert devices["rtx3090"] == "8.6"
    assert devices["host"] == ""
    assert "rtx-6000-ada" in call("targets").stdout


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--target", "cuda", "--device", "jetson-orin", "--backend", "tensorrt-rtx"), 2, "jetson-orin has 8.7"),
        (("--target", "cuda", "--device", "jetson-orin"), 3, "nothing here builds engines for jetson-orin"),
        (("--target", "cuda", "--device", "rtx4090", "--backend", "tensorrt"), 3, "which needs no GPU"),
        (("--target", "cuda"), 3, "this machine has no NVIDIA GPU to build for"),
        (("--target", "cuda", "--mcpu", "x86-64-v3"), 2, "is a CPU"),
        (("--target", "cuda", "--device", "sm89", "--mcpu", "x86-64-v3"), 2, "are for CPUs"),
        (("--target", "cuda", "--device", "sm89", "--no-winograd"), 2, "says nothing to --target cuda"),
        (("--target", "cuda", "--device", "sm89", "--optimize", "measured"), 2, "no knobs to measure"),
        (("--mcpu", "x86-64-v3", "--precision", "fp16"), 2, "does not multiply vectors of float16"),
        (("--device", "raspberry-pi-4", "--precision", "fp16"), 2, "cortex-a72) does not multiply vectors of float16"),
        (("--device", "raspberry-pi-5", "--precision", "bf16"), 2, "the llvm target does not compute in bf16"),
        (("--target", "cuda", "--device", "sm89", "--precision", "fp16", "--allow-slow"), 2, "--allow-slow says"),
        (("--target", "cuda", "--device", "sm89", "--precision", "bf16", "--keep", "x"), 2, "--keep says nothing"),
        (("--precision", "int8", "--data", "random", "--float-type", "bf16"), 2, "try: --float-type fp32"),
        (("--target", "cuda", "--device", "sm89", "--float-type", "fp16"), 2, "try: --precision fp16"),
        (("--target", "cuda", "--device", "sm89", "--version-compatible"), 2, "has no lean runtime"),
        (("--target", "cuda", "--device", "sm89", "--hardware-compatible", "same"), 2, "changes nothing"),
        (("--target", "cuda", "--device", "sm89", "--sparse"), 2, "the same engine with --sparse and without"),
        (("--target", "cuda", "--device", "sm89", "--dla", "0"), 2, "DLA is a part of Jetsons, and sm89 has none"),
        (("--target", "cuda", "--device", "sm89", "--gpu-fallback"), 2, "--gpu-fallback is for --dla"),
        (("--target", "cuda", "--device", "sm89", "--strip-weights"), 3, "this machine has no NVIDIA GPU"),
        (("--target", "cuda", "--device", "sm89", "--refittable"), 3, "this machine has no NVIDIA GPU"),
        (("--backend", "tensorrt-rtx"), 2, "--backend is for --target cuda"),
        (("--dla", "0"), 2, "--dla is for --target cuda"),
        (("--build-budget", "9"), 2, "--build-budget is for --target cuda"),
        (("--workspace", "64"), 2, "--workspace is for --target cuda"),
        (("--device", "rtx4090"), 2, "'rtx4090' is a GPU"),
        (("--device", "rtx4091"), 2, "did you mean rtx4090"),
        (("--target", "cuda", "--target", "llvm", "--device", "sm89"), 2, "try: --target cuda --device sm89"),
    ],
)  # fmt: skip
def test_flags_that_contradict_are_refused_before_any_work(
    digits: Digits, tmp_path: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    tensorrt_rtx()
    outcome = call("compile", digits.model, "--weights", digits.weights, "-o", tmp_path / "d.cnncc", *flags, code=code)
    assert said in outcome.stderr
    assert "export" not in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_tensorrt_lacks_is_named_by_module(tmp_path: Path) -> None:
    tensorrt_rtx()
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], "abs"),
        helper.make_node("Bernoulli", ["a"], ["b"], "first"),
        helper.make_node("NonZero", ["b"], ["y"], "second"),
    ]
    model = tmp_path / "m.onnx"
    model.write_bytes(graph_of(nodes, {"x": [2, 3]}, {"y": (7, [2, None])}).serialized)
    outcome = call("compile", model, "--target", "cuda", "--device", "sm89", "-o", tmp_path / "m.cnncc", code=4)
    assert "TensorRT-RTX 1.7.1.116 cannot build 2 nodes of the graph" in outcome.stderr
    assert "first (Bernoulli 'first'): TensorRT-RTX 1.7.1.116 has no operator Bernoulli" in outcome.stderr
    assert "second (NonZero 'second'): " in outcome.stderr
