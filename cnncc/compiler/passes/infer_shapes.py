"""Types and shapes of every value, inferred anew from the inputs."""

from __future__ import annotations

from cnncc.graph.draft import Draft, GraphPass
from cnncc.graph.shapes import infer


def _infer_shapes(draft: Draft) -> int:
    before = len(draft.values)
    draft.values, outputs = infer(draft.skeleton())
    draft.outputs[:] = outputs
    return abs(len(draft.values) - before)


infer_shapes = GraphPass("infer_shapes", _infer_shapes)
"""Strict inference with the values of shape computations; weights are not copied for it."""
