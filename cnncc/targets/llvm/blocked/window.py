"""Depthwise convolution and pooling on blocked tensors: what is computed, for the kernel in `schedule/window.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx

from cnncc.targets.llvm.blocked.geometry import pack_channels
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import ConvShape, Sliding, WindowPlan, depthwise_plan, sliding_of, window_plan
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, MEASURED, PARAMETERS
from cnncc.targets.llvm.schedule.products import as_float
from cnncc.targets.llvm.schedule.window import GREATEST, SUM, WEIGHTED, WINDOW

Define = Callable[..., Any]


def depthwise(
    builder: Any,
    data: Any,
    weight: NDArray[Any],
    shape: ConvShape,
    machine: Machine,
    plan: WindowPlan | None = None,
) -> Any:
    """Return the call that convolves each channel with a kernel of its own.

    Args:
        builder: Relax block builder.
        data: Blocked, ``[n, ⌈c / b⌉, h, w, b]`` floats, or steps, whose sums are whole numbers in float32.
        weight: ``[c, 1, kh, kw]``.
        shape: The convolution, with as many groups as channels.
        machine: What the kernel is for.
        plan: Knobs; the rule's by default.

    Returns:
        A call of type ``[n, ⌈c / b⌉, oh, ow, b]``.
    """
    packed = relax.const(pack_channels(weight[:, 0].astype(float_type(data)), machine.block))
    define = depthwise_definition(shape, plan or depthwise_plan(shape, machine))
    return builder.call_te(define, data, packed, primfunc_name_hint="depthwise_conv2d", primfunc_attrs=FUSES)


def depthwise_definition(shape: ConvShape, plan: WindowPlan) -> Define:
    """Return the operator on weights ``[⌈c / b⌉, kh, kw, b]``, for ``call_te``."""
    sliding = sliding_of(shape)

    def define(x: Any, w: Any) -> Any:
        def element(n: Any, block: Any, oh: Any, ow: Any, lane: Any) -> Any:
            kh, kw = _taps(sliding)
            value = _under(x, sliding, (n, block, oh, ow, lane), (kh, kw), 0.0, str(w.dtype))
            return te.sum(value * w[block, kh, kw, lane], axis=[kh, kw])

        return te.compute(_result(x, sliding), element, "depthwise", attrs=_notes(sliding, WEIGHTED, plan))

    return define


def max_pool(builder: Any, data: Any, sliding: Sliding, machine: Machine) -> Any:
    """Return the call that takes the greatest element under a window; padding is −∞ and NaN wins.

    Args:
        builder: Relax block builder.
        data: Blocked, ``[n, ⌈c / b⌉, h, w, b]`` floats, or steps, of which whole numbers in float32 are made.
        sliding: How the window slides.
        machine: What the kernel is for.

    Returns:
        A call of type ``[n, ⌈c / b⌉, oh, ow, b]``.
    """
    *first, last = _separated(sliding)
    for step in first:
        data = builder.emit(_max_pool(builder, data, step, machine))
    return _max_pool(builder, data, last, machine)


def _separated(sliding: Sliding) -> list[Sliding]:
    """Return windows that follow each other and find the same maximum: of rows, then of columns, where that takes less.

    Half as many taps pay for the pass over memory between the two.
    """
    (high, wide), (rows, columns), ratio = sliding.kernel, sliding.output, sliding.image[0] / sliding.output[0]
    if high * wide < 2 * (wide * ratio + high):
        return [sliding]
    top, left, bottom, right = sliding.padding
    image = sliding.image[0]
    (down, across), (below, beside) = sliding.stride, sliding.dilation
    return [
        Sliding(sliding.image, (1, wide), (1, across), (0, left, 0, right), (1, beside), (image, columns)),
        Sliding((image, columns), (high, 1), (down, 1), (top, 0, bottom, 0), (below, 1), (rows, columns)),
    ]


def _max_pool(builder: Any, data: Any, sliding: Sliding, machine: Machine) -> Any:
    dtype = float_type(data)

    def define(x: Any) -> Any:
        def element(n: Any, block: Any, oh: Any, ow: Any, lane: Any) -> Any:
            taps = _taps(sliding)
            seen = _under(x, sliding, (n, block, oh, ow, lane), taps, float("-inf"), dtype)
            return te.max(seen, axis=list(taps))

        return te.compute(
            _result(x, sliding), element, "max_pool", attrs=_notes(sliding, GREATEST, _pool_plan(x, sliding, machine))
        )

    return builder.call_te(define, data, primfunc_name_hint="max_pool2d", primfunc_attrs=FUSES)


def average_pool(builder: Any, data: Any, sliding: Sliding, divisors: NDArray[Any], machine: Machine) -> Any:
    """Return the call that averages the elements under a window.

    Args:
        builder: Relax block builder.
        data: Blocked, ``[n, ⌈c / b⌉, h, w, b]`` floats; they are summed in float32.
        sliding: How the window slides.
        divisors: ``[oh, ow]`` float32, what each sum is divided by; see `divisors_of`.
        machine: What the kernel is for.

    Returns:
        A call of type ``[n, ⌈c / b⌉, oh, ow, b]``.
    """
    same = float(divisors.flat[0]) if bool(np.all(divisors == divisors.flat[0])) else None

    def define(x: Any, *counts: Any) -> Any:
        def element(n: Any, block: Any, oh: Any, ow: Any, lane: Any) -> Any:
            taps = _taps(sliding)
            return te.sum(_under(x, sliding, (n, block, oh, ow, lane), taps, 0.0), axis=list(taps))

        shape = _result(x, sliding)
        total = te.compute(shape, element, "window_sum", attrs=_notes(sliding, SUM, _pool_plan(x, sliding, machine)))

        def average(n: Any, block: Any, oh: Any, ow: Any, lane: Any) -> Any:
            divisor = tirx.const(same, "float32") if same is not None else counts[0][oh, ow]
            return (total[n, block, oh, ow, lane] / divisor).astype(x.dtype)

        return te.compute(shape, average, "average")

    operands = [data] if same is not None else [data, relax.const(divisors.astype("float32"))]
    return builder.call_te(define, *operands, primfunc_name_hint="avg_pool2d", primfunc_attrs=FUSES)


def divisors_of(sliding: Sliding, include_padding: bool) -> NDArray[np.float32]:
    """Return how many elements each window averages, ``[oh, ow]``, at least 1.

    Args:
        sliding: How the window slides.
        include_padding: Whether padding counts; what lies beyond it (``ceil_mode``) never does.
    """
    counts = []
    for axis in (0, 1):
        before, after = sliding.padding[axis], sliding.padding[axis + 2]
        starts = np.arange(sliding.output[axis])[:, None] * sliding.stride[axis] - before
        taps = starts + np.arange(sliding.kernel[axis])[None, :] * sliding.dilation[axis]
        size = sliding.image[axis]
        low, high = (-before, size + after) if include_padding else (0, size)
        counts.append(np.maximum(((taps >= low) & (taps < high)).sum(axis=1), 1))
    return np.outer(counts[0], counts[1]).astype("float32")


def _taps(sliding: Sliding) -> tuple[Any, Any]:
    return te.reduce_axis((0, sliding.kernel[0]), "kh"), te.reduce_axis((0, sliding.kernel[1]), "kw")


def float_type(data: Any) -> str:
    """Return the element type in which a window over a tensor computes: the tensor's own, float32 for steps."""
    return "float16" if str(data.ty.dtype) == "float16" else "float32"


def _under(
    x: Any, sliding: Sliding, place: tuple[Any, ...], taps: tuple[Any, Any], outside: float, dtype: str = "float32"
) -> Any:
    """Return the element that a tap of the window sees, or a value beyond the image's edge, as a float of some type."""
    n, block, oh, ow, lane = place
    y = oh * sliding.stride[0] + taps[0] * sliding.dilation[0] - sliding.padding[0]
    z = ow * sliding.stride[1] + taps[1] * sliding.dilation[1] - sliding.padding[1]
    inside = tirx.all(y >= 0, y < sliding.image[0], z >= 0, z < sliding.image[1])
    return tirx.if_then_else(inside, as_float(x(n, block, y, z, lane), dtype), tirx.const(outside, dtype))


def _result(x: Any, sliding: Sliding) -> tuple[int, int, int, int, int]:
    batch, blocks, _, _, lanes = (int(size) for size in x.shape)
    return batch, blocks, *sliding.output, lanes


def _pool_plan(x: Any, sliding: Sliding, machine: Machine) -> WindowPlan:
    return window_plan(sliding, int(x.shape[0]) * int(x.shape[1]), machine, weighted=False)


def _notes(sliding: Sliding, kind: int, plan: WindowPlan) -> dict[str, Any]:
    numbers = [*sliding.kernel, *sliding.stride, *sliding.padding[:2], *sliding.dilation, kind, *plan.numbers]
    return {KERNEL: WINDOW, PARAMETERS: numbers, MEASURED: int(plan.measured)}
