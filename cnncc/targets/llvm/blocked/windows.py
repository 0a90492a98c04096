"""Pooling and reductions over pixels, on blocked tensors."""

from __future__ import annotations

from typing import Any

from tvm import relax

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.image import NCHW, Image, Steps, Value, dims_of
from cnncc.targets.llvm.blocked.integers import held_steps
from cnncc.targets.llvm.blocked.window import average_pool, divisors_of, max_pool
from cnncc.targets.llvm.rules import Sliding

_AXES = {"n": 0, "h": 2, "w": 3}
"""Axis of a blocked tensor."""


def pool(context: Context, call: Any, name: str | None) -> Image | Value | None:
    """Return the maximum or average under a sliding window, or None where the data are not float images."""
    (data,) = call.args
    attrs = call.attrs
    if str(attrs.layout) != "NCHW" or not context.machine.computes(str(call.ty.dtype)):
        return None
    greatest = str(call.op.name).endswith("max_pool2d")
    steps = context.steps(data) if greatest else None
    held = steps.image if steps is not None and steps.is_image else None
    image = held or context.blocked(data, NCHW)
    dims = dims_of(shape_of(call), NCHW)
    top, left, bottom, right = (int(size) for size in attrs.padding)
    kernel, stride, dilation = (_pair(sizes) for sizes in (attrs.pool_size, attrs.strides, attrs.dilation))
    sliding = Sliding(image.dims[2:], kernel, stride, (top, left, bottom, right), dilation, dims[2:])
    whole = context.whole(image)
    if greatest:
        made = max_pool(context.builder, whole, sliding, context.machine.of(str(whole.ty.dtype)))
        if steps is not None and held is not None:
            made = held_steps(context.builder, context.emit(made, name), str(whole.ty.dtype))
            return Value(steps=Steps(steps.scale, image=context.result(made, dims, NCHW, name)))
    else:
        divisors = divisors_of(sliding, bool(attrs.count_include_pad))
        made = average_pool(context.builder, whole, sliding, divisors, context.machine)
    return context.result(made, dims, NCHW, name)


def _pair(sizes: Any) -> tuple[int, int]:
    first, second = (int(size) for size in sizes)
    return first, second


def reduce_pixels(context: Context, call: Any, name: str | None) -> Image | None:
    """Return a sum, mean, maximum and so on over rows, columns or both, or None where other axes are reduced."""
    (data,) = call.args
    image = context.image(data)
    if image is None or call.attrs.axis is None:
        return None
    axes = {int(axis) % len(image.order) for axis in call.attrs.axis}
    letters = [image.order[axis] for axis in sorted(axes)]
    if not set(letters) <= {"h", "w"}:
        return None
    order = image.order if call.attrs.keepdims else "".join(letter for letter in image.order if letter not in letters)
    n, c, h, w = image.dims
    dims = (n, c, 1 if "h" in letters else h, 1 if "w" in letters else w)
    reduce = getattr(relax.op, str(call.op.name).removeprefix("relax."))
    made = reduce(context.whole(image), axis=[_AXES[letter] for letter in letters], keepdims=True)
    return context.result(made, dims, order, name)
