"""What is quantized: which layers, and which tensors carry int8 between them. Names and structure only, no numbers.

The contract that every target shares (docs/qdq.md): a quantized layer reads a Q/DQ pair on its input and int8
weights per output channel; whoever else reads a quantized tensor, as the skip of a residual add does, reads the same
pair; operators that only choose or move elements have the same scale before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from cnncc.graph.draft import STANDARD, attribute
from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import ModelRefused

QUANTIZATION = frozenset(
    (
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
    )
)
"""Operators that a graph has only where somebody quantized it already."""

PRODUCTS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
"""Operators that multiply by weights. ConvTranspose stays in float: TensorRT computes no int8 for it (docs/qdq.md)."""

FEWEST = 4
"""Products in a sum up to which a convolution over one pixel of one image, as in squeeze-and-excite, stays in float:
int8 gains nothing there, and TensorRT-RTX computes it in float anyhow (`cnncc.calibration.lint_rules.floating`)."""

_MOVERS = frozenset(
    (
        *("MaxPool", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split"),
        *("DepthToSpace", "SpaceToDepth", "Identity", "Dropout", "Expand", "Tile"),
    )
)
"""Operators that choose or move elements: quantizing commutes with them."""


@dataclass(frozen=True)
class Layer:
    """A node whose product with constant weights can be computed in int8.

    Attributes:
        node: Its name, unique in a cleaned graph.
        op: ``Conv``, ``Gemm`` or ``MatMul``.
        module: PyTorch module path.
        tensor: Its input.
        output: Its output.
        weight: The initializer.
        axis: The weight's axis of output channels.
        bias: The initializer of the bias; empty where there is none.
    """

    node: str
    op: str
    module: str
    tensor: str
    output: str
    weight: str
    axis: int
    bias: str


@dataclass(frozen=True)
class Group:
    """Tensors that share one scale.

    Attributes:
        tensors: All of them, in the graph's order: each gets a Q/DQ pair.
        read: Those that quantized layers read: the scale is made from what they hold.
    """

    tensors: tuple[str, ...]
    read: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is quantized.

    Attributes:
        layers: In the graph's order.
        groups: Disjoint; in the graph's order.
        floating: Nodes that read the float tensor even where others read its pair: products that stay in float, and
            additions of two tensors where these are wanted in float.
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    floating: frozenset[str] = frozenset()


def layers_of(graph: OnnxGraph) -> tuple[Layer, ...]:
    """Return every layer that can be quantized, in the graph's order.

    Raises:
        ModelRefused: The graph is quantized already, or takes float16.
    """
    _check(graph)
    found = [_layer(graph, node) for node in graph.nodes if node.domain in STANDARD]
    return tuple(layer for layer in found if layer is not None)


def unsupported(graph: OnnxGraph, layers: Iterable[Layer]) -> tuple[onnx.NodeProto, ...]:
    """Return the products that are no layers, and so stay in float: transposed, small, or without constant weights."""
    known = {layer.node for layer in layers}
    return tuple(node for node in graph.nodes if node.op_type in PRODUCTS and node.name not in known)


def plan_for(graph: OnnxGraph, layers: Iterable[Layer], *, float_adds: bool = False) -> Plan:
    """Return the tensors that must be quantized so that these layers are.

    Args:
        graph: Cleaned, in float32.
        layers: Of `layers_of` this graph.
        float_adds: Whether the additions of two tensors, as those of residual blocks, read float tensors.
    """
    layers = tuple(layers)
    order = {value.name: index for index, value in enumerate(graph.proto.graph.input)}
    for node in graph.nodes:
        order.update({name: len(order) for name in node.output if name})
    read = dict.fromkeys(layer.tensor for layer in layers)
    leader = {name: name for name in read}

    def root(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for node in reversed(graph.nodes):
        outputs = [name for name in node.output if name in leader]
        if not outputs or not is_mover(node):
            continue
        moved = [name for name in _data_inputs(node) if name not in graph.constants]
        for name in (*moved, *outputs):
            leader.setdefault(name, name)
            leader[root(name)] = root(outputs[0])
    members: dict[str, list[str]] = {}
    for name in sorted(leader, key=lambda name: order[name]):
        members.setdefault(root(name), []).append(name)
    groups = [Group(tuple(names), tuple(name for name in names if name in read)) for names in members.values()]
    quantized = {layer.node for layer in layers}
    floating = [
        node.name
        for node in graph.nodes
        if (node.op_type in PRODUCTS and node.name not in quantized) or (float_adds and _adds_tensors(graph, node))
    ]
    return Plan(layers, tuple(groups), frozenset(floating))


def is_mover(node: onnx.NodeProto) -> bool:
    """Whether a node only chooses or moves elements of its inputs."""
    if node.domain not in STANDARD:
        return False
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", b"nearest") == b"nearest")
    # the second output of MaxPool is indices, not values
    return node.op_type in _MOVERS and not (node.op_type == "MaxPool" and any(node.output[1:]))


def _adds_tensors(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    return node.op_type == "Add" and node.domain in STANDARD and not graph.constants.keys() & set(node.input)


def _data_inputs(node: onnx.NodeProto) -> list[str]:
    return list(node.input) if node.op_type == "Concat" else list(node.input[:1])


def _layer(graph: OnnxGraph, node: onnx.NodeProto) -> Layer | None:
    axis = _channel_axis(node)
    if axis is None or len(node.input) < 2:
        return None
    weight = graph.constants.get(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT or node.input[0] in graph.constants:
        return None
    if node.op_type == "MatMul" and len(weight.dims) != 2:
        return None
    if node.op_type == "Conv" and math.prod(weight.dims[1:]) <= FEWEST and _one_pixel(graph, node.output[0]):
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias and bias not in graph.constants:
        return None  # a computed bias cannot be corrected
    return Layer(node.name, node.op_type, module_path(node), node.input[0], node.output[0], node.input[1], axis, bias)


def _one_pixel(graph: OnnxGraph, name: str) -> bool:
    """Whether a tensor is known to be one image of one pixel."""
    for value in graph.proto.graph.value_info:
        if value.name == name:
            batch, _channels, *sizes = value.type.tensor_type.shape.dim
            return all(dim.dim_value == 1 for dim in (batch, *sizes))
    return False


def _channel_axis(node: onnx.NodeProto) -> int | None:
    """Return the axis of a weight's output channels; None where the operator is no layer."""
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1.0, 1.0):
            return None
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "MatMul": 1}.get(node.op_type)


def _check(graph: OnnxGraph) -> None:
    done = [node for node in graph.nodes if node.op_type in QUANTIZATION]
    if done:
        raise ModelRefused(
            f"the model is quantized already: it has {len(done)} quantization operators",
            where=[f"{module_path(node)} ({node.op_type})" for node in done[:3]],
            hint="compile it as it is: its scales are respected; or calibrate the float32 model that it was made of",
        )
    halves = [spec for spec in graph.inputs if spec.dtype == "float16"]
    if halves:
        raise ModelRefused(
            f"the input '{halves[0].name}' is float16: calibration needs the float32 model",
            hint="give the model as it was before it was converted",
        )
