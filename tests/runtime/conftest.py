"""Engines for the runtime's tests, built in a process of their own: the tests' process must never hold the compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnncc_runtime.cpu import host_machine
from cnncc_runtime.specs import TensorSpec
from tests.runtime.c_runner import Runner, host_runner, sanitized_runner, small_runner
from tests.runtime.engine_files import WEIGHTY_RECORD, make_bundle, manifest

HEAVY = ([TensorSpec("x", (512, 64))], [TensorSpec("y", (512, 64))])
WEIGHTY = ([TensorSpec("x", (1, 1024))], [TensorSpec("y", (1, 1024))])


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of engine files; see `engine_files.main`."""
    folder = tmp_path_factory.mktemp("engines")
    script = Path(__file__).with_name("engine_files.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def bundle(engines: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a bundle of one of the engines: ``bundle("conv", inputs=…, outputs=…, parity=…)``."""

    def make(name: str = "conv", *specs: Any, **changes: Any) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.cnncc"
        weights = engines / f"{name}.bin"
        if weights.exists():
            changes.setdefault("engine", WEIGHTY_RECORD)
        return make_bundle(
            folder, manifest(*specs, **changes), engines / f"{name}.so", weights if weights.exists() else None
        )

    return make


@pytest.fixture(scope="session", params=["wheels", pytest.param("compiled", marks=pytest.mark.slow)])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """``cnncc-run``, on TVM's runtime out of its wheels, and on the one that is compiled of its sources."""
    folder = tmp_path_factory.mktemp("runner")
    return small_runner(folder, host_machine()) if request.param == "compiled" else host_runner(folder)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """``cnncc-run`` with sanitizers and without TVM."""
    return sanitized_runner(tmp_path_factory.mktemp("sanitized"))
