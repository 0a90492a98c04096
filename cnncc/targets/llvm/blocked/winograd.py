"""Winograd's convolution on blocked tensors: transformed weights, and the operator's definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx

from cnncc.targets.llvm.blocked.geometry import blocks_of
from cnncc.targets.llvm.blocked.transforms import Matrix, transform_of
from cnncc.targets.llvm.expansions import Expanded, Expansions
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import ConvShape
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, MEASURED, PARAMETERS
from cnncc.targets.llvm.schedule.winograd import WINOGRAD
from cnncc.targets.llvm.winograd_rules import WinogradPlan


def winograd_conv2d(
    builder: Any,
    data: Any,
    weight: NDArray[Any],
    shape: ConvShape,
    plan: WinogradPlan,
    machine: Machine,
    expansions: Expansions,
) -> Any:
    """Return the call that convolves by Winograd's method.

    Args:
        builder: Relax block builder.
        data: ``[n, ⌈c / b⌉, h, w, b]``, float32.
        weight: ``[groups · outputs, inputs, 3, 3]``, float32.
        shape: The convolution; `winograd_rules.applies` to it.
        plan: Knobs.
        machine: What the kernel is for.
        expansions: Where the transformed weights are noted.

    Returns:
        A call of type ``[n, ⌈c / b⌉, h, w, b]``.
    """
    expanded = expanded_weights(weight, shape, plan, machine)
    transformed = relax.const(expansions.add(expanded, transformed_shape(shape, plan, machine)))
    return builder.call_te(
        definition(shape, plan, machine), data, transformed, primfunc_name_hint="winograd", primfunc_attrs=FUSES
    )


def expanded_weights(weight: NDArray[Any], shape: ConvShape, plan: WinogradPlan, machine: Machine) -> Expanded:
    """Return weights for the kernel, outputs zero-padded; the engine's first run transforms them.

    The kernel reads them from first to last: rows are frequencies of panels of groups, or, where stages are separate
    regions, panels of groups of frequencies. Input channels are not padded: lanes after the last one hold anything.
    """
    outer = plan.panel * machine.block
    panels = blocks_of(shape.outputs, outer)
    full = np.zeros((shape.groups, panels * outer, shape.inputs, shape.taps), "float32")
    full[:, : shape.outputs] = weight.reshape(shape.groups, shape.outputs, shape.inputs, shape.taps)
    split = full.reshape(shape.groups * panels, outer, shape.inputs, shape.taps)
    ordered = split.transpose(3, 0, 2, 1) if plan.staged else split.transpose(0, 3, 2, 1)
    parts = 1 if plan.staged else shape.groups * panels
    return Expanded(transform_of(plan.size).weight_matrix, np.ascontiguousarray(ordered).reshape(parts, shape.taps, -1))


def transformed_shape(shape: ConvShape, plan: WinogradPlan, machine: Machine) -> tuple[int, int, int]:
    """Return the shape of transformed weights: ``[row, input channel, output channel of a panel]``."""
    outer = plan.panel * machine.block
    rows = transform_of(plan.size).frequencies * shape.groups * blocks_of(shape.outputs, outer)
    return rows, shape.inputs, outer


def definition(shape: ConvShape, plan: WinogradPlan, machine: Machine) -> Any:
    """Return the operator as one sum, for ``call_te``.

    It is what the kernel computes, term by term, and right whatever schedules it; but without the factors that the
    kernel takes out of the sum it would be slower than any direct convolution.
    """
    transform, block = transform_of(plan.size), machine.block
    size, outputs, inputs = transform.size, blocks_of(shape.outputs, block), blocks_of(shape.inputs, block)
    panels = blocks_of(shape.outputs, plan.panel * block)
    result = (shape.batch, shape.groups * outputs, *shape.output, block)
    numbers = [*shape.padding[:2], shape.groups, shape.inputs, *plan.numbers]
    notes = {KERNEL: WINOGRAD, PARAMETERS: numbers, MEASURED: int(plan.measured)}

    def define(x: Any, u: Any) -> Any:
        channel = te.reduce_axis((0, shape.inputs), "ic")
        high, low, down, right = (te.reduce_axis((0, size), name) for name in ("fh", "fw", "kh", "kw"))

        def element(n: Any, ob: Any, oh: Any, ow: Any, lane: Any) -> Any:
            group, own = ob // outputs, ob % outputs
            y = oh // plan.size * plan.size + down - shape.padding[0]
            z = ow // plan.size * plan.size + right - shape.padding[1]
            inside = tirx.all(y >= 0, y < shape.image[0], z >= 0, z < shape.image[1])
            read = x(n, group * inputs + channel // block, y, z, channel % block)
            value = tirx.if_then_else(inside, read, tirx.const(0.0, "float32"))
            panel, frequency = group * panels + own // plan.panel, high * size + low
            row = (
                frequency * shape.groups * panels + panel if plan.staged else panel * transform.frequencies + frequency
            )
            product = value * u(row, channel, own % plan.panel * block + lane)
            into = _entry(transform.data, high, down) * _entry(transform.data, low, right)
            back = _entry(transform.result, oh % plan.size, high) * _entry(transform.result, ow % plan.size, low)
            return te.sum(product * into * back, axis=[channel, high, low, down, right])

        return te.compute(result, element, name="winograd", attrs=notes)

    return define


def _entry(matrix: Matrix, row: Any, column: Any) -> Any:
    """Return an entry of a constant matrix."""
    return _pick([_pick([tirx.const(value, "float32") for value in values], column) for values in matrix], row)


def _pick(values: Sequence[Any], position: Any) -> Any:
    chosen = values[-1]
    for number, value in reversed(list(enumerate(values[:-1]))):
        chosen = tirx.Select(position == number, value, chosen)
    return chosen
