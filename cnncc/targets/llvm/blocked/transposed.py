"""Transposed convolutions: one ordinary convolution for each phase of the output, and their results interleaved.

Output row y of a transposed convolution of stride s sums the kernel's rows that are (y + padding) mod s, mod s; rows of
one phase are a convolution of stride 1 (Shi et al., Is the deconvolution layer the same as a convolutional layer?,
2016). No product with the zeros between input pixels is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.convolutions import Convolution, convolve
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.geometry import blocked_shape
from cnncc.targets.llvm.blocked.image import NCHW, Dims, Image, dims_of
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, PARAMETERS
from cnncc.targets.llvm.schedule.interleave import INTERLEAVE

_MOST_PHASES = 16
"""Phases up to which each may have a kernel call of its own."""


@dataclass(frozen=True)
class _Axis:
    """One axis of a transposed convolution.

    Attributes:
        size: Of the input.
        kernel: Of the weights.
        stride: Distance of input pixels in the output.
        before: Rows that are cut off in front.
        output: Of the result.
    """

    size: int
    kernel: int
    stride: int
    before: int
    output: int

    @property
    def first(self) -> int:
        """First row that each phase computes; its convolution needs no negative padding."""
        return min(self.before // self.stride, self.kernel // self.stride - 1)

    @property
    def offset(self) -> int:
        """Where the result begins in the interleaved rows."""
        return self.before - self.first * self.stride

    @property
    def rows(self) -> int:
        """Rows that each phase computes: what is asked for, but all that its input gives without padding."""
        return max((self.offset + self.output - 1) // self.stride + 1, self.size - self.first)

    def taps(self, phase: int) -> range:
        """Return the kernel's rows of a phase, in the order of a convolution."""
        return range(phase, self.kernel, self.stride)[::-1]

    def padding(self, phase: int) -> tuple[int, int]:
        """Return the padding before and after a phase's input."""
        count = len(self.taps(phase))
        before = count - 1 - self.first
        return before, self.rows + count - 1 - self.size - before


def transposed_convolution(context: Context, call: Any, name: str | None) -> Image | None:
    """Return the result of a transposed convolution with constant weights on images, else None."""
    data, weight = call.args[0], context.constant(call.args[1])
    attrs = call.attrs
    if weight is None or (str(attrs.data_layout), str(attrs.kernel_layout)) != (NCHW.upper(), "IOHW"):
        return None
    stride = [int(size) for size in attrs.strides]
    kernel = weight.shape[2:]
    if any(int(size) != 1 for size in attrs.dilation) or any(k < s for k, s in zip(kernel, stride, strict=True)):
        return None
    if stride[0] * stride[1] > _MOST_PHASES or not context.machine.computes(str(call.ty.dtype)):
        return None
    result = dims_of(shape_of(call), NCHW)
    before = [int(size) for size in attrs.padding][:2]
    down, across = (
        _Axis(shape_of(data)[2 + axis], kernel[axis], stride[axis], before[axis], result[2 + axis]) for axis in (0, 1)
    )
    forward = _forward(weight, int(attrs.groups))
    phases = [
        context.whole(_phase(context, data, forward, int(attrs.groups), (down, across), (row, column), name))
        for row in range(stride[0])
        for column in range(stride[1])
    ]
    if len(phases) == 1 and (down.offset, across.offset, down.rows, across.rows) == (0, 0, *result[2:]):
        return context.image_of(phases[0], result, NCHW, name)
    return context.result(_interleave(context, phases, result, (down, across)), result, NCHW, name)


def _forward(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """Return weights ``[inputs, outputs of a group, kh, kw]`` as ``[outputs, inputs of a group, kh, kw]``."""
    inputs, outputs, *kernel = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(split).reshape(groups * outputs, inputs // groups, *kernel)


def _phase(
    context: Context,
    data: Any,
    weight: NDArray[Any],
    groups: int,
    axes: tuple[_Axis, _Axis],
    phase: tuple[int, int],
    name: str | None,
) -> Image:
    down, across = axes
    rows, columns = list(down.taps(phase[0])), list(across.taps(phase[1]))
    (top, bottom), (left, right) = down.padding(phase[0]), across.padding(phase[1])
    taps = np.ascontiguousarray(weight[:, :, rows][:, :, :, columns])
    spec = Convolution(taps, groups, (1, 1), (top, left, bottom, right), (1, 1), (down.rows, across.rows))
    return convolve(context, data, spec, NCHW, name)


def _interleave(context: Context, phases: Sequence[Any], dims: Dims, axes: tuple[_Axis, _Axis]) -> Any:
    """Return the call that takes each pixel from its phase."""
    (high, top), (wide, left) = ((axis.stride, axis.offset) for axis in axes)
    notes = {KERNEL: INTERLEAVE, PARAMETERS: [high, wide, top, left]}

    def define(*parts: Any) -> Any:
        def element(n: Any, block: Any, y: Any, x: Any, lane: Any) -> Any:
            row, column = y + top, x + left
            phase = row % high * wide + column % wide

            def read(part: Any) -> Any:
                return part(n, block, row // high, column // wide, lane)

            value = read(parts[-1])
            for number in range(len(parts) - 2, -1, -1):
                value = tirx.if_then_else(phase == number, read(parts[number]), value)
            return value

        return te.compute(blocked_shape(dims, context.block), element, name="interleave", attrs=notes)

    return context.builder.call_te(define, *phases, primfunc_name_hint="interleave", primfunc_attrs=FUSES)
