"""The GPU that a benchmark runs on: what it is, and how its clocks, its heat and its power were around every turn.

All of it is the word of the driver's management library (NVML). Where that or its bindings are missing, the report says
so; what a GPU does not tell (Jetsons, virtual GPUs) is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cnncc_runtime.errors import EngineMismatch
from cnncc_runtime.gpu import DRIVER, HostGpu, gpus_text, host_gpus

_T = TypeVar("_T")

FELL = 0.03
"""A clock fell where one turn ended with this fraction less than another: what a warm-up takes for settled, too."""

THROTTLES = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x020: "thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
}
"""nvml.h, nvmlClocksEventReason…: those that slow a busy GPU down. The others say that it idles, or what was set."""

_PACKAGE = "pip install nvidia-ml-py"
_BUS_ID_LENGTH = 32


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it.
        capability: CUDA compute capability.
        driver: Version of the driver; empty where it is not known.
        power_limit: Watts that it may draw.
        problem: Why its clocks were not watched; empty where they were.
    """

    name: str
    capability: str
    driver: str = ""
    power_limit: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    Attributes:
        sm_mhz: Clock of its multiprocessors.
        memory_mhz: Clock of its memory.
        celsius: Temperature.
        watts: Power that it draws.
        throttled: What slows it down, of `THROTTLES`.
    """

    sm_mhz: int | None
    memory_mhz: int | None
    celsius: int | None
    watts: float | None
    throttled: tuple[str, ...]


@dataclass(frozen=True)
class GpuTurns:
    """How a GPU was around one subject's turns.

    Attributes:
        before: Before its first turn.
        after: After its last turn.
        sm_mhz: Lowest and highest clock of the multiprocessors at the end of a turn.
        memory_mhz: The same of the memory.
        throttled: What slowed the GPU down at the end of any turn.
    """

    before: GpuState
    after: GpuState
    sm_mhz: tuple[int, int] | None
    memory_mhz: tuple[int, int] | None
    throttled: tuple[str, ...]


def summarize_turns(looks: Sequence[tuple[GpuState, GpuState]]) -> GpuTurns | None:
    """Return what is kept of one subject's turns.

    Clocks are compared at the end of turns alone: before a turn the GPU may have idled.

    Args:
        looks: Before and after each turn; may be empty.
    """
    if not looks:
        return None
    ends = [after for _, after in looks]
    reasons = tuple(dict.fromkeys(reason for state in ends for reason in state.throttled))
    return GpuTurns(looks[0][0], ends[-1], _range(s.sm_mhz for s in ends), _range(s.memory_mhz for s in ends), reasons)


def gpu_noise(turns: Mapping[str, GpuTurns | None]) -> tuple[str, ...]:
    """Say whose turns the GPU did not give the same clocks, or was slowed down in.

    Args:
        turns: Subject → what `summarize_turns` made of its turns.
    """
    reasons = []
    for name, found in turns.items():
        if found is None:
            continue
        for title, clocks in (("", found.sm_mhz), (" memory's", found.memory_mhz)):
            if clocks and clocks[0] < (1 - FELL) * clocks[1]:
                reasons.append(f"{name}: the GPU's{title} clock fell from {clocks[1]} to {clocks[0]} MHz")
        if found.throttled:
            reasons.append(f"{name}: the GPU was slowed down meanwhile ({', '.join(found.throttled)})")
    known = [found for found in turns.values() if found and found.sm_mhz]
    highest = [found.sm_mhz[1] for found in known if found.sm_mhz]
    if highest and min(highest) < (1 - FELL) * max(highest):
        reasons.append(f"the GPU's clock was {min(highest)} MHz at most for one subject, {max(highest)} for another")
    return tuple(reasons)


def host_gpu(capability: str) -> HostGpu:
    """Return the GPU that everyone is measured on: the first that runs engines for a capability.

    Raises:
        EngineMismatch: There is none.
    """
    for gpu in host_gpus():
        if gpu.runs(capability):
            return gpu
    raise EngineMismatch(f"built for: a GPU of compute capability {capability}, found: {gpus_text()}")


class GpuWatch:
    """Looks at one GPU; use as a context manager.

    Args:
        index: Of the GPU, in CUDA's order.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._nvml: Any = None
        self._handle: Any = None
        self._problem = ""

    def __enter__(self) -> GpuWatch:
        """Open the management library."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            self._problem = f"its clocks were not watched: {_PACKAGE}"
            return self
        try:
            nvml.nvmlInit()
            self._nvml = nvml  # from here on, there is something to close
            self._handle = nvml.nvmlDeviceGetHandleByPciBusId(_bus_id(self._index))
        except (nvml.NVMLError, OSError, AttributeError) as exc:
            self._problem = f"its clocks were not watched: {exc}"
        return self

    def __exit__(self, *_: object) -> None:
        """Close the management library."""
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def describe(self) -> Gpu:
        """Return the GPU, and why it was not watched, if so."""
        host = host_gpus()
        name, capability = (host[self._index].name, host[self._index].capability) if host else ("", "")
        if self._handle is None:
            return Gpu(name, capability, problem=self._problem)
        limit = self._ask(lambda nvml: nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle))
        driver = self._ask(lambda nvml: nvml.nvmlSystemGetDriverVersion())
        driver = driver.decode() if isinstance(driver, bytes) else driver  # bytes in bindings before 12
        return Gpu(name, capability, str(driver or ""), _watts(limit), self._problem)

    def look(self) -> GpuState | None:
        """Return how the GPU is now; None where it is not watched."""
        if self._handle is None:
            return None
        handle = self._handle
        reasons = self._ask(lambda nvml: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        return GpuState(
            sm_mhz=self._ask(lambda nvml: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            memory_mhz=self._ask(lambda nvml: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))),
            celsius=self._ask(lambda nvml: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            watts=_watts(self._ask(lambda nvml: nvml.nvmlDeviceGetPowerUsage(handle))),
            throttled=throttle_reasons(reasons),
        )

    def _ask(self, question: Callable[[Any], _T]) -> _T | None:
        """Return an answer; None where the GPU or its driver has none."""
        try:
            return question(self._nvml)
        except self._nvml.NVMLError:
            return None


def throttle_reasons(mask: int) -> tuple[str, ...]:
    """Return what slows a GPU down, of NVML's bit mask."""
    return tuple(reason for bit, reason in THROTTLES.items() if mask & bit)


def _range(clocks: Any) -> tuple[int, int] | None:
    known = [clock for clock in clocks if clock is not None]
    return (min(known), max(known)) if known else None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1e3


def _bus_id(index: int) -> bytes:
    """Return the address of a GPU, which NVML counts in an order of its own.

    Raises:
        OSError: There is no such GPU.
    """
    driver = ctypes.CDLL(DRIVER)
    device, text = ctypes.c_int(), ctypes.create_string_buffer(_BUS_ID_LENGTH)
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetPCIBusId(text, _BUS_ID_LENGTH, device)
    ):
        raise OSError(f"the driver has no GPU {index}")
    return text.value
