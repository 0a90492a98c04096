"""A driver and TensorRT without a GPU, for what runs plans: see `libcuda.c` and `modules`.

They show that sessions handle memory, streams, graphs, versions and failures right; that the real driver and the real
libraries behave as these do, the tests marked ``gpu`` show.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HERE = Path(__file__).parent
MODULES = HERE / "modules"


def build_driver(folder: Path) -> Path:
    """Compile the stand-in for ``libcuda.so.1``; skips the test where there is no C compiler, and fails it in CI."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        problem = "no C compiler"
        pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem)
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", library, HERE / "libcuda.c"]
    subprocess.run(command, check=True)
    return library


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that finds the stand-ins.

    Args:
        folder: Where the driver lies.
    """
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join((str(MODULES), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep),
        "CNNCC_CACHE_DIR": str(folder / "cache"),
    }


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a process that finds the stand-ins.

    Args:
        folder: Where the driver lies.
        arguments: Of pytest.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=300"]
    # a PyTorch that was built with CUDA finds that this driver lacks what it calls
    command += ["-W", "ignore:CUDA initialization:UserWarning", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True)


def install_trtexec(folder: Path) -> Path:
    """Put the stand-in for TensorRT's program into a folder; return the file that it writes its calls into."""
    folder.mkdir(exist_ok=True)
    program = folder / "trtexec"
    program.write_text(f"#!{sys.executable}\n{(HERE / 'trtexec.py').read_text(encoding='utf-8')}", encoding="utf-8")
    program.chmod(0o755)
    return folder / "calls"
