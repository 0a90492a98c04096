"""Networks' typical blocks on blocked tensors: right for every number of channels, and with no needless copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, shape_inference

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc.targets.devices import resolve_profile
from tests.targets.llvm.running import kernels_of, run_graph

CHANNELS = (1, 3, 5, 16, 17, 24, 58)


class Writer:
    """Writes a graph node by node; every operator returns the name of its result."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)
        self.result = ""

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def const(self, values: Any, dtype: str = "float32") -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def normal(self, *shape: int) -> str:
        return self.const(self.random.standard_normal(shape) * np.prod(shape[1:] or (1,)) ** -0.5)

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 1, **attributes: Any) -> str:
        group = attributes.get("group", 1)
        attributes.setdefault("pads", [kernel // 2] * 4)
        weights = self.normal(outputs, inputs // group, kernel, kernel)
        return str(self.node("Conv", x, weights, self.normal(outputs), kernel_shape=[kernel] * 2, **attributes))

    def graph(self, result: str) -> OnnxGraph:
        self.nodes.append(helper.make_node("Identity", [result], ["y"], "result"))
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        body = helper.make_graph(self.nodes, "g", [x], [y], self.weights)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return OnnxGraph(shape_inference.infer_shapes(model, strict_mode=True))


def residual(w: Writer, c: int) -> str:
    x = w.conv("x", w.shape[1], c, 3)
    y = w.conv(w.node("Relu", w.conv(x, c, c, 3)), c, c, 3)
    return str(w.node("Relu", w.node("Add", y, x)))


def squeeze_and_excite(w: Writer, c: int) -> str:
    x = w.node("HardSwish", w.conv("x", w.shape[1], c))
    x = w.node("Relu", w.conv(x, c, c, 3, group=c))
    gate = w.conv(w.node("Relu", w.conv(w.node("GlobalAveragePool", x), c, 4)), 4, c)
    return w.conv(w.node("Mul", x, w.node("Sigmoid", gate)), c, c)


def shuffle(w: Writer, c: int) -> str:
    x = w.conv("x", w.shape[1], 2 * c)
    for _ in range(2):
        left, right = w.node("Split", x, w.const([c, c], "int64"), outputs=2, axis=1)
        joined = w.node("Concat", left, w.node("Relu", w.conv(right, c, c)), axis=1)
        n, _, height, width = w.shape
        grid = w.node("Reshape", joined, w.const([n, 2, c, height, width], "int64"))
        turned = w.node("Transpose", grid, perm=[0, 2, 1, 3, 4])
        x = w.node("Reshape", turned, w.const([n, 2 * c, height, width], "int64"))
    return w.conv(x, 2 * c, c)


def dense(w: Writer, c: int) -> str:
    x, channels = w.conv("x", w.shape[1], c), c
    for _ in range(3):
        scaled = w.node("Add", w.node("Mul", x, w.normal(channels, 1, 1)), w.normal(channels, 1, 1))
        x = w.node("Concat", x, w.conv(w.node("Relu", scaled), channels, 12, 3), axis=1)
        channels += 12
    return w.conv(x, channels, c)


def channels_last(w: Writer, c: int) -> str:
    x = w.conv("x", w.shape[1], c)
    y = w.node("Transpose", w.conv(x, c, c, 7, group=c), perm=[0, 2, 3, 1])
    y = w.node("LayerNormalization", y, w.normal(c), w.normal(c), axis=-1)
    y = w.node("Gelu", w.node("Add", w.node("MatMul", y, w.normal(c, 4 * c)), w.normal(4 * c)))
    y = w.node("Mul", w.node("MatMul", y, w.normal(4 * c, c)), w.normal(c))
    return str(w.node("Add", w.node("Transpose", y, perm=[0, 3, 1, 2]), x))


def up_and_join(w: Writer, c: int) -> str:
    x = w.conv("x", w.shape[1], c, 3)
    low = w.conv(w.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), c, c, 3)
    up = w.node("ConvTranspose", low, w.normal(c, c, 2, 2), w.normal(c), strides=[2, 2])
    return w.conv(w.node("Concat", up, x, axis=1), 2 * c, c, 3)


def unwritten_lanes(w: Writer, c: int) -> str:
    """0 / 0 and log 0 in the lanes after the last channel."""
    x = w.conv("x", w.shape[1], c)
    one = w.node("Div", x, x)
    pooled = w.node("GlobalAveragePool", w.node("Add", one, w.node("Abs", w.node("Log", w.node("Abs", x)))))
    return w.conv(w.node("Mul", w.node("Softmax", one, axis=1), pooled), c, c, 3)


BLOCKS: dict[str, tuple[Callable[[Writer, int], str], int]] = {
    "residual": (residual, 0),
    "squeeze and excite": (squeeze_and_excite, 0),
    "shuffle": (shuffle, 0),
    "dense": (dense, 0),
    "channels last": (channels_last, 0),
    "up and join": (up_and_join, 0),
    "unwritten lanes": (unwritten_lanes, 2),
}
"""Block → how it is written, and copies between layouts inside it; softmax takes its operand as the graph has it."""


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_computes_what_onnx_runtime_computes(name: str, channels: int) -> None:
    writer = Writer(1, 3, 8, 10)
    graph = writer.graph(BLOCKS[name][0](writer, channels))
    feeds = {"x": np.random.default_rng(1).standard_normal(writer.shape).astype("float32")}
    want = Reference(graph).run(feeds)["y"]
    assert np.isfinite(want).all()
    for cpu in (None, "x86-64-v3"):
        (got,) = run_graph(graph, feeds, resolve_profile(mcpu=cpu))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_stays_blocked_between_its_input_and_its_output(name: str) -> None:
    write, copies = BLOCKS[name]
    writer = Writer(1, 3, 8, 10)
    kernels = kernels_of(writer.graph(write(writer, 32)))
    moved = [kernel for kernel in kernels if "pack_channels" in kernel]
    assert len(moved) == copies + 1, f"one copy makes the output plain; found {moved} among {kernels}"


@given(
    inputs=st.integers(1, 20), outputs=st.integers(1, 20), groups=st.sampled_from([1, 1, 2, 3]),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4), more=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_transposed_convolution_computes_what_onnx_runtime_computes(
    inputs: int, outputs: int, groups: int, kernel: Any, stride: Any, pads: Any, more: Any, size: Any
) -> None:
    more = tuple(min(extra, step - 1) for extra, step in zip(more, stride, strict=True))
    made = [
        (size[axis] - 1) * stride[axis] + kernel[axis] + more[axis] - pads[axis] - pads[axis + 2] for axis in (0, 1)
    ]
    assume(min(made) > 0)
    writer = Writer(1, inputs * groups, *size)
    weights = writer.normal(inputs * groups, outputs, *kernel)
    up = writer.node("ConvTranspose", "x", weights, writer.normal(outputs * groups), group=groups, strides=stride,
                     pads=pads, output_padding=more)  # fmt: skip
    graph = writer.graph(writer.node("Relu", up))
    feeds = {"x": np.random.default_rng(1).standard_normal(writer.shape).astype("float32")}
    (got,) = run_graph(graph, feeds)
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-4, atol=2e-5)
