"""This machine's NVIDIA GPUs, by the driver's own library; nothing else is loaded and no memory of a GPU is taken."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

DRIVER = "libcuda.so.1"
"""Comes with the driver, on desktops and on Jetsons alike."""

NEWER = "+"
"""Behind a compute capability: and newer ones."""

_MAJOR, _MINOR = 75, 76  # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NAME_LENGTH = 256


@dataclass(frozen=True)
class HostGpu:
    """One GPU.

    Attributes:
        name: As the driver calls it.
        capability: CUDA compute capability: ``8.9``.
        index: In CUDA's order.
    """

    name: str
    capability: str
    index: int = 0

    def runs(self, built_for: str) -> bool:
        """Whether it executes engines for a compute capability: ``8.9``, or ``8.0+``, which newer ones execute too."""
        if built_for.endswith(NEWER):
            return _numbers(self.capability) >= _numbers(built_for.removesuffix(NEWER))
        return self.capability == built_for

    def __str__(self) -> str:
        """Return ``NVIDIA GeForce RTX 4090 (compute capability 8.9)``."""
        return f"{self.name} (compute capability {self.capability})"


@functools.cache
def host_gpus() -> tuple[HostGpu, ...]:
    """Return the GPUs that this process may use, in CUDA's order; none where there is no driver. Never raises."""
    try:
        return _gpus(ctypes.CDLL(DRIVER))
    except (OSError, AttributeError):  # no driver, or something else by its name
        return ()


@functools.cache
def driver_cuda() -> tuple[int, int] | None:
    """Return the version of CUDA that the driver is for: ``(13, 0)``; None where there is no driver. Never raises."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):  # as above
        return None
    return version.value // 1000, version.value % 1000 // 10


def gpus_text() -> str:
    """Return this machine's GPUs as messages name them."""
    return ", ".join(map(str, host_gpus())) or "no NVIDIA GPU"


def _gpus(driver: ctypes.CDLL) -> tuple[HostGpu, ...]:
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):  # 0 is success: a driver without a GPU fails
        return ()
    return tuple(gpu for index in range(count.value) if (gpu := _gpu(driver, index)))


def _gpu(driver: ctypes.CDLL, index: int) -> HostGpu | None:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_LENGTH)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, _NAME_LENGTH, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else HostGpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", index)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
