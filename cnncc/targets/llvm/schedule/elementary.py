"""exp, log, sigmoid, tanh, erf and rounding in arithmetic that vectorizes.

LLVM turns each of them into one call of the C library per lane, ten times slower. Results are within 4 units in the
last place over the whole range, infinities and NaN included; sigmoid gives 0 where its result would be subnormal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from cnncc.targets.llvm.schedule import tir

_EXP = (1.37805939e-3, 8.37312452e-3, 4.16695364e-2, 1.66664720e-1, 4.99999851e-1, 1.0, 1.0)
"""N. Juffa, "Fast vectorizable expf" (forums.developer.nvidia.com): eʳ for \\|r\\| ≤ ln 2 / 2, highest power first."""
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
"""Cephes tanhf: (tanh x − x) / x³ in x² for \\|x\\| < 0.625."""
_ERF_SMALL = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
"""N. Juffa, "A fast vectorizable erff": erf x / x − 1 in x² for \\|x\\| ≤ 0.927734375."""
_ERF_LARGE = (-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1, -6.34846687e-1,
              -1.28717512e-1)  # fmt: skip
"""The same: ln(1 − erf x) / x + 1 in x for larger x."""
_LOG_EVEN = (-0.130310059, -0.121483512, -0.166846126, -0.249996200)
_LOG_ODD = (0.140869141, 0.139814854, 0.200120345)
"""N. Juffa, "Efficient implementation of logf": (ln(1 + f) − f + f²/2 − f³/3) / f⁴ in f for −1/3 ≤ f ≤ 1/3, as two
polynomials in f²: the even powers' and the odd powers' coefficients, highest first."""
_ROUND = 12582912.0
"""1.5 · 2²³: adding it rounds to a whole number, which the sum's lowest bits then hold."""


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


def _below(x: Any, bound: float) -> Any:
    """Return the lesser of a value and a bound; NaN stays."""
    return tirx.Select(x > _f(bound), _f(bound), x)


def _above(x: Any, bound: float) -> Any:
    """Return the greater of a value and a bound; NaN stays."""
    return tirx.Select(x < _f(bound), _f(bound), x)


def _bits(x: Any) -> Any:
    return tirx.reinterpret("int32", x)


def _of_bits(bits: Any) -> Any:
    return tirx.reinterpret("float32", bits)


def _i(value: int) -> Any:
    return tirx.const(value, "int32")


def _copysign(size: Any, sign: Any) -> Any:
    """Return a value that is not negative with the sign of another."""
    return _of_bits(_bits(size) | (_bits(sign) & _i(-(2**31))))


def _power(scope: _Scope, x: Any) -> tuple[Any, Any]:
    """Return 2 eʳ and n, as the bits of n − 1 powers of two, with x = n ln 2 + r.

    n is found by rounding x / ln 2 to the lowest bits of a sum: shifted left they are an exponent.
    """
    shifted = scope.bind(x * _f(1.44269504088896341) + _f(_ROUND))
    n = scope.bind(shifted - _f(_ROUND))
    r = scope.bind(x - n * _f(0.693359375) + n * _f(2.12194440e-4))
    # Twice the series, and one power less, so that n reaches 128: the greatest finite results.
    mantissa = scope.bind(_horner(r, [2.0 * coefficient for coefficient in _EXP]))
    return mantissa, (_bits(shifted) << _i(23)) + _i(126 << 23)


def _flushing_exp(scope: _Scope, x: Any) -> Any:
    """Return eˣ for x ≤ 89.4, 0 below -87.5 (asked for no further); from 89 on it is infinite."""
    mantissa, power = _power(scope, x)
    return scope.bind(mantissa * _of_bits(power))


def _exp(scope: _Scope, x: Any) -> Any:
    """Subnormal results come from 64 powers of two more and a factor."""
    inside = scope.bind(_below(scope.bind(_above(x, -104.0)), 89.4))
    mantissa, power = _power(scope, inside)
    deep = inside < _f(-80.0)
    power = power + tirx.Select(deep, _i(64 << 23), _i(0))
    return scope.bind(mantissa * _of_bits(power) * tirx.Select(deep, _f(2.0**-64), _f(1.0)))


def _sigmoid(scope: _Scope, x: Any) -> Any:
    opposite = scope.bind(_f(0.0) - x)
    inside = scope.bind(_below(scope.bind(_above(opposite, -87.5)), 89.4))
    return scope.bind(_f(1.0) / (_f(1.0) + _flushing_exp(scope, inside)))


def _tanh(scope: _Scope, x: Any) -> Any:
    size = scope.bind(tirx.abs(x))
    square = scope.bind(x * x)
    small = scope.bind(_horner(square, _TANH) * square * size + size)
    double = scope.bind(_below(scope.bind(size + size), 20.0))  # from there on the result is 1
    large = scope.bind(_f(1.0) - _f(2.0) / (_flushing_exp(scope, double) + _f(1.0)))
    return scope.bind(_copysign(scope.bind(tirx.Select(size < _f(0.625), small, large)), x))


def _erf(scope: _Scope, x: Any) -> Any:
    size = scope.bind(tirx.abs(x))
    square = scope.bind(x * x)
    small = scope.bind(_horner(square, _ERF_SMALL) * x + x)
    bounded = scope.bind(_below(size, 4.0))  # from there on the result is 1
    large = scope.bind(_f(1.0) - _flushing_exp(scope, scope.bind(_horner(bounded, _ERF_LARGE) * bounded - bounded)))
    return scope.bind(tirx.Select(size > _f(0.927734375), _copysign(large, x), small))


def _log(scope: _Scope, x: Any) -> Any:
    """With x = 2ⁿ (1 + f); subnormal numbers are made normal first."""
    tiny = x < _f(2.0**-126)
    normal = scope.bind(tirx.Select(tiny, x * _f(2.0**23), x))
    power = (_bits(normal) - _i(0x3F2AAAAB)) & _i(-(2**23))  # 2/3 ≤ 1 + f < 4/3
    f = scope.bind(_of_bits(_bits(normal) - power) - _f(1.0))
    n = scope.bind(power.astype("float32") * _f(2.0**-23) - tirx.Select(tiny, _f(23.0), _f(0.0)))
    square = scope.bind(f * f)
    series = scope.bind(_horner(square, _LOG_ODD) * f + _horner(square, _LOG_EVEN))
    series = scope.bind((series * f + _f(0.333331972)) * f - _f(0.5))
    result = scope.bind(n * _f(0.693147182) + (series * square + f))
    infinity = _f(float("inf"))
    right = scope.bind(tirx.Select(x < infinity, result, x))  # NaN and infinity
    positive = scope.bind(tirx.Select(x < _f(0.0), _f(float("nan")), right))
    return scope.bind(tirx.Select(tirx.abs(x) > _f(0.0), positive, tirx.Select(x <= _f(0.0), _f(0.0) - infinity, x)))


def _rsqrt(scope: _Scope, x: Any) -> Any:
    return scope.bind(_f(1.0) / tirx.sqrt(x))


def _round(scope: _Scope, x: Any) -> Any:
    """To the nearest whole number, halves to even; from 2²³ on there is nothing to round."""
    size = scope.bind(tirx.abs(x))
    raised = scope.bind(size + _f(2.0**23))
    whole = scope.bind(raised - _f(2.0**23))
    return scope.bind(tirx.Select(size < _f(2.0**23), _copysign(whole, x), x))


_RULES: dict[str, Callable[[_Scope, Any], Any]] = {
    "tirx.exp": _exp,
    "tirx.log": _log,
    "tirx.sigmoid": _sigmoid,
    "tirx.tanh": _tanh,
    "tirx.erf": _erf,
    "tirx.rsqrt": _rsqrt,
    "tirx.nearbyint": _round,
}
