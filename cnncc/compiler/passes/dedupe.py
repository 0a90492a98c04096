"""Constants that are equal, bit for bit, become one."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import onnx
from onnx import numpy_helper

from cnncc.graph.draft import Draft, GraphPass
from cnncc.graph.values import values_in_use


def _dedupe(draft: Draft) -> int:
    alike: dict[tuple[int, tuple[int, ...]], list[str]] = defaultdict(list)
    captured = _captured(draft)
    for name, tensor in draft.weights.items():
        if name not in captured:
            alike[(tensor.data_type, tuple(tensor.dims))].append(name)
    mapping: dict[str, str] = {}
    for names in alike.values():
        if len(names) > 1:
            mapping.update(_same(draft, names))
    draft.rename_reads(mapping)
    for name in mapping:
        del draft.weights[name]
    return len(mapping)


def _captured(draft: Draft) -> set[str]:
    """Names that subgraphs define themselves; they are not the graph's constants."""
    own = {name for node in draft.nodes for name in node.output}
    graph = onnx.GraphProto()
    graph.node.extend(node for node in draft.nodes if any(a.HasField("g") or a.graphs for a in node.attribute))
    return values_in_use(graph) - own if graph.node else set()


def _same(draft: Draft, names: list[str]) -> dict[str, str]:
    first: dict[bytes, str] = {}
    mapping = {}
    for name in names:
        tensor = draft.weights[name]
        data = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
        key = hashlib.sha256(data).digest()
        if key in first:
            mapping[name] = first[key]
        else:
            first[key] = name
    return mapping


dedupe = GraphPass("dedupe", _dedupe)
"""Equal constants become one; the first in order stays."""
