"""Executed precision: which layers of a quantized model an engine multiplies in int8, by its own list of kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cnncc.calibration.plan import PRODUCTS
from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.bundle import LayerRecord

_INT8 = "int8"


@dataclass(frozen=True)
class Audit:
    """What became of the layers that a graph quantizes.

    Attributes:
        quantized: Convolutions and products with dequantized weights.
        fallbacks: Those that the engine does not multiply in int8: module path and node.
    """

    quantized: int
    fallbacks: tuple[str, ...]


def executed(layers: Iterable[LayerRecord]) -> dict[str, str]:
    """Return product (its node's label) → element type that it multiplies; copies beside a kernel do not count."""
    found: dict[str, str] = {}
    for layer in layers:
        for node, op in zip(layer.nodes, layer.ops, strict=True):
            if op in PRODUCTS and found.get(node) != _INT8:
                found[node] = layer.precision
    return found


def audit(graph: OnnxGraph, layers: Iterable[LayerRecord]) -> Audit:
    """Compare what a graph asks for with what an engine does.

    Args:
        graph: With Q/DQ; what the engine was built from.
        layers: The engine's kernels.
    """
    dequantized = {node.output[0] for node in graph.nodes if node.op_type == "DequantizeLinear"}
    asked = [node for node in graph.nodes if node.op_type in PRODUCTS and dequantized.issuperset(node.input[:2])]
    found = executed(layers)
    missed = [node for node in asked if found.get(node_label(node)) != _INT8]
    return Audit(len(asked), tuple(f"{module_path(node)} ({node_label(node)})" for node in missed))
