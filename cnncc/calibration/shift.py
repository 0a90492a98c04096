"""Shifts: a tensor that is never, or hardly ever, negative gets all 255 steps of int8 instead of half of them.

Zero-points other than 0 are refused by TensorRT, so what a ReLU gives uses 127 steps of 255. But where every reader of
a tensor x is a layer without padding, W·x = W·(x − c) + c·ΣW: x − c is quantized instead, and the layer's bias takes up
c·ΣW. The float network computes the same; int8 computes it with steps half as large. (Wei et al., *Outlier
Suppression+*, EMNLP 2023, section 4.1, shift so, per channel, against outliers.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from cnncc.calibration.histogram import Histogram
from cnncc.calibration.plan import Group, Plan, is_mover
from cnncc.calibration.thresholds import LEVELS, SMALLEST_SCALE, squared_errors
from cnncc.graph.draft import attribute
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.values import reads

_STEPS = 2 * LEVELS
"""Steps of int8 that are used, of −127 to 127."""

_GRID = 96

_GAIN = 0.75
"""Step of the shifted tensor, as a share of the unshifted one's, above which it stays as it is."""


@dataclass(frozen=True)
class Shift:
    """How a tensor is shifted.

    Attributes:
        amount: c, subtracted before quantizing.
        scale: Of what is quantized then.
    """

    amount: float
    scale: float


def shiftable(graph: OnnxGraph, plan: Plan) -> set[str]:
    """Return the groups, by their first tensor, that only layers without padding read.

    What the plan leaves in float reads the float tensor. But movers within a group move what is shifted: what they make
    may neither be read in float nor be an output of the graph.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        for name in set(reads(node)):
            readers.setdefault(name, []).append(node)
    layers = {layer.node for layer in plan.layers}
    moved = {name for node in graph.nodes if is_mover(node) for name in node.output}
    given = moved & {spec.name for spec in graph.outputs}
    return {
        group.tensors[0]
        for group in plan.groups
        if not given.intersection(group.tensors) and _is_shiftable(group, readers, layers, plan.floating, moved)
    }


def _is_shiftable(
    group: Group,
    readers: Mapping[str, list[onnx.NodeProto]],
    layers: set[str],
    floating: Collection[str],
    moved: set[str],
) -> bool:
    inside = set(group.tensors)
    for name in group.tensors:
        for node in readers.get(name, ()):
            if node.name in layers:
                if not _takes_up(node) or node.input[0] != name:
                    return False
            elif not _moves_within(node, inside) and (node.name not in floating or name in moved):
                return False
    return True


def _moves_within(node: onnx.NodeProto, inside: set[str]) -> bool:
    joined = node.input if node.op_type == "Concat" else node.input[:1]
    return is_mover(node) and inside.issuperset(node.output) and inside.issuperset(joined)


def _takes_up(node: onnx.NodeProto) -> bool:
    """Whether a layer's bias can take up a shift: no pixel is padded with zeros that were not shifted."""
    if node.op_type == "Conv":
        return not any(attribute(node, "pads", [])) and attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    return bool(node.op_type == "Gemm" and attribute(node, "beta", 1.0) == 1.0)


def shift_of(histogram: Histogram, scale: float) -> Shift | None:
    """Return the shift c and the scale of x − c with the least expected squared error; None where little is gained.

    The range [lowest, T] is cut into 254 steps; T is searched for as in `mean_squared_error`. Negative values, which
    are few here, are taken for positive ones of their magnitude: both are rounded alike.

    Args:
        histogram: Of the tensor.
        scale: Without a shift.
    """
    if histogram.exponent is None or -histogram.lowest > histogram.largest / 2:
        return None
    tops = np.linspace(0.05, 1.0, _GRID) * histogram.largest
    steps = (tops - min(histogram.lowest, 0.0)) / _STEPS
    best = int(squared_errors(histogram, tops, steps).argmin())
    top, step = float(tops[best]), float(np.float32(max(steps[best], SMALLEST_SCALE)))
    # a whole number of steps: zero, which a ReLU gives so often, stays exact
    amount = float(np.float32(step * round((top + min(histogram.lowest, 0.0)) / 2 / step)))
    return Shift(amount, step) if step < _GAIN * scale else None
