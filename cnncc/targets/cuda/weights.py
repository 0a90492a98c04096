"""The weights of an engine that holds none: a file beside it, by the names that TensorRT's refitter calls them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import BuildFailed

WEIGHTS = "weights.npz"

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can say
_SHOWN = 10


def write_weights(graph: OnnxGraph, path: Path) -> None:
    """Write a graph's constants as a plain npz, stored and not compressed; equal constants give equal bytes.

    The parser names weights as the graph's initializers are named. Elements of types that NumPy lacks (bfloat16,
    float8) are stored as unsigned integers of the same bits.

    Args:
        graph: What the engine was built from.
        path: The file.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in sorted(graph.constants.items()):
            content = io.BytesIO()
            np.lib.format.write_array(content, _plain(numpy_helper.to_array(tensor)), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            info.create_system = 3  # the same on every system that writes one
            info.external_attr = 0o644 << 16
            archive.writestr(info, content.getvalue())


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    plain = array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
    return np.asarray(plain, order="C")


def check_weights(graph: OnnxGraph, trt: Any, logger: Any, plan: bytes, note: Callable[[str], None]) -> None:
    """Refuse a plan that asks for weights that `write_weights` does not write.

    Args:
        graph: What it was built from.
        trt: The library's module.
        logger: The library's logger.
        plan: The plan.
        note: Told where this machine cannot load the plan, so that nobody knows what it asks for.

    Raises:
        BuildFailed: It could never run.
    """
    runtime = trt.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        note("this machine cannot load the stripped engine: whether all its weights lie beside it shows on the device")
        return
    missing = sorted(set(trt.Refitter(engine, logger).get_all_weights()) - graph.constants.keys())
    if missing:
        raise BuildFailed(
            f"the stripped engine asks for {len(missing)} weights that the graph does not name",
            where=missing[:_SHOWN],
            hint="leave --strip-weights out",
        )
