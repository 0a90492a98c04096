"""What is inside a model: layers in the user's names, their shapes, parameters and multiply-adds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import onnx

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.specs import TensorSpec


@dataclass(frozen=True)
class Layer:
    """One node of the graph.

    Attributes:
        module: PyTorch module path.
        node: ONNX node name.
        op: ONNX operator.
        shape: Of its first output; empty where unknown.
        parameters: Elements of the constants it reads.
        macs: Multiply-adds of a convolution or matrix product for the graph's batch (1 where symbolic); else 0.
    """

    module: str
    node: str
    op: str
    shape: tuple[int | str, ...]
    parameters: int
    macs: int


@dataclass(frozen=True)
class ModelSummary:
    """A model at a glance.

    Attributes:
        inputs: Specs.
        outputs: Specs.
        opset: Of ONNX.
        operators: Operator → nodes.
        parameters: Elements of all constants.
        macs: Multiply-adds of one inference.
        layers: In the graph's order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    operators: dict[str, int]
    parameters: int
    macs: int
    layers: tuple[Layer, ...]


def summarize(graph: OnnxGraph) -> ModelSummary:
    """Return what is inside a graph whose shapes were inferred."""
    shapes = _shapes(graph)
    sizes = {name: math.prod(tensor.dims) for name, tensor in graph.constants.items()}
    layers = tuple(_layer(node, shapes, sizes) for node in graph.nodes)
    return ModelSummary(
        graph.inputs,
        graph.outputs,
        graph.opset,
        dict(Counter(layer.op for layer in layers).most_common()),
        sum(sizes.values()),
        sum(layer.macs for layer in layers),
        layers,
    )


def _shapes(graph: OnnxGraph) -> dict[str, tuple[int | str, ...]]:
    values = (*graph.proto.graph.value_info, *graph.proto.graph.input, *graph.proto.graph.output)
    found: dict[str, tuple[int | str, ...]] = {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or "?")
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }
    return found | {name: tuple(tensor.dims) for name, tensor in graph.constants.items()}


def _layer(node: onnx.NodeProto, shapes: dict[str, tuple[int | str, ...]], sizes: dict[str, int]) -> Layer:
    shape = shapes.get(node.output[0], ()) if node.output else ()
    parameters = sum(sizes.get(name, 0) for name in node.input)
    return Layer(module_path(node), node_label(node), node.op_type, shape, parameters, _macs(node, shape, shapes))


def _macs(node: onnx.NodeProto, shape: tuple[int | str, ...], shapes: dict[str, tuple[int | str, ...]]) -> int:
    """Count multiply-adds: output elements × the length of the sum behind each."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or len(node.input) < 2:
        return 0
    first, weight = shapes.get(node.input[0], ()), shapes.get(node.input[1], ())
    if node.op_type == "Conv":
        return _product(shape) * _product(weight[1:])
    if node.op_type == "ConvTranspose":
        return _product(first) * _product(weight[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return _product(shape) * _product(first[-2 if transposed else -1 :][:1])


def _product(sizes: tuple[int | str, ...]) -> int:
    return math.prod(size if isinstance(size, int) else 1 for size in sizes) if sizes else 0
