"""Options from end to end. Where only TensorRT heeds them, TensorRT-RTX stands in its place: it has the same API."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from cnncc.compiler import build_worker
from cnncc.compiler.build_worker import build_apart, engine_from_plain, engine_to_plain
from cnncc.compiler.export import export
from cnncc.compiler.ingest import Model
from cnncc.compiler.passes.pipeline import clean
from cnncc.compiler.proof import gpu_options
from cnncc.compression.sparsity import apply_masks, two_of_four
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions, Engine, GpuOptions
from cnncc.targets.cuda import compile as compiling
from cnncc.targets.cuda import target as cuda
from cnncc.targets.cuda import timing_cache
from cnncc.targets.cuda.compile import compile_graph
from cnncc.targets.cuda.target import CudaTarget
from cnncc.targets.cuda.timing_cache import ASIDE
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc.targets.cuda.weights import check_weights
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.bundle import EngineRecord, TargetRecord
from cnncc_runtime.errors import BuildFailed, UsageError
from cnncc_runtime.gpu import HostGpu, host_gpus
from cnncc_runtime.plan_library import logger_of
from cnncc_runtime.specs import TensorSpec
from tests.calibration.rtx import VERSION, tensorrt_rtx
from tests.cli.conftest import install_target
from tests.compression.blocks import Residual
from tests.compression.blocks import build as network_of
from tests.runtime.engine_files import manifest
from tests.targets.conformance import graph_of, small_graph

SM89 = resolve_profile("sm89")
GPU = HostGpu("NVIDIA L4", "8.9")

pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TensorRT-RTX be TensorRT 10 on a machine with a GPU."""
    trt = tensorrt_rtx()
    monkeypatch.setattr(cuda, "installed", lambda: {"tensorrt": "10.16.1.11"})
    monkeypatch.setattr(compiling, "load", lambda _vendor: trt)
    for module in (cuda, timing_cache):
        monkeypatch.setattr(module, "host_gpus", lambda: (GPU,))


def build(graph: OnnxGraph, folder: Path, *, options: dict[str, Any] | None = None, **asked: Any) -> Engine:
    return CudaTarget(SM89).build(graph, BuildOptions(SM89, gpu=GpuOptions(**asked), **(options or {})), folder)


def sparse_graph() -> OnnxGraph:
    weights = np.ones((8, 16, 1, 1), np.float32)
    weights[:, ::4] = weights[:, 1::4] = 0
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    return graph_of([node], {"x": [1, 16, 4, 4]}, {"y": [1, 8, 4, 4]}, [numpy_helper.from_array(weights, "w")])


@pytest.mark.usefixtures("tensorrt")
def test_the_record_says_which_newer_gpus_run_an_engine(tmp_path: Path) -> None:
    plain = build(small_graph(), tmp_path)
    assert (plain.target.gpu, plain.target.processor) == ("8.9", "sm89")
    same = build(small_graph(), tmp_path, hardware="same")
    assert same.target.gpu == "8.9"
    newer = build(small_graph(), tmp_path, hardware="ampere+")
    assert (newer.target.gpu, newer.target.processor) == ("8.0+", "sm80+")
    assert newer.record.abi.startswith("tensorrt 1.7") and not newer.record.abi.endswith("+")
    assert engine_from_plain(engine_to_plain(newer), tmp_path) == newer


def test_an_engine_is_built_again_as_it_was(tmp_path: Path) -> None:
    """`cnncc verify --layers` builds parts of the graph, with the same library, on the same part of the device."""
    target = TargetRecord("cuda", "jetson-orin", "", "", "aarch64", (), "8.7")
    record = EngineRecord("engine.plan", "tensorrt", "tensorrt 10.3.0.30", {0: "profile 0"}, dla=1)
    again = gpu_options(manifest(target=target, engine=record))
    assert again == GpuOptions("tensorrt", dla=1, gpu_fallback=True), "a part may hold what DLA cannot run"
    assert gpu_options(manifest(target=target, engine=replace(record, dla=None))) == GpuOptions("tensorrt")
    assert gpu_options(manifest()) == GpuOptions()


@pytest.mark.usefixtures("tensorrt")
def test_a_flag_that_the_library_fails_with_is_a_failed_build(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="libnvinfer_lean"):
        build(small_graph(), tmp_path, version_compatible=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tensorrt")
def test_sparsity_is_counted_and_refused_where_there_is_none(tmp_path: Path) -> None:
    notes: list[str] = []
    build(sparse_graph(), tmp_path, options={"note": notes.append}, sparse=True)
    assert notes == ["1 of 1 convolutions and products have 2:4 sparse weights"]
    with pytest.raises(UsageError, match="no layer of 3 has 2:4 sparse weights"):
        build(small_graph(), tmp_path, sparse=True)


@pytest.mark.usefixtures("tensorrt")
def test_a_module_that_was_pruned_2_4_builds_with_the_sparse_flag(tmp_path: Path) -> None:
    """BatchNorm is folded into its weights by then: channels of outputs are scaled, and zeros stay."""
    module = network_of(Residual)
    masks, dense = two_of_four(module)
    apply_masks(module, masks)
    graph, _ = clean(export(Model("net", "net", (TensorSpec("x", (1, 3, 16, 16)),), "", module=module)).graph)
    notes: list[str] = []
    engine = build(graph, tmp_path, options={"note": notes.append}, sparse=True)
    assert dense == ("stem.0",), "of three input channels"
    assert notes == [f"{len(masks)} of {len(masks) + 1} convolutions and products have 2:4 sparse weights"]
    assert (tmp_path / engine.record.file).stat().st_size


@pytest.mark.parametrize("asked", [{"sparse": True}, {"hardware": "ampere+"}, {"hardware": "same"}])
def test_what_tensorrt_rtx_is_refused_changes_nothing_there(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Where one of these changes the engine one day, it need not be refused."""
    tensorrt_rtx()
    rtx = Chosen(VENDORS[-1], VERSION)
    plans = []
    for number, each in enumerate(({}, asked)):
        plan = tmp_path / f"{number}.plan"
        compile_graph(sparse_graph(), (), "8.9", rtx, BuildOptions(SM89, gpu=GpuOptions(**each)), plan)
        plans.append(plan.read_bytes())
    assert plans[0] == plans[1]


@pytest.mark.usefixtures("tensorrt")
def test_times_of_kernels_outlive_a_build(tmp_path: Path) -> None:
    notes: list[str] = []
    options = {"timings": tmp_path / "timings", "note": notes.append}
    build(small_graph(), tmp_path, options=options)
    [file] = (tmp_path / "timings").iterdir()
    assert file.name == "tensorrt-1.7.1.116-NVIDIA_L4-8.9.timings", "of the library, by its own word"
    build(small_graph(), tmp_path, options=options)
    assert notes == []
    file.write_bytes(file.read_bytes()[:-1])
    build(small_graph(), tmp_path, options=options)
    assert len(notes) == 1 and "is damaged" in notes[0]
    assert {path.name for path in file.parent.iterdir()} == {file.name, file.name + ASIDE}


def test_tensorrt_rtx_keeps_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx()
    monkeypatch.setattr(cuda, "host_gpus", lambda: ())
    build(small_graph(), tmp_path, options={"timings": tmp_path / "timings"})
    assert not (tmp_path / "timings").exists()


def test_a_builder_that_does_not_heed_its_budget_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx()
    monkeypatch.setattr(build_worker, "_GRACE", 0.0)
    (tmp_path / "m.onnx").write_bytes(small_graph().serialized)
    told: list[str] = []
    options = BuildOptions(SM89, gpu=GpuOptions(budget=0.01), progress=lambda what, _fraction: told.append(what))
    with pytest.raises(BuildFailed, match=r"did not finish within 0\.01 s \(--build-budget\)"):
        build_apart("cuda", tmp_path / "m.onnx", options, tmp_path)
    assert told == [], "the library did not even begin"


TELLING_TARGET = """
from dataclasses import dataclass

from cnncc.targets.base import BuildOptions, Profile
from cnncc_runtime.errors import BuildFailed


@dataclass(frozen=True)
class Telling:
    profile: Profile
    name: str = "telling"

    def build(self, graph, options, workdir):
        options.note(f"times of kernels go to {options.timings}")
        raise BuildFailed(f"asked for {options.gpu}")
"""


def test_options_reach_the_process_that_builds_and_its_notes_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_target(tmp_path / "site", "telling", TELLING_TARGET, "Telling")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    (tmp_path / "m.onnx").write_bytes(small_graph().serialized)
    notes: list[str] = []
    asked = GpuOptions(
        "tensorrt", 4, 64, 600.0, version_compatible=True, hardware="same", refittable=True, strip_weights=True,
        sparse=True, dla=0, gpu_fallback=True,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)  # the child works elsewhere
    options = BuildOptions(SM89, gpu=asked, timings=Path("timings"), note=notes.append)
    with pytest.raises(BuildFailed) as caught:
        build_apart("telling", tmp_path / "m.onnx", options, tmp_path)
    assert str(caught.value) == f"asked for {asked}"
    assert notes == [f"times of kernels go to {tmp_path / 'timings'}"]


def test_a_stripped_engine_that_cannot_be_loaded_here_is_told(tmp_path: Path) -> None:
    """Without a GPU no engine is: what it asks for is not known."""
    trt = tensorrt_rtx()
    if host_gpus():
        pytest.skip("about machines without a GPU")
    graph, notes = small_graph(), list[str]()
    plan = tmp_path / "e.plan"
    compile_graph(graph, (), "8.9", Chosen(VENDORS[-1], VERSION), BuildOptions(SM89), plan)
    check_weights(graph, trt, logger_of(trt), plan.read_bytes(), notes.append)
    assert notes == [
        "this machine cannot load the stripped engine: whether all its weights lie beside it shows on the device"
    ]
