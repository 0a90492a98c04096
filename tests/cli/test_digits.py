"""The command line end to end on the digits CNN: what each command says, writes and leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import cnncc_runtime
from cnncc.cli.main import COMMANDS
from cnncc.graph.names import MODULE_KEY, module_path, node_metadata
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.digests import canonical_json, digest_file
from cnncc_runtime.golden import read_golden
from cnncc_runtime.preprocess import Preprocessing
from tests.cli.conftest import Digits, WriteModule
from tests.cli.harness import DIGITS, ROOT, STAGES, apart, call, leftovers, tree

LAYERS = [*(f"features.{n}" for n in range(6)), *(f"classifier.{n}" for n in range(4))]
CLOSE = 1e-4
"""Relative; float32 makes about 1e-6 on this network, so this allows rounding and nothing else."""


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((1, 3, 28, 28), dtype=np.float32)


@pytest.fixture
def copy(digits: Digits, tmp_path: Path) -> Path:
    """A copy of the bundle, to change."""
    return Path(shutil.copytree(digits.bundle, tmp_path / "copy.cnncc"))


# ---- compile


def test_compile_says_every_stage_on_stderr(digits: Digits) -> None:
    for stage in STAGES:
        assert f"✓ {stage}" in digits.stderr
    assert "parity passed on 2 samples" in digits.stderr


def test_a_rerun_reuses_every_stage_and_says_so(digits: Digits) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.bundle.iterdir()}
    again = call("compile", digits.model, "--weights", digits.weights, "-o", digits.bundle)
    assert again.stdout.startswith(f"{digits.bundle}  unchanged: llvm")
    assert "parity passed" in again.stdout
    for stage in STAGES:
        assert f"= {stage}" in again.stderr
    assert "✓" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in digits.bundle.iterdir()} == before


def test_json_is_one_document_and_names_the_bundle(digits: Digits) -> None:
    outcome = call("compile", digits.model, "--weights", digits.weights, "-o", digits.bundle, "--json")
    [bundle] = outcome.document["bundles"]
    assert bundle["bundle"] == str(digits.bundle)
    assert bundle["digest"] == digest_file(digits.bundle / "manifest.json")
    assert (bundle["target"], bundle["device"], bundle["precision"]) == ("llvm", "host", "fp32")
    assert (bundle["parity"], bundle["unchanged"]) == ("passed", True)
    assert bundle["engine_bytes"] == sum((digits.bundle / name).stat().st_size for name in ("engine.so", "weights.bin"))


def test_quiet_leaves_the_result_alone(digits: Digits) -> None:
    outcome = call("compile", digits.model, "--weights", digits.weights, "-o", digits.bundle, "--quiet")
    assert outcome.stderr == ""
    assert "unchanged" in outcome.stdout


def test_the_bundle_holds_what_it_should_and_nothing_else(digits: Digits) -> None:
    roles = {
        "engine.so": "engine",
        "weights.bin": "weights",
        "golden.npz": "golden",
        "parity.json": "report",
        "reference.onnx": "reference",
    }
    assert set(tree(digits.bundle)) == {"manifest.json", *roles}
    manifest = read_bundle(digits.bundle).manifest
    assert {name: record.role for name, record in manifest.files.items()} == roles
    assert manifest.name == "digits"
    assert manifest.model["source"] == "model.py:build"
    assert [str(spec) for spec in manifest.inputs] == ["image: float32[1, 3, 28, 28]"]
    assert [str(spec) for spec in manifest.outputs] == ["output: float32[1, 10]"]
    assert manifest.preprocessing == Preprocessing(size=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert manifest.labels == tuple("0123456789")
    assert (manifest.parity, manifest.precision, manifest.reproducible) == ("passed", "fp32", True)
    assert {layer.precision for layer in manifest.layers} == {"float32"}
    computed = {module for layer in manifest.layers for module in layer.modules}
    assert computed >= {"features.0", "features.1", "features.3", "classifier.1", "classifier.3"}
    assert str(DIGITS.parent) not in (digits.bundle / "manifest.json").read_text(encoding="utf-8")


def test_the_engine_computes_what_pytorch_computes(digits: Digits, x: np.ndarray) -> None:
    found = cnncc_runtime.load(digits.bundle)(x)
    expected = digits.expected(x)
    assert np.linalg.norm(found - expected) <= CLOSE * np.linalg.norm(expected)


def test_the_golden_outputs_are_those_of_pytorch(digits: Digits) -> None:
    golden = read_golden(digits.bundle / "golden.npz")
    expected = digits.expected(golden.feeds["image"])
    assert np.linalg.norm(golden.outputs["output"] - expected) <= CLOSE * np.linalg.norm(expected)


def test_a_bundle_without_its_reference_still_verifies_against_its_golden_outputs(
    digits: Digits, tmp_path: Path
) -> None:
    lean = tmp_path / "lean.cnncc"
    call("compile", digits.model, "--weights", digits.weights, "-o", lean, "--no-reference")
    assert not (lean / "reference.onnx").exists()
    assert "only the golden sample was checked" in call("verify", lean).stdout
    assert "compile without --no-reference" in call("verify", lean, "--layers", code=2).stderr
    assert "reference" in call("bench", lean, code=2).stderr


def test_an_existing_bundle_is_replaced_as_a_whole(digits: Digits, copy: Path) -> None:
    (copy / "stale.txt").write_text("of the old bundle")
    (copy / "engine.so").write_bytes(b"damaged")
    outcome = call("compile", digits.model, "--weights", digits.weights, "-o", copy)
    assert "written" in outcome.stdout
    assert "stale.txt" not in tree(copy)
    assert read_bundle(copy).file("engine.so").read_bytes() == (digits.bundle / "engine.so").read_bytes()
    assert not leftovers(copy.parent)


def test_a_changed_weight_makes_another_bundle(digits: Digits, tmp_path: Path, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(digits.weights)
    state["classifier.3.bias"][4] += 100
    save_file(state, tmp_path / "other.safetensors")
    old = read_bundle(copy).digest
    call("compile", digits.model, "--weights", tmp_path / "other.safetensors", "-o", copy)
    assert read_bundle(copy).digest != old
    assert int(cnncc_runtime.load(copy)(np.zeros((1, 3, 28, 28), np.float32)).argmax()) == 4


def test_a_file_that_the_models_code_imports_is_part_of_the_key(tmp_path: Path, write_module: WriteModule) -> None:
    write_module("WIDTH = 4\n", "width.py")
    model = write_module(
        """
        import width
        def build():
            return nn.Sequential(nn.Conv2d(1, width.WIDTH, 1), nn.ReLU())
        """
    )
    arguments = ("export", f"{model}:build", "--input-shape", "1,1,4,4", "-o", tmp_path / "m.onnx")
    call(*arguments)
    assert "= export" in call(*arguments).stderr
    write_module("WIDTH = 6\n", "width.py")
    again = call(*arguments).stderr
    assert "✓ export" in again
    assert "has changed" in again


def test_the_default_output_is_named_after_the_factory(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call("export", digits.model)
    assert [path.name for path in tmp_path.iterdir()] == ["build.onnx"]


@pytest.mark.slow
def test_two_processes_with_two_caches_make_the_same_bytes(digits: Digits, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        bundle = tmp_path / name / "digits.cnncc"
        bundle.parent.mkdir()
        arguments = ("--weights", digits.weights, "-o", bundle, "--cache-dir", tmp_path / name / "cache")
        outcome = apart("compile", digits.model, *arguments, env={"PYTHONHASHSEED": str(len(made))})
        assert "reused" not in outcome.stderr
        made.append(tree(bundle))
    assert made[0] == made[1] == tree(digits.bundle)


def test_a_rerun_is_light(digits: Digits) -> None:
    script = (
        "import sys\nfrom cnncc.cli.main import cli\n"
        "try:\n    cli(sys.argv[1:], prog_name='cnncc')\nexcept SystemExit as exc:\n    assert not exc.code\n"
        "print('LOADED', *sys.modules)\n"
    )
    arguments = ["compile", digits.model, "--weights", str(digits.weights), "-o", str(digits.bundle)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert "unchanged" in done.stdout
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert not loaded & {"torch", "tvm", "onnxruntime", "onnxscript"}


# ---- other shapes of models


def test_one_bundle_serves_several_batch_sizes(digits: Digits, tmp_path: Path, x: np.ndarray) -> None:
    bundle = tmp_path / "many.cnncc"
    shape = ("--input-shape", "N,3,28,28", "--batch", "1,4")
    call("compile", digits.model, "--weights", digits.weights, *shape, "-o", bundle)
    manifest = read_bundle(bundle).manifest
    assert manifest.batches == (1, 4)
    assert manifest.inputs[0].shape == ("N", 3, 28, 28)
    engine = cnncc_runtime.load(bundle)
    four = np.concatenate([x, x + 1, x - 1, x * 2])
    for batch in (x, four):
        expected = digits.expected(batch)
        assert np.linalg.norm(engine(batch) - expected) <= CLOSE * np.linalg.norm(expected)
    np.save(tmp_path / "two.npy", four[:2])
    refused = call("run", bundle, "--input", tmp_path / "two.npy", code=5)
    assert "batch" in refused.stderr
    assert "4" in refused.stderr
    assert call("verify", bundle, "--json").document["passed"]


TWO = """
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Conv2d(1, 2, 3)
            self.right = nn.Linear(5, 2)

        def forward(self, image, meta):
            features = self.left(image).mean((2, 3))
            other = self.right(meta)
            return features + other, features * 2

    build = Two
"""


def test_a_model_of_two_inputs_and_two_outputs_runs_by_name(tmp_path: Path, write_module: WriteModule) -> None:
    bundle = tmp_path / "two.cnncc"
    shapes = ("--input-shape", "image=1,1,6,6", "--input-shape", "meta=1,5")
    call("compile", f"{write_module(TWO)}:build", *shapes, "-o", bundle)
    manifest = read_bundle(bundle).manifest
    assert [spec.name for spec in manifest.inputs] == ["image", "meta"]
    assert [spec.name for spec in manifest.outputs] == ["output_0", "output_1"]
    generator = np.random.default_rng(0)
    feeds = {"image": generator.random((1, 1, 6, 6), np.float32), "meta": generator.random((1, 5), np.float32)}
    first, second = cnncc_runtime.load(bundle)(feeds["image"], feeds["meta"])
    np.savez(tmp_path / "feeds.npz", **feeds)
    call("run", bundle, "--input", tmp_path / "feeds.npz", "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as written:
        assert np.array_equal(written["output_0"], first)
        assert np.array_equal(written["output_1"], second)
    np.save(tmp_path / "image.npy", feeds["image"])
    assert "image, meta" in call("run", bundle, "--input", tmp_path / "image.npy", code=4).stderr


def test_an_onnx_model_compiles_without_pytorch(digits: Digits, tmp_path: Path, x: np.ndarray) -> None:
    exported, bundle = tmp_path / "digits.onnx", tmp_path / "from_onnx.cnncc"
    call("export", digits.model, "--weights", digits.weights, "-o", exported)
    call("compile", exported, "-o", bundle)
    expected = digits.expected(x)
    assert np.linalg.norm(cnncc_runtime.load(bundle)(x) - expected) <= CLOSE * np.linalg.norm(expected)
    refused = call("bench", bundle, "--against", "torch", code=2)
    assert "leave torch out of --against" in refused.stderr


def test_several_targets_make_a_bundle_each(digits: Digits, wrong_target: str, tmp_path: Path) -> None:
    targets = ("--target", "llvm", "--target", wrong_target)
    arguments = ("compile", digits.model, "--weights", digits.weights, *targets, "-o", tmp_path / "m.cnncc")
    call(*arguments, code=1)  # the broken one is refused, what came before it stays
    assert [path.name for path in tmp_path.glob("*.cnncc")] == ["m-llvm-host.cnncc"]
    for name in ("engine.so", "weights.bin"):
        assert tree(tmp_path / "m-llvm-host.cnncc")[name] == (digits.bundle / name).read_bytes()


# ---- verify


def test_verify_passes_and_says_how_far_everyone_is_from_the_truth(digits: Digits) -> None:
    document = call("verify", digits.bundle, "--json").document
    assert document["passed"] is True
    judged = {(s["subject"], s["against"]) for s in document["subjects"] if s["judged"]}
    assert judged >= {("engine", "truth"), ("engine", "golden"), ("onnxruntime", "truth")}
    text = call("verify", digits.bundle).stdout
    assert "parity passed on 2 samples" in text
    assert "✗" not in text


def test_verify_by_layers_names_every_module(digits: Digits) -> None:
    document = call("verify", digits.bundle, "--layers", "--json").document
    assert [layer["module"] for layer in document["layers"]] == LAYERS
    assert all(layer["within"] for layer in document["layers"])


def test_verify_takes_real_inputs(digits: Digits, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "three").mkdir(parents=True)
    shutil.copy(image, folder / "three" / "a.png")
    shutil.copy(image, folder / "three" / "b.png")
    found = call("verify", digits.bundle, "--data", folder, "--json").document
    assert sorted(found["samples"]) == ["three/a.png", "three/b.png"]
    np.savez(tmp_path / "data.npz", x=np.zeros((5, 3, 28, 28), np.float32), y=np.arange(5))
    found = call("verify", digits.bundle, "--data", tmp_path / "data.npz", "--samples", "3", "--json").document
    assert len(found["samples"]) == 3


def test_a_wrong_engine_leaves_no_bundle(digits: Digits, wrong_target: str, tmp_path: Path) -> None:
    bundle = tmp_path / "wrong.cnncc"
    arguments = ("compile", digits.model, "--weights", digits.weights, "--target", wrong_target, "-o", bundle)
    for _ in range(2):  # a failed proof is never cached
        refused = call(*arguments, code=1)
        assert "the engine does not compute what the model computes" in refused.stderr
        assert "--keep-failed" in refused.stderr
        assert not bundle.exists()
        assert not leftovers(tmp_path)
    document = call(*arguments, "--json", code=1).document
    assert (document["error"], document["exit_code"]) == ("ParityFailed", 1)
    assert document["where"]


def test_a_wrong_engine_that_is_kept_is_marked_and_does_not_run(
    digits: Digits, wrong_target: str, tmp_path: Path, image: Path
) -> None:
    bundle = tmp_path / "wrong.cnncc"
    arguments = ("compile", digits.model, "--weights", digits.weights, "--target", wrong_target, "-o", bundle)
    for _ in range(2):
        assert "marked as failed" in call(*arguments, "--keep-failed", code=1).stderr
        assert read_bundle(bundle).manifest.parity == "failed"
    assert "its results are wrong" in call("run", bundle, "--input", image, code=1).stderr
    failed = call("verify", bundle, code=1)
    assert "--layers" in failed.stderr
    assert "parity failed" in failed.stdout
    document = call("verify", bundle, "--layers", "--json", code=1).document
    assert document["passed"] is False
    assert any("first leaves its tolerance at features.3" in note for note in document["notes"])


def test_an_engine_for_another_machine_stays_pending(digits: Digits, tmp_path: Path, image: Path) -> None:
    bundle = tmp_path / "future.cnncc"
    cpu = ("--mcpu", "diamondrapids")  # newer than any machine that runs this
    outcome = call("compile", digits.model, "--weights", digits.weights, *cpu, "-o", bundle)
    assert "parity is pending until `cnncc verify` runs on the device" in outcome.stderr
    assert "parity pending" in outcome.stdout
    assert read_bundle(bundle).manifest.target.cpu == "diamondrapids"
    assert "nobody checked" in call("run", bundle, "--input", image, code=1).stderr
    refused = call("verify", bundle, code=3)
    assert "built for: diamondrapids" in refused.stderr
    assert "which lacks" in refused.stderr


@pytest.mark.parametrize(("device", "machine"), [("raspberry-pi-4", "aarch64"), ("cortex-a7", "arm")])
def test_a_device_by_name_gets_an_engine_that_stays_pending(
    digits: Digits, device: str, machine: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "board.cnncc"
    outcome = call("compile", digits.model, "--weights", digits.weights, "--device", device, "-o", bundle)
    assert "parity pending" in outcome.stdout
    manifest = read_bundle(bundle).manifest
    assert (manifest.target.device, manifest.target.machine, manifest.parity) == (device, machine, "pending")
    assert manifest.toolchain["linker"]
    refused = call("verify", bundle, code=3)
    assert f"built for: {machine} ({device})" in refused.stderr


def test_a_device_from_a_file_names_its_bundle(digits: Digits, tmp_path: Path) -> None:
    ours = ROOT / "cnncc" / "targets" / "devices" / "profiles" / "x86-64-v2.toml"
    board = tmp_path / "my-board.toml"
    board.write_text(ours.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ("compile", digits.model, "--weights", digits.weights, "--device", "host", "--device", board)
    call(*arguments, "-o", tmp_path / "digits.cnncc")
    for device in ("my-board", "host"):
        manifest = read_bundle(tmp_path / f"digits-llvm-{device}.cnncc").manifest
        assert (manifest.name, manifest.target.device) == ("digits", device)
    board.write_text(board.read_text(encoding="utf-8").replace("cores", "corse"), encoding="utf-8")
    assert "corse" in call(*arguments, "-o", tmp_path / "digits.cnncc", code=2).stderr


def test_verify_on_the_device_records_the_verdict_of_a_pending_bundle(digits: Digits, copy: Path, image: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    (copy / "manifest.json").write_bytes(canonical_json({**manifest, "parity": "pending"}))
    assert "nobody checked" in call("run", copy, "--input", image, code=1).stderr
    assert "recorded as 'passed'" in call("verify", copy).stderr
    assert read_bundle(copy).manifest.parity == "passed"
    call("run", copy, "--input", image)
    again = call("verify", copy)
    assert "recorded" not in again.stderr
    assert not leftovers(copy.parent)


# ---- bench


@pytest.mark.slow
def test_bench_measures_the_bundle_beside_its_peers(digits: Digits, tmp_path: Path) -> None:
    short = ("--rounds", "2", "--min-time", "0.01")
    report = tmp_path / "report.json"
    outcome = call("bench", digits.bundle, "--against", "ort,torch", *short, "--json", "-o", report)
    assert [subject["name"] for subject in outcome.document["subjects"]] == ["cnncc", "ort", "torch"]
    assert {ratio["peer"] for ratio in outcome.document["ratios"]} == {"ort", "torch"}
    assert all(subject["wall"]["p50"] > 0 for subject in outcome.document["subjects"])
    assert {k: v for k, v in outcome.document.items() if k != "notes"} == json.loads(report.read_bytes())


def test_bench_is_a_gate(digits: Digits) -> None:
    short = ("--rounds", "2", "--min-time", "0.01", "--threads", "1")
    missed = call("bench", digits.bundle, *short, "--max-latency-ratio", "ort=0.0001", code=1)
    assert "slower than its budget allows" in missed.stderr
    assert "than ONNX Runtime" in missed.stdout or "with ONNX Runtime" in missed.stdout
    met = call("bench", digits.bundle, *short, "--max-latency-ratio", "ort=10000", "--json")
    assert met.document["threads"] == 1
    again = call("bench", digits.bundle, *short, "--max-latency-ratio", "ort=0.0001", "--json", code=1)
    assert again.document["schema"].startswith("cnncc.benchmark/")


# ---- run


def test_run_classifies_a_picture_by_the_stored_preprocessing(digits: Digits, image: Path) -> None:
    contract = read_bundle(digits.bundle).manifest.preprocessing
    assert contract is not None
    scores = digits.expected(contract.apply(Image.open(image)))[0]
    probabilities = torch.from_numpy(scores).softmax(0).numpy()
    [result] = call("run", digits.bundle, "--input", image, "--top", "2", "--json").document["results"]
    assert result["input"] == str(image)
    assert result["outputs"] == {"output": [1, 10]}
    assert [item["index"] for item in result["classes"]] == list(np.argsort(-scores)[:2])
    assert [item["label"] for item in result["classes"]] == [str(n) for n in np.argsort(-scores)[:2]]
    assert result["classes"][0]["probability"] == pytest.approx(float(probabilities.max()), rel=1e-4)
    text = call("run", digits.bundle, "--input", image).stdout
    assert f"{probabilities.max():7.2%}" in text


def test_run_takes_several_inputs_of_several_kinds(digits: Digits, image: Path, tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "named.npz", image=x)
    files = [image, tmp_path / "x.npy", tmp_path / "x.npz", tmp_path / "named.npz"]
    inputs = [argument for file in files for argument in ("--input", file)]
    outcome = call("run", digits.bundle, *inputs, "-o", tmp_path / "out.npz", "--json")
    assert [result["input"] for result in outcome.document["results"]] == [str(file) for file in files]
    with np.load(tmp_path / "out.npz") as written:
        outputs = [written[f"output.{n}"] for n in range(4)]
    assert np.allclose(outputs[1], digits.expected(x), rtol=1e-3, atol=1e-5)
    assert np.array_equal(outputs[1], outputs[2])
    assert np.array_equal(outputs[1], outputs[3])


# ---- inspect, export, targets, doctor, cache


def test_inspect_shows_a_bundles_layers_and_files(digits: Digits) -> None:
    text = call("inspect", digits.bundle).stdout
    for part in (
        "features.0",
        "Conv",
        "engine.so",
        "weights.bin",
        "float32[1, 3, 28, 28]",
        "fp32 asked, float32 executed",
        "passed",
    ):
        assert part in text
    document = call("inspect", digits.bundle, "--json").document
    assert document["digest"] == digest_file(digits.bundle / "manifest.json")
    assert document["files"]["engine.so"]["sha256"] == digest_file(digits.bundle / "engine.so")


def test_inspect_counts_a_models_parameters_and_macs(digits: Digits) -> None:
    document = call("inspect", digits.model, "--weights", digits.weights, "--json").document
    weights = sum(p.numel() for p in digits.module.parameters())
    assert 0 <= document["parameters"] - weights <= 2  # a Reshape's shape is a constant too
    convolutions = 28 * 28 * 32 * 3 * 9 + 14 * 14 * 64 * 32 * 9
    assert document["macs"] == convolutions + 64 * 7 * 7 * 128 + 128 * 10
    assert [layer["module"] for layer in document["layers"]] == LAYERS
    assert "features.3" in call("inspect", digits.model, "--weights", digits.weights).stdout


@pytest.mark.parametrize("flags", [(), ("--raw",)], ids=["cleaned", "raw"])
def test_every_exported_node_bears_its_module(digits: Digits, tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = tmp_path / "digits.onnx"
    outcome = call("export", digits.model, "--weights", digits.weights, "-o", path, "--json", *flags)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert outcome.document["nodes"] == len(model.graph.node)
    assert outcome.document["bytes"] == path.stat().st_size
    assert outcome.document["digest"] == digest_file(path)
    assert all(node_metadata(node, MODULE_KEY) for node in model.graph.node)
    assert {module_path(node) for node in model.graph.node} <= {*LAYERS, "(model)", "classifier", "features"}


def test_targets_lists_llvm_and_this_machine() -> None:
    document = call("targets", "--json").document
    assert document["targets"]["llvm"]["state"] == "ready"
    assert document["devices"][0]["name"] == "host"
    assert document["devices"][0]["cpu"]
    assert "llvm" in call("targets").stdout


def test_targets_lists_devices_with_their_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = call("targets").stdout
    assert "raspberry-pi-4" in text
    shutil.copy(ROOT / "cnncc" / "targets" / "devices" / "profiles" / "raspberry-pi-5.toml", tmp_path / "my-board.toml")
    monkeypatch.setenv("CNNCC_DEVICES", str(tmp_path))
    devices = {device["name"]: device for device in call("targets", "--json").document["devices"]}
    assert {"cortex-a7", "my-board", "rtx4090"} <= devices.keys()
    assert devices["my-board"]["file"] == str(tmp_path / "my-board.toml")
    for fact in ("triple", "cpu", "features", "cores", "memory", "glibc", "description"):
        assert devices["my-board"][fact] == devices["raspberry-pi-5"][fact] != ""
    assert devices["cortex-a7"]["emulator"] == {"binary": "qemu-arm", "cpu": "cortex-a7"}


def test_doctor_finds_a_machine_that_can_compile() -> None:
    outcome = call("doctor", "--json")
    assert outcome.document["ready"] is True
    states = {finding["name"]: finding["state"] for finding in outcome.document["findings"]}
    assert states["torch"] == states["apache-tvm"] == states["target llvm"] == "ready"
    assert "can compile" in call("doctor").stdout


def test_doctor_says_what_to_install_and_exits_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnncc.compiler import doctor

    monkeypatch.setattr(doctor, "_REQUIRED", ("a-package-that-nobody-has",))
    outcome = call("doctor", code=3)
    assert "cannot compile yet" in outcome.stdout
    assert "pip install" in outcome.stdout
    assert "a bug" not in outcome.stderr
    assert call("doctor", "--json", code=3).document["ready"] is False


def test_the_cache_can_be_looked_at_and_emptied(digits: Digits, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert call("cache", "info", "--cache-dir", cache, "--json").document["files"] == 0
    arguments = ("export", digits.model, "-o", tmp_path / "d.onnx", "--cache-dir", cache)
    call(*arguments)
    document = call("cache", "info", "--cache-dir", cache, "--json").document
    assert document["entries"] == {"clean": 1, "export": 1}
    assert document["bytes"] == sum(path.stat().st_size for path in (cache / "v1" / "blobs").rglob("*/*"))
    (cache / "notes.txt").write_text("the user's own file")
    assert "removed" in call("cache", "clear", "--cache-dir", cache).stdout
    assert call("cache", "info", "--cache-dir", cache, "--json").document["bytes"] == 0
    assert (cache / "notes.txt").exists()
    assert "✓ export" in call(*arguments).stderr


# ---- cnncc.toml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_of_flags_stand_in_cnncc_toml(digits: Digits, folder: Path) -> None:
    (folder / "cnncc.toml").write_text(
        f'[export]\nweights = "{digits.weights}"\ninput-shape = "1,3,28,28"\noutput = "from_toml.onnx"\nraw = true\n'
        '[run]\ntop = 1\n[compile]\ntarget = "llvm"\nbatch = [1, 4]\n'
    )
    call("export", digits.model)
    assert (folder / "from_toml.onnx").exists()
    call("export", digits.model, "-o", "from_flag.onnx")
    assert (folder / "from_flag.onnx").exists()
    np.save("x.npy", np.zeros((1, 3, 28, 28), np.float32))
    [result] = call("run", digits.bundle, "--input", "x.npy", "--json").document["results"]
    assert len(result["classes"]) == 1
    refused = call("compile", digits.model, "-o", folder / "x.cnncc", code=2)
    assert "--batch needs a symbolic batch" in refused.stderr


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("[compil]\n", "a table [compil] that is no command"),
        ("compile = 3\n", "a table [compile] that is no command"),
        ("[compile]\ntargett = 'llvm'\n", "[compile] has unknown keys: targett"),
        ("[export]\nmodel = 'a.onnx'\n", "[export] has unknown keys: model"),
        ("[compile\n", "cnncc.toml cannot be read"),
        ("[run]\ntop = 'many'\n", "'many' is not a valid integer"),
        ("[compile]\nkeep_failed = 'perhaps'\n", "'perhaps' is not a valid boolean"),
    ],
)
def test_a_wrong_cnncc_toml_is_a_usage_error(folder: Path, text: str, phrase: str) -> None:
    (folder / "cnncc.toml").write_text(text)
    command = ("run", "x.cnncc", "--input", "x.npy") if "[run]" in text else ("compile", "model.onnx")
    refused = call(*command, code=2)
    assert phrase in refused.stderr
    assert phrase in call(*command, "--json", code=2).document["message"]


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_flags_give_a_json_document_too(name: str) -> None:
    document = call(name, "--json", "--no-such-flag", code=2).document
    assert document["error"] == "UsageError"
    assert document["exit_code"] == 2


def test_a_reader_that_has_seen_enough_is_no_failure(digits: Digits) -> None:
    for flags in ("", "--json"):
        command = f"{sys.executable} -m cnncc.cli inspect {digits.bundle} {flags} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
