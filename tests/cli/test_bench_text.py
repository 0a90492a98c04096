"""What ``cnncc bench`` prints of a benchmark on a GPU, which a recorded report stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnncc.cli.bench_command import _text
from cnncc.cli.render import Render
from cnncc.compiler.bench.gpu import Gpu, GpuState, summarize_turns
from cnncc.compiler.bench.machine import Machine
from cnncc.compiler.bench.report import SCHEMA, BenchmarkReport, Interval, Latency, Noise, Ratio, SubjectResult

MACHINE = Machine("x86_64", "CPU", 16, ("avx2",), "", 0.0, "Linux 6", 0.0, 0.0, 0.0)
STATE = GpuState(1980, 2619, 52, 412.4, ())


def latency(milliseconds: float) -> Latency:
    seconds = milliseconds / 1e3
    return Latency(seconds, seconds, seconds, None, None, 0.01)


def subject(name: str, wall: float, device: float | None, clock: str, note: str = "") -> SubjectResult:
    return SubjectResult(
        name, name, name, "1", "fp16", 50, 9, True, latency(wall), latency(wall), 1e3 / wall, 0.1, 0.2, 9, 8, 7, 0,
        None, latency(device) if device else None, clock, summarize_turns([(STATE, STATE)]), note,
    )  # fmt: skip


def ratio(peer: str, wall: float, device: float, basis: str) -> Ratio:
    one, other = (Interval(value, value - 0.01, value + 0.01) for value in (wall, device))
    return Ratio("cnncc", peer, one, one, basis, other)


REPORT = BenchmarkReport(
    SCHEMA, 1, 12, 0, {"x": "float32[1]"}, MACHINE, Noise(True, ("cnncc: the GPU's clock fell from 1980 to 1410 MHz",)),
    (ratio("torch-cuda", 0.5, 0.4, "wall"), ratio("trtexec", 2.0, 1.01, "device")),
    (subject("cnncc", 1.5, 1.2, "CUDA events"), subject("torch-cuda", 3.0, 3.0, "CUDA events", "channels last"),
     subject("trtexec", 1.3, 1.19, "its own clock")),
    gpu=Gpu("NVIDIA H100", "9.0", "580.1", 700.0),
)  # fmt: skip


def printed(report: BenchmarkReport, capsys: pytest.CaptureFixture[str]) -> str:
    _text(Render(), report)
    return capsys.readouterr().out


def test_both_times_stand_side_by_side_and_what_is_around_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(REPORT, capsys)
    [ours] = [line for line in text.splitlines() if line.startswith("cnncc ")]
    assert ours.split()[3:13] == ["1.50", "ms", "–", "–", "1.20", "ms", "0.300", "ms", "667", "0.20"]
    assert "engine alone  around it" in text
    assert "2.00 × faster than torch-cuda" in text
    assert "engines alone: 0.4, 95 % interval 0.39–0.41" in text
    assert "a tie with trtexec" in text, "by the time of the engines alone"
    assert "torch-cuda (channels last)" in text


def test_the_gpu_its_state_and_what_disturbed_it_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(REPORT, capsys)
    assert "NVIDIA H100, compute capability 9.0, driver 580.1, 700 W at most" in text
    assert "cnncc: 1980 MHz, 2619 MHz memory, 52 °C, 412 W before, 1980 MHz" in text
    assert "noisy machine: cnncc: the GPU's clock fell from 1980 to 1410 MHz" in text
    assert "trtexec is timed alone by its own clock" in text


def test_a_gpu_that_was_not_watched_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    unseen = Gpu("NVIDIA H100", "9.0", problem="its clocks were not watched: pip install nvidia-ml-py")
    subjects = tuple(replace(each, gpu=None) for each in REPORT.subjects)
    text = printed(replace(REPORT, gpu=unseen, subjects=subjects), capsys)
    assert "! its clocks were not watched: pip install nvidia-ml-py" in text


def test_on_a_cpu_there_is_no_such_column(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(replace(REPORT, gpu=None, ratios=()), capsys)
    assert "engine alone" not in text
    assert "around it" not in text
