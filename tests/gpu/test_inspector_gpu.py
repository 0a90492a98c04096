"""What the installed library's own inspector says of a plan, on the GPU that the plan is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cnncc.compiler.audit import audit, executed
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import name_nodes, with_shapes
from cnncc.targets.base import BuildOptions, GpuOptions
from cnncc.targets.cuda.inspector import inspect, inspected
from cnncc.targets.cuda.target import CudaTarget
from cnncc.targets.cuda.vendors import installed, load, vendor_of
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.gpu import host_gpus
from cnncc_runtime.plan_library import RTX, TENSORRT
from tests.calibration import patterns
from tests.targets.conformance import small_graph

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


def described(graph: OnnxGraph, backend: str, folder: Path) -> str:
    """Build a plan for this machine's GPU and return what the inspector says of it."""
    found = installed()
    vendor = vendor_of(backend, found.get(backend, ""))
    if vendor is None or (vendor.portable and host_gpus()[0].capability not in vendor.capabilities):
        pytest.skip(f"{backend} does not build for this GPU, or is not installed")
    profile = resolve_profile("host")
    options = BuildOptions(profile, gpu=GpuOptions(backend=backend))
    engine = CudaTarget(profile).build(graph, options, folder)
    trt: Any = load(vendor)
    return inspect(trt, engine.payload.read_bytes())


@pytest.mark.parametrize("backend", [TENSORRT, RTX])
def test_every_product_of_a_float_model_is_named_and_none_is_int8(backend: str, tmp_path: Path) -> None:
    graph = small_graph()
    found = executed(inspected(graph, described(graph, backend, tmp_path), {}))
    assert found.keys() == {"conv1", "conv2", "classifier"}
    assert set(found.values()) <= {"float32", "unknown"}


@pytest.mark.parametrize("pattern", patterns.CLEAN[:4], ids=lambda pattern: pattern.name)
def test_what_tensorrt_quantizes_is_int8_by_its_inspector(pattern: patterns.Pattern, tmp_path: Path) -> None:
    proto = pattern.graph().copy_proto()
    name_nodes(proto.graph)
    graph = with_shapes(OnnxGraph(proto))
    records = inspected(graph, described(graph, TENSORRT, tmp_path), {})
    assert audit(graph, records).fallbacks == ()
