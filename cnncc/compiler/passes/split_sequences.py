"""SplitToSequence read by SequenceAt becomes Split: the exporter's form of `chunk`, `split` and `unbind`.

Engines have no sequences; the positions are constants, so the parts can be named.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from cnncc.graph.draft import STANDARD, Draft, GraphPass, attribute
from cnncc.graph.names import MODULE_KEY, node_metadata


def _split_sequences(draft: Draft) -> int:
    readers, outputs = draft.readers(), draft.output_names()
    replaced: list[onnx.NodeProto] = []
    gone: set[int] = set()
    changed = 0
    for node in draft.nodes:
        made = None
        if node.op_type == "SplitToSequence" and node.domain in STANDARD and node.output[0] not in outputs:
            made = _as_split(draft, node, readers.get(node.output[0], []))
        if made is None:
            replaced.append(node)
            continue
        replaced += made
        gone |= {id(reader) for reader in readers.get(node.output[0], [])}
        changed += 1
    draft.nodes[:] = [node for node in replaced if id(node) not in gone]
    return changed


def _as_split(draft: Draft, node: onnx.NodeProto, readers: list[onnx.NodeProto]) -> list[onnx.NodeProto] | None:
    """Return the nodes that replace a sequence, or None where its parts are not known."""
    sizes = _sizes(draft, node)
    if sizes is None:
        return None
    places: dict[int, list[str]] = {}
    for reader in readers:
        index = draft.array(reader.input[1]) if reader.op_type == "SequenceAt" else None
        if index is None or index.size != 1 or not -len(sizes) <= int(index.reshape(())) < len(sizes):
            return None
        places.setdefault(int(index.reshape(())) % len(sizes), []).append(reader.output[0])
    return _nodes(draft, node, sizes, places)


def _sizes(draft: Draft, node: onnx.NodeProto) -> list[int] | None:
    shape = draft.shape(node.input[0])
    if shape is None:
        return None
    length = shape[int(attribute(node, "axis", 0))]
    split = draft.array(node.input[1]) if len(node.input) > 1 and node.input[1] else np.int64(1)
    if split is None or not isinstance(length, int):
        return None
    if split.ndim == 1:
        return [int(size) for size in split]
    size = int(split)
    return [min(size, length - start) for start in range(0, length, size)] if size > 0 else None


def _nodes(draft: Draft, node: onnx.NodeProto, sizes: list[int], places: dict[int, list[str]]) -> list[onnx.NodeProto]:
    axis = int(attribute(node, "axis", 0))
    squeezed = len(node.input) < 2 and not attribute(node, "keepdims", 1)
    parts = [draft.fresh(f"{node.output[0]}_{index}") for index in range(len(sizes))]
    lengths = draft.fresh(f"{node.name}.split")
    draft.set_constant(lengths, np.array(sizes, dtype=np.int64))
    made = [helper.make_node("Split", [node.input[0], lengths], parts, name=node.name, axis=axis)]
    axes = ""
    if squeezed:
        axes = draft.fresh(f"{node.name}.axes")
        draft.set_constant(axes, np.array([axis], dtype=np.int64))
    for index, names in sorted(places.items()):
        for count, name in enumerate(names):
            kind, inputs = ("Squeeze", [parts[index], axes]) if squeezed else ("Identity", [parts[index]])
            made.append(helper.make_node(kind, inputs, [name], name=f"{node.name}_{index}_{count}"))
    path = node_metadata(node, MODULE_KEY)
    for each in made:
        if path is not None:
            each.metadata_props.add(key=MODULE_KEY, value=path)
    return made


split_sequences = GraphPass("split_sequences", _split_sequences)
"""Replace sequences of parts by Split, where positions and sizes are constants."""
