"""Small operations on ONNX protobufs that exporters, readers and passes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import inliner

from cnncc_runtime.errors import ModelRefused

STANDARD_DOMAINS = ("", "ai.onnx")


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in a node's attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of a graph, nested graphs included."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those nested in it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of the values that a node reads, those that its subgraphs read included."""
    yield from (name for name in node.input if name)
    for inner in subgraphs(node):
        for value in inner.output:
            yield value.name
        for nested in inner.node:
            yield from reads(nested)


def values_in_use(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all values, nested graphs included."""
    names: set[str] = set()
    for inner in all_graphs(graph):
        names.update(value.name for value in (*inner.input, *inner.output, *inner.initializer))
        for node in inner.node:
            names.update(node.input)
            names.update(node.output)
    return names - {""}


def rename_reads(node: onnx.NodeProto, mapping: Mapping[str, str]) -> None:
    """Rename what a node reads, in its subgraphs too. ONNX forbids shadowing, so a name means one value."""
    for index, name in enumerate(node.input):
        if name in mapping:
            node.input[index] = mapping[name]
    for inner in subgraphs(node):
        for value in inner.output:
            if value.name in mapping:
                value.name = mapping[value.name]
        for nested in inner.node:
            rename_reads(nested, mapping)


def rename_values(graph: onnx.GraphProto, mapping: Mapping[str, str]) -> None:
    """Rename values of a graph wherever they are defined or read, all at once."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = mapping.get(value.name, value.name)
    for node in graph.node:
        rename_reads(node, mapping)
        for index, name in enumerate(node.output):
            node.output[index] = mapping.get(name, name)


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its local functions expanded, each node's metadata kept.

    Raises:
        ModelRefused: Functions call themselves, or expand beyond reason.
    """
    if not proto.functions:
        return proto
    _check_expansion(proto)
    try:
        return inliner.inline_local_functions(proto)
    except Exception as exc:  # onnx's C++ raises RuntimeError and its own types
        raise ModelRefused(f"the model's local functions cannot be expanded: {exc}") from exc


_MAX_NODES = 1_000_000  # a CNN has thousands; nested functions can ask for 2**n


def _check_expansion(proto: onnx.ModelProto) -> None:
    bodies = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], path: tuple[tuple[str, str], ...]) -> int:
        if key in path or len(path) > 100:
            raise ModelRefused(f"the local function '{key[1]}' calls itself", hint="export the model again")
        if key not in sizes:
            nodes = [n for top in bodies[key].node for n in (top, *(m for g in subgraphs(top) for m in all_nodes(g)))]
            sizes[key] = sum(
                size(call, (*path, key)) if (call := (n.domain, n.op_type)) in bodies else 1 for n in nodes
            )
        return sizes[key]

    total = sum(
        size(call, ()) if (call := (node.domain, node.op_type)) in bodies else 1 for node in all_nodes(proto.graph)
    )
    if total > _MAX_NODES:
        raise ModelRefused(f"the model's local functions expand to {total} nodes", hint="export the model again")
