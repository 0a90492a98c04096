"""Executed precision: which layers of a narrow model an engine multiplies in its type, by its own list of kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from cnncc.calibration.plan import PRODUCTS
from cnncc.graph.half import HALVES, half_values
from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.bundle import LayerRecord

_INT8 = "int8"
_EXECUTED = {"int8": _INT8, "fp16": "float16", "bf16": "bfloat16"}
"""Precision → how kernels are said to multiply."""


@dataclass(frozen=True)
class Audit:
    """What became of the layers that a graph quantizes, or has in half precision.

    Attributes:
        asked: Convolutions and products that are so in the graph.
        fallbacks: Those that the engine does not multiply so: module path and node.
        narrowed: Those in float32 that the engine multiplies in half precision, though nobody asked for it.
    """

    asked: int
    fallbacks: tuple[str, ...]
    narrowed: tuple[str, ...] = ()


def executed(layers: Iterable[LayerRecord]) -> dict[str, str]:
    """Return product (its node's label) → element type that it multiplies; copies beside a kernel do not count."""
    found: dict[str, str] = {}
    for layer in layers:
        for node, op in zip(layer.nodes, layer.ops, strict=True):
            if op in PRODUCTS and found.get(node) != _INT8:
                found[node] = layer.precision
    return found


def audit(graph: OnnxGraph, layers: Iterable[LayerRecord], precision: str = "int8") -> Audit:
    """Compare what a graph asks for with what an engine does: half precision where weights or results are of that type.

    Args:
        graph: With Q/DQ, or in half precision; what the engine was built from.
        layers: The engine's kernels.
        precision: ``int8``, ``fp16`` or ``bf16``.
    """
    asked = _quantized(graph) if precision == _INT8 else _half(graph)
    found = executed(layers)
    missed = [node for node in asked if found.get(node_label(node)) != _EXECUTED[precision]]
    if precision == _INT8:
        return Audit(len(asked), _named(missed))
    labels = {node_label(node) for node in asked}
    others = [node for node in graph.nodes if node.op_type in PRODUCTS and node_label(node) not in labels]
    narrowed = [node for node in others if found.get(node_label(node)) == _EXECUTED[precision]]
    return Audit(len(asked), _named(missed), _named(narrowed))


def _named(nodes: Iterable[onnx.NodeProto]) -> tuple[str, ...]:
    return tuple(f"{module_path(node)} ({node_label(node)})" for node in nodes)


def _quantized(graph: OnnxGraph) -> list[onnx.NodeProto]:
    dequantized = {node.output[0] for node in graph.nodes if node.op_type == "DequantizeLinear"}
    return [node for node in graph.nodes if node.op_type in PRODUCTS and dequantized.issuperset(node.input[:2])]


def _half(graph: OnnxGraph) -> list[onnx.NodeProto]:
    own = graph.proto.graph
    halves = half_values(graph).keys() | {tensor.name for tensor in own.initializer if tensor.data_type in HALVES}
    return [
        node
        for node in graph.nodes
        if node.op_type in PRODUCTS and not halves.isdisjoint((*node.input[1:2], *node.output))
    ]
