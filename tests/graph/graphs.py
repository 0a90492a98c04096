"""Small ONNX graphs for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from cnncc.graph.onnx_graph import OnnxGraph


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[Any]],
    constants: Mapping[str, Any],
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    dtypes: Mapping[str, int] | None = None,
) -> OnnxGraph:
    """Make a graph; output shapes come from inference."""
    kinds = dtypes or {}
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(n, kinds.get(n, onnx.TensorProto.FLOAT), list(s)) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return OnnxGraph(inferred)


def one_node(
    operator: str,
    inputs: Mapping[str, Sequence[int]],
    *,
    constants: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    **attributes: Any,
) -> OnnxGraph:
    """Make a graph of one node that reads the inputs, then the constants."""
    fixed = constants or {}
    if operator == "Mish":
        opset = max(opset, 18)
    node = helper.make_node(operator, [*inputs, *fixed], list(outputs), name="node", **attributes)
    return graph_of([node], inputs, fixed, outputs, opset)
