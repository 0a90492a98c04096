"""Nodes that return their input unchanged go: Identity, Dropout, casts and reshapes to what is there already."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from cnncc.graph.draft import STANDARD, Draft, GraphPass, attribute


def _remove_identity(draft: Draft) -> int:
    """Join each idle node's input and output; a name that the graph's interface knows stays."""
    removed = 0
    inputs, outputs = draft.input_names(), draft.output_names()
    producers = draft.producers()
    mapping: dict[str, str] = {}
    idle: list[onnx.NodeProto] = []
    for node in draft.nodes:
        if node.domain not in STANDARD or not _is_idle(draft, node):
            continue
        source, target = _end(node.input[0], mapping), node.output[0]
        if target not in outputs:
            mapping[target] = source
            idle.append(node)
        elif source not in inputs and source not in outputs and source not in draft.weights and source in producers:
            maker = producers[source]
            maker.output[list(maker.output).index(source)] = target
            mapping[source] = target
            producers[target] = maker
            idle.append(node)
    removed += len(idle)
    draft.drop(idle)
    draft.rename_reads(mapping)
    return removed


def _end(name: str, mapping: dict[str, str]) -> str:
    while name in mapping:
        name = mapping[name]
    return name


def _is_idle(draft: Draft, node: onnx.NodeProto) -> bool:
    check = _CHECKS.get(node.op_type)
    if check is None or not node.input or not node.input[0]:
        return False
    uses_more = [name for name in node.output[1:] if name and (name in draft.output_names() or _is_read(draft, name))]
    return not uses_more and check(draft, node)


def _is_read(draft: Draft, name: str) -> bool:
    return draft.uses()[name] > 0


def _always(_draft: Draft, _node: onnx.NodeProto) -> bool:
    return True


def _dropout(draft: Draft, node: onnx.NodeProto) -> bool:
    """Dropout passes everything through unless its training flag is a constant true, or not a constant."""
    if len(node.input) < 3 or not node.input[2]:
        return True
    training = draft.array(node.input[2])
    return training is not None and not bool(training.any())


def _cast(draft: Draft, node: onnx.NodeProto) -> bool:
    return draft.dtype(node.input[0]) != 0 and draft.dtype(node.input[0]) == attribute(node, "to")


def _cast_like(draft: Draft, node: onnx.NodeProto) -> bool:
    return draft.dtype(node.input[0]) != 0 and draft.dtype(node.input[0]) == draft.dtype(node.input[1])


def _same_shape(draft: Draft, node: onnx.NodeProto) -> bool:
    """Shapes are equal size by size, every size known or the same symbol."""
    before, after = draft.shape(node.input[0]), draft.shape(node.output[0])
    return before is not None and None not in before and before == after


def _reshape(draft: Draft, node: onnx.NodeProto) -> bool:
    return _same_shape(draft, node)


def _transpose(draft: Draft, node: onnx.NodeProto) -> bool:
    perm = attribute(node, "perm")
    return perm is not None and list(perm) == sorted(perm)


def _slice(draft: Draft, node: onnx.NodeProto) -> bool:
    """Every slice takes its whole axis, forwards."""
    if not _same_shape(draft, node):
        return False
    steps = draft.array(node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1)
    return steps is not None and bool((steps > 0).all())


def _concat(_draft: Draft, node: onnx.NodeProto) -> bool:
    return len(node.input) == 1


def _pad(draft: Draft, node: onnx.NodeProto) -> bool:
    pads = draft.array(node.input[1]) if len(node.input) > 1 else None
    return pads is not None and not pads.any()


def _all_ones(index: int) -> Callable[[Draft, onnx.NodeProto], bool]:
    def check(draft: Draft, node: onnx.NodeProto) -> bool:
        values = draft.array(node.input[index])
        return values is not None and bool((values == 1).all()) and _same_shape(draft, node)

    return check


_CHECKS: dict[str, Callable[[Draft, onnx.NodeProto], bool]] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Reshape": _reshape,
    "Flatten": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Expand": _same_shape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Concat": _concat,
    "Pad": _pad,
    "Tile": _all_ones(1),
    "Sum": _concat,
    "Max": _concat,
    "Min": _concat,
    "Mean": _concat,
}

remove_identity = GraphPass("remove_identity", _remove_identity)
"""Drop nodes that return their input unchanged; names of the graph's inputs and outputs stay."""
