"""float16 and bfloat16 on a machine that computes in neither: float32 arithmetic, every value rounded to its type.

Right evaluations of a half-precision graph differ by where they round: fused operators keep float32 between them, and
sums are rounded as they go or at the end. So none of them is the truth; that is the graph without rounding
(`cnncc.graph.exact`), and how far rounding leads from it, the emulation tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnncc.graph.draft import STANDARD, Draft
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import name_nodes
from cnncc.graph.values import all_nodes, subgraphs

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

JITTER: dict[int, float] = {TensorProto.FLOAT16: 2.0**-12, TensorProto.BFLOAT16: 2.0**-9}
"""Half type → how far a value moves before it is rounded, as a share of itself: half a unit in its last place at most.

So what is representable stays, however often it is rounded, and anything else is rounded to either neighbour, the
nearer one more often (as in stochastic rounding: Connolly, Higham and Mary, SIAM J. Sci. Comput. 43(1), 2021)."""

_LOWERED = {22: 21}
"""Opset → the one before, which says the same of float32: 22 only let operators take bfloat16, and ONNX Runtime has not
all of its operators."""

_TYPE_ATTRIBUTES = frozenset(("to", "dtype", "output_dtype", "precision"))


def half_types(graph: OnnxGraph) -> set[int]:
    """Return the half types that a graph, whose values' types are known, holds values of."""
    own = graph.proto.graph
    values = (*own.input, *own.output, *own.value_info)
    kinds = {value.type.tensor_type.elem_type for value in values} | {tensor.data_type for tensor in own.initializer}
    return kinds.intersection(HALVES)


def is_half(graph: OnnxGraph) -> bool:
    """Whether a graph holds values of half precision."""
    return bool(half_types(graph))


def half_values(graph: OnnxGraph) -> dict[str, int]:
    """Return value → its half type, of all that nodes make."""
    own = graph.proto.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*own.value_info, *own.output)}
    return {name: kinds[name] for node in own.node for name in node.output if kinds.get(name) in HALVES}


def emulated(graph: OnnxGraph, seed: int | None = None) -> OnnxGraph:
    """Return a graph in float32 arithmetic whose values are rounded as the graph says; the interface stays.

    Args:
        graph: Any graph, every value's type known. Nodes inside of nested graphs read and make no half values.
        seed: Rounds to either neighbour at random, a seed each its own way; None rounds to the nearest.
    """
    draft, kinds = Draft.of(graph), half_values(graph)
    outputs = draft.output_names()
    given = {value.name: draft.dtype(value.name) for value in draft.inputs if draft.dtype(value.name) in HALVES}
    float_names = {name: draft.fresh(f"{name}_float") for name in (*given, *kinds) if name in given or name in outputs}
    draft.rename_reads(float_names)
    nodes = [_cast(name, float_names[name], TensorProto.FLOAT) for name in given]
    for number, node in enumerate(draft.nodes):
        _widen_attributes(node)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in kinds:
                node.output[index] = raw = draft.fresh(f"{name}_raw")
                noise = None if seed is None else float(1 + number + 1000 * seed)
                between = name if name in outputs else draft.fresh(f"{name}_bits")
                nodes += _rounded(draft, raw, between, float_names.get(name, name), kinds[name], noise)
    draft.nodes[:] = nodes
    for name, tensor in draft.weights.items():
        if tensor.data_type in HALVES:
            draft.set_constant(name, numpy_helper.to_array(tensor).astype(np.float32))
    for name in kinds.keys() & draft.values.keys():
        draft.values[name].type.tensor_type.elem_type = TensorProto.FLOAT
    made = draft.close().proto
    for imported in made.opset_import:
        if imported.domain in STANDARD:
            imported.version = _LOWERED.get(imported.version, imported.version)
    return OnnxGraph(made)


def with_float_outputs(graph: OnnxGraph, names: Sequence[str]) -> tuple[OnnxGraph, dict[str, str]]:
    """Return a graph that gives out these values, those of half precision as float32: NumPy knows no bfloat16.

    Args:
        graph: Every value's type known.
        names: Of values.

    Returns:
        The graph, and value → the output that holds it.
    """
    kinds, draft = half_values(graph), Draft.of(graph.with_outputs(names))
    made = {name: draft.fresh(f"{name}_float") if name in kinds else name for name in names}
    draft.nodes += [_cast(name, made[name], TensorProto.FLOAT) for name in names if name in kinds]
    for value in draft.outputs:
        if value.name in kinds:
            own = draft.values[value.name] = onnx.ValueInfoProto()
            own.CopyFrom(value)
            value.name = made[value.name]
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    part = draft.close().proto
    name_nodes(part.graph)
    return OnnxGraph(part), made


def _rounded(
    draft: Draft, raw: str, between: str, result: str, kind: int, noise: float | None
) -> Iterator[onnx.NodeProto]:
    """Yield nodes that round a value to a half type, ``between``, and give it in float32, ``result``."""
    source = raw
    if noise is not None:
        drawn, source = draft.fresh(f"{raw}_jitter"), draft.fresh(f"{raw}_moved")
        low, high = 1 - JITTER[kind], 1 + JITTER[kind]
        yield helper.make_node("RandomUniformLike", [raw], [drawn], low=low, high=high, seed=noise)
        yield helper.make_node("Mul", [raw, drawn], [source])  # infinities stay
    yield _cast(source, between, kind)
    yield _cast(between, result, TensorProto.FLOAT)


def _cast(name: str, result: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [result], to=kind)


def _widen_attributes(node: onnx.NodeProto) -> None:
    """Make the half types that a node's attributes name float32."""
    for each in (node, *(nested for inner in subgraphs(node) for nested in all_nodes(inner))):
        for attribute in each.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in HALVES:
                array = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
