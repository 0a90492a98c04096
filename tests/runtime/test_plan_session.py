"""Engines for GPUs on stand-ins for the driver and TensorRT: in processes of their own, which find no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stand_in import build_driver, run_pytest


def run(folder: Path, *arguments: str) -> str:
    """Run pytest where the stand-ins are; return what it printed."""
    build_driver(folder)
    done = run_pytest(folder, *arguments)
    assert done.returncode == 0, f"{done.stdout[-20000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    return done.stdout


def test_sessions_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    assert "skipped" not in run(tmp_path, "tests/stand_in/cases.py")


@pytest.mark.slow
def test_what_a_gpu_is_tested_with_runs_from_end_to_end(tmp_path: Path) -> None:
    """`make test-gpu`, but for what a stand-in cannot say: memory that processes share, bfloat16, other libraries."""
    left_out = ("real_architectures", "bf16", "full_gpu", "beside_torch", "lies", "rtx_compiles")
    files = ("tests/gpu/test_execution.py", "tests/gpu/test_faults.py")
    found = run(tmp_path, "-m", "gpu", "-k", " and ".join(f"not {name}" for name in left_out), *files)
    assert "skipped" not in found
