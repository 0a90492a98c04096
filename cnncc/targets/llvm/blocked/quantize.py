"""Quantization of blocked tensors: which of them are held as steps."""

from __future__ import annotations

from typing import Any

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.convolution import FEW_CHANNELS
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.image import NCHW, Steps, Value
from cnncc.targets.llvm.blocked.integers import quantized
from cnncc.targets.llvm.schedule.products import dots_of

_ORDERS = {4: NCHW, 2: "nc"}
"""Axes of a tensor → their order."""


def quantize(context: Context, call: Any, scale: float, name: str | None) -> Value | None:
    """Return a tensor's steps, or None where it is neither an image nor rows of features.

    Images of few channels stay plain, as the convolution that reads them wants them.

    Args:
        context: The function that is written.
        call: ``relax.quantize``.
        scale: Of a step.
        name: Name of its result.
    """
    data = call.args[0]
    held = context.steps(data)
    if held is not None and held.scale == scale:  # of a pool or a concatenation: rounded already
        return Value(steps=held)
    image, shape = context.image(data), shape_of(data)
    positive = data in context.pairs.positive
    dtype = dots_of(context.machine, positive=positive).steps
    if image is None and len(shape) == 4 and shape[1] <= FEW_CHANNELS:
        made = quantized(context.builder, context.plain(data), scale, dtype, positive=positive)
        return Value(steps=Steps(scale, plain=context.emit(made, name)))
    if image is None:
        if len(shape) not in _ORDERS:
            return None
        image = context.blocked(data, _ORDERS[len(shape)])
    made = quantized(context.builder, context.whole(image), scale, dtype, positive=positive)
    return Value(steps=Steps(scale, image=context.result(made, image.dims, image.order, name)))


def dequantize(context: Context, call: Any, scale: float, _name: str | None) -> Value | None:
    """Return the steps that a tensor is dequantized from; None where they are as the graph has them."""
    steps = context.steps(call.args[0])
    return None if steps is None else Value(steps=steps)
