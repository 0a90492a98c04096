"""What a device installs is enough: no compiler, no torch, no onnx, in an environment that has never seen them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from cnncc_runtime.tvm_runtime import VARIABLE, locate

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"

DEVICE = """
import sys, time
start = time.perf_counter()
import cnncc_runtime
import numpy as np
with cnncc_runtime.load(sys.argv[1]) as model:
    y = model(np.load(sys.argv[2]))
np.save(sys.argv[3], y)
print(f"{time.perf_counter() - start:.2f} s from import to result")
for name in ("torch", "onnx", "onnxruntime", "tvm", "cnncc", "PIL"):
    assert name not in sys.modules, name
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is installed here: the test proves nothing")
"""


@pytest.mark.slow
def test_an_engine_runs_where_no_compiler_is(bundle: Callable[..., Path], tmp_path: Path) -> None:
    import numpy as np

    from tests.runtime.engine_files import conv_reference

    home = tmp_path / "device"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    wheels = tmp_path / "wheels"
    # built from a copy: setuptools and hatchling must leave nothing in the checkout
    shutil.copytree(RUNTIME, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    quiet = ["--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, str(tmp_path / "source")], check=True)
    [wheel] = wheels.glob("cnncc_runtime-*.whl")
    before = size(home)
    subprocess.run([str(python), "-m", "pip", "install", *quiet, str(wheel)], check=True)
    installed = size(home) - before

    library = locate()
    assert library is not None
    shutil.copy(library, home / "libtvm_runtime.so")
    x = np.random.default_rng(3).standard_normal((1, 3, 16, 16)).astype("f")
    np.save(tmp_path / "x.npy", x)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TVM", "LD_"))}
    done = subprocess.run(
        [str(python), "-c", DEVICE, str(bundle()), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")],
        env={**clean, VARIABLE: str(home)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), conv_reference(x), rtol=1e-5, atol=1e-5)
    assert installed < 150 << 20, f"{installed >> 20} MiB installed"
    (tmp_path / "report").write_text(f"{installed / (1 << 20):.1f} MiB installed; {done.stdout}")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
