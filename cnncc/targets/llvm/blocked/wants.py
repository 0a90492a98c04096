"""Which variables some operator wants blocked: looked up before the layouts are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm import ir, relax

Op = Callable[[Any], bool]


def wanted_blocked(bindings: Iterable[Any], wants: Op, follows: Op) -> set[Any]:
    """Return the variables whose readers are, or lead to, operators on blocked tensors.

    Args:
        bindings: Bindings of a function, in order.
        wants: Whether a call computes on blocked tensors.
        follows: Whether a call takes either layout and passes it on.
    """
    found: set[Any] = set()
    for binding in reversed(list(bindings)):
        value = binding.value
        if _passes_on(value, binding.var in found, wants, follows):
            found.update(variables(value))
    return found


def _passes_on(value: Any, wanted: bool, wants: Op, follows: Op) -> bool:
    if not isinstance(value, ir.Call):
        return wanted
    return wants(value) or (wanted and follows(value))


def variables(expr: Any) -> list[Any]:
    """Return the variables that an expression reads."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    parts = expr.args if isinstance(expr, ir.Call) else expr.fields if isinstance(expr, relax.Tuple) else []
    return [var for part in parts for var in variables(part)]
