"""The accuracy benchmark: its data, its networks, its judge and its table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.quantizers import field
from benchmarks.quantizers.inspection import Coverage, coverage, faults
from benchmarks.quantizers.judge import Verdict, mean_iou, sqnr, top1
from benchmarks.quantizers.process import Cost, run
from benchmarks.quantizers.table import Block, Entry, Line, block, margin, spread
from benchmarks.trained import nets
from benchmarks.trained.data import Counts, digits, load, split
from benchmarks.trained.fonts import family_of, find_fonts
from benchmarks.trained.recipes import RECIPES
from benchmarks.trained.training import folded, outputs, train, uneven
from cnncc_runtime.errors import DependencyMissing, EnvironmentMissing, RunFailed, UsageError
from tests.conftest import ROOT

FEW = Counts(36, 8, 12)


def quantized(*, zero: int = 0, kind: type = np.int8, bias: bool = False, weights: bool = True) -> onnx.ModelProto:
    """A convolution that reads Q/DQ through a max-pool, with quantized weights, then a product in float."""
    constants = {
        "s": np.float32(0.1),
        "z": np.asarray(zero, kind),
        "w": np.zeros((4, 3, 1, 1), np.int8 if weights else np.float32),
        "v": np.zeros((4, 5), np.float32),
        "b": np.zeros(4, np.int32 if bias else np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("MaxPool", ["xd"], ["p"], kernel_shape=[2, 2]),
        *([helper.make_node("DequantizeLinear", ["w", "s"], ["wd"])] if weights else []),
        *([helper.make_node("DequantizeLinear", ["b", "s"], ["bd"])] if bias else []),
        helper.make_node("Conv", ["p", "wd" if weights else "w", "bd" if bias else "b"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["m"]),
        helper.make_node("MatMul", ["m", "m"], ["y"]),  # two computed tensors: no layer
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def test_a_layer_is_int8_where_both_of_its_operands_are() -> None:
    assert coverage(quantized()) == Coverage(1, 2)
    assert coverage(quantized(weights=False)) == Coverage(0, 2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (quantized(), ()),
        (quantized(zero=3), ("zero points",)),
        (quantized(kind=np.uint8), ("uint8",)),
        (quantized(kind=np.uint8, zero=128, bias=True), ("int32 bias", "uint8", "zero points")),
    ],
)
def test_what_tensorrt_would_not_take_is_named(model: onnx.ModelProto, expected: tuple[str, ...]) -> None:
    assert faults(model) == expected


def test_a_quantizer_without_a_zero_point_makes_uint8() -> None:
    model = quantized()
    del model.graph.node[0].input[2]
    del model.graph.node[1].input[2]
    assert faults(model) == ("uint8",)


def test_top1_counts_right_images() -> None:
    logits = np.array([[1, 0], [0, 1], [3, 2], [0, 5]], np.float32)
    assert top1(logits, np.array([0, 1, 1, 1])) == 0.75


def test_mean_iou_counts_pixels_over_the_whole_set_and_leaves_out_classes_that_never_occur() -> None:
    y = np.array([[[0, 0, 1, 1]], [[0, 0, 0, 1]]])
    guessed = np.array([[[0, 0, 1, 0]], [[0, 1, 0, 1]]])
    logits = np.moveaxis(np.eye(3, dtype=np.float32)[guessed], -1, 1)
    assert mean_iou(logits, y) == pytest.approx((4 / 6 + 2 / 4) / 2)


@given(st.floats(1e-3, 0.5), st.integers(0, 100))
def test_sqnr_is_that_of_the_noise_that_was_added(strength: float, seed: int) -> None:
    signal = np.random.default_rng(seed).standard_normal((64, 10)).astype(np.float32)
    noisy = (signal * np.float32(1 + strength)).astype(np.float32)
    assert sqnr(signal, noisy) == pytest.approx(-20 * np.log10(strength), abs=0.01)
    assert sqnr(signal, signal) == float("inf")


def entry(seed: int, db: float, *, layers: int = 4, fault: str = "") -> Entry:
    verdict = Verdict(95.0 + seed, 96.0, db, layers, 4, (fault,) if fault else ())
    return Entry(seed, Cost(2.0, 3.0, 300_000_000), verdict)


BLOCK = Block(
    "net",
    "top-1",
    "images",
    512,
    (
        Line("cnncc", "", (entry(0, 31.0), entry(1, 33.0))),
        Line("legal", "", (entry(0, 29.0), entry(1, 30.0))),
        Line("worse", "", (entry(0, 25.0), entry(1, 25.0))),
        Line("unsigned", "", (entry(0, 40.0, fault="uint8"), entry(1, 40.0, fault="uint8"))),
        Line("sparing", "", (entry(0, 50.0, layers=3), entry(1, 50.0, layers=3))),
        Line("broken", "", (entry(0, 60.0), Entry(1, failure="it broke"))),
    ),
)


def test_we_are_compared_with_the_best_that_tensorrt_takes_at_our_coverage() -> None:
    assert margin(BLOCK, "cnncc") == "cnncc beyond legal, the best at this coverage: 2.5 [2.0, 3.0] dB"
    assert margin(replace(BLOCK, lines=BLOCK.lines[1:]), "cnncc") == ""
    assert (
        margin(replace(BLOCK, lines=BLOCK.lines[:1]), "cnncc") == "no peer that TensorRT takes quantizes as many layers"
    )


def test_ours_are_no_peers_of_each_other() -> None:
    other = Line("cnncc-float-adds", "", (entry(0, 35.0), entry(1, 36.0)))
    both = replace(BLOCK, lines=(*BLOCK.lines, other))
    assert margin(both, "cnncc") == margin(BLOCK, "cnncc")
    assert margin(both, "cnncc-float-adds") == (
        "cnncc-float-adds beyond legal, the best at this coverage: 6.0 [6.0, 6.0] dB"
    )


def test_a_block_has_means_and_ranges_legality_and_failures() -> None:
    head, _, *lines = block(BLOCK)
    assert head == "net, 2 seeds, 512 calibration images, images; fp32 top-1 96.00 [96.00, 96.00]"
    [legal] = [line for line in lines if line.startswith("  legal ")]
    expected = "legal 95.50 [95.00, 96.00] 0.50 [0.00, 1.00] 29.5 [29.0, 30.0] 4/4 2 300 yes"
    assert " ".join(legal.split()) == expected
    assert any(line.startswith("  unsigned") and line.endswith("no: uint8") for line in lines)
    assert any(line.startswith("  broken") and "failed on seed 1: it broke" in line for line in lines)


def test_one_value_has_no_range() -> None:
    assert spread([1.25]) == "1.25"


def test_a_block_of_failures_alone_has_no_figures() -> None:
    lines = list(block(replace(BLOCK, lines=(Line("cnncc", "", (Entry(0, failure="no"),)),))))
    assert lines[0] == "net, 1 seed, 512 calibration images, images"
    assert lines[2].endswith("failed on seed 0: no")


def test_a_process_is_as_large_as_it_is_itself() -> None:
    ballast = np.ones(60_000_000)  # 480 MB, here
    small = run([[sys.executable, "-c", "pass"]])
    large = run([[sys.executable, "-c", "pass"], [sys.executable, "-c", "x = b'1' * 200_000_000"]])
    assert ballast.nbytes > 400_000_000 > 100_000_000 > small.peak_resident > 1_000_000
    assert large.peak_resident > 200_000_000
    assert large.seconds > small.seconds
    assert large.cpu_seconds > 0.001


def test_a_command_that_fails_gives_its_last_line() -> None:
    with pytest.raises(RunFailed, match=r"^ValueError: no such range \(exit 1\)$"):
        run([[sys.executable, "-c", "raise ValueError('no  such range')"]])
    with pytest.raises(RunFailed, match=r"^no such range \(exit 4\)$"):
        run([[sys.executable, "-c", "print('no such range\\n  at conv\\n  try: another'); exit(4)"]])
    with pytest.raises(RunFailed, match="nothing/here does not start: No such file or directory"):
        run([["nothing/here"]])


def test_quantizers_have_names_of_their_own_and_unknown_ones_are_refused() -> None:
    names = [peer.name for peer in field.PEERS]
    assert len(set(names)) == len(names)
    assert field.find(["nncf", "ort-u8"])[0].name == "nncf"
    with pytest.raises(UsageError, match="'nnfc' is not a known quantizer"):
        field.find(["nnfc"])


def test_a_quantizer_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    [nncf] = field.find(["nncf"])
    monkeypatch.setenv("CNNCC_BENCH_PYTHON_NNCF", "/bin/false")
    with pytest.raises(DependencyMissing, match="nncf is not installed") as caught:
        nncf.version()
    assert caught.value.hint == "make quantizers, or name its Python in CNNCC_BENCH_PYTHON_NNCF"


def test_ours_is_two_commands_and_the_second_reads_what_the_first_wrote() -> None:
    calibrate, quantize = field.OURS[0].commands(Path("a.onnx"), "N,3,8,8", Path("c.npz"), Path("b.onnx"))
    model = ["a.onnx", "--input-shape", "N,3,8,8"]
    assert calibrate[3:11] == ["calibrate", *model, "--data", "c.npz", "-o", "b.calib.json"]
    assert quantize[3:] == ["quantize", *model, "--calib", "b.calib.json", "-o", "b.onnx"]
    floating, _quantize = field.OURS[1].commands(Path("a.onnx"), "N,3,8,8", Path("c.npz"), Path("b.onnx"))
    assert [each for each in floating if each not in calibrate] == ["--float-adds"]


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("DejaVuSans-Bold.ttf", "dejavusans"),
        ("Lato-HairlineItalic.ttf", "lato"),
        ("LinLibertine_R.otf", "linlibertine"),
    ],
)
def test_weights_of_a_family_are_of_one_family(file: str, family: str) -> None:
    assert family_of(Path(file)) == family


@given(st.sets(st.text("abc", min_size=1), min_size=2))
def test_fonts_are_split_by_family(names: set[str]) -> None:
    train, test = split({name: (Path(name),) for name in names})
    assert train
    assert test
    assert sorted([*train, *test]) == sorted(names)


def test_a_machine_without_fonts_is_told_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.trained.fonts._matplotlib", list)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(EnvironmentMissing, match="0 families of fonts were found") as caught:
        find_fonts((tmp_path,))
    assert caught.value.hint == "make fonts"


@pytest.mark.parametrize(("name", "shape", "classes"), [("glyphs", (3, 32, 32), 36), ("scenes", (3, 64, 64), 5)])
def test_rendered_data_is_the_same_again(name: str, shape: tuple[int, ...], classes: int, tmp_path: Path) -> None:
    first, kept = load(name, tmp_path, FEW), load(name, tmp_path, FEW)
    [file] = tmp_path.iterdir()
    file.unlink()
    again = load(name, tmp_path, FEW)
    assert first.digest == kept.digest == again.digest
    assert first.shape == shape
    assert (len(first.train.x), len(first.pool.x), len(first.test.x)) == (36, 8, 12)
    assert set(np.unique(first.train.y)) == set(range(classes))
    assert first.test.inputs.dtype == np.float32
    assert -2.01 < first.test.inputs.min() < first.test.inputs.max() < 2.01


def test_calibration_images_are_drawn_by_seed(tmp_path: Path) -> None:
    data = load("glyphs", tmp_path, FEW)
    first, same, other = data.calibration(5, 0), data.calibration(5, 0), data.calibration(5, 1)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    with pytest.raises(UsageError, match="glyphs has 8 images to calibrate with, 9 were asked for"):
        data.calibration(9, 0)


def test_digits_to_test_with_are_others_than_those_trained_on() -> None:
    data = digits()
    train_images = {image.tobytes() for image in data.train.x}
    assert sum(image.tobytes() in train_images for image in data.test.x) < 5  # two people may draw the same digit
    assert (len(data.train.x), len(data.test.x)) == (1198, 599)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "seed"])
def test_networks_answer_as_their_data_asks(name: str) -> None:
    recipe = RECIPES[name]
    network: nn.Module = getattr(nets, recipe.factory)().eval()
    size = 64 if recipe.data == "scenes" else 32
    result = outputs(network, np.zeros((2, 3, size, size), np.float32))
    assert result.shape == ((2, 5, 64, 64) if recipe.data == "scenes" else (2, 36))


def test_uneven_channels_compute_the_same_function() -> None:
    torch.manual_seed(0)
    network = nets.MobileNet(width=4, classes=5, act=nn.ReLU)
    network.train()(torch.randn(16, 3, 32, 32))  # statistics that matter
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    expected = outputs(network.eval(), x)
    hard = folded(network)
    assert np.allclose(outputs(hard, x), expected, atol=1e-5)
    before = [layer.weight.detach().clone() for layer in hard.modules() if isinstance(layer, nn.Conv2d)]
    uneven(hard, seed=1)
    assert np.allclose(outputs(hard, x), expected, atol=1e-5)
    after = [layer.weight for layer in hard.modules() if isinstance(layer, nn.Conv2d)]
    factors = [(b.detach() / a).abs().amax((1, 2, 3)) for a, b in zip(before[1::3], after[1::3], strict=True)]
    assert max(float(factor.max() / factor.min()) for factor in factors) > 10


def test_training_learns_and_a_seed_gives_the_same_weights(tmp_path: Path) -> None:
    data = load("glyphs", tmp_path, Counts(72, 8, 12))
    told: list[str] = []
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        network = nets.ResNet(width=4)
        train(network, data.train, epochs=3, rate=1e-2, batch=32, seed=3, tell=told.append)
        made.append(network.head[-1].weight.detach().clone())
    assert torch.equal(*made)
    losses = [float(line.rpartition(" ")[2]) for line in told]
    assert losses[:3] == losses[3:]
    assert losses[2] < losses[0]


@pytest.mark.slow
def test_accuracy_prints_what_a_peer_loses_and_keeps_its_verdict(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "seed", "--seeds", "1", "--no-ours"]
    command += ["--peers", "ort-minmax-lean", "--calibration-images", "32"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path / "out.json")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "seed, 1 seed, 32 calibration images, 599 of scikit-learn's digits; fp32 top-1 9" in first.stdout
    assert re.search(r"^  ort-minmax-lean +9\d\.\d\d .* 4/4 .* yes$", first.stdout, re.M)
    [found] = json.loads((tmp_path / "out.json").read_bytes())
    assert found["lines"][0]["entries"][0]["verdict"]["sqnr"] > 30
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout == first.stdout
    assert again.stderr == ""  # neither trained nor quantized


def test_accuracy_refuses_networks_that_nobody_knows() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "sed"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "'sed' is not a known network" in result.stderr


@pytest.mark.slow
def test_calibration_cost_prints_seconds_memory_and_images_per_second(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "calibration_cost.py"), "--images", "1,4", "--size", "32"]
    command += ["--methods", "Percentile", "--no-ours", "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^  ort-Percentile ( +[\d.]+, \d+){2} +[\d.]+ +([\d.]+|–)$", result.stdout, re.M)
