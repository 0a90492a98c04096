"""Importing the package is nearly free; what is heavy comes with its first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cnncc_runtime


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing() -> None:
    heavy = {"numpy", "msgspec", "tvm_ffi", "tvm", "torch", "PIL", "click", "ctypes"}
    assert not loaded_by("import cnncc_runtime") & heavy


def test_reading_a_bundle_needs_no_runtime() -> None:
    heavy = {"numpy", "tvm_ffi", "tvm", "torch", "PIL"}
    assert not loaded_by("from cnncc_runtime import read_bundle, load, open") & heavy


def test_a_devices_agent_needs_no_arrays() -> None:
    heavy = {"numpy", "tvm_ffi", "tvm", "torch", "onnx", "PIL", "cnncc"}
    assert not loaded_by("import cnncc_runtime.agent.cli, cnncc_runtime.session") & heavy


@pytest.mark.parametrize("name", cnncc_runtime.__all__)
def test_what_the_package_promises_is_there(name: str) -> None:
    assert getattr(cnncc_runtime, name)
    assert name in dir(cnncc_runtime)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cnncc_runtime.nonsense
