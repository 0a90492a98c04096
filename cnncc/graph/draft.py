"""`Draft`: a graph opened for change, and `GraphPass`, which makes a pure function of a change.

A protobuf copies whatever is put into it, so a pass that went from `OnnxGraph` to `OnnxGraph` would copy every
weight. A draft holds nodes of its own and refers to the source's weights; passes in a row share one draft, and
weights are copied once, when it is closed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.shapes import byte_count, skeleton
from cnncc.graph.values import reads, rename_reads, subgraphs, values_in_use
from cnncc_runtime.errors import ModelRefused

STANDARD = ("", "ai.onnx")

MOST_BYTES = 2**31 - 2**24
"""Bytes of constants that a graph may have in all: one protobuf holds 2 GiB, nodes and names included."""


@dataclass
class Draft:
    """A graph that passes change in place.

    Attributes:
        source: What it was opened from; never changed.
        nodes: Own copies, in topological order.
        weights: Initializers by name; the protobufs are shared with the source, so they are replaced, never edited.
        inputs: Of the graph, initializers excluded.
        outputs: Of the graph.
        values: Types and shapes known, by name.
    """

    source: OnnxGraph
    nodes: list[onnx.NodeProto]
    weights: dict[str, onnx.TensorProto]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    values: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: OnnxGraph) -> Draft:
        """Open a graph."""
        own = graph.proto.graph
        weights = {tensor.name: tensor for tensor in own.initializer}
        return cls(
            graph,
            [_copy(node) for node in own.node],
            weights,
            [_copy(value) for value in own.input if value.name not in weights],
            [_copy(value) for value in own.output],
            {value.name: _copy(value) for value in own.value_info},
        )

    def close(self) -> OnnxGraph:
        """Return the graph as it is now: the one place where weights are copied.

        Raises:
            ModelRefused: It exceeds 2 GiB.
        """
        if sum(byte_count(tensor) for tensor in self.weights.values()) >= MOST_BYTES:
            raise ModelRefused("the model's weights exceed 2 GiB, more than one ONNX file can hold")
        header = self.source.proto
        proto = onnx.ModelProto(
            ir_version=max(header.ir_version, 4),
            producer_name=header.producer_name,
            producer_version=header.producer_version,
        )
        proto.opset_import.extend(header.opset_import)
        graph = proto.graph
        graph.name = header.graph.name or "main_graph"
        graph.node.extend(self.nodes)
        graph.input.extend(self.inputs)
        graph.output.extend(self.outputs)
        for name in self.weights:
            graph.initializer.append(self.weights[name])
        made = {name for node in self.nodes for name in node.output} - {value.name for value in self.outputs}
        graph.value_info.extend(self.values[name] for name in sorted(self.values.keys() & made))
        return OnnxGraph(proto)

    def skeleton(self) -> onnx.ModelProto:
        """Return the graph without large weights, for shape inference."""
        return skeleton(self.source.proto, self.nodes, self.weights.values(), self.inputs, self.outputs)

    # ---- reading

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.source.opset

    @cached_property
    def _all_names(self) -> set[str]:
        return values_in_use(self.source.proto.graph)

    def output_names(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.outputs}

    def input_names(self) -> set[str]:
        """Names of the graph's inputs."""
        return {value.name for value in self.inputs}

    def producers(self) -> dict[str, onnx.NodeProto]:
        """Return value → the node that makes it."""
        return {name: node for node in self.nodes for name in node.output if name}

    def uses(self) -> Counter[str]:
        """Return value → times it is read, by subgraphs and as an output of the graph included."""
        counts: Counter[str] = Counter(value.name for value in self.outputs)
        for node in self.nodes:
            counts.update(reads(node))
        return counts

    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """Return value → the nodes that read it, a node once per reading."""
        found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in reads(node):
                found[name].append(node)
        return found

    def array(self, name: str) -> NDArray[Any] | None:
        """Return a constant's value, or None where the name is not one."""
        tensor = self.weights.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def value(self, name: str) -> onnx.ValueInfoProto | None:
        """Return what is known of a value that is not a constant."""
        if name in self.values:
            return self.values[name]
        return next((value for value in (*self.inputs, *self.outputs) if value.name == name), None)

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """Return a value's shape: sizes, symbols, None for an unknown size; None where even the rank is unknown."""
        if name in self.weights:
            return tuple(self.weights[name].dims)
        value = self.value(name)
        if value is None or not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            return None
        dims = value.type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims)

    def static_shape(self, name: str) -> tuple[int, ...] | None:
        """Return a value's shape where every size is known."""
        shape = self.shape(name)
        if shape is None or not all(isinstance(size, int) for size in shape):
            return None
        return tuple(size for size in shape if isinstance(size, int))

    def dtype(self, name: str) -> int:
        """Return a value's ONNX element type; 0 where it is unknown."""
        if name in self.weights:
            return int(self.weights[name].data_type)
        value = self.value(name)
        return 0 if value is None else int(value.type.tensor_type.elem_type)

    # ---- changing

    def fresh(self, name: str) -> str:
        """Return a value name that nothing bears, near the one given; the same on every run."""
        candidate, count = name, 0
        while candidate in self._all_names or candidate in self.weights:
            count += 1
            candidate = f"{name}_{count}"
        self._all_names.add(candidate)
        return candidate

    def set_constant(self, name: str, array: NDArray[Any]) -> None:
        """Add or replace a constant."""
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)

    def drop(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Drop these nodes."""
        gone = {id(node) for node in nodes}
        self.nodes[:] = [node for node in self.nodes if id(node) not in gone]

    def rename_reads(self, mapping: Mapping[str, str]) -> None:
        """Make every node read other values; chains (a → b, b → c) are followed."""
        final = {name: _follow(name, mapping) for name in mapping}
        for node in self.nodes:
            if any(name in final for name in node.input) or any(True for _ in subgraphs(node)):
                rename_reads(node, final)


def _follow(name: str, mapping: Mapping[str, str]) -> str:
    while name in mapping:
        name = mapping[name]
    return name


def _copy(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


@dataclass(frozen=True)
class GraphPass:
    """A change made into a pure function of graphs.

    Attributes:
        name: As reports and errors call it.
        change: Changes a draft in place and returns how many things it changed.
        exact: Whether outputs stay bit for bit the same; else they may differ by rounding.
    """

    name: str
    change: Callable[[Draft], int]
    exact: bool = True

    def __call__(self, graph: OnnxGraph) -> OnnxGraph:
        """Return the changed graph; the one given stays as it is."""
        draft = Draft.of(graph)
        self.change(draft)
        return draft.close()


def set_input(node: onnx.NodeProto, index: int, name: str) -> None:
    """Set one of a node's inputs, optional ones that it did not have included."""
    node.input.extend([""] * (index + 1 - len(node.input)))
    node.input[index] = name


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return a node's attribute as a Python value."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default
