"""int8 on the command line: calibrate, quantize, compile, and everything that they refuse."""

from __future__ import annotations

import json
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

from cnncc.calibration.lint import lint
from cnncc.calibration.table import read_table
from cnncc.graph.reader import read_onnx
from cnncc.graph.reference import Reference
from cnncc.targets.base import Engine
from cnncc.targets.llvm.blocked.integers import MOST_PRODUCTS
from cnncc_runtime.bundle import read_bundle
from tests.cli.conftest import Digits, WriteModule
from tests.cli.harness import Outcome, apart, call, finish, leftovers, start, tree
from tests.cli.test_faults import DEFAULT_SIGINT
from tests.qemu.board import make_board, require
from tests.targets.conformance import graph_of

COUNT = 24


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """Seeded inputs, labelled with what the float model says of them."""
    path = tmp_path_factory.mktemp("data") / "x.npz"
    x = np.random.default_rng(3).uniform(0, 1, (COUNT, 3, 28, 28)).astype(np.float32)
    np.savez(path, x=x, y=digits.expected(x).argmax(1))
    return path


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory, digits: Digits, data: Path) -> Path:
    """The digits CNN's calibration table."""
    path = tmp_path_factory.mktemp("table") / "digits.calib.json"
    call("calibrate", digits.model, "--weights", digits.weights, "--data", data, "-o", path)
    return path


def model(digits: Digits) -> tuple[str | Path, ...]:
    return (digits.model, "--weights", digits.weights)


def refused(*arguments: str | Path, code: int, says: str, hint: str = "") -> Outcome:
    outcome = call(*arguments, code=code)
    assert says in outcome.stderr, outcome.stderr
    assert hint in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return outcome


# ---- the way through


def test_a_model_is_calibrated_and_quantized_into_an_onnx_that_any_runtime_reads(
    digits: Digits, data: Path, tmp_path: Path
) -> None:
    out, onnx_file = tmp_path / "d.calib.json", tmp_path / "d.int8.onnx"
    outcome = call("calibrate", *model(digits), "--data", data, "--val", data, "-o", out, "--json")
    document = outcome.document
    assert document["layers"] == 4
    assert document["float"] == []
    assert document["accuracy"]["metric"] == "top-1"
    assert document["accuracy"]["fp32"] == 100.0
    assert document["accuracy"]["samples"] == COUNT
    assert document["sqnr_db"] > 25
    assert {finding["kind"] for finding in document["health"]} >= {"few-samples"}
    call("quantize", *model(digits), "--calib", out, "-o", onnx_file)
    graph = read_onnx(onnx_file)
    assert not [finding for finding in lint(graph) if finding.severity != "slow"]
    assert sum(node.op_type == "QuantizeLinear" for node in graph.nodes) >= 4
    assert {tensor.data_type for tensor in graph.constants.values() if len(tensor.dims) > 1} == {onnx.TensorProto.INT8}
    with np.load(data) as archive:
        x = archive["x"][:4]
    found = np.concatenate([Reference(graph).run({graph.inputs[0].name: each[None]})["output"] for each in x])
    wanted = digits.expected(x)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_the_same_calibration_is_taken_from_the_cache_and_gives_the_same_bytes(
    digits: Digits, data: Path, table: Path, tmp_path: Path
) -> None:
    outcome = call("calibrate", *model(digits), "--data", data, "-o", tmp_path / "again.json")
    assert "= calibrate" in outcome.stderr
    assert (tmp_path / "again.json").read_bytes() == table.read_bytes()
    fresh = apart(
        "calibrate", *model(digits), "--data", data, "-o", tmp_path / "fresh.json", "--cache-dir", tmp_path / "cache"
    )
    assert "✓ calibrate" in fresh.stderr
    assert (tmp_path / "fresh.json").read_bytes() == table.read_bytes()


def test_compile_to_int8_calibrates_proves_and_says_what_is_executed(
    digits: Digits, data: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "d8.cnncc"
    flags = ("--precision", "int8", "--data", data, "--val", data, "--max-accuracy-drop", "5", "--allow-slow")
    outcome = call("compile", *model(digits), *flags, "-o", bundle)
    assert "top-1 100.00 → " in outcome.stderr
    assert "in float32" not in outcome.stderr
    made = read_bundle(bundle)
    assert (made.manifest.precision, made.manifest.parity) == ("int8", "passed")
    found = read_table(made.file("calibration.json"))
    assert found.accuracy is not None
    assert found.accuracy.int8 >= 95
    reference = read_onnx(made.file("reference.onnx"))
    assert any(node.op_type == "QuantizeLinear" for node in reference.nodes)
    assert "int8 asked, int8 executed" in call("inspect", bundle).stdout
    assert "parity passed" in call("verify", bundle, "--data", data).stdout
    again = call("compile", *model(digits), *flags, "-o", bundle)
    assert "unchanged" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_an_int8_engine_for_arm_computes_what_onnx_runtime_does(
    digits: Digits, data: Path, table: Path, tmp_path: Path, cpu: str
) -> None:
    require()
    bundle, onnx_file, disk = tmp_path / "arm.cnncc", tmp_path / "d.int8.onnx", tmp_path / "disk"
    device = ("--mtriple", "aarch64-linux-gnu", "--mcpu", cpu)
    call("compile", *model(digits), "--precision", "int8", "--calib", table, *device, "--allow-slow", "-o", bundle)
    call("quantize", *model(digits), "--calib", table, "-o", onnx_file)
    graph = read_onnx(onnx_file)
    disk.mkdir()
    board, made = make_board(disk, cpu), read_bundle(bundle).manifest
    engine = Engine(made.target, made.engine, bundle / made.engine.file, {}, made.layers, reproducible=True)
    with np.load(data) as archive:
        for image in archive["x"][:4, None]:
            (found,) = board.run(engine, made, [image])
            (wanted,) = Reference(graph).run({graph.inputs[0].name: image}).values()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def long_product(path: Path) -> Path:
    """Write a model whose one sum is too long for int32 to hold in any case."""
    depth = MOST_PRODUCTS + 1
    weight = np.random.default_rng(0).standard_normal((depth, 2)).astype(np.float32) / 256
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], "long")
    graph = graph_of([gemm], {"x": [1, depth]}, {"y": [1, 2]}, [numpy_helper.from_array(weight, "w")])
    path.write_bytes(graph.serialized)
    return path


def test_a_layer_that_falls_back_to_float_is_an_error_unless_it_is_allowed(tmp_path: Path) -> None:
    path, data, bundle = long_product(tmp_path / "m.onnx"), tmp_path / "x.npz", tmp_path / "m.cnncc"
    np.savez(data, x=np.random.default_rng(1).uniform(0, 1, (4, MOST_PRODUCTS + 1)).astype(np.float32))
    arguments = ("compile", path, "--precision", "int8", "--data", data, "-o", bundle)
    says = "llvm computes 1 of 1 int8 layers in float32"
    refused(*arguments, code=1, says=says, hint="--max-fallback 1 allows it")
    assert not bundle.exists()
    outcome = call(*arguments, "--max-fallback", "1", "--allow-slow")
    assert f"{says}: long (long)" in outcome.stderr
    assert "int8 asked, float32 executed" in call("inspect", bundle).stdout
    call("compile", path, "--precision", "auto", "--data", data, "--allow-slow", "-o", bundle)


def test_compile_takes_a_table_that_was_made_before(digits: Digits, table: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "d8.cnncc"
    outcome = call("compile", *model(digits), "--precision", "int8", "--calib", table, "--allow-slow", "-o", bundle)
    assert "calibrate" not in outcome.stderr
    assert read_bundle(bundle).file("calibration.json").read_bytes() == table.read_bytes()


@pytest.mark.slow
def test_bench_says_what_every_engine_multiplies(digits: Digits, table: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "d8.cnncc"
    call("compile", *model(digits), "--precision", "int8", "--calib", table, "-o", bundle)
    short = ("--rounds", "2", "--min-time", "0.01", "--threads", "1")
    outcome = call("bench", bundle, "--against", "ort,ort-int8,torch", *short, "--json")
    found = {subject["name"]: subject["precision"] for subject in outcome.document["subjects"]}
    assert found == {"cnncc": "int8", "ort": "fp32, Q/DQ", "ort-int8": "int8", "torch": "fp32"}
    shown = call("bench", bundle, "--against", "torch,ort-int8", *short).stdout
    assert "PyTorch (fp32)" in shown
    assert "ONNX Runtime, its int8 " in shown


def test_auto_keeps_in_float_what_the_budget_needs(digits: Digits, data: Path, table: Path, tmp_path: Path) -> None:
    reached = read_table(table).sqnr_db
    assert reached is not None
    flags = ("--precision", "auto", "--data", data, "--min-sqnr", f"{reached + 2:.2f}", "--allow-slow")
    call("compile", *model(digits), *flags, "-o", tmp_path / "d.cnncc")
    found = read_table(read_bundle(tmp_path / "d.cnncc").file("calibration.json"))
    assert found.sqnr_db is not None
    assert found.sqnr_db >= reached + 2
    assert 0 < len(found.kept) < 4
    assert {layer.why for layer in found.kept} == {"budget"}


def test_layers_that_are_kept_are_named_by_module(digits: Digits, data: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", *model(digits), "--data", data, "--keep", "classifier.*", "-o", tmp_path / "t.json")
    outcome = call(*arguments)
    assert "float  classifier.1 (Gemm), asked" in outcome.stdout
    assert "2 of 4 layers int8" in outcome.stdout
    call("quantize", *model(digits), "--calib", tmp_path / "t.json", "-o", tmp_path / "q.onnx")
    graph = read_onnx(tmp_path / "q.onnx")
    [first] = [node for node in graph.nodes if node.op_type == "Gemm"][:1]
    assert graph.constants[first.input[1]].data_type == onnx.TensorProto.FLOAT


def test_another_method_costs_no_data(digits: Digits, table: Path, tmp_path: Path) -> None:
    for method in ("max", "percentile"):
        call("quantize", *model(digits), "--calib", table, "--method", method, "-o", tmp_path / f"{method}.onnx")
    made = [read_onnx(tmp_path / f"{method}.onnx") for method in ("max", "percentile")]
    scales = [graph.constant(next(n.input[1] for n in graph.nodes if n.op_type == "QuantizeLinear")) for graph in made]
    assert scales[0] is not None
    assert scales[1] is not None
    assert scales[0] > scales[1]


def test_an_image_folder_is_data(digits: Digits, tmp_path: Path) -> None:
    images = folder(tmp_path)
    outcome = call("calibrate", *model(digits), "--data", images, "-o", tmp_path / "t.json")
    assert "6 samples" in outcome.stderr
    found = read_table(tmp_path / "t.json")
    assert found.data is not None
    assert found.data.preprocessing is not None


def folder(tmp_path: Path, count: int = 6) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    return images


# ---- data that cannot be used


def test_int8_without_data_is_refused_with_the_way_out(digits: Digits, tmp_path: Path) -> None:
    for command in (("calibrate",), ("compile", "--precision", "int8"), ("compile", "--precision", "auto")):
        refused(
            *command,
            *model(digits),
            "-o",
            tmp_path / "out",
            code=2,
            says="int8 needs data to find its scales with, and there is no default",
            hint="--data images/",
        )
    assert list(tmp_path.iterdir()) == []


def test_random_data_is_marked_and_said(digits: Digits, tmp_path: Path) -> None:
    outcome = call(
        "calibrate", *model(digits), "--data", "random", "--calibration-samples", "4", "-o", tmp_path / "t.json"
    )
    assert "calibrated on random numbers" in outcome.stderr
    found = read_table(tmp_path / "t.json")
    assert found.data is not None
    assert found.data.random


def test_damaged_images_are_refused_or_skipped_and_counted(digits: Digits, tmp_path: Path) -> None:
    images = folder(tmp_path)
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    arguments = ("calibrate", *model(digits), "--data", images, "-o", tmp_path / "t.json")
    refused(*arguments, code=4, says="3.png")
    assert not (tmp_path / "t.json").exists()
    outcome = call(*arguments, "--skip-bad")
    assert "1 bad samples were skipped" in outcome.stderr
    found = read_table(tmp_path / "t.json")
    assert found.data is not None
    assert (found.data.samples, found.data.skipped) == (5, 1)


def bad_arrays() -> dict[str, tuple[np.ndarray, str]]:
    good = np.zeros((4, 3, 28, 28), np.float32)
    nan = good.copy()
    nan[2, 1, 5, 5] = np.nan
    return {
        "four channels": (np.zeros((4, 4, 28, 28), np.float32), "has shape [1, 4, 28, 28]"),
        "another dtype": (good.astype(np.float64), "float64"),
        "NaN": (nan, "x[2] holds NaN or Inf"),
        "nothing": (good[:0], "no samples"),
        "one number": (np.float32(1), "a single float32"),
    }


@pytest.mark.parametrize("kind", bad_arrays())
def test_arrays_that_do_not_fit_are_refused(digits: Digits, tmp_path: Path, kind: str) -> None:
    array, says = bad_arrays()[kind]
    np.savez(tmp_path / "x.npz", x=array)
    refused("calibrate", *model(digits), "--data", tmp_path / "x.npz", "-o", tmp_path / "t.json", code=4, says=says)
    assert not (tmp_path / "t.json").exists()


def test_activations_that_overflow_name_the_tensor_and_the_module(write_module: WriteModule, tmp_path: Path) -> None:
    path = write_module(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

            def forward(self, x):
                return self.second(torch.exp(1000 * self.first(x)))

        def build():
            return Net()
        """
    )
    np.savez(tmp_path / "x.npz", x=np.full((2, 3, 8, 8), 5, np.float32))
    arguments = ("calibrate", f"{path}:build", "--input-shape", "1,3,8,8", "--data", tmp_path / "x.npz")
    outcome = call(*arguments, "-o", tmp_path / "t.json", code=4)
    assert "holds NaN or Inf on x[" in outcome.stderr


# ---- tables that do not fit


def test_a_table_of_other_weights_is_refused_by_name(digits: Digits, table: Path, tmp_path: Path) -> None:
    weights = load_file(digits.weights)
    name = next(iter(weights))
    weights[name] = weights[name] * 1.01
    save_file(weights, tmp_path / "other.safetensors")
    other = (digits.model, "--weights", tmp_path / "other.safetensors")
    says = "the table was calibrated for other weights of 'build'"
    refused("quantize", *other, "--calib", table, "-o", tmp_path / "q.onnx", code=4, says=says, hint="calibrate again")
    flags = ("--precision", "int8", "--calib", table, "-o", tmp_path / "m.cnncc")
    refused("compile", *other, *flags, code=4, says=says)
    assert not (tmp_path / "q.onnx").exists()
    assert not (tmp_path / "m.cnncc").exists()


def test_a_table_of_another_model_or_shape_is_refused(digits: Digits, table: Path, tmp_path: Path) -> None:
    flags = ("--input-shape", "N,3,28,28", "--calib", table, "-o", tmp_path / "q.onnx")
    refused("quantize", *model(digits), *flags, code=4, says="another model", hint="--input-shape")


def test_a_table_of_another_preprocessing_is_refused(digits: Digits, table: Path, tmp_path: Path) -> None:
    contract = tmp_path / "own.toml"
    contract.write_text("size = [28, 28]\nmean = [0.1, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n")
    flags = ("--precision", "int8", "--calib", table, "--preprocess", contract, "-o", tmp_path / "m.cnncc")
    outcome = refused("compile", *model(digits), *flags, code=4, says="calibrated with another preprocessing")
    assert "mean: (0.5, 0.5, 0.5), now (0.1, 0.5, 0.5)" in outcome.stderr


@pytest.mark.parametrize("damage", ["cut", "schema", "gone"])
def test_a_damaged_table_is_refused(digits: Digits, table: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.json"
    if damage == "cut":
        path.write_bytes(table.read_bytes()[:-100])
    elif damage == "schema":
        path.write_text(json.dumps({**json.loads(table.read_bytes()), "schema": "cnncc.calibration/99"}))
    refused("quantize", *model(digits), "--calib", path, "-o", tmp_path / "q.onnx", code=4, says=str(path))


# ---- models that are quantized already


def test_a_model_that_carries_qdq_is_compiled_as_it_is_and_never_calibrated(
    digits: Digits, data: Path, table: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "q.onnx"
    call("quantize", *model(digits), "--calib", table, "-o", quantized)
    refused(
        *("calibrate", quantized, "--data", data, "-o", tmp_path / "t.json"),
        code=4,
        says="quantized already",
        hint="its scales are respected",
    )
    flags = ("--precision", "int8", "--data", data, "-o", tmp_path / "m.cnncc")
    refused("compile", quantized, *flags, code=2, says="carries Q/DQ already", hint="its scales are respected")
    outcome = call("compile", quantized, "-o", tmp_path / "m.cnncc")
    assert "its own scales are used" in outcome.stderr
    assert read_bundle(tmp_path / "m.cnncc").manifest.precision == "int8"


def test_a_tensorrt_cache_becomes_a_table(digits: Digits, table: Path, tmp_path: Path) -> None:
    scales = read_table(table).scales
    lines = [f"{name}: {struct.pack('!f', scale).hex()}" for name, scale in scales.items()]
    cache = tmp_path / "calibration.cache"
    cache.write_text("\n".join(["TRT-100300-EntropyCalibration2", *lines]) + "\n")
    arguments = ("calibrate", *model(digits), "--import", cache, "-o", tmp_path / "t.json")
    outcome = call(*arguments)
    assert "does not say which weights and data" in outcome.stderr
    assert read_table(tmp_path / "t.json").scales == scales
    call("quantize", *model(digits), "--calib", tmp_path / "t.json", "-o", tmp_path / "q.onnx")
    cache.write_text("\n".join(["TRT-100300-EntropyCalibration2", *lines[:1]]) + "\n")
    refused(*arguments, code=4, says="has no scale for")
    cache.write_text("not a cache\n")
    refused(*arguments, code=4, says="is no TensorRT calibration cache")
    cache.write_text("TRT-100300-EntropyCalibration2\nimage: zz\n")
    refused(*arguments, code=4, says="line 2")


# ---- flags


FLAGS = {
    "a pattern that names nothing": (("--keep", "nothing.*"), "--keep nothing.* names no layer", "features.0"),
    "a budget without data for it": (("--max-accuracy-drop", "1"), "needs data to measure accuracy on", "--val"),
    "an unknown method": (("--method", "best"), "'best' is not one of", ""),
    "no samples": (("--calibration-samples", "0"), "0 is not in the range", ""),
    "data and a cache": (("--import", "x.cache"), "--import says nothing beside --data", ""),
}


@pytest.mark.parametrize(("flags", "says", "hint"), FLAGS.values(), ids=FLAGS)
def test_a_wrong_flag_is_refused(
    digits: Digits, data: Path, tmp_path: Path, flags: tuple[str, ...], says: str, hint: str
) -> None:
    refused(
        "calibrate", *model(digits), "--data", data, *flags, "-o", tmp_path / "t.json", code=2, says=says, hint=hint
    )
    assert list(tmp_path.iterdir()) == []


def test_flags_of_int8_say_nothing_for_fp32(digits: Digits, data: Path, table: Path, tmp_path: Path) -> None:
    said = (("--method", "mse"), ("--no-shift",), ("--float-adds",), ("--skip-bad",))
    for flags in (("--max-fallback", "1"), ("--allow-slow",)):
        arguments = ("compile", *model(digits), *flags, "-o", tmp_path / "m.cnncc")
        refused(*arguments, code=2, says=f"{flags[0]} says nothing with --precision fp32")
    for flags in (("--keep", "features.*"), ("--min-sqnr", "30"), ("--val", data), ("--calib", table), *said):
        arguments = ("compile", *model(digits), "--data", data, *flags, "-o", tmp_path / "m.cnncc")
        refused(*arguments, code=2, says=f"{flags[0]} says nothing with --precision fp32")
    flags = ("--precision", "int8", "--calib", table, "--val", data, "-o", tmp_path / "m.cnncc")
    refused("compile", *model(digits), *flags, code=2, says="--val says nothing beside --calib")


def test_a_budget_that_nothing_meets_is_a_failed_check(digits: Digits, data: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", *model(digits), "--data", data, "--min-sqnr", "1000", "-o", tmp_path / "t.json")
    refused(*arguments, code=1, says="no choice of layers meets the budget", hint="--min-sqnr")
    assert not (tmp_path / "t.json").exists()


# ---- interruption


INTERRUPTING = """
import os, signal
from pathlib import Path

import numpy as np

FIRST = Path(__file__).with_name("first")


def samples():
    for number in range(24):
        if number == 20 and FIRST.exists():
            count = int(FIRST.read_text())
            FIRST.write_text(str(count - 1)) if count > 1 else FIRST.unlink()
            if count == 1:
                os.kill(os.getpid(), signal.{name})
        yield np.random.default_rng(number).uniform(0, 1, (1, 3, 28, 28)).astype(np.float32)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_calibration_goes_on_where_it_was(
    digits: Digits, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "own.py").write_text(INTERRUPTING.format(name=number.name))
    cache, out = tmp_path / "cache", tmp_path / "t.json"
    arguments = ("calibrate", *model(digits), "--data", f"{tmp_path / 'own.py'}:samples", "--cache-dir", cache)
    # the samples are read twice: those that steps are judged by, then all; the signal comes in the second reading
    (tmp_path / "first").write_text("2")
    process = start(*arguments, "-o", out, prefix=DEFAULT_SIGINT)
    outcome = finish(process, code=128 + number)
    assert "nothing half-written was left behind" in outcome.stderr
    assert not out.exists()
    [left] = (cache / "calibration").iterdir()
    assert left.name.endswith(".pass.npz")
    apart(*arguments, "-o", out)
    assert list((cache / "calibration").iterdir()) == []
    shutil.rmtree(cache)
    apart(*arguments, "-o", tmp_path / "whole.json")
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert leftovers(tmp_path) == []
    assert set(tree(tmp_path)) >= {"t.json", "whole.json"}
