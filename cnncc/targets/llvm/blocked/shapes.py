"""Changes of shape that leave blocked tensors where they are, or move whole pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.geometry import blocked_shape
from cnncc.targets.llvm.blocked.image import NCHW, Image, Value, filled, fitting_orders


def permute(context: Context, call: Any, name: str | None) -> Value | None:
    """Return a blocked tensor under another order of axes: nothing moves while pixels keep their order, else None."""
    value = context.value(call.args[0])
    if value.grid:
        return _permuted_grid(value, _axes(call, len(value.grid) + 3), name)
    image = value.image
    if image is None:
        return None
    order = "".join(image.order[axis] for axis in _axes(call, len(image.order)))
    pixels = [letter for letter in order if letter != "c"]
    if pixels != sorted(pixels, key=NCHW.index):
        return None
    return Value(image=image.reordered(order, name))


def _axes(call: Any, rank: int) -> list[int]:
    axes = call.attrs.axes
    return list(range(rank))[::-1] if axes is None else [int(axis) % rank for axis in axes]


def _permuted_grid(value: Value, axes: list[int], name: str | None) -> Value | None:
    """Return channels that lie on a grid with the grid's axes in another order: a shuffle of channels."""
    count = len(value.grid)
    inner = axes[1:-2]
    if value.base is None or [axes[0], *axes[-2:]] != [0, count + 1, count + 2]:
        return None
    numbers = np.arange(value.base.dims[1]).reshape(value.grid).transpose([axis - 1 for axis in inner])
    base = Image(value.base.channels.take(numbers.reshape(-1)), NCHW, name)
    return Value(base=base, grid=numbers.shape)


def reshape(context: Context, call: Any, name: str | None) -> Value | None:
    """Return a blocked tensor under another shape, where that only adds, drops, joins or splits axes."""
    value, shape = context.value(call.args[0]), shape_of(call)
    if value.grid and value.base is not None and tuple(shape) == value.base.dims:
        return Value(image=value.base.reordered(NCHW, name))
    image = value.image
    if image is None:
        return None
    for order in fitting_orders(image.dims, shape, image.order):
        if _same_sequence(image, order):
            return Value(image=image.reordered(order, name))
    if not context.machine.computes(str(call.ty.dtype)):  # masks are not gathered
        return None
    return _channels_regrouped(context, image, shape, name) or _pixels_regrouped(context, image, shape, name)


def _channels_regrouped(context: Context, image: Image, shape: list[int], name: str | None) -> Value | None:
    """Return an image whose channels become several axes, or one axis with its pixels."""
    batch, channels, height, width = image.dims
    if image.order != NCHW or shape[0] != batch:
        return None
    base = Image(image.channels, NCHW, name)
    if len(shape) > 4 and shape[-2:] == [height, width] and int(np.prod(shape[1:-2])) == channels:
        return Value(base=base, grid=tuple(shape[1:-2]))
    if shape == [batch, channels * height * width] and filled(channels, context.block):
        return Value(base=base)
    return None


def _same_sequence(image: Image, order: str) -> bool:
    """Whether axes longer than 1 follow each other alike in both orders; otherwise it is no reshape."""
    long = {letter for letter, size in zip(NCHW, image.dims, strict=True) if size > 1}
    return [a for a in image.order if a in long] == [a for a in order if a in long]


def _pixels_regrouped(context: Context, image: Image, shape: list[int], name: str | None) -> Value | None:
    """Return an image with rows and columns as one axis, or an axis of pixels as rows and columns."""
    batch, channels, height, width = image.dims
    last = image.order[-1] == "c"
    if len(shape) == 3 and image.order in (NCHW, "nhwc"):
        dims, order = (batch, channels, 1, height * width), "nwc" if last else "ncw"
    elif len(shape) == 4 and image.order in ("ncw", "nwc"):
        rows, columns = (shape[1], shape[2]) if last else (shape[2], shape[3])
        dims, order = (batch, channels, rows, columns), "nhwc" if last else NCHW
    else:
        return None
    if dims[2] * dims[3] != height * width or not any(fitting_orders(dims, shape, order)):
        return None
    if next(fitting_orders(dims, shape, order)) != order:
        return None
    made = relax.op.reshape(context.whole(image), blocked_shape(dims, context.block))
    return Value(image=context.result(made, dims, order, name))
