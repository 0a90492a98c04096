"""A graph as the lint sees it: which values are quantized where, and which layers multiply them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from cnncc.graph.draft import Draft, attribute
from cnncc.graph.names import MODULE_KEY, exporter_module_path, node_metadata
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.values import STANDARD_DOMAINS, reads

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that are worth computing in int8."""

MOVING = frozenset(
    {
        "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherND", "GlobalMaxPool", "Identity", "MaxPool",
        "Pad", "ReduceMax", "ReduceMin", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
"""Operators that select or move values: between a DequantizeLinear and a layer, the layer still computes in int8
(TensorRT-RTX 1.7.1, each probed)."""

MERGING = frozenset({"Concat", "Max", "Min"})
"""As `MOVING`, of several tensors, where their scales are equal."""


class Flow(NamedTuple):
    """What is known of a value.

    Attributes:
        constant: Computed from constants alone.
        quantizer: Where it is integer: the QuantizeLinear it came from.
        dequantizer: Where it is float: the DequantizeLinear it came from, through moving operators at most.
        step: The moving operator that made it.
        before: The flow that `step` read.
        stop: The operator that made it, where that is not a moving one.
        behind: Whether `stop` reads a dequantized value.
    """

    constant: bool = False
    quantizer: onnx.NodeProto | None = None
    dequantizer: onnx.NodeProto | None = None
    step: onnx.NodeProto | None = None
    before: Any = None
    stop: onnx.NodeProto | None = None
    behind: bool = False


UNKNOWN = Flow()


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or a product.

    Attributes:
        node: The ONNX node.
        data: Its activations.
        weight: Its weights, or the other activations of a product of two.
        weight_index: Which input the weights are.
    """

    node: onnx.NodeProto
    data: Flow
    weight: Flow
    weight_index: int

    @property
    def whole(self) -> bool:
        """Whether both operands are quantized."""
        return self.data.dequantizer is not None and self.weight.dequantizer is not None


class View:
    """Reads a graph once, in topological order; nested graphs are not entered.

    Args:
        graph: Any graph; one without Q/DQ has nothing to find.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self._draft = Draft.of(graph)
        self.opset = graph.opset
        self.nodes = self._draft.nodes
        self.producers = self._draft.producers()
        self.readers = self._draft.readers()
        self._flows: dict[str, Flow] = {name: Flow(constant=True) for name in self._draft.weights}
        for node in self.nodes:
            flow = self._flow(node)
            self._flows.update((name, flow) for name in node.output if name)

    # ---- nodes

    def quantizers(self) -> Iterator[onnx.NodeProto]:
        """Yield each QuantizeLinear."""
        return (node for node in self.nodes if is_standard(node, QUANTIZE))

    def dequantizers(self) -> Iterator[onnx.NodeProto]:
        """Yield each DequantizeLinear."""
        return (node for node in self.nodes if is_standard(node, DEQUANTIZE))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Convolutions and products, in order."""
        return tuple(self._layer(node) for node in self.nodes if is_standard(node, *LAYERS) and len(node.input) > 1)

    @cached_property
    def output_names(self) -> set[str]:
        """Names of the graph's outputs."""
        return self._draft.output_names()

    def anchor(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Return the node whose module a user knows: of a Q or DQ without one, the first layer that reads it."""
        if node_metadata(node, MODULE_KEY) is not None or exporter_module_path(node) is not None:
            return node
        return self._anchors.get(id(node), node)

    @cached_property
    def _anchors(self) -> dict[int, onnx.NodeProto]:
        found: dict[int, onnx.NodeProto] = {}
        for layer in self.layers:
            for name in layer.node.input:
                dequantizer = self.flow(name).dequantizer
                pair = [] if dequantizer is None else [dequantizer, self.pair(dequantizer)]
                for node in pair:
                    if node is not None:
                        found.setdefault(id(node), layer.node)
        return found

    # ---- values

    def flow(self, name: str) -> Flow:
        """Return what is known of a value."""
        return self._flows.get(name, UNKNOWN)

    def moved(self, node: onnx.NodeProto) -> bool:
        """Whether a node moves dequantized values, so that layers behind it are in int8 still."""
        return any(self.flow(name).step is node and self.flow(name).dequantizer is not None for name in node.output)

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """Return a value's shape as `Draft.shape` does."""
        return self._draft.shape(name)

    def array(self, name: str) -> NDArray[Any] | None:
        """Return a constant's value; None where it is not one, or would have to be computed."""
        array = self._draft.array(name)
        producer = self.producers.get(name)
        if array is not None or producer is None or not is_standard(producer, "Constant"):
            return array
        value = next(iter(producer.attribute), None)
        if value is None or value.name.startswith("sparse") or value.name.startswith("value_string"):
            return None
        given = onnx.helper.get_attribute_value(value)
        return numpy_helper.to_array(given) if isinstance(given, TensorProto) else np.asarray(given)

    def pair(self, dequantizer: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the QuantizeLinear whose integers a DequantizeLinear reads."""
        return self.flow(dequantizer.input[0]).quantizer

    # ---- parameters of Q and DQ

    def scale(self, node: onnx.NodeProto) -> NDArray[np.float64] | None:
        """Return the scale, of any rank; None where it is not a known constant."""
        array = self.array(node.input[1])
        return None if array is None else np.asarray(array).astype(np.float64)

    def zero_point(self, node: onnx.NodeProto) -> NDArray[Any] | None:
        """Return the zero-point; None where there is none, or it is not a known constant."""
        return self.array(node.input[2]) if has_zero_point(node) else None

    def integer_type(self, node: onnx.NodeProto) -> int:
        """Return the ONNX element type that a Q makes or a DQ reads; 0 where it is unknown.

        A QuantizeLinear that does not say makes uint8 (ONNX operator specification).
        """
        if node.op_type == DEQUANTIZE:
            quantizer = self.pair(node)
            return self._type(node.input[0]) if quantizer is None else self.integer_type(quantizer)
        if has_zero_point(node):
            return self._type(node.input[2])
        return int(attribute(node, "output_dtype", 0)) or int(TensorProto.UINT8)

    def _type(self, name: str) -> int:
        array = None if name in self._draft.weights else self.array(name)
        return self._draft.dtype(name) if array is None else onnx.helper.np_dtype_to_tensor_dtype(array.dtype)

    def dynamic(self, node: onnx.NodeProto) -> bool:
        """Whether a DQ takes its parameters from DynamicQuantizeLinear."""
        producer = self.producers.get(node.input[1])
        return producer is not None and is_standard(producer, "DynamicQuantizeLinear")

    def per_channel(self, node: onnx.NodeProto) -> bool:
        """Whether a Q or DQ has a scale for each of several channels."""
        shape = self.shape(node.input[1])
        array = self.array(node.input[1]) if shape is None else None
        sizes = array.shape if array is not None else shape
        return sizes is not None and any(size != 1 for size in sizes)

    def same_parameters(self, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
        """Whether two Q or DQ have equal scales; True where a scale is not known."""
        if one.input[1] == other.input[1]:
            return True
        scales = self.scale(one), self.scale(other)
        if scales[0] is None or scales[1] is None:
            return True
        return bool(np.array_equal(scales[0].ravel(), scales[1].ravel()))

    def weight_axis(self, layer: Layer) -> int | None:
        """Return the axis of the layer's own weight that per-channel scales run along; None where that is not known."""
        flow, node = layer.weight, layer.weight.dequantizer
        if node is None or not self.per_channel(node) or attribute(node, "block_size", 0):
            return None
        shape = self.shape(node.input[0])
        if shape is None:
            return None
        axis = int(attribute(node, "axis", 1))
        axis += len(shape) if axis < 0 else 0
        for step in _steps(flow):
            moved = self._moved(axis, step)
            if moved is None:
                return None
            axis = moved
        return axis

    # ---- construction

    def _flow(self, node: onnx.NodeProto) -> Flow:
        inputs = [self.flow(name) for name in reads(node)]
        constant = all(flow.constant for flow in inputs) and (bool(inputs) or node.op_type == "Constant")
        first = inputs[0] if inputs else UNKNOWN
        if is_standard(node, QUANTIZE):
            return Flow(first.constant, quantizer=node)
        if is_standard(node, DEQUANTIZE):
            return Flow(first.constant, dequantizer=node)
        if is_standard(node, *MOVING) and (first.quantizer or first.dequantizer) and self._moves(node):
            return Flow(constant, first.quantizer, first.dequantizer, node, first)
        if is_standard(node, *MERGING) and self._equal(inputs):
            return Flow(constant, first.quantizer, first.dequantizer, node, first)
        return Flow(constant, stop=node, behind=any(flow.dequantizer is not None for flow in inputs))

    def _equal(self, flows: list[Flow]) -> bool:
        nodes = [flow.quantizer or flow.dequantizer for flow in flows]
        known = [node for node in nodes if node is not None]
        if len(known) < max(len(nodes), 1) or len({node.op_type for node in known}) > 1:
            return False
        return all(self.same_parameters(known[0], node) for node in known[1:])

    def _moves(self, node: onnx.NodeProto) -> bool:
        """Whether an operator moves values as it stands: a Pad with constants does where a convolution takes it over.

        TensorRT-RTX 1.7.1 makes zeros around an image part of the one convolution that reads it; else it pads in float.
        """
        while node.op_type == "Pad" and attribute(node, "mode", b"constant") == b"constant":
            pads, readers = self._pads(node), self.readers.get(node.output[0], [])
            alone = len(readers) == 1 and node.output[0] not in self.output_names
            if pads is None or any(pads[:2]) or any(pads[len(pads) // 2 :][:2]) or not alone:
                return False
            if is_standard(readers[0], "Conv"):
                return bool(readers[0].input[0] == node.output[0])
            if not is_standard(readers[0], "Pad"):
                return False
            node = readers[0]
        return True

    def _pads(self, node: onnx.NodeProto) -> list[int] | None:
        """Return what a Pad of zeros adds to each axis, first before and then behind; None for another Pad."""
        value = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
        pads = self.array(node.input[1]) if len(node.input) == 2 or not any(node.input[3:]) else None
        return None if pads is None or value is None or np.any(value) else [int(size) for size in pads]

    def _layer(self, node: onnx.NodeProto) -> Layer:
        flows = [self.flow(name) for name in node.input[:2]]
        index = 0 if node.op_type == "MatMul" and flows[0].constant and not flows[1].constant else 1
        return Layer(node, flows[1 - index], flows[index], index)

    def _moved(self, axis: int, step: onnx.NodeProto) -> int | None:
        """Return where an operator on weights moves an axis to."""
        if step.op_type == "Identity":
            return axis
        if step.op_type == "Transpose":
            shape = self.shape(step.input[0])
            permutation = list(attribute(step, "perm", None) or reversed(range(len(shape or ()))))
            return permutation.index(axis) if axis in permutation else None
        before, after = self.shape(step.input[0]), self.shape(step.output[0])
        kept = before is not None and after is not None and before[: axis + 1] == after[: axis + 1]
        return axis if step.op_type == "Reshape" and kept else None


def is_standard(node: onnx.NodeProto, *operators: str) -> bool:
    """Whether a node is one of these operators of ONNX itself."""
    return node.op_type in operators and node.domain in STANDARD_DOMAINS


def has_zero_point(node: onnx.NodeProto) -> bool:
    """Whether a Q or DQ is given a zero-point."""
    return len(node.input) > 2 and bool(node.input[2])


def _steps(flow: Flow) -> list[onnx.NodeProto]:
    """Return the moving operators between a DequantizeLinear and a value, in order."""
    steps = []
    while flow.step is not None:
        steps.append(flow.step)
        flow = flow.before
    return steps[::-1]
