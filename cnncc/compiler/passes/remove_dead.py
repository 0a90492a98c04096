"""Nodes, optional outputs and constants that no output of the graph depends on go."""

from __future__ import annotations

from cnncc.graph.draft import Draft, GraphPass
from cnncc.graph.values import reads

_OPTIONAL = {"MaxPool": 1, "Dropout": 1, "LayerNormalization": 1, "BatchNormalization": 1, "GRU": 0, "LSTM": 0}
"""Operators whose outputs from this position on may be left out when nothing reads them."""


def _remove_dead(draft: Draft) -> int:
    live = draft.output_names()
    kept = []
    for node in reversed(draft.nodes):
        if any(name in live for name in node.output):
            kept.append(node)
            live.update(reads(node))
    removed = len(draft.nodes) - len(kept)
    draft.nodes[:] = reversed(kept)
    for node in draft.nodes:
        first = _OPTIONAL.get(node.op_type, len(node.output))
        while len(node.output) > first and node.output[-1] not in live:
            del node.output[-1]
            removed += 1
    unused = [name for name in draft.weights if name not in live]
    for name in unused:
        del draft.weights[name]
    draft.values = {name: value for name, value in draft.values.items() if name in live}
    return removed + len(unused)


remove_dead = GraphPass("remove_dead", _remove_dead)
"""Drop what no output depends on; inputs of the graph stay."""
