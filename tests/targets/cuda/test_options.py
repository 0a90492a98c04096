"""What is refused before any work: options that contradict each other, the device, or the library."""

from __future__ import annotations

from typing import Any

import pytest

from cnncc.targets.base import BuildOptions, GpuOptions
from cnncc.targets.cuda.options import check_options
from cnncc.targets.cuda.vendors import Chosen, vendor_of
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.errors import CnnccError, TargetUnavailable, UsageError

VERSIONS = {"10": ("tensorrt", "10.16.1.11"), "11": ("tensorrt", "11.4.0.106"), "rtx": ("tensorrt-rtx", "1.7.1.116")}


def check(version: str, device: str, here: list[str], batches: tuple[int, ...] = (), **asked: Any) -> None:
    backend, number = VERSIONS[version]
    vendor = vendor_of(backend, number)
    assert vendor is not None
    profile = resolve_profile(device)
    check_options(BuildOptions(profile, batches, gpu=GpuOptions(**asked)), Chosen(vendor, number), profile, here)


@pytest.mark.parametrize(
    ("version", "device", "asked"),
    [
        ("10", "a100", {"version_compatible": True, "hardware": "ampere+", "sparse": True}),
        ("11", "a100", {"version_compatible": True, "hardware": "ampere+", "sparse": True}),
        ("11", "t4", {"hardware": "same"}),
        ("10", "jetson-orin", {"dla": 1, "gpu_fallback": True, "version_compatible": True}),
        ("10", "a100", {"refittable": True, "strip_weights": True, "budget": 1.0}),
        ("rtx", "a100", {"refittable": True, "strip_weights": True, "budget": 1.0, "level": 5, "workspace": 64}),
    ],
)  # fmt: skip
def test_what_a_library_heeds_is_taken(version: str, device: str, asked: dict[str, Any]) -> None:
    check(version, device, ["8.0"], **asked)


@pytest.mark.parametrize(
    ("version", "device", "asked", "kind", "said"),
    [
        ("rtx", "a100", {"version_compatible": True}, UsageError, "has no lean runtime"),
        ("rtx", "a100", {"hardware": "same"}, UsageError, "--hardware-compatible changes nothing"),
        ("rtx", "a100", {"sparse": True}, UsageError, "the same engine with --sparse and without"),
        ("rtx", "a100", {"strip_weights": True}, TargetUnavailable, "this machine has no NVIDIA GPU"),
        ("rtx", "a100", {"refittable": True}, TargetUnavailable, "leave --refittable and --strip-weights out"),
        ("rtx", "jetson-orin", {"dla": 0}, UsageError, "TensorRT-RTX 1.7.1.116 does not build for DLA"),
        ("11", "jetson-orin", {"dla": 0}, UsageError, "build on the Jetson, with TensorRT 10"),
        ("10", "a100", {"dla": 0}, UsageError, "DLA is a part of Jetsons, and a100 has none"),
        ("10", "jetson-orin", {"dla": 0, "batches": (1, 8)}, UsageError, "DLA runs one batch size"),
        ("10", "jetson-orin", {"gpu_fallback": True}, UsageError, "--gpu-fallback is for --dla"),
        ("10", "jetson-orin", {"hardware": "ampere+"}, UsageError, "engines of Jetsons run on no other GPU"),
        ("10", "t4", {"hardware": "ampere+"}, UsageError, "t4 (compute capability 7.5) is older than Ampere"),
        ("10", "a100", {"hardware": "all"}, UsageError, "known: same, ampere+"),
        ("11", "a100", {"version_compatible": True, "strip_weights": True}, UsageError, "refits no weights"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(
    version: str, device: str, asked: dict[str, Any], kind: type[CnnccError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        check(version, device, [], **asked)
    assert said in str(caught.value)


def test_dla_has_no_bfloat16() -> None:
    orin = resolve_profile("jetson-orin")
    vendor = vendor_of("tensorrt", "10.3.0")
    assert vendor is not None
    options = BuildOptions(orin, gpu=GpuOptions(dla=0), precision="bf16")
    with pytest.raises(UsageError, match="DLA computes in float16 and int8"):
        check_options(options, Chosen(vendor, "10.3.0"), orin, ["8.7"])


def test_a_budget_is_no_part_of_what_an_engine_is() -> None:
    assert GpuOptions(budget=1.0, sparse=True).lasting == GpuOptions(sparse=True)
