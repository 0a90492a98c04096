"""Which convolutions of a network use Winograd's method: one choice for all, since accuracy and size are shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import ir

from cnncc.targets.base import KernelOptions
from cnncc.targets.llvm.importer import node_index
from cnncc.targets.llvm.layers import bindings_of
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.rules import ConvShape
from cnncc.targets.llvm.winograd_rules import WinogradPlan


@dataclass(frozen=True)
class KernelPolicy:
    """What the user asks of one function's kernels.

    Attributes:
        winograd: Whether any convolution may use Winograd's method.
        direct: Indices of the ONNX nodes that must not.
        growth: What transformed weights may add to the memory of the function's weights, as a share of them.
    """

    winograd: bool = True
    direct: frozenset[int] = frozenset()
    growth: float = KernelOptions.growth


def choose_methods(function: Any, plans: Plans, policy: KernelPolicy) -> dict[Any, WinogradPlan]:
    """Return call → plan, for the convolutions that use Winograd's method.

    Args:
        function: Relax function on plain tensors.
        plans: Knobs of kernels.
        policy: What the user asked.
    """
    if not policy.winograd:
        return {}
    candidates: dict[Any, ConvShape] = {}
    layers = 0
    for node, call, shape in _convolutions(function):
        layers += 1
        if node not in policy.direct:
            candidates[call] = shape
    return plans.choose(candidates, int(policy.growth * _weight_bytes(function)), layers)


def _convolutions(function: Any) -> Iterator[tuple[int | None, Any, ConvShape]]:
    """Yield the convolutions with constant weights: node, call and shape, the last one first.

    A node's last binding is named after it; what has no name was emitted on the way there.
    """
    node = None
    for binding in reversed(list(bindings_of(function))):
        call = binding.value
        named = node_index(binding.var)
        node = node if named is None else named
        if not isinstance(call, ir.Call) or getattr(call.op, "name", "") != "relax.nn.conv2d":
            continue
        if str(call.ty.dtype) != "float32":  # transforms of float16 round too much; see `cnncc.compiler.parity`
            continue
        if isinstance(call.args[1], ir.GenericConst) and str(call.attrs.data_layout) == "NCHW":
            yield node, call, _shape(call)


def _shape(call: Any) -> ConvShape:
    attrs, groups = call.attrs, int(call.attrs.groups)
    batch, channels, height, width = _ints(call.args[0].ty.shape)
    outputs, inputs, *kernel = _ints(call.args[1].ty.shape)
    stride, padding, dilation = _ints(attrs.strides), _ints(attrs.padding), _ints(attrs.dilation)
    output = _ints(call.ty.shape)[2:]
    return ConvShape(
        batch, groups, inputs, outputs // groups, (height, width), (kernel[0], kernel[1]), (stride[0], stride[1]),
        (padding[0], padding[1], padding[2], padding[3]), (dilation[0], dilation[1]), (output[0], output[1]),
        blocked=channels > 4,
    )  # fmt: skip


def _weight_bytes(function: Any) -> int:
    """Return the bytes of all constants of a function."""
    found: dict[Any, int] = {}
    for binding in bindings_of(function):
        for argument in getattr(binding.value, "args", ()):
            if isinstance(argument, ir.GenericConst):
                found[argument] = argument.value.numpy().nbytes
    return sum(found.values())


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
