"""Whether TensorRT 10, TensorRT 11 and TensorRT-RTX have all that the cuda target uses of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.calibration.rtx import tensorrt_rtx
from tests.conftest import ROOT
from tests.targets.cuda.bindings import api_of, describe

SOURCE = ROOT / "cnncc" / "targets" / "cuda"

SHARED: dict[str, dict[str, str | None]] = {
    "Builder": {
        "__init__": "logger",
        "create_network": "flags",
        "create_builder_config": "",
        "create_optimization_profile": "",
        "build_serialized_network": "network, config",
        "num_DLA_cores": None,
    },
    "BuilderFlag": {
        "GPU_FALLBACK": None,
        "REFIT": None,
        "REFIT_IDENTICAL": None,
        "SPARSE_WEIGHTS": None,
        "STRIP_PLAN": None,
        "TF32": None,
        "VERSION_COMPATIBLE": None,
    },
    "DeviceType": {"DLA": None},
    "HardwareCompatibilityLevel": {"AMPERE_PLUS": None, "SAME_COMPUTE_CAPABILITY": None},
    "IBuilderConfig": {
        "DLA_core": None,
        "add_optimization_profile": "profile",
        "builder_optimization_level": None,
        "can_run_on_DLA": "layer",
        "clear_flag": "flag",
        "create_timing_cache": "serialized_timing_cache",
        "default_device_type": None,
        "get_timing_cache": "",
        "hardware_compatibility_level": None,
        "profiling_verbosity": None,
        "progress_monitor": None,
        "set_flag": "flag",
        "set_memory_pool_limit": "pool, pool_size",
        "set_timing_cache": "cache, ignore_mismatch",
    },
    "EngineInspector": {"execution_context": None, "get_engine_information": "format"},
    "ICudaEngine": {
        "create_engine_inspector": "",
        "create_execution_context": "strategy",
        "get_tensor_mode": "name",
        "get_tensor_name": "index",
        "get_tensor_profile_shape": "name, profile_index",
        "get_tensor_shape": "name",
        "num_io_tensors": None,
    },
    "IExecutionContext": {"set_input_shape": "name, shape"},
    "ILayer": {"metadata": None, "name": None, "type": None},
    "ILogger": {"ERROR": None, "INTERNAL_ERROR": None, "WARNING": None, "log": "severity, msg"},
    "INetworkDefinition": {"get_input": "index", "get_layer": "index", "num_inputs": None, "num_layers": None},
    "IOptimizationProfile": {"set_shape": "input, min, opt, max"},
    "IProgressMonitor": {
        "phase_start": "phase_name, parent_phase, num_steps",
        "phase_finish": "phase_name",
        "step_complete": "phase_name, step",
    },
    "ITensor": {"name": None, "shape": None},
    "LayerInformationFormat": {"JSON": None},
    "ITimingCache": {"serialize": ""},
    "LayerType": {"CONSTANT": None},
    "MemoryPoolType": {"WORKSPACE": None},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": None},
    "OnnxParser": {
        "__init__": "network, logger",
        "get_error": "index",
        "num_errors": None,
        "parse": "model, path",
        "supports_operator": "op_name",
    },
    "ParserError": {"desc": "", "node": "", "node_name": ""},
    "ProfilingVerbosity": {"DETAILED": None},
    "TensorIOMode": {"INPUT": None},
    "Refitter": {"__init__": "engine, logger", "get_all_weights": ""},
    "Runtime": {"__init__": "logger", "deserialize_cuda_engine": None, "engine_host_code_allowed": None},
}
"""Class → member → parameters; None for what is no function."""

RTX_ONLY: dict[str, dict[str, str | None]] = {
    "ComputeCapability": {
        "CURRENT": None,
        "SM75": None,
        "SM80": None,
        "SM86": None,
        "SM89": None,
        "SM120": None,
        "SM121": None,
    },
    "IBuilderConfig": {"num_compute_capabilities": None, "set_compute_capability": "compute_capability, index"},
}


def check(api: dict[str, dict[str, str | None]], expected: dict[str, dict[str, str | None]]) -> None:
    for kind, members in expected.items():
        for member, parameters in members.items():
            assert member in api.get(kind, {}), f"{kind}.{member} is missing"
            if parameters is not None:
                assert api[kind][member] == parameters, f"{kind}.{member}"


@pytest.mark.parametrize("major", [10, 11])
def test_tensorrt_has_what_is_used(major: int, tmp_path: Path) -> None:
    api = api_of(major, tmp_path)
    check(api, SHARED)
    assert "ComputeCapability" not in api, "it might build for other GPUs now: see cnncc.targets.cuda.vendors"


def test_tensorrt_rtx_has_what_is_used() -> None:
    api = describe(tensorrt_rtx())
    check(api, SHARED)
    check(api, RTX_ONLY)
    known = {name for name in api["ComputeCapability"] if re.fullmatch(r"SM\d+", name)}
    assert known == set(RTX_ONLY["ComputeCapability"]) - {"CURRENT"}, (
        "the table of vendors must list what the library builds for"
    )


def test_the_table_above_lists_all_that_the_source_names() -> None:
    known = {kind: SHARED.get(kind, {}) | RTX_ONLY.get(kind, {}) for kind in (*SHARED, *RTX_ONLY)}
    members = {member for table in known.values() for member in table}
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
                assert node.attr in known[owner.attr], f"{path.name}: trt.{owner.attr}.{node.attr}"
            if isinstance(owner, ast.Name) and owner.id in (
                "config",
                "builder",
                "runtime",
                "engine",
                "context",
                "inspector",
                "network",
                "parser",
                "tensor",
                "error",
                "layer",
                "cache",
            ):
                assert node.attr in members or owner.id == "error", f"{path.name}: {owner.id}.{node.attr}"
