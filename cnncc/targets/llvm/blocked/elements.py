"""Element-wise operators on blocked tensors, with the broadcasting of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import ir, relax

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.image import Image, dims_of
from cnncc.targets.llvm.blocked.transform import pack_constant

_UNARY = frozenset(
    {
        "abs", "acos", "acosh", "asin", "asinh", "astype", "atan", "atanh", "bitwise_not", "ceil", "clip", "cos",
        "cosh",
        "erf", "exp", "floor", "isfinite", "isinf", "isnan", "log", "logical_not", "negative", "nn.gelu",
        "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.selu", "nn.silu", "nn.softplus", "round", "rsqrt", "sigmoid",
        "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc",
    }
)  # fmt: skip
_SEVERAL = frozenset(
    {
        "add", "atan2", "bitwise_and", "bitwise_or", "bitwise_xor", "divide", "equal", "ewise_fma", "floor_divide",
        "floor_mod", "greater", "greater_equal", "left_shift", "less", "less_equal", "log_add_exp", "logical_and",
        "logical_or", "logical_xor", "maximum", "minimum", "mod", "multiply", "not_equal", "power", "right_shift",
        "subtract", "where",
    }
)  # fmt: skip

_INJECTIVE = 2
"""TVM's ``kInjective``: element-wise operators may follow it, it joins no sum before it."""

ELEMENTWISE = frozenset(f"relax.{name}" for name in _UNARY | _SEVERAL)
"""Operators that treat all elements alike, with NumPy's broadcasting."""


def elementwise(context: Context, call: Any, name: str | None, *, wanted: bool) -> Image | None:
    """Return the result of an element-wise operator as an image, or None where it is to be plain.

    Args:
        context: The function that is written.
        call: The call of the graph.
        name: Name of its result.
        wanted: Whether some reader of the result wants it blocked.
    """
    tensors = [arg for arg in call.args if isinstance(arg.ty, relax.TensorType)]
    layout = _leading(context, tensors)
    if layout is None or not all(_may_be_blocked(context, tensor) for tensor in (call, *tensors)):
        return None
    shape = shape_of(call)
    if len(shape) > len(layout.order):
        return None
    dims = dims_of(shape, layout.order)
    if not wanted and any(_is_large(context, tensor, dims, layout.order) for tensor in tensors):
        return None
    args = [
        operand(context, arg, dims, layout.order) if isinstance(arg.ty, relax.TensorType) else arg for arg in call.args
    ]
    if str(call.op.name) == "relax.subtract":  # a shift: as part of the code, it would make a kernel for every amount
        args = [_as_tensor(arg) for arg in args]
    made = ir.Call(call.op, args, call.attrs, call.ty_args)
    if any(_is_stretched(context.image(tensor), dims) for tensor in tensors):
        made = _apart(context, made)
    return context.result(made, dims, layout.order, name)


def _may_be_blocked(context: Context, tensor: Any) -> bool:
    """Whether a tensor holds floats or masks; of integers, lanes after the last channel could divide by 0: a trap."""
    return str(tensor.ty.dtype) == "bool" or context.machine.computes(str(tensor.ty.dtype))


def _as_tensor(arg: Any) -> Any:
    """Return a constant number as a tensor that broadcasts, and anything else as it is."""
    if not isinstance(arg, ir.GenericConst) or len(arg.ty.shape):
        return arg
    return relax.const(np.asarray(arg.value.numpy()).reshape(1, 1, 1, 1, 1))


def _is_stretched(image: Image | None, dims: Sequence[int]) -> bool:
    """Whether one blocked pixel meets all pixels of the result, as the scale of squeeze-and-excitation does."""
    return image is not None and image.dims[2] * image.dims[3] == 1 < dims[2] * dims[3]


def _apart(context: Context, call: Any) -> Any:
    """Return an operator as a loop nest that does not join the kernel which makes the pixel: that has its own loops."""
    call = context.builder.normalize(call)
    nest = ir.Op.get(call.op.name).get_attr("FLegalize")(context.builder, call)
    function = context.builder.get()[nest.args[0]]
    context.builder.update_func(nest.args[0], function.with_attr("op_pattern", _INJECTIVE))
    return nest


def shape_of(expr: Any) -> list[int]:
    """Return the shape of a tensor, which is static."""
    return [int(size) for size in expr.ty.shape]


def _leading(context: Context, tensors: Sequence[Any]) -> Image | None:
    """Return the blocked operand that the result's axes follow: the one of the most axes."""
    images = [image for image in map(context.image, tensors) if image is not None]
    if not images:
        return None
    return max(images, key=lambda image: (len(image.order), np.prod(image.dims)))


def _is_large(context: Context, tensor: Any, dims: Sequence[int], order: str) -> bool:
    """Whether a tensor is plain and would have to be packed, pixel by pixel."""
    if context.constant(tensor) is not None or context.image(tensor) is not None:
        return False
    own = dims_of(shape_of(tensor), order)
    return own[1] > 1 and own[2] * own[3] > 1 and own[2] * own[3] == dims[2] * dims[3]


def operand(context: Context, expr: Any, dims: Sequence[int], order: str) -> Any:
    """Return an operand so that it broadcasts against blocked tensors.

    Args:
        context: The function that is written.
        expr: A constant or a variable of the graph.
        dims: Sizes of the result's axes.
        order: Order of the result's axes.
    """
    shape = shape_of(expr)
    if not shape:
        return context.plain(expr)
    own = dims_of(shape, order)
    values = context.constant(expr)
    if values is not None:
        return relax.const(pack_constant(values, own, order[-len(shape) :], context.block))
    image = context.image(expr)
    if image is not None and image.order == order[-len(shape) :] and own[1] == dims[1]:
        return context.whole(image)
    if own[1] == 1:  # rows and columns keep their order whatever the order of axes, since there is but one channel
        return context.emit(relax.op.reshape(context.plain(expr), (*own, 1)), context.name(expr))
    return context.whole(context.blocked(expr, order[-len(shape) :]))
