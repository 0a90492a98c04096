"""Operators that move or blend whole pixels of blocked tensors."""

from __future__ import annotations

from typing import Any

from tvm import relax, topi

from cnncc.targets.llvm.blocked.context import Context
from cnncc.targets.llvm.blocked.elements import shape_of
from cnncc.targets.llvm.blocked.image import NCHW, Image, dims_of


def resize(context: Context, call: Any, name: str | None) -> Image | None:
    """Return resized images, or None where the data are plain."""
    image, attrs = context.image(call.args[0]), call.attrs
    if image is None or image.order != NCHW or str(attrs.layout) != NCHW.upper():
        return None
    if not context.machine.computes(str(call.ty.dtype)):
        return None
    dims = dims_of(shape_of(call), NCHW)
    made = context.builder.call_te(
        topi.image.resize2d,
        context.whole(image),
        [float(edge) for edge in attrs.roi],
        list(dims[2:]),
        layout=f"NCHW{context.block}c",
        method=str(attrs.method),
        coordinate_transformation_mode=str(attrs.coordinate_transformation_mode),
        rounding_method=str(attrs.rounding_method),
        bicubic_alpha=float(attrs.cubic_alpha),
        bicubic_exclude=int(attrs.cubic_exclude),
        extrapolation_value=float(attrs.extrapolation_value),
        primfunc_name_hint="resize2d",
    )
    return context.result(made, dims, NCHW, name)


def pad(context: Context, call: Any, name: str | None) -> Image | None:
    """Return padded images, or None where the data are plain or channels are padded."""
    image, attrs = context.image(call.args[0]), call.attrs
    if image is None:
        return None
    sizes = [int(size) for size in attrs.pad_width]
    widths = {letter: sizes[2 * axis : 2 * axis + 2] for axis, letter in enumerate(image.order)}
    none = [0, 0]
    if widths.get("c", none) != none:
        return None
    spread = [size for letter in NCHW for size in widths.get(letter, none)]
    made = relax.op.nn.pad(context.whole(image), [*spread, *none], str(attrs.pad_mode), float(attrs.pad_value))
    return context.result(made, dims_of(shape_of(call), image.order), image.order, name)
