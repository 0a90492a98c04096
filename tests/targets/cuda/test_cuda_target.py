"""The cuda target in its build-only form: TensorRT-RTX builds here, and no test needs a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from cnncc.compiler.build_worker import build_apart
from cnncc.targets.base import BuildOptions, Engine, GpuOptions, Profile, Target
from cnncc.targets.cuda import target as cuda
from cnncc.targets.cuda.target import CudaTarget
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.errors import BuildFailed, TargetUnavailable, UnsupportedGraph, UsageError
from tests.calibration import patterns
from tests.calibration.rtx import tensorrt_rtx
from tests.targets.conformance import BuildConformance, graph_of, small_graph

SM89 = resolve_profile("rtx4090")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build as on a machine without a GPU, whatever is here."""
    tensorrt_rtx()
    monkeypatch.setattr(cuda, "host_gpus", lambda: ())


class TestCudaTarget(BuildConformance):
    unsupported = ("NonZero", "Bernoulli")

    @pytest.fixture
    def target(self) -> Target:
        return CudaTarget(SM89)


@pytest.mark.parametrize("device", ["sm80", "sm86", "sm89", "sm120", "sm121"])
def test_each_capability_is_what_the_plan_is_for(device: str, tmp_path: Path) -> None:
    profile = resolve_profile(device)
    engine = CudaTarget(profile).build(small_graph(), BuildOptions(profile), tmp_path)
    plan = engine.payload.read_bytes()
    assert set(re.findall(rb"accelerators=\{(sm\w+) \}", plan)) == {device.encode()}
    assert (engine.target.gpu, engine.target.processor) == (profile.gpu, device)
    assert engine.record.file == "engine.plan"
    assert engine.record.format == "tensorrt-rtx"
    assert engine.record.abi.startswith("tensorrt-rtx 1.")
    assert engine.layers[0].precision == "float32", "no TF32"
    assert set(re.findall(rb"\n  tf32=(\d)\n", plan)) == {b"0"}


def test_one_profile_holds_all_batch_sizes_and_one_copy_of_the_weights(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((256, 1024), np.float32), "w")
    graph = graph_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")], {"x": ["N", 256]}, {"y": ["N", 1024]}, [weights]
    )
    engine = CudaTarget(SM89).build(graph, BuildOptions(SM89, (8, 1, 32)), tmp_path)
    assert engine.record.entries == {8: "profile 0", 1: "profile 0", 32: "profile 0"}
    assert engine.payload.stat().st_size < 2 * 4 * 256 * 1024


def test_level_and_workspace_reach_the_builder(tmp_path: Path) -> None:
    def build(**options: int) -> Engine:
        return CudaTarget(SM89).build(small_graph(), BuildOptions(SM89, gpu=GpuOptions(**options)), tmp_path)  # type: ignore[arg-type]

    assert build(level=0, workspace=64).layers
    with pytest.raises(BuildFailed, match="no tactics to implement the operation within workspace limit"):
        build(workspace=1)


def test_what_the_builder_refuses_names_modules(tmp_path: Path) -> None:
    profile = resolve_profile("sm75")
    with pytest.raises(BuildFailed, match=r"FP32 GEMM is not supported") as caught:
        CudaTarget(profile).build(small_graph(), BuildOptions(profile), tmp_path)
    assert caught.value.where == ("classifier (Gemm 'classifier')",)


def test_refused_nodes_are_named_by_module_with_the_parsers_words(tmp_path: Path) -> None:
    """A parser stops at its first refusal; here it is asked again for the rest."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"], "first"),
        helper.make_node("Relu", ["x"], ["r"], "fine"),
        helper.make_node("Gelu", ["r"], ["g"], "fifth"),
        helper.make_node("LpPool", ["x4"], ["l"], "sixth", kernel_shape=[2, 2], p=3),
        helper.make_node("Bernoulli", ["g"], ["b"], "third"),
        helper.make_node("Abs", ["b"], ["y"], "after"),
    ]
    graph = graph_of(nodes, {"x": [2, 3], "x4": [1, 2, 4, 4]}, {"i": (7, [2, None]), "y": [2, 3], "l": [1, 2, 3, 3]})
    issues = {issue.node: issue for issue in CudaTarget(SM89).unsupported(graph)}
    assert {"first", "third"} <= set(issues)
    assert not {"fine", "after"} & set(issues)
    assert "Assertion" not in str(issues["first"])
    assert "has no operator Bernoulli" in str(issues["third"])
    with pytest.raises(UnsupportedGraph, match=r"TensorRT-RTX 1\.[\d.]+ cannot build \d nodes"):
        CudaTarget(SM89).build(graph, BuildOptions(SM89), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_that_a_listing_cannot_hold_come_back(tmp_path: Path) -> None:
    names = ['conv "one"[0]', "größe\x1f]", "a\\b"]
    graph = graph_of(
        [helper.make_node("Relu", ["x"], ["a"], names[0]),
         helper.make_node("MaxPool", ["a"], ["b"], names[1], kernel_shape=[2, 2]),
         helper.make_node("GlobalAveragePool", ["b"], ["y"], names[2])],
        {"x": [1, 2, 8, 8]}, {"y": [1, 2, 1, 1]},
    )  # fmt: skip
    engine = CudaTarget(SM89).build(graph, BuildOptions(SM89), tmp_path)
    assert {node for layer in engine.layers for node in layer.nodes} == set(names)


class Stopped(Exception):
    pass


def test_what_progress_raises_stops_the_build(tmp_path: Path) -> None:
    told: list[str] = []

    def progress(what: str, _fraction: float) -> None:
        told.append(what)
        if what.startswith("build"):
            raise Stopped

    with pytest.raises(Stopped):
        CudaTarget(SM89).build(small_graph(), BuildOptions(SM89, progress=progress), tmp_path)
    assert len([what for what in told if what.startswith("build")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_parser_that_crashes_is_an_error_of_ours(tmp_path: Path) -> None:
    """The Q/DQ lint refuses such a graph before; a plain build does not."""
    [pattern] = [pattern for pattern in patterns.PATTERNS if pattern.rtx == "crash"]
    path = tmp_path / "m.onnx"
    path.write_bytes(pattern.graph().serialized)
    with pytest.raises(BuildFailed, match="the cuda compiler was killed by SIGSEGV"):
        build_apart("cuda", path, BuildOptions(SM89), tmp_path)


def test_builds_in_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(small_graph().serialized)
    plans = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        engine = build_apart("cuda", path, BuildOptions(SM89), folder)
        assert engine.reproducible
        plans.append(engine.payload.read_bytes())
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("profile", "backend", "kind", "said"),
    [
        (resolve_profile("host"), "auto", TargetUnavailable, "this machine has no NVIDIA GPU"),
        (Profile("x86_64/znver3", "x86_64-linux-gnu", "znver3"), "auto", UsageError, "is a CPU"),
        (SM89, "tensorflow", UsageError, "unknown backend"),
        (resolve_profile("jetson-orin"), "tensorrt-rtx", UsageError, "jetson-orin has 8.7"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_before_any_work(
    profile: Profile, backend: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        CudaTarget(profile).preflight(BuildOptions(profile, gpu=GpuOptions(backend)))


def test_the_target_imports_no_library_until_it_builds() -> None:
    code = (
        "import sys; from cnncc.targets.cuda.target import CudaTarget; "
        "from cnncc.targets.devices import resolve_profile; CudaTarget(resolve_profile('sm89')).toolchain(); "
        "assert not {'tensorrt', 'tensorrt_rtx', 'tvm', 'torch', 'onnx'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
