"""What a builder is told. TensorRT itself is not here; TensorRT-RTX has the same configuration, and says what it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cnncc.targets.base import BuildOptions, GpuOptions
from cnncc.targets.cuda.config import configure, hardware_level
from cnncc.targets.cuda.dla import check_dla, refused_by_dla
from cnncc.targets.cuda.parse import Parsed, parse
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.errors import TargetUnavailable, UsageError
from tests.calibration import patterns
from tests.calibration.rtx import tensorrt_rtx
from tests.targets.conformance import small_graph

TRT10 = Chosen(VENDORS[0], "10.16.1.11")
SM80 = resolve_profile("sm80")


def configured(trt: Any = None, parsed: Parsed | None = None, **asked: Any) -> Any:
    trt = trt or tensorrt_rtx()
    parsed = parsed or parse(small_graph(), trt, TRT10)
    return configure(parsed, trt, (), "8.0", TRT10, BuildOptions(SM80, gpu=GpuOptions(**asked)))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, set()),
        ({"version_compatible": True}, {"VERSION_COMPATIBLE"}),
        ({"sparse": True}, {"SPARSE_WEIGHTS"}),
        ({"refittable": True}, {"REFIT"}),
        ({"strip_weights": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"strip_weights": True, "refittable": True}, {"STRIP_PLAN", "REFIT"}),
        ({"dla": 1}, set()),
        ({"dla": 0, "gpu_fallback": True}, {"GPU_FALLBACK"}),
    ],
)
def test_each_option_sets_its_flags_and_no_others(asked: dict[str, Any], expected: set[str]) -> None:
    trt = tensorrt_rtx()
    config = configured(**asked)
    found = {name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)}
    assert found == expected, "TF32 is off, too"


def test_levels_of_hardware_compatibility_have_names_of_the_library() -> None:
    """TensorRT-RTX has the names, and its configuration stays at none whatever it is told."""
    trt = tensorrt_rtx()
    levels = trt.HardwareCompatibilityLevel
    assert hardware_level("ampere+", trt, TRT10) == levels.AMPERE_PLUS
    assert hardware_level("same", trt, TRT10) == levels.SAME_COMPUTE_CAPABILITY
    assert configured(hardware="ampere+").hardware_compatibility_level == levels.NONE


def test_dla_is_the_default_device_where_it_is_asked_for() -> None:
    trt = tensorrt_rtx()  # it says -1 for any core: it has none
    assert configured(dla=0).default_device_type == trt.DeviceType.DLA
    assert configured().default_device_type == trt.DeviceType.GPU


def test_what_a_version_lacks_is_refused() -> None:
    old = SimpleNamespace(HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS=1))
    with pytest.raises(TargetUnavailable, match=r"TensorRT 10\.16\.1\.11 has no --hardware-compatible same"):
        hardware_level("same", old, TRT10)


def test_what_dla_cannot_run_is_listed_by_module() -> None:
    """Here is no DLA, so that is everything that computes: TensorRT-RTX says so, layer by layer."""
    trt, graph = tensorrt_rtx(), small_graph()
    parsed = parse(graph, trt, TRT10)
    issues = refused_by_dla(graph, parsed, trt, configured(trt, parsed, dla=0))
    assert {issue.node for issue in issues} <= {node.name for node in graph.nodes}
    assert "classifier" in {issue.module for issue in issues}
    assert all(issue.op and issue.reason for issue in issues)


def test_dla_asks_for_a_narrow_graph_and_a_core() -> None:
    trt = tensorrt_rtx()
    asked = GpuOptions(dla=0)
    wide = small_graph()
    parsed = parse(wide, trt, TRT10)
    with pytest.raises(UsageError, match="this graph has neither"):
        check_dla(wide, parsed, trt, configured(trt, parsed, dla=0), asked)
    narrow = next(pattern.graph() for pattern in patterns.PATTERNS if pattern.rtx == "int8")
    parsed = parse(narrow, trt, TRT10)
    with pytest.raises(TargetUnavailable, match="there is no DLA core 0 here: 0 cores"):
        check_dla(narrow, parsed, trt, configured(trt, parsed, dla=0), asked)
