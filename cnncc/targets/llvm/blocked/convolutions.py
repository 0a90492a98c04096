"""Convolutions of the graph to convolutions on blocked tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.convolution import FEW_CHANNELS, conv2d, whole_groups
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.geometry import blocks_of, pack_channels
from cnncc.targets.llvm.blocked.image import Dims, Image, Value, dims_of
from cnncc.targets.llvm.blocked.integers import MOST_PRODUCTS, MOST_TAPS, integer_conv2d, offsets_of, rescaled
from cnncc.targets.llvm.blocked.window import depthwise
from cnncc.targets.llvm.blocked.winograd import winograd_conv2d
from cnncc.targets.llvm.rules import ConvShape
from cnncc.targets.llvm.winograd_rules import WinogradPlan, applies

_WIDER = 1.25
"""How many more input channels (with zero weights) a convolution may read where that saves moving channels."""


@dataclass(frozen=True)
class Convolution:
    """What a convolution of the graph computes.

    Attributes:
        weight: ``[outputs, inputs of a group, kh, kw]``; int8 where the data are steps.
        groups: Groups of channels.
        stride: Down and right.
        padding: Top, left, bottom, right.
        dilation: Down and right.
        output: Height and width of the result.
        winograd: How it uses Winograd's method; None for the direct one.
        scales: What sums of steps are multiplied by, one number an output channel; None for float32.
    """

    weight: NDArray[Any]
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]
    winograd: WinogradPlan | None = None
    scales: NDArray[np.float32] | None = None


def convolution(context: Context, call: Any, name: str | None) -> Image | None:
    """Return the result of a convolution with constant weights on images or sequences, else None."""
    attrs = call.attrs
    layout = str(attrs.data_layout)
    steps = context.steps(call.args[0])
    integers = _integers(context, call) if layout == "NCHW" and steps is not None and steps.is_image else None
    weight, scales = integers or (context.constant(call.args[1]), None)
    if weight is None or layout not in ("NCHW", "NCW") or not _is_float(context, call, *call.args):
        return None
    order = layout.lower()
    stride, dilation = _ints(attrs.strides), _ints(attrs.dilation)
    before, after = _halves(_ints(attrs.padding))
    if order == "ncw":
        weight = weight[:, :, None]
        stride, dilation, before, after = [1, *stride], [1, *dilation], [0, *before], [0, *after]
    output = dims_of(shape_of(call), order)[2:]
    padding = (before[0], before[1], after[0], after[1])
    spec = Convolution(
        weight,
        int(attrs.groups),
        (stride[0], stride[1]),
        padding,
        (dilation[0], dilation[1]),
        output,
        context.methods.get(call),
        scales,
    )
    return convolve(context, call.args[0], spec, order, name)


def convolve(context: Context, data: Any, spec: Convolution, order: str, name: str | None) -> Image:
    """Return the result of a convolution.

    Args:
        context: The function that is written.
        data: Variable of the graph.
        spec: The convolution.
        order: Order of the data's axes.
        name: Name of the result.
    """
    dims = dims_of(shape_of(data), order)
    result = (dims[0], spec.weight.shape[0], *spec.output)
    plans = context.plans.of(str(data.ty.dtype))
    if spec.scales is not None:
        return _convolve_steps(context, data, spec, result, name)
    if spec.groups > 1 and spec.weight.shape[:2] == (spec.groups, 1):
        image = context.blocked(data, order)
        shape = _shape(spec, dims, (1, 1), spec.groups, blocked=True)
        call = depthwise(
            context.builder, context.whole(image), spec.weight, shape, plans.machine, plans.depthwise(shape)
        )
        return context.result(call, result, order, name)
    weight, groups = whole_groups(spec.weight, spec.groups, context.block)
    value = context.value(data)
    few = dims[1] <= FEW_CHANNELS and groups == 1 and order == "nchw" and value.plain is not None
    if few:
        operand = context.plain(data)
    else:
        operand, weight = _operand(context, context.blocked(data, order), weight, groups)
    if groups * weight.shape[1] > dims[1] and groups > 1:
        operand = _cleared(context, operand, dims[1], context.name(data))
    if not few:
        operand, weight = _whole_blocks(context, operand, weight, context.name(data))
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    shape = _shape(spec, dims, (inputs, outputs), groups, blocked=not few)
    if spec.winograd is not None and applies(shape, context.machine):
        call = winograd_conv2d(
            context.builder, operand, weight, shape, spec.winograd, context.machine, context.expansions
        )
    else:
        call = conv2d(context.builder, operand, weight, shape, plans.machine, plans.direct(shape))
    return context.result(call, result, order, name)


def _integers(context: Context, call: Any) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
    """Return int8 weights and the scales of their sums with steps; None where an operand is not int8."""
    steps, weight = context.steps(call.args[0]), context.pairs.weights.get(call.args[1])
    if steps is None or weight is None or weight.integers[0].size > MOST_PRODUCTS:
        return None
    if weight.swapped != (weight.integers.ndim == 2):  # its scales are those of input channels
        return None
    if weight.integers.shape[1] == 1 and weight.integers[0].size > MOST_TAPS:  # depthwise sums are in float32
        return None
    scales = np.float64(steps.scale) * weight.scales.astype(np.float64)
    return weight.integers, scales.astype(np.float32)


def _convolve_steps(context: Context, data: Any, spec: Convolution, result: Dims, name: str | None) -> Image:
    """Return the result of a convolution of steps: their sums, multiplied by the scales."""
    steps, builder, block = context.steps(data), context.builder, context.block
    assert steps is not None
    assert spec.scales is not None
    scales = pack_channels(spec.scales, block)
    if steps.image is None and spec.groups > 1:
        steps = context.blocked_steps(steps, dims_of(shape_of(data), "nchw"), name)
    dims = steps.image.dims if steps.image is not None else dims_of(shape_of(data), "nchw")
    if spec.groups > 1 and spec.weight.shape[:2] == (spec.groups, 1) and steps.image is not None:
        shape = _shape(spec, dims, (1, 1), spec.groups, blocked=True)
        plan = context.plans.depthwise(shape)
        sums = depthwise(builder, context.whole(steps.image), spec.weight, shape, context.machine, plan)
        offsets = None
    else:
        weight, groups = whole_groups(spec.weight, spec.groups, block)
        operand: Any = steps.plain
        if steps.image is not None:
            operand, weight = _operand(context, steps.image, weight, groups)
        channels = (weight.shape[1], weight.shape[0] // groups)
        shape = _shape(spec, dims, channels, groups, blocked=steps.image is not None)
        sums = integer_conv2d(builder, operand, weight, shape, context.plans)
        offsets = offsets_of(weight, str(operand.ty.dtype), context.machine)
    made = rescaled(builder, context.emit(sums, name), scales, offsets)
    return context.result(made, result, steps.image.order if steps.image is not None else "nchw", name)


def _operand(context: Context, image: Image, weight: NDArray[Any], groups: int) -> tuple[Any, NDArray[Any]]:
    """Return a convolution's blocked operand, and its weights for that operand's channels.

    Where all channels lie in one tensor, the weights are put in its order instead of the channels in theirs.
    """
    channels = image.channels
    if channels.whole is None and groups == 1 and len(channels.sources) == 1:
        source, count = channels.sources[0]
        once = len(np.unique(channels.places[:, 1])) == len(channels.places)
        near = blocks_of(count, context.block) <= _WIDER * blocks_of(len(channels.places), context.block)
        if near and (once or weight.dtype != np.int8):  # two weights of int8 have no sum in int8
            spread = np.zeros((weight.shape[0], count, *weight.shape[2:]), weight.dtype)
            for position, place in enumerate(channels.places[:, 1]):
                spread[:, place] += weight[:, position]
            return source, spread
    return context.whole(image), weight


def _whole_blocks(context: Context, operand: Any, weight: NDArray[Any], name: str | None) -> tuple[Any, NDArray[Any]]:
    """Return a convolution's operand and weights with whole blocks of channels, where its kernel loads whole blocks."""
    missing = -weight.shape[1] % context.block
    if not missing or context.machine.of(str(operand.ty.dtype)).abreast == 1:
        return operand, weight
    filled = np.pad(weight, [(0, 0), (0, missing), (0, 0), (0, 0)])
    return _cleared(context, operand, weight.shape[1], name), filled


def _cleared(context: Context, operand: Any, channels: int, name: str | None) -> Any:
    """Return a blocked tensor whose lanes after the last channel are 0; its producer does that on the way."""
    inside = pack_channels(np.ones((1, channels, 1, 1), "bool"), context.block, axis=1, fill=0)
    return context.emit(relax.op.where(relax.const(inside), operand, relax.const(0.0, operand.ty.dtype)), name)


def _shape(spec: Convolution, dims: Dims, channels: tuple[int, int], groups: int, *, blocked: bool) -> ConvShape:
    batch, _, height, width = dims
    kernel = (spec.weight.shape[2], spec.weight.shape[3])
    shape = ConvShape(batch, groups, *channels, (height, width), kernel, spec.stride, spec.padding, spec.dilation,
                      spec.output)  # fmt: skip
    return replace(shape, blocked=blocked)


def product(context: Context, call: Any, name: str | None) -> Value | None:
    """Return a product with a constant matrix whose left operand is blocked, else None.

    Args:
        context: The function that is written.
        call: ``relax.matmul``.
        name: Name of its result.
    """
    if (integers := _integers(context, call)) is not None:
        return _product_of_steps(context, call, *integers, name)
    left, matrix = context.value(call.args[0]), context.constant(call.args[1])
    if matrix is None or matrix.ndim != 2 or not _is_float(context, call, call.args[0]):
        return None
    if left.base is not None and left.plain is None and not left.grid:
        return _product_of_rows(context, left.base, matrix, name)
    image = left.image
    if image is None or image.order[-1] != "c" or image.dims[2] * image.dims[3] == 1:
        return None
    weight = np.ascontiguousarray(matrix.T)[:, :, None, None]
    spec = Convolution(weight, 1, (1, 1), (0, 0, 0, 0), (1, 1), image.dims[2:])
    operand, weight = _whole_blocks(context, *_operand(context, image, weight, 1), image.name)
    shape = _shape(spec, image.dims, (weight.shape[1], weight.shape[0]), 1, blocked=True)
    dims = (image.dims[0], matrix.shape[1], *image.dims[2:])
    plans = context.plans.of(str(matrix.dtype))
    made = conv2d(context.builder, operand, weight, shape, plans.machine, plans.direct(shape))
    return Value(image=context.result(made, dims, image.order, name))


def _product_of_steps(
    context: Context, call: Any, weight: NDArray[Any], scales: NDArray[np.float32], name: str | None
) -> Value | None:
    """Return the product of steps with a matrix: a convolution of pixels, or as large as the image that rows were.

    None where channels are not the last axis.
    """
    steps = context.steps(call.args[0])
    if steps is None or steps.image is None or steps.grid or not (steps.flat or steps.image.order[-1] == "c"):
        return None
    batch, channels, *pixels = steps.image.dims
    kernel = weight.reshape(weight.shape[0], channels, *(pixels if steps.flat else (1, 1)))
    output = (1, 1) if steps.flat else (pixels[0], pixels[1])
    spec = Convolution(kernel, 1, (1, 1), (0, 0, 0, 0), (1, 1), output, scales=scales)
    made = _convolve_steps(context, call.args[0], spec, (batch, weight.shape[0], *output), name)
    return Value(image=made.reordered("nc", name) if steps.flat else made)


def _product_of_rows(context: Context, image: Image, matrix: NDArray[Any], name: str | None) -> Value:
    """Return the product of whole images as rows: the matrix is put in the order of blocks instead of the image."""
    batch, channels, height, width = image.dims
    blocks, block = channels // context.block, context.block
    rows = matrix.reshape(blocks, block, height, width, -1).transpose(0, 2, 3, 1, 4)
    ordered = np.ascontiguousarray(rows).reshape(matrix.shape)
    flat = context.emit(relax.op.reshape(context.whole(image), [batch, matrix.shape[0]]), image.name)
    return Value(plain=context.emit(relax.op.matmul(flat, relax.const(ordered)), name))


def _is_float(context: Context, *tensors: Any) -> bool:
    dtypes = {str(tensor.ty.dtype) for tensor in tensors}
    return len(dtypes) == 1 and context.machine.computes(dtypes.pop())


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _halves(values: Sequence[int]) -> tuple[list[int], list[int]]:
    middle = len(values) // 2
    return list(values[:middle]), list(values[middle:])
