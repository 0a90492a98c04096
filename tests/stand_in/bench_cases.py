"""``cnncc bench`` on a GPU that is not there: `tests/compiler/bench/test_gpu_stand_in.py` runs it beside stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.harness import apart
from tests.stand_in import install_trtexec
from tests.stand_in.cases import Make, bundle  # noqa: F401 - a fixture

SHORT = ("--rounds", "3", "--min-time", "0.05", "--threads", "1", "--json")


def bench(path: Path, *flags: str, **env: str) -> dict[str, Any]:
    return apart("bench", path, *SHORT, *flags, env=env).document


def test_both_times_are_measured_and_the_gpu_is_told(bundle: Make) -> None:  # noqa: F811
    report = bench(bundle(), "--against", "")
    [ours] = report["subjects"]
    assert 0 < ours["device"]["p50"] < ours["wall"]["p50"]
    assert (ours["clock"], ours["size"] > 0) == ("CUDA events", True)
    assert (report["gpu"]["name"], report["gpu"]["capability"]) == ("NVIDIA L4", "8.9")
    assert report["gpu"]["problem"].startswith("its clocks were not watched: "), "this driver tells no addresses"


def test_a_cuda_graph_is_told(bundle: Make) -> None:  # noqa: F811
    [ours] = bench(bundle(), "--against", "", "--cuda-graph")["subjects"]
    assert ours["note"] == "launched as a CUDA graph; the engine alone is not"


def test_trtexec_is_a_peer_of_the_same_gpu(bundle: Make, tmp_path: Path) -> None:  # noqa: F811
    calls = install_trtexec(tmp_path / "bin")
    path = bundle(batches=(1, 4))
    report = bench(path, "--against", "trtexec", "--batch", "4", PATH=f"{calls.parent}:/usr/bin:/bin")
    ours, theirs = report["subjects"]
    assert (theirs["name"], theirs["clock"]) == ("trtexec", "its own clock")
    assert ours["agreement"] < 1e-6
    [ratio] = report["ratios"]
    assert ratio["basis"] == "device"
    assert ratio["device"]["value"] == pytest.approx(ours["device"]["p50"] / 1.5e-3)
    said = [json.loads(line) for line in calls.read_text().splitlines()]
    assert {call["device"] for call in said if "help" not in call} == {"0"}


def test_by_default_the_peer_is_on_the_gpu_too(bundle: Make) -> None:  # noqa: F811
    refused = apart("bench", bundle(), *SHORT, code=None)
    assert "ort-cuda: ONNX Runtime" in refused.stderr
    assert "is built without CUDA" in refused.stderr


def test_a_bundle_for_another_gpu_is_refused_before_anyone_is_opened(bundle: Make) -> None:  # noqa: F811
    refused = apart("bench", bundle(gpu="12.0"), "--against", "ort-cuda", code=3)
    assert "built for: a GPU of compute capability 12.0 (some-gpu), found: NVIDIA L4" in refused.stderr
