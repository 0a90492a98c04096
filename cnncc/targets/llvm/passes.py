"""Relax passes of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import ir, relax

Fold = Callable[[Any, NDArray[Any]], NDArray[Any]]


def _axes(call: Any) -> tuple[int, ...] | None:
    return None if call.attrs.axes is None else tuple(int(axis) for axis in call.attrs.axes)


def _reshape(call: Any, data: NDArray[Any]) -> NDArray[Any]:
    return data.reshape([int(size) for size in call.ty.shape])


def reciprocals(divisor: Any) -> NDArray[np.float32] | None:
    """Return what to multiply with instead; None where that would not give the same."""
    if not isinstance(divisor, ir.GenericConst) or str(divisor.ty.dtype) != "float32":
        return None
    values = divisor.value.numpy()
    normal = np.finfo(np.float32).tiny
    if not np.all((np.abs(values) >= normal) & (np.abs(values) <= 1 / normal)):  # NaN neither
        return None
    return np.asarray(1 / values.astype(np.float64), np.float32)


FOLDS: dict[str, Fold] = {
    "relax.reshape": _reshape,
    "relax.expand_dims": _reshape,
    "relax.squeeze": _reshape,
    "relax.flatten": _reshape,
    "relax.permute_dims": lambda call, data: np.transpose(data, _axes(call)),
    "relax.astype": lambda call, data: data.astype(str(call.attrs.dtype)),
    "relax.broadcast_to": lambda call, data: np.broadcast_to(data, [int(size) for size in call.ty.shape]),
}
"""Operator → what it does to a constant. TVM folds by compiling a function each, which takes 20 ms or more."""


@tvm.transform.module_pass(opt_level=0, name="FoldConstants")
class FoldConstants:
    """Computes changes of layout and type of constants in NumPy; divisions by constants become multiplications.

    Such a quotient may differ by a unit in the last place.
    """

    def transform_module(self, module: Any, _context: Any) -> Any:
        """Fold in every Relax function."""
        for var, function in module.functions_items():
            if isinstance(function, relax.Function):
                module.update_func(var, _Folder(module).visit_expr(function))
        return module


@relax.expr_functor.mutator
class _Folder(relax.PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        call = self._with_constants(self.visit_expr_post_order(call))
        name = getattr(call.op, "name", "")
        if name == "relax.divide" and (factors := reciprocals(call.args[1])) is not None:
            return self.builder_.normalize(relax.op.multiply(call.args[0], relax.const(factors)))
        fold = FOLDS.get(name)
        if fold is None or not call.args:
            return call
        data = call.args[0]
        if not isinstance(data, ir.GenericConst):
            return call
        if not isinstance(call.ty, relax.TensorType) or call.ty.shape is None:
            return call
        return relax.const(np.ascontiguousarray(fold(call, data.value.numpy())))

    def _with_constants(self, call: Any) -> Any:
        """Return the call with constants in place of variables bound to them, so that legalization sees weights."""
        values = [self.lookup_binding(arg) if isinstance(arg, relax.Var) else None for arg in call.args]
        if not any(isinstance(value, ir.GenericConst) for value in values):
            return call
        args = [
            value if isinstance(value, ir.GenericConst) else arg for arg, value in zip(call.args, values, strict=True)
        ]
        return self.builder_.normalize(ir.Call(call.op, args, call.attrs, call.ty_args))
