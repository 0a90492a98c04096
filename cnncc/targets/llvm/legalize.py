"""Operators to loop nests that our schedules know.

Each loop nest is a plain definition of the operator, right whatever schedules it; its block is marked with the kernel
that computes it fast, and weights are packed as that kernel reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import ir, relax, te, tirx, topi

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule.anchor import KERNEL, PARAMETERS
from cnncc.targets.llvm.schedule.conv2d import CONV2D, tile_of
from cnncc.targets.llvm.schedule.matmul import MATMUL, matmul_tile
from cnncc.targets.llvm.schedule.window import GREATEST, SUM, WEIGHTED, WINDOW

Legalizer = Callable[[Any, Any], Any]

_FUSES_WITH_WHAT_FOLLOWS = {"op_pattern": 4}
"""TVM's ``kOutEWiseFusable``: element-wise operators after it may join it, none before."""


def legalizers(machine: Machine) -> dict[str, Legalizer]:
    """Return operator → how it becomes a loop nest, where TVM's own way is not taken."""
    return {
        "relax.nn.conv2d": lambda builder, call: _conv2d(builder, call, machine),
        "relax.nn.max_pool2d": lambda builder, call: _pool(builder, call, GREATEST),
        "relax.nn.avg_pool2d": lambda builder, call: _pool(builder, call, SUM),
        "relax.take": _take,
        "relax.matmul": lambda builder, call: _matmul(builder, call, machine),
    }


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _shape(expr: Any) -> list[int]:
    return _ints(expr.ty.shape)


def _is_float(*tensors: Any) -> bool:
    return all(str(tensor.ty.dtype) == "float32" for tensor in tensors)


def _default(name: str, builder: Any, call: Any) -> Any:
    return ir.Op.get(name).get_attr("FLegalize")(builder, call)


@dataclass(frozen=True)
class _Slide:
    """How a window slides: stride, padding (top, left), dilation, kernel; two numbers each."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    kernel: Sequence[int]

    def axes(self) -> tuple[Any, Any]:
        """Return the reduction axes of the window."""
        return te.reduce_axis((0, self.kernel[0]), "kh"), te.reduce_axis((0, self.kernel[1]), "kw")

    def read(self, x: Any, outer: Sequence[Any], place: Sequence[Any], outside: float) -> Any:
        """Return an image's element under the window, or a value beyond its edge.

        Args:
            x: The image.
            outer: Its first two indices.
            place: Output row and column, kernel row and column.
            outside: The value beyond.
        """
        oh, ow, kh, kw = place
        y = oh * self.stride[0] + kh * self.dilation[0] - self.padding[0]
        z = ow * self.stride[1] + kw * self.dilation[1] - self.padding[1]
        inside = tirx.all(y >= 0, y < x.shape[2], z >= 0, z < x.shape[3])
        return tirx.if_then_else(inside, x(*outer, y, z), tirx.const(outside, "float32"))


def _conv2d(builder: Any, call: Any, machine: Machine) -> Any:
    data, weight = call.args
    attrs = call.attrs
    if str(attrs.data_layout) != "NCHW" or not _is_float(data, weight, call):
        return _default("relax.nn.conv2d", builder, call)
    outputs, inputs, *kernel = _shape(weight)
    slide = _Slide(_ints(attrs.strides), _ints(attrs.padding)[:2], _ints(attrs.dilation), kernel)
    groups = int(attrs.groups)
    if inputs == 1 and groups > 1:
        return _depthwise(builder, call, slide)
    out_h, out_w = _shape(call)[2:]
    rows, vectors = tile_of(outputs // groups, out_h * out_w, machine)
    packed = _pack(builder, weight, (groups, outputs // groups, inputs, *kernel), rows)
    notes = {KERNEL: CONV2D, PARAMETERS: [*slide.stride, *slide.padding, *slide.dilation, vectors]}
    per_group = outputs // groups

    def define(x: Any, w: Any) -> Any:
        ic = te.reduce_axis((0, inputs), "ic")
        kh, kw = slide.axes()

        def element(n: Any, oc: Any, oh: Any, ow: Any) -> Any:
            group, part = oc // per_group, oc % per_group
            value = slide.read(x, (n, group * inputs + ic), (oh, ow, kh, kw), 0.0)
            return te.sum(value * w[group, part // rows, ic, kh, kw, part % rows], axis=[ic, kh, kw])

        return te.compute(_shape(call), element, name="conv2d", attrs=notes)

    return builder.call_te(define, data, packed, primfunc_name_hint="conv2d", primfunc_attrs=_FUSES_WITH_WHAT_FOLLOWS)


def _pack(builder: Any, weight: Any, shape: tuple[int, ...], rows: int) -> Any:
    """Return weights as ``[group, block of rows, input channel, kernel row, kernel column, row]``, zero-padded."""
    groups, outputs, inputs, kernel_h, kernel_w = shape
    blocks = -(-outputs // rows)
    if isinstance(weight, ir.GenericConst):
        full = np.zeros((groups, blocks * rows, inputs, kernel_h, kernel_w), "float32")
        full[:, :outputs] = weight.value.numpy().reshape(shape)
        order = full.reshape(groups, blocks, rows, inputs, kernel_h, kernel_w).transpose(0, 1, 3, 4, 5, 2)
        return relax.const(np.ascontiguousarray(order))

    def define(w: Any) -> Any:
        def element(g: Any, b: Any, i: Any, h: Any, x: Any, r: Any) -> Any:
            output = b * rows + r
            zero = tirx.const(0.0, "float32")
            return tirx.if_then_else(output < outputs, w[g * outputs + output, i, h, x], zero)

        return te.compute((groups, blocks, inputs, kernel_h, kernel_w, rows), element, name="pack")

    return builder.emit_te(define, weight, primfunc_name_hint="pack_weights")


def _depthwise(builder: Any, call: Any, slide: _Slide) -> Any:
    data, weight = call.args
    channels, outputs = _shape(data)[1], _shape(call)[1]
    flat = _reshaped(builder, weight, [outputs, *slide.kernel])

    def define(x: Any, w: Any) -> Any:
        kh, kw = slide.axes()

        def element(n: Any, c: Any, oh: Any, ow: Any) -> Any:
            value = slide.read(x, (n, c // (outputs // channels)), (oh, ow, kh, kw), 0.0)
            return te.sum(value * w[c, kh, kw], axis=[kh, kw])

        return te.compute(_shape(call), element, name="depthwise", attrs=_window_notes(slide, WEIGHTED))

    return builder.call_te(
        define, data, flat, primfunc_name_hint="depthwise_conv2d", primfunc_attrs=_FUSES_WITH_WHAT_FOLLOWS
    )


def _window_notes(slide: _Slide, kind: int) -> dict[str, Any]:
    return {KERNEL: WINDOW, PARAMETERS: [*slide.stride, *slide.padding, *slide.dilation, *slide.kernel, kind]}


def _reshaped(builder: Any, expr: Any, shape: list[int]) -> Any:
    if isinstance(expr, ir.GenericConst):
        return relax.const(expr.value.numpy().reshape(shape))
    return builder.emit(relax.op.reshape(expr, shape))


def _pool(builder: Any, call: Any, kind: int) -> Any:
    (data,) = call.args
    attrs = call.attrs
    if str(attrs.layout) != "NCHW" or not _is_float(data):
        return _default("relax.nn.max_pool2d" if kind == GREATEST else "relax.nn.avg_pool2d", builder, call)
    padding = _ints(attrs.padding)
    slide = _Slide(_ints(attrs.strides), padding[:2], _ints(attrs.dilation), _ints(attrs.pool_size))
    notes = _window_notes(slide, kind)
    shape = _shape(call)

    def greatest(x: Any) -> Any:
        kh, kw = slide.axes()

        def element(n: Any, c: Any, oh: Any, ow: Any) -> Any:
            return te.max(slide.read(x, (n, c), (oh, ow, kh, kw), float("-inf")), axis=[kh, kw])

        return te.compute(shape, element, name="max_pool", attrs=notes)

    def average(x: Any, divisor: Any) -> Any:
        kh, kw = slide.axes()

        def element(n: Any, c: Any, oh: Any, ow: Any) -> Any:
            return te.sum(slide.read(x, (n, c), (oh, ow, kh, kw), 0.0), axis=[kh, kw])

        total = te.compute(shape, element, name="window_sum", attrs=notes)
        return te.compute(shape, lambda n, c, oh, ow: total[n, c, oh, ow] / divisor[oh, ow], name="average")

    if kind == GREATEST:
        return builder.call_te(greatest, data, primfunc_name_hint="max_pool2d", primfunc_attrs=_FUSES_WITH_WHAT_FOLLOWS)
    counts = _divisors(slide, _shape(data)[2:], padding, shape[2:], bool(attrs.count_include_pad))
    return builder.call_te(
        average, data, relax.const(counts), primfunc_name_hint="avg_pool2d", primfunc_attrs=_FUSES_WITH_WHAT_FOLLOWS
    )


def _divisors(
    slide: _Slide, image: Sequence[int], padding: Sequence[int], output: Sequence[int], include_padding: bool
) -> NDArray[np.float32]:
    """Return how many elements each window averages.

    Args:
        slide: How the window slides.
        image: Height and width.
        padding: Top, left, bottom, right.
        output: Height and width.
        include_padding: Whether padding counts; what lies beyond it (``ceil_mode``) never does.
    """
    counts = []
    for axis in (0, 1):
        starts = np.arange(output[axis])[:, None] * slide.stride[axis] - padding[axis]
        taps = starts + np.arange(slide.kernel[axis])[None, :] * slide.dilation[axis]
        low, high = (-padding[axis], image[axis] + padding[axis + 2]) if include_padding else (0, image[axis])
        counts.append(np.maximum(((taps >= low) & (taps < high)).sum(axis=1), 1))
    return np.outer(counts[0], counts[1]).astype("float32")


def _take(builder: Any, call: Any) -> Any:
    """TVM's own way warns on stderr that it does not check bounds; here indices are kept inside."""
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    if str(call.attrs.mode) != "fast" or not isinstance(call.args[1].ty, relax.TensorType):
        return _default("relax.take", builder, call)
    return builder.call_te(topi.take, call.args[0], call.args[1], axis, mode="clip", primfunc_name_hint="take")


def _matmul(builder: Any, call: Any, machine: Machine) -> Any:
    left, right = call.args
    if not _is_float(left, right, call) or len(_shape(left)) < 2 or len(_shape(right)) < 2:
        return _default("relax.matmul", builder, call)
    shape = _shape(call)
    height, width, depth = shape[-2], shape[-1], _shape(left)[-1]
    rows, vectors = matmul_tile(height, width, machine)
    columns = vectors * machine.lanes
    packed = isinstance(right, ir.GenericConst) and len(_shape(right)) == 2
    if depth == 0 or (not packed and width < columns):
        return _default("relax.matmul", builder, call)
    if packed:
        right = relax.const(_packed_right(right.value.numpy(), columns))

    def define(a: Any, b: Any) -> Any:
        k = te.reduce_axis((0, depth), "k")

        def element(*place: Any) -> Any:
            *outer, row, column = place
            other = b[column // columns, k, column % columns] if packed else b(*_aligned(b, outer), k, column)
            return te.sum(a(*_aligned(a, outer), row, k) * other, axis=[k])

        notes = {KERNEL: MATMUL, PARAMETERS: [rows, vectors, depth, int(packed)]}
        return te.compute(shape, element, name="matmul", attrs=notes)

    return builder.call_te(define, left, right, primfunc_name_hint="matmul", primfunc_attrs=_FUSES_WITH_WHAT_FOLLOWS)


def _aligned(operand: Any, outer: Sequence[Any]) -> list[Any]:
    sizes = _ints(operand.shape)[:-2]
    places = outer[len(outer) - len(sizes) :]
    return [0 if size == 1 else place for size, place in zip(sizes, places, strict=True)]


def _packed_right(weight: NDArray[Any], columns: int) -> NDArray[Any]:
    """Return a matrix ``[k, n]`` as ``[block of columns, k, column]``, zero-padded."""
    depth, width = weight.shape
    blocks = -(-width // columns)
    full = np.zeros((depth, blocks * columns), "float32")
    full[:, :width] = weight
    return np.ascontiguousarray(full.reshape(depth, blocks, columns).transpose(1, 0, 2))
