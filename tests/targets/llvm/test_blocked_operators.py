"""Every operator between blocked tensors whose lanes after the last channel are NaN, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cnncc.graph.reference import Reference
from cnncc.targets.devices import resolve_profile
from tests.targets.llvm.running import kernels_of, run_graph
from tests.targets.llvm.test_blocked_layout import Writer

Operator = Callable[[Writer, str, int], str]
"""Takes the writer, a blocked image of ``[2, c, 9, 10]`` and c; returns the result."""

HEIGHT, WIDTH, BATCH = 9, 10, 2


def node(op: str, *constants: object, **attributes: object) -> Operator:
    """One node whose further inputs are constants; whole numbers are int64."""

    def write(w: Writer, x: str, _c: int) -> str:
        inputs = [w.const(c, "int64") if np.asarray(c).dtype.kind == "i" else w.const(c) for c in constants]
        return str(w.node(op, x, *inputs, **attributes))

    return write


def pad(mode: str, *sizes: int) -> Operator:
    return node("Pad", sizes, mode=mode)


def resize(scales: tuple[float, float], **attributes: object) -> Operator:
    def write(w: Writer, x: str, _c: int) -> str:
        return str(w.node("Resize", x, "", w.const([1, 1, *scales]), **attributes))

    return write


def concat_of_odd_parts(w: Writer, x: str, c: int) -> str:
    parts = [x, w.conv(x, c, 3), w.conv(x, c, 21), w.node("Relu", x)]
    return str(w.node("Concat", *parts, axis=1))


def concat_of_rows(w: Writer, x: str, c: int) -> str:
    return str(w.node("Concat", x, w.conv(x, c, c), axis=2))


def concat_with_the_input(w: Writer, x: str, c: int) -> str:
    return w.conv(str(w.node("Concat", "x", x, axis=1)), 3 + c, 7)


def split_in_odd_parts(w: Writer, x: str, c: int) -> str:
    a, b = w.node("Split", x, w.const([c // 3, c - c // 3], "int64"), outputs=2, axis=1)
    return str(w.node("Concat", w.node("Relu", b), a, axis=1))


def split_of_columns(w: Writer, x: str, _c: int) -> str:
    a, b = w.node("Split", x, w.const([3, 7], "int64"), outputs=2, axis=3)
    return str(w.node("Concat", b, w.node("Relu", a), axis=3))


def every_other_channel(w: Writer, x: str, _c: int) -> str:
    bounds = ([1], [1000], [1], [2])
    return str(w.node("Slice", x, *(w.const(values, "int64") for values in bounds)))


def backwards(w: Writer, x: str, _c: int) -> str:
    bounds = ([7, -1], [0, -1000], [2, 3], [-2, -1])
    return str(w.node("Slice", x, *(w.const(values, "int64") for values in bounds)))


def shuffled(w: Writer, x: str, c: int) -> str:
    wide = w.conv(x, c, 3 * c)
    grid = w.node("Reshape", wide, w.const([BATCH, 3, c, HEIGHT, WIDTH], "int64"))
    turned = w.node("Transpose", grid, perm=[0, 2, 1, 3, 4])
    return str(w.node("Reshape", turned, w.const([BATCH, 3 * c, HEIGHT, WIDTH], "int64")))


def shuffled_before_a_convolution(w: Writer, x: str, c: int) -> str:
    return w.conv(shuffled(w, x, c), 3 * c, 5, 3)


def read_as_a_grid(w: Writer, x: str, c: int) -> str:
    grid = w.node("Reshape", w.conv(x, c, 2 * c), w.const([BATCH, 2, c, HEIGHT, WIDTH], "int64"))
    return str(w.node("Softmax", grid, axis=1))


def mask_of_one_channel(w: Writer, x: str, c: int) -> str:
    return str(w.node("Mul", x, w.node("Sigmoid", w.conv(x, c, 1, 7))))


def plain_partner(w: Writer, x: str, c: int) -> str:
    one = w.node("ReduceMax", "x", w.const([1], "int64"), keepdims=1)
    return w.conv(str(w.node("Add", x, one)), c, 3)


def constants_of_all_shapes(w: Writer, x: str, c: int) -> str:
    for shape in ((c, 1, 1), (1, c, 1, 1), (1,), (), (HEIGHT, WIDTH), (1, 1, HEIGHT, 1), (c, HEIGHT, WIDTH), (WIDTH,)):
        x = w.node("Add", x, w.const(w.random.standard_normal(shape)))
    return x


def chosen_by_sign(w: Writer, x: str, _c: int) -> str:
    positive = w.node("Greater", x, w.const(0.0))
    return str(w.node("Where", w.node("Not", positive), w.node("Mul", x, w.const(0.1)), x))


def masks_of_some_channels(w: Writer, x: str, c: int) -> str:
    mask = w.node("Greater", x, w.const(0.0))
    first, _ = w.node("Split", mask, w.const([1, c - 1], "int64"), outputs=2, axis=1)
    return str(w.node("Where", first, w.node("Abs", x), w.node("Neg", x)))


def parametric_relu(w: Writer, x: str, c: int) -> str:
    return str(w.node("PRelu", x, w.normal(c, 1, 1)))


def instance_normalization(w: Writer, x: str, c: int) -> str:
    return str(w.node("InstanceNormalization", x, w.normal(c), w.normal(c)))


def last_layers(w: Writer, x: str, c: int) -> str:
    pooled = w.node("Flatten", w.node("GlobalAveragePool", x))
    return str(w.node("Gemm", pooled, w.normal(c, 11), w.normal(11)))


def rows_before_a_product(w: Writer, x: str, c: int) -> str:
    return str(w.node("Gemm", w.node("Flatten", x), w.normal(c * HEIGHT * WIDTH, 6), w.normal(6)))


def tokens(w: Writer, x: str, c: int) -> str:
    flat = w.node("Reshape", x, w.const([BATCH, c, HEIGHT * WIDTH], "int64"))
    rows = w.node("LayerNormalization", w.node("Transpose", flat, perm=[0, 2, 1]), w.normal(c), w.normal(c))
    made = w.node("Transpose", w.node("MatMul", rows, w.normal(c, c + 2)), perm=[0, 2, 1])
    return w.conv(str(w.node("Reshape", made, w.const([BATCH, c + 2, HEIGHT, WIDTH], "int64"))), c + 2, 4, 3)


def narrow_groups(w: Writer, x: str, c: int) -> str:
    wide = w.node("Div", w.conv(x, c, 40), w.const(np.full((40, 1, 1), 2.0)))
    return w.conv(str(wide), 40, 40, 3, group=5)


def groups_of_unlike_sizes(w: Writer, x: str, c: int) -> str:
    return w.conv(w.conv(x, c, 18), 18, 30, 3, group=6)


def more_outputs_than_inputs(w: Writer, x: str, c: int) -> str:
    return w.conv(x, c, 2 * c, 3, group=c, strides=[2, 2])


def weights_from_the_input(w: Writer, x: str, c: int) -> str:
    bounds = ([0, 0], [1, 1], [0, 1])
    part = w.node("Slice", "x", *(w.const(values, "int64") for values in bounds))
    row = w.node("ReduceMax", part, w.const([2], "int64"), keepdims=0)
    return str(w.node("Conv", x, w.node("Expand", w.node("Reshape", row, w.const([WIDTH, 1, 1, 1], "int64")),
                                        w.const([WIDTH, c, 1, 1], "int64"))))  # fmt: skip


def sequence(w: Writer, x: str, c: int) -> str:
    flat = w.node("Reshape", x, w.const([BATCH, c, HEIGHT * WIDTH], "int64"))
    wide = w.node("Conv", flat, w.normal(7, c, 5), w.normal(7), pads=[2, 2], strides=[2])
    return str(w.node("Conv", w.node("Relu", wide), w.normal(7, 1, 3), group=7))


def transposed(**attributes: object) -> Operator:
    def write(w: Writer, x: str, c: int) -> str:
        group = c if attributes.get("group") else 1
        weights = w.normal(c, 1 if group > 1 else 6, 3, 3)
        return str(w.node("ConvTranspose", x, weights, **{**attributes, "group": group}))

    return write


OPERATORS: dict[str, Operator] = {
    "max pool, ceil": node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max pool, dilated": node("MaxPool", kernel_shape=[2, 2], dilations=[2, 3], pads=[1, 0, 1, 0]),
    "average pool": node("AveragePool", kernel_shape=[3, 2], pads=[1, 1, 1, 0]),
    "average pool, padding counted": node("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    "resize, nearest": resize((2, 3), coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "resize, linear": resize((2, 1.5), mode="linear", coordinate_transformation_mode="half_pixel"),
    "resize, cubic": resize((3, 1.5), mode="cubic", coordinate_transformation_mode="half_pixel"),
    "pad": pad("constant", 0, 0, 1, 2, 0, 0, 3, 0),
    "pad, reflect": pad("reflect", 0, 0, 1, 2, 0, 0, 3, 1),
    "pad, edge": pad("edge", 0, 0, 1, 2, 0, 0, 3, 1),
    "pad channels": pad("constant", 0, 1, 0, 0, 0, 2, 0, 0),
    "concat of odd parts": concat_of_odd_parts,
    "concat of rows": concat_of_rows,
    "concat with the input": concat_with_the_input,
    "split in odd parts": split_in_odd_parts,
    "split of columns": split_of_columns,
    "every other channel": every_other_channel,
    "backwards": backwards,
    "shuffled": shuffled,
    "shuffled before a convolution": shuffled_before_a_convolution,
    "read as a grid": read_as_a_grid,
    "gather channels": node("Gather", [2, 0, 2], axis=1),
    "mean of pixels": node("ReduceMean", [2, 3], keepdims=0),
    "greatest of rows": node("ReduceMax", [2], keepdims=0),
    "sum of columns": node("ReduceSum", [-1], keepdims=1),
    "mean of channels": node("ReduceMean", [1], keepdims=1),
    "sum of all": node("ReduceSum", keepdims=0),
    "softmax of channels": node("Softmax", axis=1),
    "clip": node("Clip", -0.5, 1.0),
    "power": node("Pow", 2.0),
    "chosen by sign": chosen_by_sign,
    "masks of some channels": masks_of_some_channels,
    "parametric relu": parametric_relu,
    "constants of all shapes": constants_of_all_shapes,
    "mask of one channel": mask_of_one_channel,
    "plain partner": plain_partner,
    "instance normalization": instance_normalization,
    "local response normalization": node("LRN", size=3, alpha=0.02, bias=1.5),
    "flatten": node("Flatten"),
    "last layers": last_layers,
    "rows before a product": rows_before_a_product,
    "tokens": tokens,
    "narrow groups": narrow_groups,
    "groups of unlike sizes": groups_of_unlike_sizes,
    "more outputs than inputs": more_outputs_than_inputs,
    "weights from the input": weights_from_the_input,
    "sequence": sequence,
    "transposed convolution, depthwise": transposed(group=True, strides=[2, 2], pads=[1, 1, 1, 1]),
    "transposed convolution, dilated": transposed(dilations=[2, 2], strides=[2, 2]),
    "depth to space": lambda w, x, c: str(w.node("DepthToSpace", w.conv(x, c, 4 * c), blocksize=2)),
}  # fmt: skip


def written(operator: Operator, channels: int) -> Writer:
    """Return a graph in which the lanes after the operand's last channel are 0 / 0."""
    writer = Writer(BATCH, 3, HEIGHT, WIDTH)
    x = writer.node("Div", writer.conv("x", 3, channels, 3), writer.const(np.linspace(1, 2, channels)[:, None, None]))
    result = operator(writer, str(x), channels)
    writer.result = result
    return writer


@pytest.mark.parametrize(("cpu", "channels"), [(None, 3), (None, 17), (None, 32), ("x86-64-v3", 17)])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_on_blocks_computes_what_onnx_runtime_computes(name: str, cpu: str | None, channels: int) -> None:
    writer = written(OPERATORS[name], channels)
    graph = writer.graph(writer.result)
    feeds = {"x": np.random.default_rng(1).standard_normal(writer.shape).astype("float32")}
    want = Reference(graph).run(feeds)["y"]
    assert np.isfinite(want).all()
    (got,) = run_graph(graph, feeds, resolve_profile(mcpu=cpu))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(want).max())))


COPIES = {
    "concat of odd parts": (1, 1),
    "split in odd parts": (2, 1),
    "shuffled": (1, 1),
    "shuffled before a convolution": (0, 1),
    "last layers": (0, 0),
    "rows before a product": (0, 0),
    "tokens": (0, 1),
    "narrow groups": (0, 1),
}
"""Operator → how often channels are moved, and copies between layouts; 32 channels."""


@pytest.mark.parametrize("name", COPIES)
def test_channels_move_as_seldom_as_they_can(name: str) -> None:
    writer = written(OPERATORS[name], 32)
    kernels = kernels_of(writer.graph(writer.result))
    moved = sum("gather_channels" in kernel for kernel in kernels)
    copied = sum("pack_channels" in kernel for kernel in kernels)
    assert (moved, copied) == COPIES[name], kernels
