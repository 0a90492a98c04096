"""Runs an engine file in this process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.targets.llvm.quiet import quiet


def run_engine(path: Path, entry: str, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Load an engine, run one entry, return its outputs."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        import tvm
        import tvm_ffi

        machine = tvm_ffi.load_module(str(path))["vm_load_executable"]()
        machine["vm_initialization"](1, 0, 2)
        result = machine[entry](*[tvm.runtime.tensor(np.require(array, requirements="C")) for array in arrays])
    outputs = [result] if hasattr(result, "numpy") else list(result)
    return [output.numpy() for output in outputs]
