"""``auto``: for each tensor the threshold by whose int8 its readers compute best, measured, not assumed.

A histogram knows how far the quantized tensor is from the tensor, but not which elements matter to the layers that
read it. So each candidate is tried where it counts: the layers are computed once from the float tensor, and once from
each candidate's int8, with their int8 weights; the candidate with the least noise in what comes out is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from cnncc.calibration.plan import Layer, Plan
from cnncc.calibration.qdq import quantize_weight
from cnncc.calibration.thresholds import scale_of
from cnncc.graph.draft import Draft
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference, side_by_side
from cnncc_runtime.specs import Feeds

_ALIKE = 0.01
"""Thresholds nearer than this share are one candidate."""

Candidates = Mapping[str, Mapping[str, float]]
"""Group (its first tensor) → method → threshold."""


def choose(
    graph: OnnxGraph, plan: Plan, candidates: Candidates, samples: Sequence[Feeds], *, threads: int = 0
) -> dict[str, str]:
    """Return group → the method that its readers do best with; where methods agree, the first of them.

    Args:
        graph: In float32.
        plan: What is quantized.
        candidates: Of every group.
        samples: To measure on.
        threads: That compute the samples; 0 for one a core.
    """
    tried = {name: _distinct(methods) for name, methods in candidates.items()}
    draft = Draft.of(graph)
    draft.outputs.clear()
    named = [(group.tensors[0], group) for group in plan.groups]
    readers = {name: [layer for layer in plan.layers if layer.tensor in group.read] for name, group in named}
    outputs: dict[str, tuple[str, str, str]] = {}
    for name, layers in readers.items():
        if len(tried[name]) > 1:
            for layer in layers:
                outputs |= _contest(draft, name, layer, tried[name])
    noise: dict[tuple[str, str, str], float] = {}
    if outputs:
        draft.outputs.extend(helper.make_tensor_value_info(made, onnx.TensorProto.FLOAT, []) for made in outputs)
        reference = Reference(draft.close(), threads=threads, beside=len(samples))
        for found in side_by_side(reference.run, samples, threads=threads):
            for made, value in found.items():
                noise[outputs[made]] = noise.get(outputs[made], 0.0) + float(value)
    chosen = {}
    for name, layers in readers.items():
        shares = {
            method: sum(noise[name, layer.node, method] / max(noise[name, layer.node, ""], 1e-300) for layer in layers)
            for method in (tried[name] if len(tried[name]) > 1 else ())
        }
        chosen[name] = min(shares, key=lambda method: shares[method]) if shares else next(iter(tried[name]))
    return chosen


def _distinct(methods: Mapping[str, float]) -> dict[str, float]:
    kept: dict[str, float] = {}
    for method, threshold in methods.items():
        if all(abs(threshold - other) > _ALIKE * max(threshold, other) for other in kept.values()):
            kept[method] = threshold
    return kept


def _contest(
    draft: Draft, group: str, layer: Layer, thresholds: Mapping[str, float]
) -> dict[str, tuple[str, str, str]]:
    """Add a layer's copies, one per candidate; return output → (group, layer, method) of its squared error."""
    node = next(node for node in draft.nodes if node.name == layer.node)
    weight = draft.array(layer.weight)
    assert weight is not None
    integers, steps = quantize_weight(weight, layer.axis)
    stored, step, rounded = (draft.fresh(f"{layer.node}_{part}") for part in ("int8", "step", "rounded"))
    draft.set_constant(stored, integers)
    draft.set_constant(step, steps)
    draft.nodes.append(helper.make_node("DequantizeLinear", [stored, step], [rounded], name=rounded, axis=layer.axis))
    outputs = {}
    for method, threshold in thresholds.items():
        scale, zero = draft.fresh("contest_scale"), draft.fresh("contest_zero")
        draft.set_constant(scale, np.float32(scale_of(threshold)).reshape(()))
        draft.set_constant(zero, np.int8(0).reshape(()))
        q, dq, out, error, noise = (draft.fresh(f"contest_{layer.node}_{method}_{part}") for part in "qdoen")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = out
        copy.input[0], copy.input[1] = dq, rounded
        copy.output[0] = out
        draft.nodes += [
            helper.make_node("QuantizeLinear", [layer.tensor, scale, zero], [q], name=q),
            helper.make_node("DequantizeLinear", [q, scale, zero], [dq], name=dq),
            copy,
            helper.make_node("Sub", [out, layer.output], [error], name=error),
            helper.make_node("ReduceSumSquare", [error], [noise], name=noise, keepdims=0),
        ]
        outputs[noise] = (group, layer.node, method)
    signal = draft.fresh(f"contest_{layer.node}_signal")
    draft.nodes.append(helper.make_node("ReduceSumSquare", [layer.output], [signal], name=signal, keepdims=0))
    outputs[signal] = (group, layer.node, "")
    return outputs
