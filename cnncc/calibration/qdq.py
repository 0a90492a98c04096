"""The Q/DQ writer: int8 as standard ONNX, which every target reads and ONNX Runtime can run.

Scales travel in the graph alone. Activations are s8 with zero-point 0, per tensor; weights are stored as s8 with a
DequantizeLinear, per output channel; biases stay float32 (docs/qdq.md says which toolchain demands what).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cnncc.calibration.plan import Layer, Plan, is_mover
from cnncc.calibration.shift import Shift, shiftable
from cnncc.calibration.thresholds import LEVELS, SMALLEST_SCALE
from cnncc.graph.draft import Draft, set_input
from cnncc.graph.names import MODULE_KEY, node_metadata, set_module_path
from cnncc.graph.onnx_graph import OnnxGraph

VALUELESS = ("Shape", "Size")
"""Operators that read no elements: they need no quantized ones."""


def insert_qdq(
    graph: OnnxGraph, plan: Plan, scales: Mapping[str, float], shifts: Mapping[str, Shift] | None = None
) -> OnnxGraph:
    """Return the graph with the plan's layers quantized.

    Args:
        graph: Cleaned, in float32.
        plan: From `cnncc.calibration.plan.plan_for` of this graph.
        scales: A scale for every tensor of the plan's groups.
        shifts: Tensors that are shifted where only layers of this plan read them that can take it up.

    Returns:
        A graph with the same inputs and outputs. Layers outside of the plan read what they read before.
    """
    draft = Draft.of(graph)
    quantized = {name: float(scales[name]) for group in plan.groups for name in group.tensors}
    shifted = taken_shifts(graph, plan, shifts or {})
    quantized |= {name: shift.scale for name, shift in shifted.items()}
    layers = {layer.node: layer for layer in plan.layers}
    pairs: dict[str, list[onnx.NodeProto]] = {}
    moved = {
        name for node in graph.nodes if is_mover(node) and set(node.input) & shifted.keys() for name in node.output
    }
    replaced = {}
    for name, scale in quantized.items():
        amount = shifted[name].amount if name in shifted and name not in moved else 0.0
        replaced[name] = _pair(draft, name, scale, pairs, amount)
    weights: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = [node for value in draft.inputs for node in pairs.get(value.name, ())]
    for node in draft.nodes:
        if node.name not in plan.floating and node.op_type not in VALUELESS:
            for index, name in enumerate(node.input):
                node.input[index] = replaced.get(name, name)
        if node.name in layers:
            layer = layers[node.name]
            if layer.tensor in shifted:
                _take_up(draft, layer, node, shifted[layer.tensor].amount)
            nodes += _dequantized_weight(draft, layer, weights, node)
        nodes.append(node)
        for name in node.output:
            for added in pairs.get(name, ()):
                _inherit(added, node)
                nodes.append(added)
    draft.nodes[:] = nodes
    for name in draft.weights.keys() - draft.uses().keys():
        del draft.weights[name]
    return draft.close()


def quantize_weight(array: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights per output channel, symmetric, to −127…127.

    Args:
        array: float32.
        axis: Of the output channels.

    Returns:
        int8 of the same shape, and a float32 scale per channel.
    """
    others = tuple(index for index in range(array.ndim) if index != axis)
    largest = np.abs(array).max(axis=others, initial=0.0).astype(np.float64)
    scales = np.maximum(largest / LEVELS, SMALLEST_SCALE).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(array.ndim)]
    steps = np.rint(array / scales.reshape(shape))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales


def taken_shifts(graph: OnnxGraph, plan: Plan, shifts: Mapping[str, Shift]) -> dict[str, Shift]:
    """Return tensor → shift, of the groups that can be shifted in a plan.

    Args:
        graph: In float32.
        plan: Of this graph.
        shifts: Those that are wanted.
    """
    able = shiftable(graph, plan)
    return {
        name: shifts[name]
        for group in plan.groups
        if group.tensors[0] in able and group.tensors[0] in shifts
        for name in group.tensors
    }


def _take_up(draft: Draft, layer: Layer, node: onnx.NodeProto, amount: float) -> None:
    """Add c·ΣW to a layer's bias: what its shifted input lacks.

    Of the rounded weights: where x is zero, as half of what a ReLU gives, their rounding then costs nothing.
    """
    weight = draft.array(layer.weight)
    assert weight is not None
    integers, scales = quantize_weight(weight, layer.axis)
    others = tuple(index for index in range(weight.ndim) if index != layer.axis)
    bias = amount * scales.astype(np.float64) * integers.sum(axis=others, dtype=np.int64)
    if len(node.input) > 2 and node.input[2]:  # by the node: correction gave it a bias that the plan knows nothing of
        bias = bias + draft.array(node.input[2])
    name = draft.fresh(f"{layer.output}_bias_shifted")
    draft.set_constant(name, bias.astype(np.float32))
    set_input(node, 2, name)


def _pair(draft: Draft, name: str, scale: float, pairs: dict[str, list[onnx.NodeProto]], amount: float) -> str:
    """Make a tensor's Q and DQ nodes, after a shift where there is one, and return the name of what comes out."""
    step, zero = draft.fresh(f"{name}_scale"), draft.fresh(f"{name}_zero_point")
    integers, floats = draft.fresh(f"{name}_quantized"), draft.fresh(f"{name}_dequantized")
    draft.set_constant(step, np.float32(scale).reshape(()))
    draft.set_constant(zero, np.int8(0).reshape(()))
    source = name
    pairs[source] = []
    if amount:
        constant, centred = draft.fresh(f"{name}_shift"), draft.fresh(f"{name}_shifted")
        draft.set_constant(constant, np.float32(amount).reshape(()))
        pairs[source].append(helper.make_node("Sub", [name, constant], [centred], name=f"{centred}_node"))
        name = centred
    pairs[source] += [
        helper.make_node("QuantizeLinear", [name, step, zero], [integers], name=f"{integers}_node"),
        helper.make_node("DequantizeLinear", [integers, step, zero], [floats], name=f"{floats}_node"),
    ]
    return floats


def _dequantized_weight(
    draft: Draft, layer: Layer, made: dict[tuple[str, int], str], node: onnx.NodeProto
) -> list[onnx.NodeProto]:
    """Have a layer read int8 weights; return the node that dequantizes them, unless another layer has it."""
    key = (layer.weight, layer.axis)
    if key in made:
        node.input[1] = made[key]
        return []
    array = draft.array(layer.weight)
    assert array is not None
    integers, scales = quantize_weight(array, layer.axis)
    stored, step = draft.fresh(f"{layer.weight}_quantized"), draft.fresh(f"{layer.weight}_scale")
    zero, floats = draft.fresh(f"{layer.weight}_zero_point"), draft.fresh(f"{layer.weight}_dequantized")
    draft.set_constant(stored, integers)
    draft.set_constant(step, scales)
    draft.set_constant(zero, np.zeros(scales.shape, np.int8))
    added = helper.make_node("DequantizeLinear", [stored, step, zero], [floats], name=f"{floats}_node", axis=layer.axis)
    _inherit(added, node)
    node.input[1] = made[key] = floats
    return [added]


def _inherit(added: onnx.NodeProto, node: onnx.NodeProto) -> None:
    """Give a new node the module of the one that it belongs to."""
    path = node_metadata(node, MODULE_KEY)
    if path is not None:
        set_module_path(added, path)
