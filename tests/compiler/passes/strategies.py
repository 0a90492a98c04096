"""Random CNN graphs for property tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper

from cnncc.graph.onnx_graph import OnnxGraph
from tests.graph.graphs import graph_of

_IDLE = ("Identity", "Dropout", "Reshape", "Transpose", "Cast", "Slice", "Concat", "Pad")


class Builder:
    """Grows a graph node by node; every value is [2, C, 6, 6] until the head."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        """Add an initializer or a Constant node."""
        name = f"k{len(self.constants) + len(self.nodes)}"
        if self.random.random() < 0.5:
            self.constants[name] = value
        else:
            tensor = onnx.numpy_helper.from_array(np.asarray(value))
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node; names are sometimes missing, as exporters write them."""
        output = f"v{len(self.nodes)}"
        name = ["", f"{operator}_{len(self.nodes) + 1}", output][int(self.random.integers(3))]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def values(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Any:
        """Draw float32 values."""
        return self.random.uniform(low, high, shape).astype(np.float32)

    def conv(self, x: str, channels: int) -> str:
        """Add a convolution, its weight sometimes computed from constants."""
        weight = self.constant(self.values(channels, channels, 3, 3))
        if self.random.random() < 0.3:
            weight = self.node("Mul", [weight, self.constant(np.float32(0.5))])
        bias = [self.constant(self.values(channels))] if self.random.random() < 0.5 else []
        return self.node("Conv", [x, weight, *bias], pads=[1, 1, 1, 1])

    def transposed(self, x: str, channels: int) -> str:
        """Add a grouped transposed convolution."""
        weight = self.constant(self.values(channels, channels // 2, 3, 3))
        return self.node("ConvTranspose", [x, weight], pads=[1, 1, 1, 1], group=2)

    def norm(self, x: str, channels: int) -> str:
        """Add a BatchNormalization with statistics that are not trivial."""
        numbers = [self.values(channels, low=0.5, high=2.0), self.values(channels), self.values(channels)]
        numbers.append(self.values(channels, low=0.3, high=3.0))
        return self.node("BatchNormalization", [x, *map(self.constant, numbers)], epsilon=1e-3)

    def idle(self, x: str, channels: int, kind: str) -> str:
        """Add a node that does nothing."""
        shape = [2, channels, 6, 6]
        if kind == "Reshape":
            return self.node("Reshape", [x, self.constant(np.int64(shape))])
        if kind == "Transpose":
            return self.node("Transpose", [x], perm=[0, 1, 2, 3])
        if kind == "Cast":
            return self.node("Cast", [x], to=onnx.TensorProto.FLOAT)
        if kind == "Slice":
            ends = [self.constant(np.int64([0, 0])), self.constant(np.int64([99, 6])), self.constant(np.int64([2, 3]))]
            return self.node("Slice", [x, *ends])
        if kind == "Pad":
            return self.node("Pad", [x, self.constant(np.int64([0] * 8))])
        return self.node(kind, [x], **({"axis": 1} if kind == "Concat" else {}))


@st.composite
def cnn_graphs(draw: st.DrawFn) -> OnnxGraph:
    """Draw a small CNN as careless exporters write them: constants everywhere, idle nodes, dead ends, branches."""
    builder = Builder(draw(st.integers(0, 2**16)))
    channels = draw(st.sampled_from([2, 4]))
    live = ["x"]
    steps = draw(st.lists(st.sampled_from(["conv", "transposed", "norm", "relu", "idle", "add", "dead"]), max_size=9))
    for step in steps:
        x = draw(st.sampled_from(live[-2:]))
        if step == "idle":
            live.append(builder.idle(x, channels, draw(st.sampled_from(_IDLE))))
        elif step == "add":
            live.append(builder.node("Add", [x, live[-1]]))
        elif step == "relu":
            live.append(builder.node("Relu", [x]))
        elif step == "dead":
            builder.node("Relu", [x])
        else:
            live.append(getattr(builder, step)(x, channels))
    outputs = [live[-1]] if live[-1] != "x" else [builder.node("Identity", ["x"])]
    if len(live) > 2 and draw(st.booleans()) and live[-2] not in outputs:
        outputs.append(live[-2])
    return graph_of(builder.nodes, {"x": (2, channels, 6, 6)}, builder.constants, outputs)
