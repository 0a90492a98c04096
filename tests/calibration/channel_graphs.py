"""Random CNN graphs whose channels have wildly different ranges, and the pieces to write small ones by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from cnncc.graph.onnx_graph import OnnxGraph
from tests.graph.graphs import graph_of


class Net:
    """Grows a graph node by node from the input x, float32[2, C, S, S]."""

    def __init__(self, seed: int = 0, channels: int = 4, size: int = 8) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}
        self.input = (2, channels, size, size)
        self.shapes: dict[str, tuple[int, ...]] = {"x": self.input}

    def node(self, operator: str, *inputs: str, shape: tuple[int, ...] | None = None, **attributes: Any) -> str:
        """Add a node; its output has the first input's shape unless another is given."""
        output = f"v{len(self.nodes)}"
        self.shapes[output] = self.shapes[inputs[0]] if shape is None else shape
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{operator}_{output}", **attributes))
        return output

    def constant(self, value: Any) -> str:
        """Add an initializer."""
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def numbers(self, *shape: int, spread: float = 1.5) -> NDArray[np.float32]:
        """Draw numbers whose size differs along the first axis, and along the second, by factors e^±spread."""
        values = self.random.normal(size=shape)
        for axis in range(min(2, len(shape))):
            sizes = np.exp(spread * self.random.uniform(-1, 1, shape[axis]))
            values = values * np.expand_dims(sizes, [a for a in range(len(shape)) if a != axis])
        return values.astype(np.float32)

    def conv(self, x: str, out: int, kernel: int = 1, groups: int = 1, bias: bool = True) -> str:
        """Add a convolution that keeps the image's size."""
        n, c, h, w = self.shapes[x]
        weight = self.constant(self.numbers(out, c // groups, kernel, kernel) / (c // groups * kernel))
        more = [self.constant(self.numbers(out))] if bias else []
        attributes = {"group": groups, "pads": [kernel // 2] * 4}
        return self.node("Conv", x, weight, *more, shape=(n, out, h, w), **attributes)

    def transposed(self, x: str, out: int, groups: int = 1) -> str:
        """Add a transposed convolution that keeps the image's size."""
        n, c, h, w = self.shapes[x]
        weight = self.constant(self.numbers(c, out // groups, 3, 3) / c)
        bias = self.constant(self.numbers(out))
        return self.node("ConvTranspose", x, weight, bias, shape=(n, out, h, w), group=groups, pads=[1] * 4)

    def gemm(self, x: str, out: int, *, rows: bool = True, bias: bool = True) -> str:
        """Add a Gemm; its weights' rows, or columns, are output channels."""
        n, c = self.shapes[x]
        weight = self.constant(self.numbers(out, c) / c if rows else self.numbers(c, out) / c)
        more = [self.constant(self.numbers(out))] if bias else []
        return self.node("Gemm", x, weight, *more, shape=(n, out), transB=int(rows))

    def matmul(self, x: str, out: int) -> str:
        """Add a product with a matrix and, as a node of its own, a bias."""
        n, c = self.shapes[x]
        y = self.node("MatMul", x, self.constant(self.numbers(c, out) / c), shape=(n, out))
        return self.node("Add", y, self.constant(self.numbers(out)))

    def reshape(self, x: str, *shape: int) -> str:
        """Add a Reshape."""
        return self.node("Reshape", x, self.constant(np.int64(shape)), shape=shape)

    def flatten(self, x: str) -> str:
        """Add a Flatten."""
        shape = self.shapes[x]
        return self.node("Flatten", x, shape=(shape[0], int(np.prod(shape[1:]))))

    def pooled(self, x: str) -> str:
        """Add a GlobalAveragePool and a Flatten."""
        n, c, *_ = self.shapes[x]
        return self.flatten(self.node("GlobalAveragePool", x, shape=(n, c, 1, 1)))

    def slice(self, x: str, start: int, end: int) -> str:
        """Add a Slice of channels."""
        n, _, h, w = self.shapes[x]
        bounds = [self.constant(np.int64([value])) for value in (start, end, 1)]
        return self.node("Slice", x, *bounds, shape=(n, end - start, h, w))

    def split(self, x: str) -> list[str]:
        """Add a Split of the channels into halves."""
        n, c, h, w = self.shapes[x]
        first = self.node("Split", x, shape=(n, c // 2, h, w), axis=1, num_outputs=2)
        second = f"{first}_b"
        self.nodes[-1].output.append(second)
        self.shapes[second] = self.shapes[first]
        return [first, second]

    def concat(self, *parts: str) -> str:
        """Add a Concat of channels."""
        n, _, h, w = self.shapes[parts[0]]
        return self.node("Concat", *parts, shape=(n, sum(self.shapes[part][1] for part in parts), h, w), axis=1)

    def shuffle(self, x: str) -> str:
        """Add a channel shuffle of two groups."""
        n, c, h, w = self.shapes[x]
        grouped = self.reshape(x, n, 2, c // 2, h, w)
        turned = self.node("Transpose", grouped, shape=(n, c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
        return self.reshape(turned, n, c, h, w)

    def gated(self, x: str) -> str:
        """Add a squeeze-and-excite block."""
        n, c, *_ = self.shapes[x]
        squeezed = self.node("ReduceMean", x, self.constant(np.int64([2, 3])), shape=(n, c, 1, 1))
        gate = self.node("Sigmoid", self.conv(self.node("Relu", self.conv(squeezed, 2)), c))
        return self.node("Mul", x, gate)

    def done(self, *outputs: str, opset: int = 18) -> OnnxGraph:
        """Return the graph."""
        return graph_of(self.nodes, {"x": self.input}, self.constants, outputs, opset)


_STEPS = (
    *("conv", "conv", "depthwise", "grouped", "transposed", "shared", "relu", "leaky", "prelu", "pool", "mean"),
    *("concat", "slice", "split", "add", "shuffle", "gated", "scaled", "shifted", "sigmoid", "padded"),
)


@st.composite
def channel_graphs(draw: st.DrawFn) -> OnnxGraph:
    """Draw a graph of layers and of what lies between them, in which most channels can be scaled and some cannot."""
    net = Net(draw(st.integers(0, 2**16)), channels=draw(st.sampled_from([1, 4])))
    live = [net.node("Relu", net.conv("x", 4, 3))]
    for step in draw(st.lists(st.sampled_from(_STEPS), min_size=2, max_size=8)):
        live += _step(net, draw(st.sampled_from(live[-3:])), step, live)
    head = draw(st.sampled_from(["pooled", "flatten", "image"]))
    if head == "image":
        last = net.conv(live[-1], 3, 3)
    else:
        hidden = net.gemm(getattr(net, head)(live[-1]), 5, rows=draw(st.booleans()))
        last = net.matmul(net.node("Relu", hidden), 3)
    extra = [live[-2]] if len(live) > 2 and draw(st.booleans()) else []
    return net.done(last, *extra)


def _step(net: Net, x: str, step: str, live: list[str]) -> list[str]:
    c = net.shapes[x][1]
    alike = [value for value in live if net.shapes[value] == net.shapes[x]]
    simple = {
        "conv": lambda: net.conv(x, int(net.random.choice([2, 4, 6])), 3),
        "depthwise": lambda: net.conv(x, c, 3, groups=c, bias=False),
        "grouped": lambda: net.conv(x, 4, 1, groups=2),
        "transposed": lambda: net.transposed(x, 4, groups=2),
        "relu": lambda: net.node("Relu", x),
        "leaky": lambda: net.node("LeakyRelu", x, alpha=0.25),
        "prelu": lambda: net.node("PRelu", x, net.constant(net.numbers(c, 1, 1))),
        "pool": lambda: net.node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4),
        "mean": lambda: net.node("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4),
        "concat": lambda: net.concat(*alike[:2], x),
        "slice": lambda: net.slice(x, 0, c - 1 - c % 2),
        "add": lambda: net.node("Add", x, alike[0]),
        "shuffle": lambda: net.shuffle(x),
        "gated": lambda: net.gated(x),
        "scaled": lambda: net.node("Mul", x, net.constant(net.numbers(c, 1, 1))),
        "shifted": lambda: net.node("Add", x, net.constant(net.numbers(1, c, 1, 1))),
        "sigmoid": lambda: net.node("Sigmoid", x),
        "padded": lambda: net.node(
            "AveragePool",
            net.node("Pad", x, net.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1])), shape=(2, c, 10, 10)),
            shape=(2, c, 8, 8),
            kernel_shape=[3, 3],
        ),
    }
    if step == "split":
        return net.split(x) if c % 2 == 0 else []
    if step == "shared":
        first = net.conv(x, c, 3)
        second = net.node("Conv", net.node("Relu", first), *net.nodes[-2].input[1:], pads=[1] * 4)
        return [second]
    even = {"grouped", "transposed", "shuffle", "slice"}
    return [simple[step]()] if c % 2 == 0 or step not in even else []
