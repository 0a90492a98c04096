"""Between plain and blocked tensors: definitions of the two copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from tvm import relax, te, tirx

from cnncc.targets.llvm.blocked.geometry import blocked_shape, pack_channels
from cnncc.targets.llvm.blocked.image import NCHW, Dims, shape_in
from cnncc.targets.llvm.schedule.anchor import KERNEL, PARAMETERS
from cnncc.targets.llvm.schedule.packing import CHANNELS_FIRST, CHANNELS_LAST, FROM_BLOCKS, PACKING, TO_BLOCKS

PACK = "pack_channels"
UNPACK = "unpack_channels"

_OPAQUE = {"op_pattern": 8}
"""TVM's ``kOpaque``: nothing joins it."""


def pack(builder: Any, data: Any, dims: Dims, order: str, block: int) -> Any:
    """Return the call that makes a blocked tensor of a plain one.

    Args:
        builder: Relax block builder.
        data: Plain tensor.
        dims: Sizes of the image's axes.
        order: The plain tensor's axes.
        block: Channels of a block.
    """

    def define(x: Any) -> Any:
        def element(n: Any, outer: Any, h: Any, w: Any, lane: Any) -> Any:
            channel = outer * block + lane
            value = x(*_arranged((n, channel, h, w), order))
            if dims[1] % block == 0:
                return value
            return tirx.if_then_else(channel < dims[1], value, tirx.const(0, str(x.dtype)))

        return te.compute(blocked_shape(dims, block), element, name=PACK, attrs=_notes(TO_BLOCKS, dims, order))

    return builder.call_te(define, data, primfunc_name_hint=PACK, primfunc_attrs=_OPAQUE)


def unpack(builder: Any, data: Any, dims: Dims, order: str, block: int) -> Any:
    """Return the expression that makes a plain tensor of a blocked one.

    Args:
        builder: Relax block builder.
        data: Blocked tensor.
        dims: Sizes of the image's axes.
        order: The plain tensor's axes.
        block: Channels of a block.
    """
    shape = shape_in(dims, order)
    if dims[1] % block == 0 and (dims[2] == dims[3] == 1 or dims[1] == block == 1):
        return relax.op.reshape(data, shape)

    def define(x: Any) -> Any:
        def element(*indices: Any) -> Any:
            at = dict(zip(order, indices, strict=True))
            n, channel, h, w = (at.get(letter, tirx.IntImm("int64", 0)) for letter in NCHW)
            return x(n, channel // block, h, w, channel % block)

        return te.compute(shape, element, name=UNPACK, attrs=_notes(FROM_BLOCKS, dims, order))

    return builder.call_te(define, data, primfunc_name_hint=UNPACK, primfunc_attrs=_OPAQUE)


def _notes(direction: int, dims: Dims, order: str) -> dict[str, Any]:
    pixels = [letter for letter in order if letter != "c"]
    if order.index("c") not in (1, len(order) - 1) or pixels != sorted(pixels, key=NCHW.index):
        return {}
    side = CHANNELS_LAST if order[-1] == "c" else CHANNELS_FIRST
    return {KERNEL: PACKING, PARAMETERS: [direction, side, dims[1]]}


def pack_constant(values: NDArray[Any], dims: Dims, order: str, block: int) -> NDArray[Any]:
    """Return a constant as it broadcasts against blocked tensors: ``[n, block, h, w, lane]``.

    Args:
        values: The constant.
        dims: Sizes of its axes; without channels (1) it has one block of one lane.
        order: Its axes, the last of which the constant has.
        block: Channels of a block.
    """
    full = values.reshape(shape_in(dims, order))
    plain = full.transpose([order.index(letter) for letter in NCHW if letter in order]).reshape(dims)
    return plain[..., None] if dims[1] == 1 else pack_channels(plain, block, axis=1)


def _arranged(indices: Sequence[Any], order: str) -> list[Any]:
    return [indices[NCHW.index(letter)] for letter in order]
