"""ONNX → a strongly typed network of TensorRT, and which nodes its parser refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import NodeIssue
from cnncc.targets.cuda.vendors import Chosen
from cnncc_runtime.errors import BuildFailed, UnsupportedGraph
from cnncc_runtime.plan_library import logger_of

_LISTABLE = re.compile(r"[ -!#-Z^-~]+")
"""Names that a listing of kernels can hold between quotes and brackets: printable ASCII, but none of ``"[]\\``."""


@dataclass(frozen=True, eq=False)
class Parsed:
    """A network, with all that must outlive it.

    Attributes:
        network: ``INetworkDefinition``.
        builder: Made it.
        logger: Keeps what went wrong.
        parser: Owns the weights.
        names: Names of its layers' nodes → labels of the graph's nodes; those that differ.
    """

    network: Any
    builder: Any
    logger: Any
    parser: Any
    names: dict[str, str]


def parse(graph: OnnxGraph, trt: Any, chosen: Chosen) -> Parsed:
    """Parse a graph into a network.

    Raises:
        UnsupportedGraph: Lists every refused node.
        BuildFailed: The library does not start, or the parser refuses the graph without saying where.
    """
    proto, names = _with_listable_names(graph)
    found = _parse(proto, trt, chosen)
    if isinstance(found, Parsed):
        return Parsed(found.network, found.builder, found.logger, found.parser, names)
    issues = refused(graph, trt, chosen)
    if not issues:
        reason = found.errors[0].reason if found.errors else "it does not say why"
        raise BuildFailed(
            f"the parser of {chosen} failed: {reason}",
            hint="report it with the model; `cnncc export` writes the graph that it refused",
        )
    raise unsupported_graph(issues, chosen)


def unsupported_graph(issues: tuple[NodeIssue, ...], chosen: Chosen) -> UnsupportedGraph:
    """Return the error that lists refused nodes."""
    count = "1 node" if len(issues) == 1 else f"{len(issues)} nodes"
    return UnsupportedGraph(
        f"{chosen} cannot build {count} of the graph",
        where=[str(issue) for issue in issues],
        hint="replace these operators in the module, or compile for a CPU: --target llvm",
    )


def refused(graph: OnnxGraph, trt: Any, chosen: Chosen) -> tuple[NodeIssue, ...]:
    """List every node that the parser refuses, in the graph's order.

    A parser stops at the first node that it refuses. So refused nodes are cut out, what they compute becomes an input,
    and the rest is parsed again, until nothing is refused. What has no known shape cannot become an input: what reads
    it is left out with it, and then says nothing.

    Raises:
        BuildFailed: The library does not start.
    """
    order = {node_label(node): index for index, node in enumerate(graph.nodes)}
    found: dict[str, NodeIssue] = {}
    rest = graph.copy_proto()
    operators = _unknown_operators(graph, trt, chosen)
    for node in graph.nodes:
        if node.op_type in operators:
            found[node_label(node)] = _issue(node, f"{chosen} has no operator {node.op_type}")
    cut: set[str] = set(found)
    while True:
        _cut_out(rest, cut)
        if not rest.graph.node:
            break
        parsed = _parse(rest, trt, chosen)
        if isinstance(parsed, Parsed):
            break
        nodes = {node_label(node): node for node in rest.graph.node}
        named = {label: error.reason for error in parsed.errors if (label := error.label(rest)) in nodes}
        if not named:
            break
        found |= {label: _issue(nodes[label], reason) for label, reason in named.items()}
        cut = set(named)
    return tuple(found[label] for label in sorted(found, key=lambda label: order[label]))


@dataclass(frozen=True)
class _Error:
    """What the parser says of one node."""

    node: int
    name: str
    reason: str

    def label(self, proto: onnx.ModelProto) -> str:
        """Return the label of the node of the top graph that it is about; empty where it is about none."""
        labels = [node_label(node) for node in proto.graph.node]
        if self.name in labels:
            return self.name
        return labels[self.node] if 0 <= self.node < len(labels) else ""


@dataclass(frozen=True)
class _Refused:
    errors: tuple[_Error, ...]


def _parse(proto: onnx.ModelProto, trt: Any, chosen: Chosen) -> Parsed | _Refused:
    logger = logger_of(trt)
    builder = _builder(trt, logger, chosen)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse(OnnxGraph(proto).serialized):
        return Parsed(network, builder, logger, parser, {})
    return _Refused(tuple(_errors(parser)))


def _builder(trt: Any, logger: Any, chosen: Chosen) -> Any:
    try:
        return trt.Builder(logger)
    except Exception as exc:  # pybind: TypeError, "factory function returned nullptr", without a driver or a GPU
        said = logger.errors[-1] if logger.errors else str(exc)
        raise BuildFailed(f"{chosen} does not start: {said}", hint="`cnncc doctor` says what is here") from exc


def _errors(parser: Any) -> Iterator[_Error]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield _Error(int(error.node()), str(error.node_name()), readable(str(error.desc())))


def readable(text: str) -> str:
    """Return the parser's words without the C++ condition before them.

    ``Assertion failed: a && b == C::kV3: plugin was not found.`` → ``plugin was not found``.
    """
    kept = text.strip()
    if kept.startswith("Assertion failed: "):
        _condition, colon, words = kept.removeprefix("Assertion failed: ").partition(": ")
        kept = words if colon and words.strip() else kept
    return kept.strip().rstrip(".")


def _unknown_operators(graph: OnnxGraph, trt: Any, chosen: Chosen) -> set[str]:
    """Return the operators of a graph that the parser has not at all: cut out at once, not in a round each."""
    logger = logger_of(trt)
    builder = _builder(trt, logger, chosen)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    return {op for op in {node.op_type for node in graph.nodes} if not parser.supports_operator(op)}


def _issue(node: onnx.NodeProto, reason: str) -> NodeIssue:
    return NodeIssue(module_path(node), node_label(node), node.op_type, reason)


def _cut_out(proto: onnx.ModelProto, labels: set[str]) -> None:
    """Take nodes out of a graph; what they compute becomes an input, or takes its readers along."""
    graph = proto.graph
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    gone: set[str] = set()
    kept: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    for node in graph.node:
        if node_label(node) not in labels and not gone.intersection(_reads(node)):
            kept.append(node)
            continue
        for name in filter(None, node.output):
            if node_label(node) in labels and _has_shape(values.get(name)):
                inputs.append(values[name])
            else:
                gone.add(name)
    made = {name for node in kept for name in node.output} | {tensor.name for tensor in graph.initializer}
    made |= {value.name for value in graph.input}
    read = {name for node in kept for name in _reads(node)}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.extend(value for value in inputs if value.name in read and value.name not in made)
    outputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.output if v.name in made]
    del graph.output[:]
    graph.output.extend(outputs)


def _reads(node: onnx.NodeProto) -> list[str]:
    nested = [inner for attribute in node.attribute for inner in (attribute.g, *attribute.graphs)]
    return [*node.input, *(name for graph in nested for inner in graph.node for name in _reads(inner))]


def _has_shape(value: onnx.ValueInfoProto | None) -> bool:
    return value is not None and value.type.tensor_type.HasField("shape")


def _with_listable_names(graph: OnnxGraph) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return the model, its nodes renamed where a listing could not hold their names, and new name → label."""
    nodes = graph.nodes
    taken = {node.name for node in nodes}
    renamed: dict[int, str] = {}
    for index, node in enumerate(nodes):
        if not _LISTABLE.fullmatch(node.name):
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            taken.add(name)
            renamed[index] = name
    if not renamed:
        return graph.proto, {}
    proto = graph.copy_proto()
    for index, name in renamed.items():
        proto.graph.node[index].name = name
    return proto, {name: node_label(nodes[index]) for index, name in renamed.items()}
