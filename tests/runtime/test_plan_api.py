"""Whether the libraries that open plans, and the driver's bindings, have all that the runtime uses of them."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.calibration.rtx import tensorrt_rtx
from tests.conftest import ROOT
from tests.targets.cuda.bindings import api_of, describe
from tests.targets.cuda.test_api_truth import check

SOURCE = ROOT / "runtime" / "cnncc_runtime"

SHARED: dict[str, dict[str, str | None]] = {
    "ICudaEngine": {
        "get_tensor_dtype": "name",
        "get_tensor_location": "name",
        "get_tensor_mode": "name",
        "get_tensor_name": "index",
        "num_io_tensors": None,
    },
    "IExecutionContext": {
        "execute_async_v3": "stream_handle",
        "get_tensor_shape": "name",
        "profiler": None,
        "set_input_shape": "name, shape",
        "set_tensor_address": "name, memory",
    },
    "ILogger": {"ERROR": None, "INTERNAL_ERROR": None, "WARNING": None, "log": "severity, msg"},
    "IProfiler": {"report_layer_time": "layer_name, ms"},
    "Refitter": {
        "__init__": "engine, logger",
        "get_all_weights": "",
        "get_weights_prototype": "weights_name",
        "refit_cuda_engine": "",
        "set_named_weights": "name, weights",
    },
    "Runtime": {
        "DLA_core": None,
        "__init__": "logger",
        "deserialize_cuda_engine": "serialized_engine",
        "engine_host_code_allowed": None,
    },
    "TensorIOMode": {"INPUT": None},
    "TensorLocation": {"DEVICE": None},
    "Weights": {"dtype": None, "nbytes": None, "size": None},
}
"""Class → member → parameters; None for what is no function."""

TENSORRT_ONLY: dict[str, dict[str, str | None]] = {"ICudaEngine": {"create_execution_context": None}}

RTX_ONLY: dict[str, dict[str, str | None]] = {
    "CudaGraphStrategy": {"WHOLE_GRAPH_CAPTURE": None},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER": None},
    "ICudaEngine": {"create_execution_context": None, "create_runtime_config": ""},
    "IRuntimeCache": {"deserialize": "blob", "serialize": ""},
    "IRuntimeConfig": {
        "create_runtime_cache": "",
        "cuda_graph_strategy": None,
        "dynamic_shapes_kernel_specialization_strategy": None,
        "set_runtime_cache": "cache",
    },
}

OWNERS = {
    "_engine": "ICudaEngine", "engine": "ICudaEngine", "_context": "IExecutionContext", "context": "IExecutionContext",
    "_runtime": "Runtime", "_compiled": "IRuntimeCache", "config": "IRuntimeConfig",
    "refitter": "Refitter", "wanted": "Weights",
}  # fmt: skip
"""Names that `plan.py` gives what it has of the library → their classes."""


@pytest.mark.parametrize("major", [10, 11])
@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_lean"])
def test_tensorrt_opens_plans_by_these_calls(module: str, major: int, tmp_path: Path) -> None:
    api = api_of(major, tmp_path, module=module)
    check(api, SHARED)
    check(api, TENSORRT_ONLY)


def test_tensorrt_rtx_opens_plans_by_these_calls() -> None:
    api = describe(tensorrt_rtx())
    check(api, SHARED)
    check(api, RTX_ONLY)


def test_the_tables_above_list_all_that_the_source_names() -> None:
    known = {kind: SHARED.get(kind, {}) | RTX_ONLY.get(kind, {}) for kind in (*SHARED, *RTX_ONLY)}
    found = set()
    for path in (SOURCE / "plan.py", SOURCE / "plan_library.py", SOURCE / "plan_weights.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            first, _, last = ast.unparse(owner).rpartition(".")
            kind = last if first == "trt" else OWNERS.get(last, "") if first in ("", "self") else ""
            if (kind and path.name != "plan_library.py") or first == "trt":
                assert node.attr in known[kind], f"{path.name}: {kind}.{node.attr}"
                found.add(kind)
    assert found == set(known) - {"IProfiler"}


def test_the_drivers_bindings_have_what_is_used() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    source = (SOURCE / "cuda_device.py").read_text(encoding="utf-8")
    called = set(re.findall(r"river\.(cu[A-Z]\w+)", source))
    assert len(called) > 25
    for name in called:
        assert hasattr(driver, name), name
    arguments = {
        "cuGraphInstantiate": "hGraph, unsigned long long flags",  # four in CUDA 11
        "cuStreamBeginCapture": "hStream, mode: CUstreamCaptureMode",
        "cuMemcpyDtoHAsync": "dstHost, srcDevice, size_t ByteCount, hStream",
        "cuMemcpyHtoDAsync": "dstDevice, srcHost, size_t ByteCount, hStream",
        "cuDevicePrimaryCtxRelease": "dev",
        "cuEventElapsedTime": "hStart, hEnd",
    }
    for name, expected in arguments.items():
        assert getattr(driver, name).__doc__.startswith(f"{name}({expected})"), name
    for member in ("CUresult", "CUstreamCaptureMode"):
        assert getattr(driver, member)
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert importlib.import_module("cuda.bindings").__version__.split(".")[0] in ("12", "13")
