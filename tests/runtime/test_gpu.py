"""This machine's GPUs, asked of drivers that are made for the test."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import cnncc_runtime
from cnncc_runtime import gpu, session
from cnncc_runtime.bundle import EngineRecord, TargetRecord
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.errors import EngineMismatch, TargetUnavailable
from cnncc_runtime.gpu import HostGpu
from tests.runtime.engine_files import ENGINE, make_bundle, manifest

DRIVER = r"""
#include <string.h>
int cuInit(unsigned flags) { return FAILS; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return index == 1; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 40 ? "NVIDIA L4" : "Other", length);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : 49 - device;
    return 0;
}
"""
L4 = HostGpu("NVIDIA L4", "8.9")
TARGET = TargetRecord("cuda", "rtx4090", "", "", host_machine(), (), "8.9")


def driver(folder: Path, *, fails: int) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(DRIVER, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", f"-DFAILS={fails}", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def test_gpus_are_asked_of_the_driver_and_one_that_fails_is_left_out(tmp_path: Path) -> None:
    assert gpu._gpus(driver(tmp_path, fails=0)) == (L4, HostGpu("Other", "8.7", 2))


def test_a_driver_without_gpus_has_none(tmp_path: Path) -> None:
    assert gpu._gpus(driver(tmp_path, fails=100)) == ()


@pytest.mark.parametrize("name", ["libno-such-driver.so.9", "libc.so.6"], ids=["no driver", "another library"])
def test_a_machine_without_a_driver_has_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVER", name)
    gpu.host_gpus.cache_clear()
    try:
        assert gpu.host_gpus() == ()
        assert gpu.gpus_text() == "no NVIDIA GPU"
    finally:
        gpu.host_gpus.cache_clear()


def test_an_engine_for_another_gpu_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    record = EngineRecord("engine.plan", "tensorrt-rtx", "tensorrt-rtx 1.7.1.116", {0: "profile 0"})
    for module in (gpu, session):
        monkeypatch.setattr(module, "host_gpus", lambda: (L4,))
    other = session.obstacle(replace(TARGET, gpu="12.0", device="rtx5090"), record)
    assert isinstance(other, EngineMismatch)
    expected = "built for: a GPU of compute capability 12.0 (rtx5090), found: NVIDIA L4 (compute capability 8.9)"
    assert other.message == expected
    assert session.engine_mismatch(TARGET) is None
    nothing = session.obstacle(TARGET, replace(record, format="tensorrt", abi="tensorrt 10.16.1.11"))
    assert isinstance(nothing, TargetUnavailable)
    assert nothing.message == "nothing here opens plans of tensorrt 10.16.1.11"
    assert nothing.hint == "pip install tensorrt-cu13==10.16.1.11 cuda-bindings"
    assert session.obstacle(TARGET, replace(record, format="trt-99")) is None, "opening it says that it is unknown"


def test_a_plan_is_not_opened_where_its_gpu_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "host_gpus", lambda: ())
    record = EngineRecord(ENGINE, "tensorrt-rtx", "tensorrt-rtx 1.7.1.116", {0: "profile 0"})
    bundle = make_bundle(tmp_path / "b.cnncc", manifest(target=TARGET, engine=record, parity="pending"), b"ftrt")
    with pytest.raises(EngineMismatch, match=r"built for: a GPU of compute capability 8\.9"):
        cnncc_runtime.open(bundle, allow_unverified=True)
