"""Constants become initializers, initializers stop being inputs, nodes have unique names, stale notes go."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.graph.draft import STANDARD, Draft, GraphPass
from cnncc.graph.values import all_nodes

_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _normalize(draft: Draft) -> int:
    changed = 0
    graph = draft.source.proto.graph
    changed += len(graph.input) - len(draft.inputs)  # initializers that were inputs: opening the draft drops them
    for node in list(draft.nodes):
        if node.op_type == "Constant" and node.domain in STANDARD and (tensor := constant_value(node)) is not None:
            tensor.name = node.output[0]
            draft.weights[node.output[0]] = tensor
            draft.drop([node])
            changed += 1
    changed += _own_outputs(draft)
    return changed + _name(draft)


def _own_outputs(draft: Draft) -> int:
    """Give a constant that is an output of the graph a node: engines want outputs to be computed."""
    constants = [value.name for value in draft.outputs if value.name in draft.weights]
    for name in dict.fromkeys(constants):
        inner = draft.fresh(f"{name}_value")
        tensor = onnx.TensorProto()
        tensor.CopyFrom(draft.weights.pop(name))
        tensor.name = inner
        draft.weights[inner] = tensor
        draft.rename_reads({name: inner})
        draft.nodes.append(onnx.helper.make_node("Identity", [inner], [name], name=f"output_{name}"))
    return len(constants)


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return a Constant node's tensor; None for strings and sparse tensors."""
    if len(node.attribute) != 1:
        return None
    entry = node.attribute[0]
    if entry.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(entry.t)
        tensor.ClearField("doc_string")
        return tensor
    if entry.name not in _DTYPES:
        return None
    array: NDArray[Any] = np.array(onnx.helper.get_attribute_value(entry), dtype=_DTYPES[entry.name])
    return numpy_helper.from_array(array)


def _name(draft: Draft) -> int:
    """Make node names unique, nested ones included; the first bearer of a name keeps it."""
    renamed = 0
    inner = onnx.GraphProto()
    inner.node.extend(draft.nodes)
    taken = {node.name for node in all_nodes(inner)}
    seen: set[str] = set()
    for index, node in enumerate(draft.nodes):
        name = node.name or f"{node.op_type}_{index}"
        count = 0
        candidate = name
        while candidate in seen or (candidate != node.name and candidate in taken):
            count += 1
            candidate = f"{name}_{count}"
        renamed += candidate != node.name
        node.name = candidate
        node.ClearField("doc_string")
        seen.add(candidate)
    return renamed


normalize = GraphPass("normalize", _normalize)
"""Constant nodes → initializers; initializers out of the inputs; unique node names."""
