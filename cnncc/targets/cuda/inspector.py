r"""What a plan executes, by the library's own inspector, where the plan's GPU is in this machine.

A plan that was built with detailed verbosity describes its layers as JSON. TensorRT 10 writes a tensor's type into its
format (``"Thirty-two wide channel vectorized row major Int8 format"``, or ``"Half"`` in layers of its compiler),
TensorRT 11 into a field of its own (``"Format"``, ``"DataType"``)::

    {"Layers": [{
      "Name": "w + conv1 + relu1", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
      "Inputs": [{"Name": "x", "Dimensions": [1, 16, 8, 8], "Format/Datatype": "Row major Int8 format"}],
      "Outputs": [...],
      "Weights": {"Type": "Int8", "Count": 2304},
      "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize64x64x64",
      "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]"}],
     "Bindings": ["x", "y"]}

What a fused layer does inside, nobody says: a product that only such layers name is of unknown precision.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.cuda.layers import KNOWN, MULTIPLIES, layer_records
from cnncc.targets.cuda.vendors import Chosen
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.gpu import host_gpus
from cnncc_runtime.plan_library import logger_of

UNKNOWN = "unknown"

_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]*)\]")
_PRODUCT = re.compile(r"conv(?!er)|gemm|matrix_?multiply|matmul|fully_?connected", re.IGNORECASE)
"""Kinds of layers that multiply two operands; fused ones (``kgen``, ``Myelin``, ``ForeignNode``) are not among them."""

_WORDS = {
    "float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bfloat16": "bfloat16",
    "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3", "double": "float64", "uint8": "uint8", "int4": "int4",
    "fp4": "float4_e2m1", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b", re.IGNORECASE)

_STORED = {"i8": "int8", "s8": "int8", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "tf32": "tfloat32",
           "e4m3": "float8_e4m3"}  # fmt: skip
_TYPE = f"(?:{'|'.join(_STORED)}|i32)"
_TACTIC = re.compile(rf"_{_TYPE}{_TYPE}_({'|'.join(_STORED)}){_TYPE}_{_TYPE}(?:_|$)")
"""In a kernel's name: types of both operands in memory, what they are multiplied as and summed in, and the result's."""

_WIDTH = ("float64", "float32", "tfloat32", "bfloat16", "float16")
"""Floating types, the widest first."""


def layers_of(
    graph: OnnxGraph, plan: bytes, trt: Any, gpu: str, made: Chosen, names: Mapping[str, str]
) -> tuple[LayerRecord, ...]:
    """Return one record per kernel of a plan that was just built, in order of execution.

    A listing that is known names the operands of every product, fused ones too, so it is asked first; other plans are
    inspected, for which their GPU must be here.

    Args:
        graph: What the plan was built from.
        plan: The plan.
        trt: The library's module.
        gpu: Compute capability that the plan is for.
        made: The library, with the version that it says it has.
        names: Names of nodes in the plan → labels in the graph, where they differ.

    Returns:
        Nothing where neither is possible.
    """
    listed = made.version in KNOWN.get(made.vendor.backend, ())
    if listed or not any(host.runs(gpu) for host in host_gpus()):
        return layer_records(graph, plan, made, names)
    return inspected(graph, inspect(trt, plan), names)


def inspect(trt: Any, plan: bytes) -> str:
    """Return what the inspector says of a plan, as JSON; empty where this machine's GPU cannot open it."""
    runtime = trt.Runtime(logger_of(trt))
    runtime.engine_host_code_allowed = True  # what version-compatible plans bring along; this one was built here
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:  # formats depend on shapes: without a context they are "N/A due to dynamic shapes"
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and -1 in engine.get_tensor_shape(name):
                context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
        inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def inspected(graph: OnnxGraph, text: str, names: Mapping[str, str]) -> tuple[LayerRecord, ...]:
    """Return one record per layer that computes nodes of the graph, in order of execution.

    Args:
        graph: What the plan was built from.
        text: What the inspector says.
        names: Names of nodes in the plan → labels in the graph, where they differ.

    Returns:
        Nothing where it is no JSON, or holds names of layers only.
    """
    nodes = {node_label(node): node for node in graph.nodes}
    products = {label for label, node in nodes.items() if node.op_type in MULTIPLIES}
    layers = [(entry, _labels(entry, names, nodes)) for entry in _layers(text)]
    multiplied = {label for entry, own in layers if _multiplies(entry) for label in own if label in products}
    records = []
    for entry, named in layers:
        # scales and biases behind a product name it too
        own = named if _multiplies(entry) else tuple(label for label in named if label not in multiplied)
        if not own:
            continue
        records.append(
            LayerRecord(
                kernel=str(entry.get("Name", "")),
                modules=tuple(dict.fromkeys(module_path(nodes[label]) for label in own)),
                nodes=own,
                ops=tuple(nodes[label].op_type for label in own),
                precision=_product(entry) if products.intersection(own) else _computed(entry),
                schedule=str(entry.get("LayerType", "")),
            )
        )
    return tuple(records)


def _layers(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text, strict=False)  # separators within metadata may stand there as they are
    except json.JSONDecodeError:
        return []
    layers = found.get("Layers", []) if isinstance(found, dict) else []
    return [entry for entry in layers if isinstance(entry, dict)]  # a layer without details is its name


def _labels(entry: Mapping[str, Any], names: Mapping[str, str], nodes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the graph's nodes that a layer computes: by its metadata, or by its name where it has none."""
    found = _NODE.findall(str(entry.get("Metadata", ""))) or str(entry.get("Name", "")).split(" + ")
    return tuple(dict.fromkeys(label for name in found if (label := names.get(name, name)) in nodes))


def _multiplies(entry: Mapping[str, Any]) -> bool:
    return any(_PRODUCT.search(str(entry.get(key, ""))) for key in ("LayerType", "ParameterType"))


def _product(entry: Mapping[str, Any]) -> str:
    """Return the type that a layer multiplies, both where its operands differ; unknown where it does not say."""
    if tactic := _TACTIC.search(str(entry.get("TacticName", ""))):
        return _STORED[tactic[1]]
    if not _multiplies(entry):
        return UNKNOWN
    read = [_type(tensor) for tensor in _tensors(entry, "Inputs")]
    weights = next((entry[key] for key in ("Weights", "ConvWeights") if isinstance(entry.get(key), dict)), None)
    constants = _tensors(entry, "Constants")  # of TensorRT 11's compiler: weights, scales, biases
    if weights is not None:  # further inputs are residuals
        read = [*read[:1], _word(str(weights.get("Type", "")))]
    elif constants:
        read = [*read[:1], _type(max(constants, key=_size))]
    known = UNKNOWN not in read[:2] and len(read) > 1
    return "×".join(dict.fromkeys(read[:2])) if known else UNKNOWN


def _computed(entry: Mapping[str, Any]) -> str:
    """Return the type that any other layer computes in: the widest floating type that it reads."""
    read = [_type(tensor) for tensor in _tensors(entry, "Inputs")]
    return next((kind for kind in _WIDTH if kind in read), next(iter(read), UNKNOWN))


def _tensors(entry: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [tensor for tensor in entry.get(key) or () if isinstance(tensor, dict)]


def _size(entry: Mapping[str, Any]) -> int:
    return math.prod(size for size in entry.get("Dimensions") or (1,) if isinstance(size, int))


def _type(entry: Mapping[str, Any]) -> str:
    by_name = {key.lower(): str(value) for key, value in entry.items()}  # "Datatype", "DataType": versions differ
    return _word(by_name.get("datatype") or by_name.get("format/datatype", ""))


def _word(text: str) -> str:
    found = _WORD.search(text)
    return _WORDS[found[1].lower()] if found else UNKNOWN
