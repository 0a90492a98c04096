"""TensorRT-RTX as a witness: it builds engines on machines without a GPU, and its plans say what they execute.

Without a GPU no engine can be deserialized, so there is no inspector. But a plan built with detailed verbosity holds a
listing of its program: tensors with their types, kernels with their operands and the ONNX nodes they came from. That
listing is not documented, so this reads the version it was written for and no other.

``python -m tests.calibration.rtx MODEL.onnx`` prints what each layer executes as.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from cnncc.graph.reader import name_nodes
from cnncc_runtime.plan_library import logger_of

VERSION = "1.7.1.116"
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_TENSOR = re.compile(rb'\b(?:sub_)?tensor=\{[^\n]*? name="([^"\n]+)"[^\n]*? type=(\w+) \}')
_KERNEL = re.compile(
    rb"^  (?:corrltn|deconvolution|fully_connected)=\{ [^\n]*? input=\{([^}\n]*)\}[^\n]*? layers=\"([^\"\n]*)\"",
    re.MULTILINE,
)
_GENERATED = re.compile(rb'^  function=\{ name=\w*MulSum\w* [^\n]*? layers="([^"\n]*)"', re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\x1f]*)\](?:\x1f|$)")


class RtxRefused(Exception):
    """The parser or the builder refused the model."""


def tensorrt_rtx() -> Any:
    """Return the module; skips the test where there is none, anywhere but on Linux on x86-64."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("TensorRT-RTX's wheels are for Linux on x86-64")
    module = importlib.import_module("tensorrt_rtx")
    assert module.__version__ == VERSION, f"the listing was read in {VERSION}: check it in {module.__version__}"
    return module


def rtx_build(proto: onnx.ModelProto, *, capability: str = "SM89", batch: tuple[int, int, int] = (1, 4, 16)) -> bytes:
    """Build a strongly typed engine and return its plan.

    Args:
        proto: The model.
        capability: A name of TensorRT-RTX's ``ComputeCapability``.
        batch: Smallest, usual and largest size of symbolic dimensions.

    Raises:
        RtxRefused: With the parser's or the builder's words.
    """
    trt = tensorrt_rtx()
    logger = logger_of(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise RtxRefused("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_profile(builder, config, network, batch)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RtxRefused("; ".join(logger.errors))
    return bytes(plan)


def rtx_executed_types(model: Path | onnx.ModelProto, *, capability: str = "SM89") -> dict[str, str]:
    """Return what each convolution and product of a model executes as: node name → type of its operands.

    The type is TensorRT's (``int8``, ``float``, ``half``, ``fp8_e4m3``). Where the two operands differ, both are
    named (``int8×float``).

    Raises:
        RtxRefused: The model does not build.
        AssertionError: A layer is not in the listing, so nothing can be said.
    """
    proto = onnx.load(model) if isinstance(model, Path) else model
    named = onnx.ModelProto.FromString(proto.SerializeToString())
    name_nodes(named.graph)
    wanted = [node.name for node in named.graph.node if node.op_type in LAYERS]
    executed = scan_plan(rtx_build(named, capability=capability))
    missing = [name for name in wanted if name not in executed]
    assert not missing, f"the engine's listing does not name {missing}"
    return {name: executed[name] for name in wanted}


def scan_plan(plan: bytes) -> dict[str, str]:
    """Return the ONNX nodes that a plan's convolution and product kernels came from → type of their operands.

    A float product of one row becomes part of a generated kernel, which multiplies and sums in registers.
    """
    types = {name.decode(): kind.decode() for name, kind in _TENSOR.findall(plan)}
    found: dict[str, str] = {}
    for inputs, layers in _KERNEL.findall(plan):
        data, weight = (types[name] for name in re.findall(r'"([^"]+)"', inputs.decode())[:2])
        for name in _LAYER.findall(layers.decode()):
            found[name] = data if data == weight else f"{data}×{weight}"
    for layers in _GENERATED.findall(plan):
        for name in _LAYER.findall(layers.decode()):
            found.setdefault(name, "float")
    return found


def _set_profile(builder: Any, config: Any, network: Any, batch: tuple[int, int, int]) -> None:
    profile, symbolic = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tensor.shape:
            symbolic = True
            profile.set_shape(tensor.name, *([size if dim == -1 else dim for dim in tensor.shape] for size in batch))
    if symbolic:
        config.add_optimization_profile(profile)


def _print(executed: Mapping[str, str]) -> None:
    for name, kind in executed.items():
        sys.stdout.write(f"{kind:12} {name}\n")


if __name__ == "__main__":
    _print(rtx_executed_types(Path(sys.argv[1])))
