"""What depends on constants alone is computed now, by ONNX Runtime with its optimizations off.

The same kernels would compute the same bits at run time, so outputs do not change by a bit.
Quantization nodes stay: they tell targets which scales hold. So do random operators, and nodes with subgraphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from cnncc.compiler.passes.infer_shapes import infer_shapes
from cnncc.graph.draft import MOST_BYTES, STANDARD, Draft, GraphPass, attribute
from cnncc.graph.shapes import byte_count, element_count
from cnncc.graph.values import subgraphs

_QUANTIZATION = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_RANDOM = (
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
    "Dropout",  # in training; in inference it goes as idle
)
_KEPT = frozenset((*_QUANTIZATION, *_RANDOM))
_BOUNDED = frozenset(["NonZero", "Unique", "Compress"])
"""Operators whose output size depends on values, but is bounded by their inputs."""

_CHUNK = 64 * 2**20
"""Bytes of results that one run of ONNX Runtime makes: bounds the memory that folding needs beside the results."""

_ROUNDS = 16
"""Rounds of inference and folding at most: each finds shapes that the one before made constant."""


def _fold_constants(draft: Draft) -> int:
    total = 0
    for _ in range(_ROUNDS):
        infer_shapes.change(draft)
        folded = _fold_known_shapes(draft) + _fold_computable(draft)
        total += folded
        if not folded:
            break
    return total


def _fold_computable(draft: Draft) -> int:
    folded = 0
    budget = MOST_BYTES - sum(byte_count(tensor) for tensor in draft.weights.values())
    refused: set[int] = set()
    while chunk := _next_chunk(draft, budget, refused):
        nodes = [node for node, _ in chunk]
        results = _evaluate(draft, nodes)
        if results is None:  # a kernel is missing: find out which
            results = {}
            for node in nodes:
                results |= _evaluate(draft, [node], results) or {}
        done = [node for node in nodes if all(name in results for name in node.output if name)]
        refused |= {id(node) for node in nodes if node not in done}
        _commit(draft, done, results)
        budget -= sum(array.nbytes for array in results.values())
        folded += len(done)
        if not done:
            refused |= {id(node) for node in nodes}
    return folded


def _fold_known_shapes(draft: Draft) -> int:
    """Replace Shape and Size of values whose shape is known."""
    known: list[onnx.NodeProto] = []
    results: dict[str, NDArray[Any]] = {}
    for node in draft.nodes:
        if node.op_type not in ("Shape", "Size") or node.domain not in STANDARD or not node.input[0]:
            continue
        shape = draft.shape(node.input[0])
        if shape is None:
            continue
        part = shape
        if node.op_type == "Shape":
            part = shape[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
        if all(isinstance(size, int) for size in part):
            sizes = [size for size in part if isinstance(size, int)]
            whole = element_count(sizes) if node.op_type == "Size" else sizes
            results[node.output[0]] = np.array(whole, dtype=np.int64)
            known.append(node)
    _commit(draft, known, results)
    return len(known)


def _commit(draft: Draft, nodes: list[onnx.NodeProto], results: dict[str, NDArray[Any]]) -> None:
    """Put results in the place of nodes; an output of the graph keeps a node, an Identity of the constant."""
    outputs = draft.output_names()
    gone = {id(node) for node in nodes}
    replaced = []
    for node in draft.nodes:
        if id(node) not in gone:
            replaced.append(node)
            continue
        for name in (name for name in node.output if name):
            if name not in outputs:
                draft.set_constant(name, results[name])
                continue
            inner = draft.fresh(f"{name}_value")
            draft.set_constant(inner, results[name])
            copy = helper.make_node("Identity", [inner], [name], name=node.name)
            copy.metadata_props.extend(node.metadata_props)
            replaced.append(copy)
    draft.nodes[:] = replaced


def _next_chunk(draft: Draft, budget: int, refused: set[int]) -> list[tuple[onnx.NodeProto, int]]:
    """Collect nodes that can be computed now, up to a chunk's bytes; in order, so inputs come first."""
    known = set(draft.weights)
    outputs = draft.output_names()
    chunk: list[tuple[onnx.NodeProto, int]] = []
    total = 0
    for node in draft.nodes:
        if id(node) in refused or not _foldable(node, known, outputs):
            continue
        size = _result_bytes(draft, node)
        if size is None or total + size > budget:
            continue
        if chunk and total + size > _CHUNK:
            break
        chunk.append((node, size))
        total += size
        known.update(node.output)
    return chunk


def _foldable(node: onnx.NodeProto, known: set[str], outputs: set[str]) -> bool:
    if node.domain not in STANDARD or node.op_type in _KEPT or any(True for _ in subgraphs(node)):
        return False
    if node.op_type == "Identity" and node.output[0] in outputs:
        return False  # what folding itself leaves at an output
    return all(name in known for name in node.input if name)


def _result_bytes(draft: Draft, node: onnx.NodeProto) -> int | None:
    """Return how many bytes a node's results need; None where that cannot be known beforehand."""
    if node.op_type in _BOUNDED:
        source = draft.shape(node.input[0])
        return (
            None if source is None else 8 * max(len(source), 1) * element_count(s for s in source if isinstance(s, int))
        )
    total = 0
    for name in (name for name in node.output if name):
        shape = draft.static_shape(name)
        if shape is None or not draft.dtype(name):
            return None
        total += element_count(shape) * np.dtype(helper.tensor_dtype_to_np_dtype(draft.dtype(name))).itemsize
    return total


def _evaluate(
    draft: Draft, nodes: list[onnx.NodeProto], extra: dict[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]] | None:
    """Run nodes whose inputs are constants; None where ONNX Runtime has no kernel for one."""
    made = [name for node in nodes for name in node.output if name]
    wanted = [name for name in made if draft.value(name) is not None]
    feeds = _inputs(draft, nodes, extra or {})
    proto = onnx.ModelProto(ir_version=max(draft.source.proto.ir_version, 4))
    proto.opset_import.extend(draft.source.proto.opset_import)
    proto.graph.name = "constants"
    proto.graph.node.extend(nodes)
    for name, array in feeds.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        proto.graph.input.append(helper.make_tensor_value_info(name, kind, list(array.shape)))
    proto.graph.output.extend(value for name in wanted if (value := draft.value(name)) is not None)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))
    except Exception:  # onnxruntime's exceptions share no base class; the node stays as it is
        return None


def _inputs(draft: Draft, nodes: list[onnx.NodeProto], extra: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    made = {name for node in nodes for name in node.output}
    found: dict[str, NDArray[Any]] = {}
    for name in _distinct(name for node in nodes for name in node.input if name):
        if name in made:
            continue
        array = extra.get(name)
        found[name] = draft.array(name) if array is None else array  # type: ignore[assignment]
    return found


def _distinct(names: Iterable[str]) -> Iterator[str]:
    yield from dict.fromkeys(names)


fold_constants = GraphPass("fold_constants", _fold_constants)
"""Compute what depends on constants alone, within protobuf's 2 GiB."""
