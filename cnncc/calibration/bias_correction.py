"""Bias correction: what quantizing shifts on average is given back to the biases.

Source: Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction* (ICCV 2019), section
4.2 and appendix D (the empirical form): E[y] − E[ỹ] per output channel is added to the bias. Strictly layer by layer:
each layer is measured on what the corrected layers before it give. The quantized graph is therefore run in pieces
that end at a layer, on all samples, and the pieces' results are carried on: one pass over the graph in all.

A layer is corrected only where a correction made from half of the samples brings the other half nearer to the truth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cnncc.calibration.plan import Layer
from cnncc.calibration.taps import Taps
from cnncc.graph.draft import Draft, set_input
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference, side_by_side
from cnncc.graph.values import reads
from cnncc_runtime.specs import Feeds, Tensors

Deltas = dict[str, NDArray[np.float32]]
"""Layer (its node) → float32[C] to add to its bias."""

Means = NDArray[np.float64]


def bias_deltas(
    graph: OnnxGraph, quantized: OnnxGraph, layers: Sequence[Layer], samples: Sequence[Feeds], *, threads: int = 0
) -> Deltas:
    """Return what to add to the biases of quantized layers; layers that gain nothing are left out.

    Args:
        graph: In float32.
        quantized: The same graph with Q/DQ; the layers' nodes have the same names.
        layers: In the graph's order.
        samples: One shows nothing: half of them must confirm what the other half shows.
        threads: That compute the samples; 0 for one a core.
    """
    if len(samples) < 2:
        return {}
    correctable = {layer.node: layer for layer in layers if layer.op != "MatMul"}
    wanted = _float_means(graph, list(correctable.values()), samples, threads)
    deltas: Deltas = {}
    values: list[Tensors] = [dict(feeds) for feeds in samples]
    for piece, later in _pieces(with_shapes(quantized), correctable):
        layer = correctable[piece.nodes[-1].name]
        run = partial(_run, Reference(piece, threads=threads, beside=len(values)), layer.output)
        found = np.stack(side_by_side(run, values, threads=threads))
        delta = _delta(wanted[layer.node] - found)
        if delta is not None:
            deltas[layer.node] = delta
            for held in values:
                held[layer.output] += _along_channels(delta, held[layer.output].ndim)
        for held in values:
            for name in held.keys() - later:
                del held[name]
    return deltas


def add_to_biases(graph: OnnxGraph, layers: Sequence[Layer], deltas: Mapping[str, NDArray[np.float32]]) -> OnnxGraph:
    """Return the graph with deltas added to its layers' biases; a layer without a bias gets one."""
    if not deltas:
        return graph
    draft = Draft.of(graph)
    nodes = {node.name: node for node in draft.nodes}
    for layer in layers:
        delta = deltas.get(layer.node)
        if delta is None:
            continue
        node = nodes[layer.node]
        old = draft.array(layer.bias) if layer.bias else None
        name = draft.fresh(f"{layer.output}_bias_corrected")
        draft.set_constant(name, (delta if old is None else old + delta).astype(np.float32))
        set_input(node, 2, name)
    return draft.close()


def _delta(errors: Means) -> NDArray[np.float32] | None:
    """Return the mean error per channel, if what half of the samples says is true of the other half.

    Args:
        errors: float64[samples, C]: mean error of each sample.
    """
    half = len(errors) // 2
    estimate, check = errors[:half].mean(axis=0), errors[half:].mean(axis=0)
    before, after = float((check**2).sum()), float(((check - estimate) ** 2).sum())
    return errors.mean(axis=0).astype(np.float32) if after < before else None


def _run(piece: Reference, output: str, held: Tensors) -> Means:
    """Add what a piece makes to what a sample's later pieces may read; return an output's means."""
    held.update(piece.run({spec.name: held[spec.name] for spec in piece.inputs}))
    return _channel_means(held[output])


def _float_means(graph: OnnxGraph, layers: Sequence[Layer], samples: Sequence[Feeds], threads: int) -> dict[str, Means]:
    by_output = {layer.output: layer.node for layer in layers}
    taps = Taps(graph, list(by_output), threads=threads, beside=len(samples))

    def means(feeds: Feeds) -> dict[str, Means]:
        return {by_output[name]: _channel_means(array) for name, array in taps.values(feeds)}

    found = side_by_side(means, samples, threads=threads)
    return {node: np.stack([each[node] for each in found]) for node in by_output.values()}


def _channel_means(array: NDArray[np.float32]) -> Means:
    means: Means = array.mean(axis=(0, *range(2, array.ndim)), dtype=np.float64)
    return means


def _along_channels(delta: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    return delta.reshape(-1, *[1] * (rank - 2))


# ---- pieces


def _pieces(graph: OnnxGraph, ends: Collection[str]) -> Iterator[tuple[OnnxGraph, set[str]]]:
    """Cut a graph after each of these nodes; yield each piece with the names of what later pieces read.

    What comes after the last of these nodes is no piece.
    """
    groups: list[list[onnx.NodeProto]] = [[]]
    for node in graph.nodes:
        groups[-1].append(node)
        if node.name in ends:
            groups.append([])
    kinds = _element_types(graph)
    last = {name: index for index, nodes in enumerate(groups) for node in nodes for name in reads(node)}
    for index, nodes in enumerate(groups[:-1]):
        later = {name for name, end in last.items() if index < end < len(groups) - 1}
        yield _piece(graph, nodes, kinds, later), later


def _piece(
    graph: OnnxGraph, nodes: Sequence[onnx.NodeProto], kinds: Mapping[str, tuple[int, int]], later: set[str]
) -> OnnxGraph:
    made = dict.fromkeys(name for node in nodes for name in node.output if name)
    read = dict.fromkeys(name for node in nodes for name in reads(node))
    outputs = [name for name in made if name in later or name in nodes[-1].output]
    # what a subgraph makes for itself is no value of the graph
    inputs = [name for name in read if name in kinds and name not in made and name not in graph.constants]
    proto = onnx.ModelProto(ir_version=graph.proto.ir_version)
    proto.opset_import.extend(graph.proto.opset_import)
    proto.graph.name = "piece"
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(graph.constants[name] for name in read if name in graph.constants)
    proto.graph.input.extend(_value(name, *kinds[name]) for name in inputs)
    proto.graph.output.extend(_value(name, *kinds[name]) for name in outputs)
    return OnnxGraph(proto)


def _element_types(graph: OnnxGraph) -> dict[str, tuple[int, int]]:
    """Return value → element type and rank."""
    found = graph.proto.graph
    values = (*found.value_info, *found.input, *found.output)
    return {value.name: (value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)) for value in values}


def _value(name: str, kind: int, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(rank)])
