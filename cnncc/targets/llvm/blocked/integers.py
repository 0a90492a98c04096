"""int8 on blocked tensors: Q/DQ pairs become tensors of steps, and the layers that read them sums of integers.

A QuantizeLinear whose readers are DequantizeLinear of the same scale becomes a tensor of steps (`products.ZERO`); the
DequantizeLinear itself is computed only for readers that want floats. A convolution or product whose operands are both
dequantized sums over steps and weights in int32, exactly; then its sums are multiplied by the product of both scales.
What follows (bias, residual, activation, the next QuantizeLinear) joins the same kernel as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tvm import ir, relax, te, tirx

from cnncc.targets.llvm.blocked.convolution import taps_of, under_tap
from cnncc.targets.llvm.blocked.geometry import blocks_of, pack_channels
from cnncc.targets.llvm.blocked.wants import variables
from cnncc.targets.llvm.rules import ConvShape, DirectPlan
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, MEASURED, PARAMETERS
from cnncc.targets.llvm.schedule.conv2d import INTEGER_CONV2D
from cnncc.targets.llvm.schedule.products import ZERO, Dots, as_float

if TYPE_CHECKING:
    from cnncc.targets.llvm.machine import Machine
    from cnncc.targets.llvm.plans import Plans

_LEAST, _MOST = -128.0, 127.0

_MAKES_POSITIVE = frozenset({"relax.nn.relu", "relax.sigmoid", "relax.nn.softmax", "relax.abs", "relax.square"})
_POSITIVE_OF_ALL = frozenset({"relax.minimum", "relax.add", "relax.multiply", "relax.concat"})
_POSITIVE_OF_FIRST = frozenset(
    {
        "relax.quantize", "relax.dequantize", "relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.mean", "relax.max",
        "relax.nn.adaptive_avg_pool2d", "relax.reshape", "relax.permute_dims", "relax.strided_slice",
    }
)  # fmt: skip
"""Operators whose results are never negative where all that they read, or the first of it, is not."""

_ROUND = 12582912.0
"""1.5 · 2²³: adding it to a small number rounds it to a whole one, halves to even, which the lowest bits then hold."""

MOST_PRODUCTS = (2**31 - 1) // (255 * 127)
"""Products that int32 sums in any case: a step held as u8, times a weight of −127 to 127."""

MOST_TAPS = 2**24 // (128 * 127)
"""Products of steps that float32 sums exactly."""


@dataclass(frozen=True)
class Weight:
    """Constant int8 weights.

    Attributes:
        integers: int8, −127 to 127 (−128 is refused: `find_pairs` leaves such weights alone).
        scales: float32, one per output channel (axis 0).
        swapped: Whether the graph reads them as ``[inputs, outputs]``.
    """

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    swapped: bool = False

    @property
    def floats(self) -> NDArray[np.float32]:
        """What they stand for, as the graph reads them."""
        shape = (-1, *[1] * (self.integers.ndim - 1))
        values = np.asarray(self.integers * self.scales.reshape(shape), np.float32)
        return np.ascontiguousarray(values.T) if self.swapped else values


@dataclass(frozen=True)
class Pairs:
    """The Q/DQ pairs of a function that become tensors of steps.

    Attributes:
        scales: Variable, of a QuantizeLinear or a DequantizeLinear → its scale.
        weights: Variable of a DequantizeLinear of constants, or of its transpose → the weights.
        positive: Variables that are never negative, quantized or not.
    """

    scales: Mapping[Any, float]
    weights: Mapping[Any, Weight]
    positive: frozenset[Any] = frozenset()


def find_pairs(bindings: Iterable[Any]) -> Pairs:
    """Return the pairs of a function, by the contract of docs/qdq.md; others are left to TVM."""
    bindings = list(bindings)
    calls = {binding.var: binding.value for binding in bindings if isinstance(binding.value, ir.Call)}
    readers: dict[Any, list[Any]] = {}
    for binding in bindings:
        for read in variables(binding.value):
            readers.setdefault(read, []).append(binding.var)
    scales: dict[Any, float] = {}
    weights: dict[Any, Weight] = {}
    for var, call in calls.items():
        if _op(call) == "relax.quantize" and isinstance(var, relax.DataflowVar):
            scale = _scale(call, "int8")
            found = readers.get(var, [])
            if scale and all(_pairs_with(calls.get(reader), scale) for reader in found):
                scales |= dict.fromkeys([var, *found], scale)
        elif _op(call) == "relax.dequantize" and (weight := _weight(call)) is not None:
            weights[var] = weight
        elif _op(call) == "relax.permute_dims" and call.args[0] in weights and _is_swap(call):
            weights[var] = replace(weights[call.args[0]], swapped=not weights[call.args[0]].swapped)
    return Pairs(scales, weights, _positive(bindings))


def _positive(bindings: Iterable[Any]) -> frozenset[Any]:
    """Return the variables that are never negative, NaN aside."""
    found: set[Any] = set()
    for binding in bindings:
        call = binding.value
        if isinstance(call, ir.Call) and _is_positive(call, found):
            found.add(binding.var)
    return frozenset(found)


def _is_positive(call: Any, known: set[Any]) -> bool:
    op = _op(call)
    read = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else call.args
    if op in _MAKES_POSITIVE or (op == "relax.clip" and _least(call.args[1]) >= 0):
        return True
    if op == "relax.maximum":
        return any(each in known or _least(each) >= 0 for each in read)
    if op in _POSITIVE_OF_ALL:
        return all(each in known or _least(each) >= 0 for each in read)
    return op in _POSITIVE_OF_FIRST and read[0] in known


def _least(expr: Any) -> float:
    """Return the least of the numbers that an operator takes; NaN where they are not constant."""
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return float(expr.value)
    found = _constant(expr)
    return float(found.min()) if found is not None and found.size else float("nan")


def _op(call: Any) -> str:
    return str(getattr(call.op, "name", ""))


def _pairs_with(call: Any, scale: float) -> bool:
    return call is not None and _op(call) == "relax.dequantize" and _scale(call, "float32") == scale


def _scale(call: Any, dtype: str) -> float | None:
    """Return the scale of a Q or DQ per tensor with zero-point 0; None where it is none."""
    scale, zero = (_constant(arg) for arg in call.args[1:3])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.reshape(()) != 0:
        return None
    value = float(scale.reshape(()))
    normal = float(np.finfo(np.float32).tiny)
    return value if str(call.ty.dtype) == dtype and normal <= value <= 1 / normal else None


def _weight(call: Any) -> Weight | None:
    values, scales, zeros = (_constant(arg) for arg in call.args)
    if values is None or scales is None or zeros is None or values.dtype != np.int8 or zeros.any():
        return None
    if values.size == 0 or values.min() < -127:
        return None
    axis = int(call.attrs.axis) % values.ndim
    if scales.size == 1 or (axis == 0 and scales.size == values.shape[0]):
        return Weight(values, np.broadcast_to(scales.reshape(-1), (values.shape[0],)).astype(np.float32))
    if values.ndim == 2 and axis == 1 and scales.size == values.shape[1]:
        return Weight(np.ascontiguousarray(values.T), scales.reshape(-1).astype(np.float32), swapped=True)
    return None


def _is_swap(call: Any) -> bool:
    axes = call.attrs.axes
    return len(call.ty.shape) == 2 and (axes is None or [int(axis) for axis in axes] == [1, 0])


def _constant(expr: Any) -> NDArray[Any] | None:
    return np.asarray(expr.value.numpy()) if isinstance(expr, ir.GenericConst) else None


# ---- element by element


def quantized(builder: Any, data: Any, scale: float, dtype: str, *, positive: bool = False) -> Any:
    """Return the call that makes steps of floats, held as some element type; NaN becomes the lowest.

    Where they are never negative, the lowest is 0.
    Rounded as x · (1 / scale), halves to even: where x / scale, rounded, is a half, the neighbour may come out.
    """

    def define(x: Any, inverse: Any) -> Any:
        def element(*indices: Any) -> Any:
            value = x(*indices) * inverse(0)
            low, high = tirx.const(0.0 if positive else _LEAST, "float32"), tirx.const(_MOST, "float32")
            value = tirx.Select(value > low, value, low)
            value = tirx.Select(value < high, value, high)
            return tirx.reinterpret("int32", value + tirx.const(_ROUND + ZERO[dtype], "float32")).astype(dtype)

        return te.compute(x.shape, element, "quantize")

    return builder.call_te(define, data, _number(1.0 / np.float64(scale)), primfunc_name_hint="quantize")


def held_steps(builder: Any, data: Any, dtype: str) -> Any:
    """Return the call that holds steps, which are whole numbers in float32, as some element type."""

    def define(x: Any) -> Any:
        def element(*indices: Any) -> Any:
            return tirx.reinterpret("int32", x(*indices) + tirx.const(_ROUND + ZERO[dtype], "float32")).astype(dtype)

        return te.compute(x.shape, element, "hold")

    return builder.call_te(define, data, primfunc_name_hint="hold")


def dequantized(builder: Any, steps: Any, scale: float) -> Any:
    """Return the call that makes floats of steps."""

    def define(x: Any, factor: Any) -> Any:
        return te.compute(x.shape, lambda *indices: as_float(x(*indices)) * factor(0), "dequantize")

    return builder.call_te(define, steps, _number(scale), primfunc_name_hint="dequantize")


def _number(value: float) -> Any:
    """Return a number as an operand: as part of the code, it would make a kernel of its own for every scale."""
    return relax.const(np.array([value], np.float32))


def rescaled(builder: Any, sums: Any, scales: NDArray[np.float32], offsets: NDArray[np.int32] | None) -> Any:
    """Return the call that makes floats of blocked sums.

    Args:
        builder: Relax block builder.
        sums: ``[n, block, h, w, lane]``, int32 or float32 that holds integers.
        scales: float32 ``[block, lane]``.
        offsets: int32 ``[block, lane]``, subtracted before; None for none.
    """
    operands = [sums, relax.const(scales), *([relax.const(offsets)] if offsets is not None else [])]

    def define(x: Any, scale: Any, *offset: Any) -> Any:
        def element(n: Any, block: Any, h: Any, w: Any, lane: Any) -> Any:
            value = x(n, block, h, w, lane)
            if offset:
                value = value - offset[0](block, lane)
            return value.astype("float32") * scale(block, lane)

        return te.compute(x.shape, element, "rescale")

    return builder.call_te(define, *operands, primfunc_name_hint="rescale")


# ---- convolution


def integer_conv2d(builder: Any, steps: Any, weight: NDArray[np.int8], shape: ConvShape, plans: Plans) -> Any:
    """Return the call that convolves steps with weights; its sums count what stands for 0 too (`offsets_of`).

    Args:
        builder: Relax block builder.
        steps: Blocked, or ``[n, c, h, w]`` where the shape says so; padding counts as steps of 0.
        weight: int8 ``[groups · outputs, inputs, kh, kw]``.
        shape: The convolution, in channels.
        plans: Knobs of kernels.

    Returns:
        A call of type int32 ``[n, ⌈c / b⌉, h, w, b]``.
    """
    machine = plans.machine
    dots = plans.dots(shape, str(steps.ty.dtype))
    counted = shape.in_elements(dots.channels)
    plan = plans.integers(counted, dots)
    packed = relax.const(pack_weights(weight, shape, plan, machine, dots))
    define = _definition(shape, counted, plan, machine, dots)
    return builder.call_te(define, steps, packed, primfunc_name_hint="conv2d_int8", primfunc_attrs=FUSES)


def offsets_of(weight: NDArray[np.int8], held: str, machine: Machine) -> NDArray[np.int32] | None:
    """Return what the sums of `integer_conv2d` count too much, ``[block, lane]``; None where that is nothing.

    Args:
        weight: int8 ``[outputs, …]``.
        held: Element type of the steps.
        machine: What the kernel is for.
    """
    zero = ZERO[held]
    sums = zero * weight.reshape(weight.shape[0], -1).sum(axis=1, dtype=np.int64)
    return pack_channels(sums.astype(np.int32), machine.block) if zero else None


def pack_weights(
    weight: NDArray[np.int8], shape: ConvShape, plan: DirectPlan, machine: Machine, dots: Dots
) -> NDArray[Any]:
    """Return weights as a kernel reads them, zero-padded.

    Returns:
        ``[group, panel, input block, kh, kw, element, output channel, channel of the element]``.
    """
    inner, outer = _lanes(shape, machine, dots), plan.panel * machine.block
    panels, blocks = blocks_of(shape.outputs, outer), blocks_of(shape.inputs, inner)
    full = np.zeros((shape.groups, panels * outer, blocks * inner, *shape.kernel), dots.weights)
    full[:, : shape.outputs, : shape.inputs] = weight.reshape(shape.groups, shape.outputs, shape.inputs, *shape.kernel)
    split = full.reshape(shape.groups, panels, outer, blocks, inner // dots.channels, dots.channels, *shape.kernel)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 6, 7, 4, 2, 5))


def _lanes(shape: ConvShape, machine: Machine, dots: Dots) -> int:
    """Return how many channels lie side by side where the kernel reads them."""
    return machine.block if shape.blocked else blocks_of(shape.inputs, dots.channels) * dots.channels


def _definition(shape: ConvShape, counted: ConvShape, plan: DirectPlan, machine: Machine, dots: Dots) -> Any:
    """Return the operator as a sum over packed weights, for ``call_te``."""
    block, inner = machine.block, _lanes(shape, machine, dots)
    outputs = blocks_of(shape.outputs, block)
    result = (shape.batch, shape.groups * outputs, *shape.output, block)
    numbers = [*shape.stride, *shape.padding[:2], *shape.dilation, counted.inputs, int(shape.flat), *plan.numbers]
    notes = {KERNEL: INTEGER_CONV2D, PARAMETERS: numbers, MEASURED: int(plan.measured)}

    def define(x: Any, w: Any) -> Any:
        taps = taps_of(shape, inner)
        kb, kh, kw, ic = taps
        outside = tirx.const(ZERO[dots.steps], dots.steps)

        def element(n: Any, ob: Any, oh: Any, ow: Any, lane: Any) -> Any:
            group, own = ob // outputs, ob % outputs
            value = under_tap(x, shape, inner, (n, group, oh, ow), taps, outside).astype("int32")
            element, place = ic // dots.channels, own % plan.panel * block + lane
            weight = w(group, own // plan.panel, kb, kh, kw, element, place, ic % dots.channels).astype("int32")
            return te.sum(value * weight, axis=list(taps))

        return te.compute(result, element, name="conv2d_int8", attrs=notes)

    return define
