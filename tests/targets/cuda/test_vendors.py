"""Which library builds for which device, with what is installed and which GPUs are here."""

from __future__ import annotations

import pytest

from cnncc.targets.cuda.vendors import choose, vendor_of
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.errors import TargetUnavailable, UsageError

TRT10, TRT11, RTX = {"tensorrt": "10.16.1.11"}, {"tensorrt": "11.4.0.106"}, {"tensorrt-rtx": "1.7.1.116"}
NOTHING: dict[str, str] = {}


@pytest.mark.parametrize(
    ("device", "found", "here", "expected", "why"),
    [
        ("rtx4090", TRT11 | RTX, ["8.9"], "TensorRT 11.4.0.106", "it times its kernels on this machine's GPU (8.9)"),
        ("rtx4090", TRT11 | RTX, ["8.6"], "TensorRT-RTX 1.7.1.116", "this machine has none of compute capability 8.9"),
        ("rtx4090", RTX, ["8.9"], "TensorRT-RTX 1.7.1.116", "TensorRT is not installed"),
        ("h100", TRT11 | RTX, ["9.0"], "TensorRT 11.4.0.106", "this machine's GPU"),
        ("h100", RTX, ["9.0"], "TensorRT-RTX 1.7.1.116", "it does not list 9.0, which this machine's GPU has"),
        ("jetson-orin", TRT10, ["8.7"], "TensorRT 10.16.1.11", "this machine's GPU"),
        ("sm80", RTX, [], "TensorRT-RTX 1.7.1.116", "TensorRT builds on the GPU itself"),
    ],
)  # fmt: skip
def test_auto_takes_what_can_build_and_says_why(
    device: str, found: dict[str, str], here: list[str], expected: str, why: str
) -> None:
    chosen = choose("auto", resolve_profile(device), found, here)
    assert str(chosen) == expected
    assert why in chosen.why


@pytest.mark.parametrize(
    ("wanted", "device", "found", "here", "kind", "said"),
    [
        ("auto", "rtx4090", NOTHING, [], TargetUnavailable, "try: pip install tensorrt-rtx-cu13==1.7.1.116"),
        ("tensorrt-rtx", "sm80", NOTHING, [], TargetUnavailable, "try: pip install tensorrt-rtx-cu13==1.7.1.116"),
        ("tensorrt", "sm80", NOTHING, ["8.0"], TargetUnavailable, "try: pip install tensorrt"),
        ("tensorrt", "sm80", TRT11, [], TargetUnavailable, "or take --backend tensorrt-rtx, which needs no GPU"),
        ("auto", "h100", RTX, [], TargetUnavailable, "h100 has 9.0"),
        ("tensorrt", "sm89", TRT11, ["8.6", "8.9"], TargetUnavailable, "try: CUDA_VISIBLE_DEVICES=1 makes"),
        ("tensorrt-rtx", "h100", RTX, ["8.9", "9.0"], UsageError, "h100 has 9.0"),
        ("tensorrt-rtx", "jetson-orin", RTX, [], UsageError, "build on the device itself, with TensorRT"),
        ("tensorrt", "jetson-orin", TRT11, ["8.7"], TargetUnavailable, "does not support JetPack"),
        ("tensorrt", "jetson-orin", NOTHING, ["8.7"], TargetUnavailable, "apt-get install python3-libnvinfer"),
        ("tensorrt", "sm80", {"tensorrt": "8.6.1"}, ["8.0"], TargetUnavailable, "knows TensorRT 10 or TensorRT 11"),
    ],
)  # fmt: skip
def test_what_cannot_build_says_why_and_what_would(
    wanted: str, device: str, found: dict[str, str], here: list[str], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as caught:
        choose(wanted, resolve_profile(device), found, here)
    assert said in str(caught.value)


def test_an_unreadable_version_is_nobodys() -> None:
    assert vendor_of("tensorrt", "dev") is None
