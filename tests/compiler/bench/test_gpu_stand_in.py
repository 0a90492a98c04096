"""``cnncc bench`` of bundles for GPUs from end to end, on stand-ins for the driver, TensorRT and trtexec."""

from __future__ import annotations

from pathlib import Path

from tests.stand_in import build_driver, run_pytest


def test_benchmarks_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    build_driver(tmp_path)
    done = run_pytest(tmp_path, "tests/stand_in/bench_cases.py")
    assert done.returncode == 0, f"{done.stdout[-20000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
