"""TensorRT's Python bindings without TensorRT: their wheels hold the API, its libraries are stood in for by stubs.

``python -m tests.targets.cuda.bindings WHEEL FOLDER`` prints the API as JSON: class → member → signature, or null where
it has none.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

WHEELS = ROOT / "build" / "tensorrt"
"""Where `make tensorrt` puts the wheels."""

_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_lean")
_SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def api_of(major: int, folder: Path, *, module: str = "tensorrt") -> dict[str, dict[str, str | None]]:
    """Return the API of a major version of TensorRT; skips the test where its wheel is not here, and fails it in CI.

    Args:
        major: 10 or 11.
        folder: For the stubs and the module.
        module: ``tensorrt``, or ``tensorrt_lean``.
    """
    wheels = [wheel for wheel in WHEELS.glob(f"{module}_cu*_bindings-*.whl") if f"_bindings-{major}." in wheel.name]
    missing = "no wheel of its bindings" if not wheels else "no C compiler" if _compiler() is None else ""
    if missing:
        problem = f"TensorRT {major}: {missing}: `make tensorrt` brings the wheels"
        pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem)
    command = [sys.executable, "-m", "tests.targets.cuda.bindings", str(wheels[0]), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, str | None]] = json.loads(done.stdout)
    return found


def describe(module: Any) -> dict[str, dict[str, str | None]]:
    """Return class → member → its signature without types; None for what is no function."""
    return {
        name: {member: _signature(getattr(kind, member)) for member in dir(kind)}
        for name, kind in vars(module).items()
        if isinstance(kind, type)
    }


def _signature(member: Any) -> str | None:
    """Return the parameters after ``self``, of the first overload: ``model, path``."""
    found = re.search(
        r"^(?:1\. )?\w+\(self: [^,)]+(?:, )?(.*?)\) -> ", getattr(member, "__doc__", None) or "", re.MULTILINE
    )
    if found is None:
        return None
    return ", ".join(part.split(":")[0].strip() for part in re.split(r", (?=\w+:)", found[1]) if part)


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _load(wheel: Path, folder: Path) -> Any:
    major = wheel.name.split("-")[1].split(".")[0]
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS), encoding="utf-8")
    for name in _LIBRARIES:
        library = folder / f"lib{name}.so.{major}"
        compiler = _compiler() or "cc"
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    with zipfile.ZipFile(wheel) as archive:
        name = wheel.name.partition("_cu")[0]
        path = Path(archive.extract(f"{name}_bindings/{name}.so", folder))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    json.dump(describe(_load(Path(sys.argv[1]), Path(sys.argv[2]))), sys.stdout)
