"""Our converters: ONNX operators that TVM's importer lacks or gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

Converter = Callable[[Any, Any, dict[str, Any], int], Any]
"""Takes the block builder, the inputs, the attributes and the operator set's version; returns an expression."""


def _celu(builder: Any, inputs: Any, attrs: dict[str, Any], _opset: int) -> Any:
    """max(0, x) + min(0, α (exp(x / α) − 1)); TVM has none."""
    x = inputs[0]
    dtype = x.ty.dtype
    alpha = relax.const(float(attrs.get("alpha", 1.0)), dtype)
    zero, one = relax.const(0.0, dtype), relax.const(1.0, dtype)
    curve = builder.emit(relax.op.exp(relax.op.divide(x, alpha)))
    below = relax.op.multiply(alpha, relax.op.subtract(curve, one))
    return relax.op.add(relax.op.maximum(x, zero), relax.op.minimum(below, zero))


def _swish(_builder: Any, inputs: Any, attrs: dict[str, Any], _opset: int) -> Any:
    """X · sigmoid(α x), of operator set 24; TVM has none."""
    x = inputs[0]
    alpha = relax.const(float(attrs.get("alpha", 1.0)), x.ty.dtype)
    return relax.op.multiply(x, relax.op.sigmoid(relax.op.multiply(x, alpha)))


def _clip(_builder: Any, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
    """Bounds as operators, so that they fuse; TVM tests them for NaN by kernels of their own."""
    x = inputs[0]
    if opset < 11:
        bounds = [relax.const(float(attrs[key]), x.ty.dtype) if key in attrs else None for key in ("min", "max")]
    else:
        bounds = [inputs[1], inputs[2]]
    if bounds[0] is not None:
        x = relax.op.maximum(x, bounds[0])
    return x if bounds[1] is None else relax.op.minimum(x, bounds[1])


CONVERTERS: dict[str, Converter] = {"Celu": _celu, "Clip": _clip, "Swish": _swish}

FLOAT32_ONLY = frozenset({"Elu", "Selu", "ThresholdedRelu"})
"""Operators that TVM's importer mixes with float32 constants: float16 is cast for them."""
