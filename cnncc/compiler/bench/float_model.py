"""The float32 model behind a Q/DQ one: what a peer that quantizes for itself starts from.

Weights become the floats that they stand for, pairs of QuantizeLinear and DequantizeLinear go, and so do shifts
(`cnncc.calibration.shift`): W·(x − c) + b = W·x + (b − c·ΣW).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import onnx
from onnx import helper

from cnncc.calibration.plan import is_mover
from cnncc.graph.draft import Draft, attribute, set_input
from cnncc.graph.exact_ops import dequantize_linear
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.values import reads

_Tensor = tuple[str, float]
"""A tensor of the float model, and what is to be subtracted from it."""


def float_model(graph: OnnxGraph) -> OnnxGraph:
    """Return a graph without its Q/DQ; one that has none comes back as it is.

    Args:
        graph: Cleaned. Integers that are not read by a DequantizeLinear stay what they are.
    """
    if not any(node.op_type == "DequantizeLinear" for node in graph.nodes):
        return graph
    return _Walk(Draft.of(graph)).run()


@dataclass
class _Walk:
    """One walk over a graph, from its inputs to its outputs.

    Attributes:
        draft: The graph.
        stands: Value → what stands for it; the value itself where it is missing.
        nodes: Of the float model.
    """

    draft: Draft
    stands: dict[str, _Tensor] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def run(self) -> OnnxGraph:
        """Return the float model."""
        readers, outputs = self.draft.readers(), self.draft.output_names()
        rounded: dict[str, onnx.NodeProto] = {}
        for node in self.draft.nodes:
            if node.op_type == "DequantizeLinear":
                if (made := rounded.get(node.input[0])) is not None and self._undoes(node, made):
                    self.stands[node.output[0]] = self._tensor(made.input[0])
                    continue
                if self._folded(node):
                    continue
            if node.op_type == "Sub" and _only(readers.get(node.output[0], []), "QuantizeLinear"):
                amount = self.draft.array(node.input[1])
                if amount is not None and amount.size == 1:
                    source, before = self._tensor(node.input[0])
                    self.stands[node.output[0]] = (source, before + float(amount.reshape(())))
                    continue
            if node.op_type == "QuantizeLinear":
                rounded[node.output[0]] = onnx.NodeProto.FromString(node.SerializeToString())  # as it was before
            self._keep(node)
        self.nodes += [self._copy(name, name) for name in sorted(outputs & self.stands.keys())]
        self.draft.nodes[:] = self._alive(outputs)
        for name in self.draft.weights.keys() - self.draft.uses().keys():
            del self.draft.weights[name]
        return self.draft.close()

    def _tensor(self, name: str) -> _Tensor:
        return self.stands.get(name, (name, 0.0))

    def _undoes(self, dequantize: onnx.NodeProto, quantize: onnx.NodeProto) -> bool:
        """Whether two nodes have the same scale and zero-point."""

        def equal(one: str, two: str) -> bool:
            first, second = self.draft.array(one), self.draft.array(two)
            return one == two or (first is not None and second is not None and np.array_equal(first, second))

        pairs = zip_longest(dequantize.input[1:], quantize.input[1:], fillvalue="")
        return all(equal(one, two) for one, two in pairs)

    def _folded(self, node: onnx.NodeProto) -> bool:
        """Make a constant of what a node dequantizes; say whether it could be done."""
        names = [*node.input, ""][:3]
        integers, scale, zero = (self.draft.array(name) for name in names)
        if integers is None or scale is None or (names[2] and zero is None):
            return False
        floats = dequantize_linear(integers, np.float64(scale), zero, axis=int(attribute(node, "axis", 1)))
        self.draft.set_constant(node.output[0], floats.astype(np.float32))
        return True

    def _keep(self, node: onnx.NodeProto) -> None:
        """Have a node read the float model's tensors: as they are where it can make up for what is subtracted."""
        amounts = {self._tensor(name)[1] for name in node.input if name and name not in self.draft.weights}
        moves = is_mover(node) and not self.draft.output_names().intersection(node.output)
        moved = next(iter(amounts)) if moves and len(amounts) == 1 else 0.0
        for index, name in enumerate(list(node.input)):
            source, amount = self._tensor(name)
            if amount and not moved and not (index == 0 and self._take_back(node, amount)):
                source = self.draft.fresh(f"{name}_float")
                self.nodes.append(self._copy(name, source))
            if name in self.stands:
                node.input[index] = source
        if moved:
            self.stands |= {name: (name, moved) for name in node.output if name}
        self.nodes.append(node)

    def _take_back(self, node: onnx.NodeProto, amount: float) -> bool:
        """Subtract c·ΣW from a layer's bias; say whether the layer has one that can take it."""
        axis = 0
        if node.op_type == "Gemm":
            axis = 0 if attribute(node, "transB", 0) else 1
        if not _is_plain(node):
            return False
        weight = self.draft.array(node.input[1])
        bias = self.draft.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.float32(0)
        if weight is None or bias is None:
            return False
        sums = weight.sum(axis=tuple(n for n in range(weight.ndim) if n != axis), dtype=np.float64)
        name = self.draft.fresh(f"{node.output[0]}_bias_float")
        self.draft.set_constant(name, (bias - amount * sums).astype(np.float32))
        set_input(node, 2, name)
        return True

    def _copy(self, name: str, result: str) -> onnx.NodeProto:
        """Return the node that computes a value from what stands for it."""
        source, amount = self._tensor(name)
        if not amount:
            return helper.make_node("Identity", [source], [result], name=f"{result}_node")
        constant = self.draft.fresh(f"{result}_amount")
        self.draft.set_constant(constant, np.float32(amount).reshape(()))
        return helper.make_node("Sub", [source, constant], [result], name=f"{result}_node")

    def _alive(self, outputs: set[str]) -> list[onnx.NodeProto]:
        """Return the nodes that somebody reads: a QuantizeLinear may have lost its readers."""
        wanted = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(reads(node))
                kept.append(node)
        return kept[::-1]


def _only(readers: list[onnx.NodeProto], op: str) -> bool:
    return bool(readers) and all(node.op_type == op for node in readers)


def _is_plain(node: onnx.NodeProto) -> bool:
    """Whether a node is W·x + b with no pixel padded."""
    if node.op_type == "Conv":
        return not any(attribute(node, "pads", [])) and attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    return node.op_type == "Gemm" and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
