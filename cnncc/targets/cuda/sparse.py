"""Which layers have 2:4 sparse weights: of every four along the input channels, two or more are zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cnncc.graph.names import node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import UsageError

_SAME_ZEROS = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
"""Operators between weights and what multiplies them: symmetric, they keep zeros where they are."""

_GROUP, _ZEROS = 4, 2


def tell_sparse(graph: OnnxGraph, note: Callable[[str], None]) -> None:
    """Tell how many layers ``--sparse`` is for.

    Raises:
        UsageError: For none.
    """
    layers = _layers(graph)
    sparse = [name for name, weights in layers.items() if weights is not None and is_sparse(weights)]
    if not sparse:
        raise UsageError(
            f"--sparse says nothing: no layer of {len(layers)} has 2:4 sparse weights along its input channels",
            hint="prune the weights to 2:4 before, or leave it out",
        )
    note(f"{len(sparse)} of {len(layers)} convolutions and products have 2:4 sparse weights")


def is_sparse(weights: NDArray[Any]) -> bool:
    """Whether weights of shape (outputs, input channels, …) are 2:4 sparse along axis 1; NVIDIA's own definition."""
    channels = weights.shape[1]
    if channels % _GROUP:
        return False
    groups = weights.reshape(weights.shape[0], channels // _GROUP, _GROUP, *weights.shape[2:])
    return bool((np.count_nonzero(groups, axis=2) <= _GROUP - _ZEROS).all())


def _layers(graph: OnnxGraph) -> dict[str, NDArray[Any] | None]:
    """Return label → weights as `is_sparse` takes them, of all convolutions and products; None where not constant."""
    made = {name: node for node in graph.nodes for name in node.output}
    found: dict[str, NDArray[Any] | None] = {}
    for node in graph.nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weights = _constant(graph, node.input[1], made)
            found[node_label(node)] = None if weights is None else _outputs_first(node, weights)
    return found


def _constant(graph: OnnxGraph, name: str, made: dict[str, onnx.NodeProto]) -> NDArray[Any] | None:
    while name in made and made[name].op_type in _SAME_ZEROS:
        name = made[name].input[0]
    return graph.constant(name)


def _outputs_first(node: onnx.NodeProto, weights: NDArray[Any]) -> NDArray[Any] | None:
    if node.op_type == "Conv":
        return weights
    if weights.ndim != 2:
        return None
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weights if transposed else weights.T
