"""What float32 rounding does to a quantized graph: values near a tie of QuantizeLinear go one step up or down.

Two right evaluations of a Q/DQ graph differ by such steps, and each step changes what all later layers round: the
difference at the outputs is far larger than float32's own, and no error of either. How large it is, a graph tells
whose values are moved by as much as float32's sums are uncertain before every QuantizeLinear.
"""

from __future__ import annotations

from onnx import helper

from cnncc.graph.draft import Draft
from cnncc.graph.onnx_graph import OnnxGraph

QUANTIZE = "QuantizeLinear"

JITTER = 2.0**-12
"""Size of the movement in steps: 2e-6 of int8's range, what a convolution's sums in another order move by, Winograd's
method included (1e-6 of the largest value)."""


def is_quantized(graph: OnnxGraph) -> bool:
    """Whether a graph rounds values to integers on its way."""
    return any(node.op_type == QUANTIZE for node in graph.nodes)


def jittered(graph: OnnxGraph, seed: int) -> OnnxGraph:
    """Return the graph with random numbers of ± `JITTER` steps added to what each QuantizeLinear reads.

    Where there is a scale per channel, of the value's own magnitude instead of steps.
    """
    draft = Draft.of(graph)
    nodes = []
    for number, node in enumerate(draft.nodes):
        if node.op_type == QUANTIZE:
            name, scale = node.input[:2]
            unit = scale if draft.shape(scale) in ((), (1,)) else name
            drawn, noise, moved = (draft.fresh(f"{name}_{part}") for part in ("drawn", "jitter", "moved"))
            nodes += [
                helper.make_node(
                    "RandomUniformLike",
                    [name],
                    [drawn],
                    name=drawn,
                    low=-JITTER,
                    high=JITTER,
                    seed=float(1 + number + 1000 * seed),
                ),
                helper.make_node("Mul", [drawn, unit], [noise], name=noise),
                helper.make_node("Add", [name, noise], [moved], name=moved),
            ]
            node.input[0] = moved
        nodes.append(node)
    draft.nodes[:] = nodes
    return draft.close()
