"""Layer normalisation of blocked pixels over their channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.geometry import pack_channels
from cnncc.targets.llvm.blocked.image import Image
from cnncc.targets.llvm.schedule.anchor import KERNEL, PARAMETERS
from cnncc.targets.llvm.schedule.normalize import NORMALIZE

_OPAQUE = {"op_pattern": 8}
"""TVM's ``kOpaque``: nothing joins it."""


def layer_norm(context: Context, call: Any, name: str | None) -> Image | None:
    """Return blocked pixels normalised over their channels, or None where the call normalises otherwise.

    Args:
        context: The function that is written.
        call: ``relax.nn.layer_norm`` with constant scale and shift.
        name: Name of its result.
    """
    image = context.image(call.args[0])
    scale, shift = (context.constant(arg) for arg in call.args[1:3])
    if image is None or scale is None or shift is None or str(call.ty.dtype) != "float32":
        return None
    attrs = call.attrs
    axes = [image.order[int(axis)] for axis in attrs.axes]
    if axes != ["c"] or scale.shape != (image.dims[1],) or not (attrs.center and attrs.scale):
        return None
    operands = [relax.const(pack_channels(np.asarray(values, "float32"), context.block)) for values in (scale, shift)]
    define = _definition(image.dims[1], float(attrs.epsilon))
    made = context.builder.call_te(
        define, context.whole(image), *operands, primfunc_name_hint="layer_norm", primfunc_attrs=_OPAQUE
    )
    return context.result(made, image.dims, image.order, name)


def _definition(channels: int, epsilon: float) -> Any:
    def define(x: Any, scale: Any, shift: Any) -> Any:
        batch, blocks, height, width, lanes = (int(size) for size in x.shape)
        pixels = (batch, height, width)

        def over_channels(name: str, term: Any) -> Any:
            """Return the sum of a term over the channels, lanes after the last one left out."""
            k, lane = te.reduce_axis((0, blocks), "k"), te.reduce_axis((0, lanes), "lane")

            def element(n: Any, h: Any, w: Any) -> Any:
                inside = k * lanes + lane < channels
                value = tirx.if_then_else(inside, term(n, k, h, w, lane), tirx.const(0.0, "float32"))
                return te.sum(value, axis=[k, lane])

            return te.compute(pixels, element, name=name)

        count = tirx.const(float(channels), "float32")
        total = over_channels("total", lambda *place: x(*place))

        def centred(n: Any, block: Any, h: Any, w: Any, lane: Any) -> Any:
            return x(n, block, h, w, lane) - total[n, h, w] / count

        squares = over_channels("squares", lambda *place: centred(*place) * centred(*place))

        def element(n: Any, block: Any, h: Any, w: Any, lane: Any) -> Any:
            factor = tirx.const(1.0, "float32") / tirx.sqrt(squares[n, h, w] / count + tirx.const(epsilon, "float32"))
            return centred(n, block, h, w, lane) * factor * scale[block, lane] + shift[block, lane]

        # An annotation holds integers; the bits of epsilon are one.
        notes = {KERNEL: NORMALIZE, PARAMETERS: [channels, int(np.float32(epsilon).view("int32"))]}
        return te.compute((batch, blocks, height, width, lanes), element, name="normalize", attrs=notes)

    return define
