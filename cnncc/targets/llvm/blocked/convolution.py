"""Convolutions on blocked tensors: weights packed for the kernel that the rules choose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx

from cnncc.targets.llvm.blocked.geometry import blocks_of
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import ConvShape, DirectPlan, direct_plan
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, MEASURED, PARAMETERS
from cnncc.targets.llvm.schedule.conv2d import CONV2D

FEW_CHANNELS = 4
"""Channels up to which a convolution reads ``[n, c, h, w]`` itself: a block would be mostly empty."""


def conv2d(
    builder: Any, data: Any, weight: Any, shape: ConvShape, machine: Machine, plan: DirectPlan | None = None
) -> Any:
    """Return the call that convolves.

    Args:
        builder: Relax block builder.
        data: Blocked, or ``[n, c, h, w]`` where the shape says so.
        weight: ``[groups · outputs, inputs, kh, kw]``, a constant.
        shape: The convolution; with several groups, each has whole blocks (see `whole_groups`).
        machine: What the kernel is for.
        plan: Knobs; the rule's by default.

    Returns:
        A call of type ``[n, ⌈c / b⌉, h, w, b]``.
    """
    plan = plan or direct_plan(shape, machine)
    packed = relax.const(pack_weights(weight, shape, plan, machine))
    return builder.call_te(
        definition(shape, plan, machine), data, packed, primfunc_name_hint="conv2d", primfunc_attrs=FUSES
    )


def whole_groups(weight: NDArray[Any], groups: int, block: int) -> tuple[NDArray[Any], int]:
    """Return weights of fewer, larger groups, each of whole blocks; what crosses the old groups is zero.

    Args:
        weight: ``[groups · outputs, inputs, kh, kw]``.
        groups: Groups.
        block: Channels of a block.

    Returns:
        The weights and the new number of groups, 1 where no number of groups makes whole blocks. The last of several
        groups may be filled up with groups of zeros: it then reads lanes after the last channel, which must not be NaN.
    """
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    size = math.lcm(block // math.gcd(block, inputs), block // math.gcd(block, outputs))
    count = -(-groups // size)
    if size == 1 or groups == 1:
        return weight, groups
    if any(blocks_of(groups * part, block) * block != count * size * part for part in (inputs, outputs)):
        size, count = groups, 1
    full = np.zeros((count * size, outputs, size, inputs, *weight.shape[2:]), weight.dtype)
    parts = weight.reshape(groups, outputs, inputs, *weight.shape[2:])
    for number in range(groups):
        full[number, :, number % size] = parts[number]
    whole = full.reshape(count * size * outputs, size * inputs, *weight.shape[2:])
    return (whole[: groups * outputs, : groups * inputs], 1) if count == 1 else (whole, count)


def pack_weights(weight: NDArray[Any], shape: ConvShape, plan: DirectPlan, machine: Machine) -> NDArray[Any]:
    """Return weights as ``[group, panel, input block, kh, kw, input channel, output channel]``, zero-padded."""
    inner, outer = shape.lane_block(machine), plan.panel * machine.block
    panels, blocks = blocks_of(shape.outputs, outer), blocks_of(shape.inputs, inner)
    full = np.zeros((shape.groups, panels * outer, blocks * inner, *shape.kernel), weight.dtype)
    full[:, : shape.outputs, : shape.inputs] = weight.reshape(shape.groups, shape.outputs, shape.inputs, *shape.kernel)
    split = full.reshape(shape.groups, panels, outer, blocks, inner, *shape.kernel)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 5, 6, 4, 2))


def packed_shape(shape: ConvShape, plan: DirectPlan, machine: Machine) -> tuple[int, ...]:
    """Return the shape of what `pack_weights` returns."""
    inner, outer = shape.lane_block(machine), plan.panel * machine.block
    panels, blocks = blocks_of(shape.outputs, outer), blocks_of(shape.inputs, inner)
    return (shape.groups, panels, blocks, *shape.kernel, inner, outer)


def definition(shape: ConvShape, plan: DirectPlan, machine: Machine) -> Any:
    """Return the operator as a sum over packed weights, for ``call_te``."""
    block, inner = machine.block, shape.lane_block(machine)
    outputs = blocks_of(shape.outputs, block)
    result = (shape.batch, shape.groups * outputs, *shape.output, block)
    notes = {
        KERNEL: CONV2D,
        PARAMETERS: [*shape.stride, *shape.padding[:2], *shape.dilation, shape.inputs, int(shape.flat), *plan.numbers],
        MEASURED: int(plan.measured),
    }

    def define(x: Any, w: Any) -> Any:
        taps = taps_of(shape, inner)
        kb, kh, kw, ic = taps

        def element(n: Any, ob: Any, oh: Any, ow: Any, lane: Any) -> Any:
            group, own = ob // outputs, ob % outputs
            value = under_tap(x, shape, inner, (n, group, oh, ow), taps, tirx.const(0.0, str(x.dtype)))
            weight = w(group, own // plan.panel, kb, kh, kw, ic, own % plan.panel * block + lane)
            return te.sum(value * weight, axis=list(taps))

        return te.compute(result, element, name="conv2d", attrs=notes)

    return define


def taps_of(shape: ConvShape, lanes: int) -> tuple[Any, Any, Any, Any]:
    """Return what a convolution sums over: blocks of input channels, rows and columns of the kernel, lanes."""
    sizes = (blocks_of(shape.inputs, lanes), *shape.kernel, lanes)
    kb, kh, kw, ic = (
        te.reduce_axis((0, size), name) for size, name in zip(sizes, ("kb", "kh", "kw", "ic"), strict=True)
    )
    return kb, kh, kw, ic


def under_tap(x: Any, shape: ConvShape, lanes: int, place: tuple[Any, ...], taps: tuple[Any, ...], outside: Any) -> Any:
    """Return the element that a tap sees from an output pixel, or what stands beyond the image and its channels.

    Args:
        x: Blocked, or ``[n, c, h, w]`` where the shape says so.
        shape: The convolution.
        lanes: Input channels of a block.
        place: Image, group, row and column of the output.
        taps: As of `taps_of`.
        outside: What stands there.
    """
    (n, group, oh, ow), (kb, kh, kw, ic) = place, taps
    y = oh * shape.stride[0] + kh * shape.dilation[0] - shape.padding[0]
    z = ow * shape.stride[1] + kw * shape.dilation[1] - shape.padding[1]
    inside = tirx.all(y >= 0, y < shape.image[0], z >= 0, z < shape.image[1], kb * lanes + ic < shape.inputs)
    first = group * blocks_of(shape.inputs, lanes)
    read = x(n, first + kb, y, z, ic) if shape.blocked else x(n, first + ic, y, z)
    return tirx.if_then_else(inside, read, outside)
