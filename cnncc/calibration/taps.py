"""`Taps`: intermediate tensors of a graph, given out in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.specs import Feeds

_FETCH = 128 << 20
"""Bytes of tensors that one run gives out at most: larger sets are fetched in several runs of the same sample."""


class Taps:
    """Runs a graph and gives out tensors of it; may be used from several threads at once.

    Args:
        graph: Every value's type known.
        tensors: Names of values that the graph takes or makes.
        threads: That compute; 0 for one a core.
        beside: Runs that are made at once and share these threads.
    """

    def __init__(self, graph: OnnxGraph, tensors: Sequence[str], *, threads: int = 1, beside: int = 1) -> None:
        fed = {spec.name for spec in graph.inputs}
        self._fed = [name for name in tensors if name in fed]
        made = [name for name in tensors if name not in fed]
        self._places = {name: module_path(node) for node in graph.nodes for name in node.output}
        self._runs = _parts(graph, made)
        self._reference = Reference(graph, threads=threads, beside=beside, outputs=made) if made else None

    def values(self, feeds: Feeds) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield each tensor's name and value on one sample."""
        for name in self._fed:
            yield name, feeds[name]
        for names in self._runs:
            assert self._reference is not None
            values = self._reference.run(feeds, names)
            for name in names:
                yield name, values.pop(name)

    def place(self, name: str) -> str:
        """Return the PyTorch module that makes a tensor, or the tensor's own name for an input."""
        return self._places.get(name, name)


def _parts(graph: OnnxGraph, names: Sequence[str]) -> list[list[str]]:
    """Split tensors into runs that give out a bounded number of bytes; an unknown size counts as 1."""
    values = {value.name: value for value in (*graph.proto.graph.value_info, *graph.proto.graph.output)}
    parts: list[list[str]] = []
    room = 0
    for name in names:
        size = 4 * int(np.prod([dim.dim_value or 1 for dim in values[name].type.tensor_type.shape.dim]))
        if not parts or size > room:
            parts.append([])
            room = _FETCH
        parts[-1].append(name)
        room -= size
    return parts
