"""exp, sigmoid, tanh and erf in arithmetic that vectorizes.

LLVM turns each of them into one call of the C library per lane, ten times slower. The polynomials are accurate to a few
units in the last place over the whole range, infinities and NaN included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from cnncc.targets.llvm.schedule import tir

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Cephes expf (Moshier): (eʳ − 1 − r) / r² for \\|r\\| ≤ ln 2 / 2, highest power first."""
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
"""Cephes tanhf: (tanh x − x) / x³ in x² for \\|x\\| < 0.625."""
_ERF_SMALL = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
"""N. Juffa, "A fast vectorizable erff": erf x / x − 1 in x² for \\|x\\| ≤ 0.927734375."""
_ERF_LARGE = (-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1, -6.34846687e-1,
              -1.28717512e-1)  # fmt: skip
"""The same: ln(1 − erf x) / x + 1 in x for larger x."""


class _Scope:
    """Statements that must run before the one that uses their results.

    A value is named by a store to a small buffer, which LLVM keeps in a register. A variable would not do: the
    compiler writes its value back into every use, and the expression grows exponentially.
    """

    def __init__(self, lanes: tir.Lanes) -> None:
        self.lanes = lanes
        self.statements: list[Any] = []

    def bind(self, value: Any) -> Any:
        """Name a value, so that it is computed once."""
        buffer, slot = self.lanes.temporary(str(value.ty.dtype))
        self.statements.append(tir.store(buffer, [slot], value))
        return buffer[slot]


def assign(target: Any, indices: Sequence[Any], value: Any) -> Any:
    """Return the statements that compute a value and store it.

    A value that guards its loads by a condition is left as it is: its parts must not be computed ahead of the
    condition.
    """
    if _guarded(value) or not expensive(value):
        return tir.store(target, indices, value)
    lanes = tir.current_lanes()
    if lanes is None:
        with tir.lanes_of(tir.index(0), 1) as single:
            return tir.block(_expanded(single, target, indices, value), single.buffers, "scalar")
    return _expanded(lanes, target, indices, value)


def _expanded(lanes: tir.Lanes, target: Any, indices: Sequence[Any], value: Any) -> Any:
    scope = _Scope(lanes)

    def expand(call: Any) -> Any:
        name = str(getattr(call.op, "name", ""))
        rule = _RULES.get(name)
        if rule is None or str(call.ty.dtype) != "float32":
            return call
        return rule(scope, scope.bind(call.args[0]))

    result = tvm_ffi.structural_map(value, [(ir.Call, expand)], order="post")
    return tir.sequence([*scope.statements, tir.store(target, indices, result)])


def expensive(value: Any) -> bool:
    """Whether a value calls a function that takes much longer than a load."""
    names = []
    tvm_ffi.structural_walk(value, [(ir.Call, lambda call: names.append(str(getattr(call.op, "name", ""))))])
    return any(name not in _CHEAP for name in names)


_CHEAP = frozenset({"prim.if_then_else", "tirx.if_then_else", "tirx.fabs", "tirx.likely", "prim.reinterpret"})


def _guarded(value: Any) -> bool:
    found = []
    tvm_ffi.structural_walk(
        value, [(ir.Call, lambda call: found.append(1) if str(getattr(call.op, "name", "")).endswith("if_then_else")
                 else None)]
    )  # fmt: skip
    return bool(found)


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    result = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + _f(coefficient)
    return result


def _exp(scope: _Scope, x: Any) -> Any:
    """Cephes: x = n ln 2 + r, eˣ = 2ⁿ eʳ; 2ⁿ in two factors, so that it over- and underflows as it should."""
    low = scope.bind(tirx.Select(x < _f(-104.0), _f(-104.0), x))
    inside = scope.bind(tirx.Select(low > _f(89.0), _f(89.0), low))
    n = scope.bind(tirx.floor(inside * _f(1.44269504088896341) + _f(0.5)))
    r = scope.bind(inside - n * _f(0.693359375) + n * _f(2.12194440e-4))
    mantissa = scope.bind(_horner(r, _EXP) * (r * r) + r + _f(1.0))
    whole = n.astype("int32")  # not named: buffers of one element type stay in registers
    half = whole >> tirx.const(1, "int32")
    return scope.bind(mantissa * _power_of_two(half) * _power_of_two(whole - half))


def _power_of_two(n: Any) -> Any:
    bits = (n + tirx.const(127, "int32")) << tirx.const(23, "int32")
    return tirx.reinterpret("float32", bits)


def _sigmoid(scope: _Scope, x: Any) -> Any:
    return scope.bind(_f(1.0) / (_f(1.0) + _exp(scope, scope.bind(_f(0.0) - x))))


def _tanh(scope: _Scope, x: Any) -> Any:
    size = scope.bind(tirx.Select(x < _f(0.0), _f(0.0) - x, x))
    square = scope.bind(x * x)
    small = _horner(square, _TANH) * square * x + x
    large = scope.bind(_f(1.0) - _f(2.0) / (_exp(scope, scope.bind(size + size)) + _f(1.0)))
    signed = tirx.Select(x < _f(0.0), _f(0.0) - large, large)
    return scope.bind(tirx.Select(size < _f(0.625), small, signed))


def _erf(scope: _Scope, x: Any) -> Any:
    size = scope.bind(tirx.Select(x < _f(0.0), _f(0.0) - x, x))
    square = scope.bind(x * x)
    small = _horner(square, _ERF_SMALL) * x + x
    bounded = scope.bind(tirx.Select(size > _f(4.0), _f(4.0), size))
    large = scope.bind(_f(1.0) - _exp(scope, scope.bind(_horner(bounded, _ERF_LARGE) * bounded - bounded)))
    signed = tirx.Select(x < _f(0.0), _f(0.0) - large, large)
    return scope.bind(tirx.Select(size > _f(0.927734375), signed, small))


_RULES: dict[str, Callable[[_Scope, Any], Any]] = {
    "tirx.exp": _exp,
    "tirx.sigmoid": _sigmoid,
    "tirx.tanh": _tanh,
    "tirx.erf": _erf,
}
