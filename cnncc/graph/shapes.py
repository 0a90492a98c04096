"""Shape inference that neither copies weights nor hides its failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import shape_inference

from cnncc_runtime.errors import ModelRefused

_SMALL = 1024
"""Elements of a constant that inference may need the values of: shapes, axes, pads, scales."""


_INVENTED = "unk__"
"""How onnx's shape inference begins the names that it makes up (onnx/defs/shape_inference.h)."""

_PACKED = (int(onnx.TensorProto.UINT4), int(onnx.TensorProto.INT4), int(onnx.TensorProto.FLOAT4E2M1))
"""Element types of four bits, two to a byte."""


def skeleton(
    header: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    weights: Iterable[onnx.TensorProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """Return a model whose large constants are inputs instead: everything but the weights' bytes.

    Args:
        header: Opsets and IR version are taken from it; its graph is not read.
        nodes: In topological order.
        weights: The initializers.
        inputs: Of the graph, without initializers.
        outputs: Of the graph.
    """
    proto = onnx.ModelProto(ir_version=max(header.ir_version, 4))  # before 4, every initializer must be an input
    proto.opset_import.extend(header.opset_import)
    graph = proto.graph
    graph.name = "main_graph"
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    for tensor in weights:
        if element_count(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return proto


def skeleton_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a whole model's skeleton."""
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    fed = [value for value in graph.input if value.name not in constants]
    return skeleton(proto, graph.node, graph.initializer, fed, graph.output)


def element_count(dims: Iterable[int]) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for size in dims:
        count *= size
    return count


def byte_count(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor's elements; protobuf's own ``ByteSize`` serializes the message to find out.

    Raises:
        ModelRefused: A negative size, or an element type that onnx does not know.
    """
    if any(size < 0 for size in tensor.dims):
        raise ModelRefused(f"'{tensor.name}' has a negative size: {list(tensor.dims)}")
    try:
        itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelRefused(f"'{tensor.name}' has an unknown element type {tensor.data_type}") from exc
    bits = 4 if tensor.data_type in _PACKED else 8 * int(itemsize)
    return (element_count(tensor.dims) * bits + 7) // 8


def infer(proto: onnx.ModelProto) -> tuple[dict[str, onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Infer types and shapes of a skeleton, strictly, with the values of shape computations.

    Returns:
        Values by name, and the outputs in order.

    Raises:
        ModelRefused: Types or shapes contradict each other.
    """
    try:
        inferred = shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as exc:  # onnx's C++ raises InferenceError, RuntimeError, ValueError
        raise ModelRefused(
            f"the model's shapes contradict each other: {reason(exc)}",
            hint="check the model with onnx.checker.check_model(path, full_check=True)",
        ) from exc
    values, outputs = list(inferred.graph.value_info), list(inferred.graph.output)
    for value in (*values, *outputs):
        _forget_invented(value.type)
    return {value.name: value for value in values}, outputs


def _forget_invented(kind: onnx.TypeProto) -> None:
    """Make sizes unknown that onnx named itself: it gives one name to all parts of a sequence.

    ONNX Runtime believes that equal names are equal sizes, and reuses buffers by them.
    """
    while kind.HasField("sequence_type"):
        kind = kind.sequence_type.elem_type
    for dim in kind.tensor_type.shape.dim if kind.HasField("tensor_type") else ():
        if dim.dim_param.startswith(_INVENTED):
            dim.ClearField("dim_param")


def reason(exc: Exception) -> str:
    """Return an onnx exception's message in one line, without its C++ source positions."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    useful = [line for line in lines if "/onnx/" not in line] or lines
    return " ".join(useful)[:400] or type(exc).__name__


def with_values(proto: onnx.ModelProto, values: Mapping[str, onnx.ValueInfoProto], outputs: Iterable[Any]) -> None:
    """Replace a model's recorded shapes by inferred ones, in place."""
    outputs = list(outputs)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(values[name] for name in sorted(values))
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
