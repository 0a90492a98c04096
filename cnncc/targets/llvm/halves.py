"""Operators on float16 that have no kernel of their own: they compute in float32, between casts.

Casts are element-wise, so they join the kernels around them: an activation behind a convolution reads its sum from
registers, a mean reads float16 from memory and adds up in float32. What moves, selects, adds or multiplies loses no
more in float16 than its result is rounded by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import ir, relax

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.passes import reciprocals

_HALF = "float16"

_SIMPLE = frozenset(
    f"relax.{name}"
    for name in (
        "abs", "add", "astype", "broadcast_to", "clip", "concat", "equal", "expand_dims", "flatten", "flip",
        "gather_elements", "gather_nd", "greater", "greater_equal", "layout_transform", "less", "less_equal", "max",
        "maximum", "min", "minimum", "multiply", "negative", "nn.leakyrelu", "nn.max_pool2d", "nn.pad", "nn.relu",
        "not_equal", "permute_dims", "repeat", "reshape", "sign", "split", "squeeze", "stack", "strided_slice",
        "subtract", "take", "tile", "where", "zeros",
    )
)  # fmt: skip
"""Operators that round once at most, or not at all."""


@tvm.transform.module_pass(opt_level=0, name="WidenHalves")
class WidenHalves:
    """Puts casts around every operator of float16 that sums, or calls a function, and has no kernel for that.

    Run it when convolutions and pools have become kernels.

    Args:
        machine: Says whether there are kernels for products.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def transform_module(self, module: Any, _context: Any) -> Any:
        """Rewrite every Relax function; one without float16 stays as it is."""
        for var, function in module.functions_items():
            if isinstance(function, relax.Function):
                module.update_func(var, _Widener(module, self._machine).visit_expr(function))
        return module


@relax.expr_functor.mutator
class _Widener(relax.PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any, machine: Machine) -> None:
        super().__init__(module)
        self._machine = machine

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = str(getattr(call.op, "name", ""))
        if not name.startswith("relax.") or name == "relax.call_tir" or name in _SIMPLE or self._is_kernel(name, call):
            return call
        if not isinstance(call.ty, relax.TensorType) or not any(_is_half(each) for each in (call, *call.args)):
            return call
        args = [self._wide(arg) for arg in call.args]
        if name == "relax.divide" and (factors := reciprocals(args[1])) is not None:
            made = relax.op.multiply(args[0], relax.const(factors))
        else:
            made = ir.Call(call.op, args, call.attrs, call.ty_args)
        made = self.builder_.normalize(made)
        return self.builder_.normalize(relax.op.astype(made, _HALF)) if _is_half(call) else made

    def _wide(self, arg: Any) -> Any:
        if not _is_half(arg):
            return arg
        if isinstance(arg, ir.GenericConst):
            return relax.const(np.asarray(arg.value.numpy()).astype(np.float32))
        return self.builder_.emit(relax.op.astype(arg, "float32"))

    def _is_kernel(self, name: str, call: Any) -> bool:
        """Whether a product is one with weights, whose kernel adds chains of float16 up in float32."""
        if name != "relax.matmul" or not self._machine.computes(_HALF):
            return False
        return isinstance(call.args[1], ir.GenericConst) and len(call.args[1].ty.shape) == 2


def _is_half(expr: Any) -> bool:
    type_ = getattr(expr, "ty", None)
    return isinstance(type_, relax.TensorType) and str(type_.dtype) == _HALF
