"""Channels brought side by side: one operator for concatenation, split, slice and shuffle, and any chain of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from cnncc.targets.llvm.blocked.geometry import blocked_shape, blocks_of
from cnncc.targets.llvm.blocked.image import Channels
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, PARAMETERS
from cnncc.targets.llvm.schedule.channels import CHANNELS


def gather(builder: Any, channels: Channels, block: int) -> Any:
    """Return the call that copies channels from their sources to one blocked tensor.

    Args:
        builder: Relax block builder.
        channels: Where they lie.
        block: Channels of a block.

    Returns:
        A call of type ``[n, ⌈c / b⌉, h, w, b]``.
    """
    count = blocks_of(len(channels.places), block) * block
    table = np.zeros((2, count), "int32")
    table[:, : len(channels.places)] = channels.places.T
    shape = blocked_shape(channels.dims, block)
    # Pairs of source and channel; lanes after the last channel are not listed.
    notes = {KERNEL: CHANNELS, PARAMETERS: [block, *channels.places.reshape(-1).tolist()]}

    def define(places: Any, *sources: Any) -> Any:
        def element(n: Any, outer: Any, h: Any, w: Any, lane: Any) -> Any:
            source, channel = places[0, outer * block + lane], places[1, outer * block + lane]

            def read(tensor: Any) -> Any:
                return tensor(n, channel // block, h, w, channel % block)

            value = read(sources[-1])
            for number in range(len(sources) - 2, -1, -1):
                value = tirx.if_then_else(source == number, read(sources[number]), value)
            return value

        return te.compute(shape, element, name="gather_channels", attrs=notes)

    operands = [variable for variable, _ in channels.sources]
    return builder.call_te(
        define, relax.const(table), *operands, primfunc_name_hint="gather_channels", primfunc_attrs=FUSES
    )
