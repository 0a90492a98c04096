"""What a quantized graph is made of: which layers are int8, and what TensorRT would not take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that compute in int8 where both of their operands are quantized."""

MOVES = ("Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that a DequantizeLinear may be moved past: they only choose and order values."""


@dataclass(frozen=True)
class Coverage:
    """How much of a graph is int8.

    Attributes:
        quantized: Layers whose data and weights both are quantized.
        layers: Convolutions and products with constant weights.
    """

    quantized: int
    layers: int


def coverage(model: onnx.ModelProto) -> Coverage:
    """Count the layers of a graph; a product of two computed tensors (attention) is not one."""
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in LAYERS]
    layers = [node for node in products if _is_constant(node.input[1], producers, constants)]
    quantized = sum(all(_is_dequantized(name, producers) for name in node.input[:2]) for node in layers)
    return Coverage(quantized, len(layers))


def faults(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return why TensorRT would refuse a quantized graph or compute something else, sorted; empty where it takes it.

    These are the rules that hold for any graph: int8 alone, zero points of 0, and no quantized bias (*Working with
    Quantized Types* in TensorRT's documentation). u8 with a zero point of 0 is parsed, and silently read as int8.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = set()
    types: dict[str, int] = {name: tensor.data_type for name, tensor in constants.items()}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.domain not in ("", "ai.onnx"):
            found.add(f"operators of {node.domain}")
        zero = node.input[2] if len(node.input) > 2 else ""
        # without a zero point QuantizeLinear gives uint8, and DequantizeLinear takes what comes (ONNX's operators)
        if node.op_type == "QuantizeLinear":
            kind = types[node.output[0]] = types.get(zero, TensorProto.UINT8)
        else:
            kind = types.get(zero, types.get(node.input[0], TensorProto.UINT8))
        if kind != TensorProto.INT8:
            found.add("int32 bias" if kind == TensorProto.INT32 else TensorProto.DataType.Name(kind).lower())
        if zero and (zero not in constants or np.any(numpy_helper.to_array(constants[zero]))):
            found.add("zero points")
    return tuple(sorted(found))


def _is_constant(name: str, producers: dict[str, onnx.NodeProto], constants: set[str]) -> bool:
    """Say whether a tensor follows from constants by quantization and moves."""
    while name not in constants:
        node = producers.get(name)
        if node is None or node.op_type == "Constant":
            return node is not None
        if node.op_type not in (*MOVES, "QuantizeLinear", "DequantizeLinear"):
            return False
        name = node.input[0]
    return True


def _is_dequantized(name: str, producers: dict[str, onnx.NodeProto]) -> bool:
    node = producers.get(name)
    while node is not None and node.op_type in MOVES:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"
