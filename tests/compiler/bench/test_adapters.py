"""The real peers, where they are installed: a tiny network, in float32 or int8, on as many threads as they are told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.compiler.bench import executorch_int8, ort_int8, requantized
from cnncc.compiler.bench.conversion import convert_subjects
from cnncc.compiler.bench.referee import Referee
from cnncc.compiler.bench.report import BenchmarkReport
from cnncc.compiler.bench.runner import run_benchmark
from cnncc.compiler.bench.subjects import KINDS, Subject, find_kind, make_subjects, peers
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import read_onnx
from cnncc_runtime.errors import DependencyMissing, ModelRefused

FEEDS = {"image": np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)}
CLOSE = 1e-5
"""Relative; rounding and Winograd's method make less on two layers, half precision makes a hundred times more."""


class Tiny(torch.nn.Module):
    """A convolution, and a linear layer on its maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.linear = torch.nn.Linear(32 * 16 * 16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.max_pool2d(torch.relu(self.conv(image)), 2)
        return self.linear(torch.flatten(hidden, 1))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as a ``.pt2`` archive; beside it, as ``.onnx``."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    network = Tiny().eval()
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 32, 32),)), folder / "tiny.pt2")
    constants = [
        numpy_helper.from_array(parameter.detach().numpy(), name) for name, parameter in network.named_parameters()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "linear.weight", "linear.bias"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 10])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "tiny.onnx")
    return folder / "tiny.pt2"


def measured(against: list[str], program: Path, folder: Path) -> BenchmarkReport:
    """Convert and measure; peers that are not installed skip the test."""
    try:
        subjects = make_subjects(None, against, onnx=program.with_suffix(".onnx"), program=program)
    except DependencyMissing as exc:
        pytest.skip(f"not installed: {exc.message}")
    referee = Referee(lenient=False)
    return run_benchmark(
        convert_subjects(subjects, folder, referee), feeds=FEEDS, threads=1, rounds=3, min_time=0.02, referee=referee
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in peers() if name != "ort" and not KINDS[name].quantizes and not KINDS[name].gpu]
)
def test_a_peer_computes_what_onnx_runtime_computes_on_one_thread(name: str, program: Path, tmp_path: Path) -> None:
    report = measured(["ort", name], program, tmp_path)
    result = report.subject(name)
    assert result is not None
    assert result.agreement is not None and result.agreement < CLOSE
    assert result.cpu.mean < 1.3 * result.wall.mean, "it computed on more than one thread"
    assert result.version[0].isdigit()
    assert result.size > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peers() if KINDS[name].quantizes])
def test_a_peer_that_quantizes_says_so_and_computes_nearly_the_same(name: str, program: Path, tmp_path: Path) -> None:
    result = measured(["ort", name], program, tmp_path).subject(name)
    assert result is not None
    assert result.precision == "int8"
    assert result.agreement is not None and CLOSE < result.agreement < 0.05  # of the float model, on inputs it has seen
    assert result.size < 0.5 * program.stat().st_size, "its weights are not int8"


def layers_of_session(path: Path, folder: Path) -> Counter[str]:
    """Return the operators that ONNX Runtime computes once it has fused a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


@pytest.fixture(scope="module")
def quantized(program: Path) -> Path:
    """The network with Q/DQ, as cnncc quantizes it."""
    graph = read_onnx(program.with_suffix(".onnx"))
    named = graph.copy_proto()
    for node in named.graph.node:
        node.name = node.output[0]
    graph = OnnxGraph(named)
    plan = plan_for(graph, layers_of(graph))
    scales = {name: 0.05 for group in plan.groups for name in group.tensors}
    path = program.with_name("quantized.onnx")
    path.write_bytes(insert_qdq(graph, plan, scales).serialized)
    return path


def test_onnx_runtime_multiplies_int8_in_what_its_own_tool_quantized_and_floats_in_ours(
    quantized: Path, tmp_path: Path
) -> None:
    ours = layers_of_session(quantized, tmp_path)
    assert ours["QLinearConv"] + ours["QGemm"] == 0
    [subject] = convert_subjects(
        make_subjects(None, ["ort-int8"], onnx=quantized, quantized=True), tmp_path, Referee(lenient=False)
    )
    theirs = layers_of_session(subject.path, tmp_path)
    assert (theirs["QLinearConv"], theirs["QGemm"]) == (1, 1)
    assert [file.name for file in subject.path.parent.iterdir()] == ["int8.onnx"]


def test_what_a_library_quantized_wrongly_is_refused() -> None:
    right = [np.linspace(-1, 1, 9, dtype=np.float32)]
    requantized.check(right, [right[0] * np.float32(1.2)], "it")
    for factor in (-1, np.nan):
        with pytest.raises(ModelRefused, match="what it quantized lies"):
            requantized.check(right, [right[0] * np.float32(factor)], "it")


def test_executorch_quantizes_no_program_of_any_batch_size() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Tiny().eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    with pytest.raises(ModelRefused, match="wants one batch size"):
        executorch_int8.quantize(program)


@pytest.mark.parametrize(
    ("machine", "features", "saturates"),
    [("x86_64", {"avx2"}, True), ("x86_64", {"avx2", "avxvnni"}, False),
     ("x86_64", {"avx512f", "avx512bw"}, True), ("x86_64", {"avx512vnni"}, False), ("aarch64", {"neon"}, False)],
)  # fmt: skip
def test_ranges_are_reduced_where_sums_of_two_products_would_saturate(
    machine: str, features: set[str], saturates: bool
) -> None:
    assert ort_int8.saturates(machine, features) == saturates


def test_reduced_ranges_leave_weights_seven_bits(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_int8, "saturates", lambda *_: True)
    made = read_onnx(ort_int8.convert(quantized, tmp_path))
    weights = [numpy_helper.to_array(tensor) for tensor in made.constants.values()]
    largest = [np.abs(array.astype(int)).max() for array in weights if array.dtype == np.int8 and array.ndim > 1]
    assert len(largest) == 2
    assert all(60 <= step <= 64 for step in largest)


def test_openvino_multiplies_int8_in_a_model_with_q_dq(quantized: Path) -> None:
    try:
        find_kind("openvino")
    except DependencyMissing as exc:
        pytest.skip(f"not installed: {exc.message}")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cnncc.compiler.bench.adapters import OpenVinoAdapter\n"
        "adapter = OpenVinoAdapter({})\n"
        "adapter.load()\n"
        "adapter.open(Path(sys.argv[1]), 1)\n"
        "for node in adapter._request.get_compiled_model().get_runtime_model().get_ops():\n"
        "    print(*(node.get_rt_info()[key].astype(str) for key in ('layerType', 'runtimePrecision')))"
    )
    command = [sys.executable, "-c", script, str(quantized)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    layers = dict(line.split() for line in found if line.startswith(("Convolution", "FullyConnected")))
    assert layers.keys() == {"Convolution", "FullyConnected"}
    assert set(layers.values()) <= {"u8", "i8"}


@pytest.mark.parametrize("name", ["mnn", "ncnn"])
def test_what_cannot_be_converted_is_refused_with_the_converters_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"this is no model")
    try:
        subjects = make_subjects(None, [name], onnx=tmp_path / "bad.onnx")
    except DependencyMissing as exc:
        pytest.skip(f"not installed: {exc.message}")
    with pytest.raises(ModelRefused, match=name if name == "mnn" else "pnnx") as caught:
        convert_subjects(subjects, tmp_path, Referee(lenient=False))
    assert name in str(caught.value)


def test_openvino_reports_to_nobody() -> None:
    try:
        find_kind("openvino")
    except DependencyMissing as exc:
        pytest.skip(f"not installed: {exc.message}")
    script = (
        "import sys\n"
        "from cnncc.compiler.bench.adapters import OpenVinoAdapter\n"
        "OpenVinoAdapter({}).load()\n"
        "print(*[name for name in sys.modules if name.startswith('openvino_telemetry') and sys.modules[name]])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_peer_may_live_in_an_environment_of_its_own(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python finds our packages, and imports nothing else of our environment through them."""
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexport SEEN="$PYTHONPATH"\nexec "{sys.executable}" "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CNNCC_BENCH_PYTHON_ORT", os.path.relpath(other))
    assert KINDS["ort"].python == str(Path.cwd() / os.path.relpath(other))
    report = measured(["ort"], program, tmp_path)
    assert [result.name for result in report.subjects] == ["ort"]


def test_an_environment_without_the_peer_says_that_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    empty.chmod(0o755)
    monkeypatch.setenv("CNNCC_BENCH_PYTHON_OPENVINO", str(empty))
    with pytest.raises(DependencyMissing, match="OpenVINO is not installed"):
        find_kind("openvino")


def test_subjects_that_read_the_model_itself_are_not_converted(program: Path, tmp_path: Path) -> None:
    subject = Subject("ort", "ort", program.with_suffix(".onnx"))
    assert convert_subjects([subject], tmp_path, Referee(lenient=False)) == (subject,)
    assert list(tmp_path.iterdir()) == []
