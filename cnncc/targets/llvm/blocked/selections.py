"""Concatenation, split and slices of blocked tensors: channels are only noted, pixels are copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.image import Image, Value, concatenated, dims_of

AXES = {"n": 0, "h": 2, "w": 3}
"""Axes of a blocked tensor, and of `Dims`; channels have two."""


def concat(context: Context, call: Any, name: str | None, *, wanted: bool) -> Image | None:
    """Return tensors after each other, or None where they are to be plain."""
    fields = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
    images = [image for image in map(context.image, fields) if image is not None]
    if not images or not (wanted or len(images) == len(fields)):
        return None
    if not context.machine.computes(str(call.ty.dtype)):
        return None
    order = images[0].order
    if len(order) != len(shape_of(call)):
        return None
    letter = order[int(call.attrs.axis)]
    parts = [context.blocked(field, order) for field in fields if isinstance(field, relax.Var)]
    if len(parts) < len(fields):  # constants
        return None
    if letter == "c":
        return Image(concatenated([part.channels for part in parts]), order, name)
    made = relax.op.concat([context.whole(part) for part in parts], axis=AXES[letter])
    return context.result(made, dims_of(shape_of(call), order), order, name)


def split(context: Context, call: Any, name: str | None) -> list[Value] | None:
    """Return the parts of a split tensor, or None where it is plain."""
    image = _float_image(context, call)
    if image is None:
        return None
    axis = int(call.attrs.axis)
    parts = []
    start = 0
    for field in call.ty.fields:
        size = int(field.shape[axis])
        parts.append(Value(image=_picked(context, image, axis, range(start, start + size), name)))
        start += size
    return parts


def strided_slice(context: Context, call: Any, name: str | None) -> Value | None:
    """Return a slice with constant bounds, or None where the tensor is plain."""
    image = _float_image(context, call)
    if image is None:
        return None
    axes, begins, ends = (_ints(arg) for arg in call.args[1:4])
    steps = _ints(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    shape = shape_of(call)
    ranges = []
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        numbers = range(*slice(begin, end, step).indices(image.shape[axis]))
        if len(numbers) != shape[axis]:  # bounds beyond the tensor that NumPy understands in another way
            return None
        ranges.append((axis, numbers))
    for axis, numbers in ranges:
        image = _picked(context, image, axis, numbers, name)
    return Value(image=image)


def take(context: Context, call: Any, name: str | None) -> Value | None:
    """Return some channels by constant numbers, or None where it is another gather."""
    image, numbers = _float_image(context, call), context.constant(call.args[1])
    if image is None or numbers is None or numbers.ndim != 1 or call.attrs.axis is None:
        return None
    if image.order[int(call.attrs.axis)] != "c" or numbers.min() < 0 or numbers.max() >= image.dims[1]:
        return None
    return Value(image=Image(image.channels.take(numbers.astype(np.int64)), image.order, name))


def _float_image(context: Context, call: Any) -> Image | None:
    """Return the blocked form of a call's operand; masks are not gathered."""
    return context.image(call.args[0]) if context.machine.computes(str(call.args[0].ty.dtype)) else None


def _picked(context: Context, image: Image, axis: int, numbers: range, name: str | None) -> Image:
    """Return some places of one axis."""
    letter = image.order[axis]
    if letter == "c":
        return Image(image.channels.take(list(numbers)), image.order, name)
    where = AXES[letter]
    size = image.dims[where]
    if numbers == range(size):
        return image
    batch, channels, height, width = (len(numbers) if axis == where else d for axis, d in enumerate(image.dims))
    end = numbers.stop if numbers.stop >= 0 else -size - 1  # before the first: -1 would be the last
    made = relax.op.strided_slice(context.whole(image), [where], [numbers.start], [end], [numbers.step])
    return context.result(made, (batch, channels, height, width), image.order, name)


def _ints(values: Any) -> Sequence[int]:
    fields = getattr(values, "fields", values)
    return [int(getattr(field, "value", field)) for field in fields]
