"""What a GPU's clocks say of a benchmark: recorded looks, and the watch on this machine, whatever it has."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from cnncc.compiler.bench import gpu
from cnncc.compiler.bench.gpu import (
    GpuState,
    GpuTurns,
    GpuWatch,
    gpu_noise,
    host_gpu,
    summarize_turns,
    throttle_reasons,
)
from cnncc_runtime.errors import EngineMismatch
from cnncc_runtime.gpu import HostGpu, host_gpus

IDLE = GpuState(sm_mhz=345, memory_mhz=2619, celsius=31, watts=69.4, throttled=())
BUSY = GpuState(sm_mhz=1980, memory_mhz=2619, celsius=52, watts=412.0, throttled=())


def turns(*ends: GpuState) -> GpuTurns | None:
    return summarize_turns([(IDLE, end) for end in ends])


def test_clocks_are_those_at_the_end_of_turns() -> None:
    """Before a turn the GPU idled: its clock then says nothing of the turn."""
    found = turns(BUSY, replace(BUSY, sm_mhz=1965, celsius=55))
    assert found is not None
    assert (found.sm_mhz, found.memory_mhz) == ((1965, 1980), (2619, 2619))
    assert (found.before, found.after.celsius) == (IDLE, 55)
    assert gpu_noise({"cnncc": found}) == ()


def test_a_clock_that_fell_is_told_with_the_subject() -> None:
    noise = gpu_noise({"cnncc": turns(BUSY, replace(BUSY, sm_mhz=1410)), "peer": turns(BUSY, BUSY)})
    assert noise == ("cnncc: the GPU's clock fell from 1980 to 1410 MHz",)
    [noise] = gpu_noise({"cnncc": turns(BUSY, replace(BUSY, memory_mhz=1200))})
    assert noise == "cnncc: the GPU's memory's clock fell from 2619 to 1200 MHz"


def test_subjects_that_were_given_other_clocks_are_told() -> None:
    slow = replace(BUSY, sm_mhz=1410)
    [noise] = gpu_noise({"cnncc": turns(BUSY, BUSY), "peer": turns(slow, slow)})
    assert noise == "the GPU's clock was 1410 MHz at most for one subject, 1980 for another"


def test_what_slowed_the_gpu_down_in_any_turn_is_told() -> None:
    hot = replace(BUSY, throttled=("thermal slowdown", "power cap"))
    [noise] = gpu_noise({"cnncc": turns(BUSY, hot, BUSY, replace(BUSY, throttled=("power cap",)))})
    assert noise == "cnncc: the GPU was slowed down meanwhile (thermal slowdown, power cap)"


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (0x0, ()),
        (0x1 | 0x2 | 0x10 | 0x100, ()),  # idle, clocks that were set, sync boost, display clocks
        (0x4, ("power cap",)),
        (0x8 | 0x40, ("hardware slowdown", "hardware thermal slowdown")),
        (0x20 | 0x80, ("thermal slowdown", "power brake")),
    ],
)
def test_only_what_slows_a_busy_gpu_down_is_throttling(mask: int, expected: tuple[str, ...]) -> None:
    assert throttle_reasons(mask) == expected


def test_the_bits_are_those_of_the_bindings() -> None:
    nvml = pytest.importorskip("pynvml")
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    for name in names:
        assert len(throttle_reasons(getattr(nvml, f"nvmlClocksEventReason{name}"))) == 1, name
    for name in ("GpuIdle", "ApplicationsClocksSetting", "SyncBoost", "DisplayClockSetting"):
        assert throttle_reasons(getattr(nvml, f"nvmlClocksEventReason{name}")) == (), name


def test_what_a_gpu_does_not_tell_is_no_reason() -> None:
    silent = GpuState(None, None, None, None, ())
    found = summarize_turns([(silent, silent)])
    assert found is not None
    assert found.sm_mhz is None
    assert gpu_noise({"cnncc": found, "peer": summarize_turns([])}) == ()


def test_without_the_bindings_the_report_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuWatch(0) as watch:
        assert watch.look() is None
        assert watch.describe().problem == "its clocks were not watched: pip install nvidia-ml-py"


@pytest.mark.skipif(bool(host_gpus()), reason="this is about machines without a GPU")
def test_without_a_driver_the_report_says_so() -> None:
    pytest.importorskip("pynvml")
    with GpuWatch(0) as watch:
        assert watch.look() is None
        assert watch.describe().problem.startswith("its clocks were not watched: ")
    with pytest.raises(EngineMismatch, match=r"compute capability 8\.9, found: no NVIDIA GPU"):
        host_gpu("8.9")


def test_the_bindings_have_all_that_is_asked_of_them() -> None:
    nvml = pytest.importorskip("pynvml")
    source = ast.parse(Path(gpu.__file__).read_text(encoding="utf-8"))
    asked = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nvml"
    }
    assert len(asked) > 9
    assert [name for name in asked if not hasattr(nvml, name)] == []


class StandIn(ModuleType):
    """NVML's bindings with one GPU in them: its second, at address 0000:65:00.0, which knows no power limit."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        """What the bindings raise."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.mask = 0x1

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> str:
        if address != b"0000:65:00.0":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"535.104.05"

    def nvmlDeviceGetEnforcedPowerLimit(self, _handle: str) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetClockInfo(self, _handle: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[kind]

    def nvmlDeviceGetTemperature(self, _handle: str, kind: int) -> int:
        return {self.NVML_TEMPERATURE_GPU: 52}[kind]

    def nvmlDeviceGetPowerUsage(self, _handle: str) -> int:
        return 412_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle: str) -> int:
        return self.mask


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(gpu, "host_gpus", lambda: (HostGpu("one", "7.5", 0), HostGpu("two", "9.0", 1)))
    monkeypatch.setattr(gpu, "_bus_id", lambda index: [b"0000:17:00.0", b"0000:65:00.0"][index])
    return module


def test_a_gpu_is_found_by_its_address_and_looked_at(nvml: StandIn) -> None:
    with GpuWatch(1) as watch:
        assert watch.describe() == gpu.Gpu("two", "9.0", "535.104.05", None, "")
        assert watch.look() == BUSY
        nvml.mask = 0x4
        assert watch.look() == replace(BUSY, throttled=("power cap",))
        assert nvml.open == 1
    assert nvml.open == 0


def test_a_gpu_that_the_library_does_not_list_is_not_watched(nvml: StandIn) -> None:
    with GpuWatch(0) as watch:
        assert watch.look() is None
        assert watch.describe() == gpu.Gpu("one", "7.5", problem="its clocks were not watched: Not Found")
    assert nvml.open == 0


def test_the_first_gpu_that_runs_an_engine_is_measured(nvml: StandIn) -> None:
    assert [host_gpu(capability).index for capability in ("9.0", "7.5", "8.0+")] == [1, 0, 1]
