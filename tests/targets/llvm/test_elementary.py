"""Functions in vector arithmetic: how many units in the last place they are off, over all of float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tvm import relax

from tests.targets.llvm.assembly import isa_profile, kernel_assembly
from tests.targets.llvm.blocked_calls import profile_of, run_call

Function = Callable[[Any], Any]

LEAST_NORMAL = 2.0**-126
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -2.5, 2.0**22 + 0.5, 2.0**23, -(2.0**23) - 1, 88.72283, 88.72284,
           -87.33654, -87.33655, -103.97, -103.98, 1e-45, -1e-45, LEAST_NORMAL, -LEAST_NORMAL, np.inf, -np.inf,
           np.nan, 3.4e38, -3.4e38, 16.0, -16.7, 0.625, -0.625, 0.927734375, 0.92773443, 3.9, 4.1]  # fmt: skip

FUNCTIONS: dict[str, tuple[Function, Callable[[NDArray[Any]], NDArray[Any]], float]] = {
    "exp": (relax.op.exp, np.exp, 2),
    "log": (relax.op.log, np.log, 2),
    "sigmoid": (relax.op.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3),
    "tanh": (relax.op.tanh, np.tanh, 3),
    "erf": (relax.op.erf, np.vectorize(math.erf, otypes=["float64"]), 2),
    "sqrt": (relax.op.sqrt, np.sqrt, 0.5),
    "rsqrt": (relax.op.rsqrt, lambda x: 1 / np.sqrt(x), 1.5),
    "round": (relax.op.round, np.round, 0),
    "floor": (relax.op.floor, np.floor, 0),
    "ceil": (relax.op.ceil, np.ceil, 0),
    "abs": (relax.op.abs, np.abs, 0),
}
"""Name → operator, its reference in float64, and units in the last place that are allowed."""


def values_of(name: str) -> NDArray[np.float32]:
    """Return numbers of every exponent and sign, what is special, and many of the magnitude that activations have."""
    patterns = np.arange(0, 2**32, 65_537 if name == "erf" else 8_191, dtype=np.uint64).astype(np.uint32)
    usual = np.random.default_rng(0).uniform(-20, 20, 30_000).astype(np.float32)
    return np.concatenate([patterns.view(np.float32), usual, np.array(SPECIAL, np.float32)])


def units_off(got: NDArray[Any], want: NDArray[Any]) -> NDArray[Any]:
    """Return the distance in units in the last place of what is wanted, infinite where only one is NaN or infinite."""
    rounded = want.astype(np.float32)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    finite = np.isfinite(got) & np.isfinite(rounded)
    unit = np.spacing(np.where(finite, np.abs(rounded), 1).astype(np.float32)).astype(np.float64)
    off = np.where(
        finite, np.abs(np.where(finite, got, 0).astype(np.float64) - np.where(finite, want, 0)) / unit, np.inf
    )
    return np.where(same, np.minimum(off, 0.5), off)


@pytest.mark.parametrize("cpu", ["host", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_accurate_over_the_whole_range(name: str, cpu: str) -> None:
    operator, reference, allowed = FUNCTIONS[name]
    values = values_of(name)
    got = run_call(lambda _b, _m, x: operator(x), [values], profile_of(cpu))
    with np.errstate(all="ignore"):
        want = reference(values.astype(np.float64))
        off = units_off(got, want)
    if name == "sigmoid":  # results that are subnormal may be 0
        small = np.abs(want) < LEAST_NORMAL
        assert np.all(np.abs(got[small]) <= LEAST_NORMAL)
        off[small] = 0
    worst = int(np.argmax(off))
    limit = max(allowed, 0.5)
    assert off[worst] <= limit, f"{name}({values[worst]!r}) is {got[worst]!r}, {off[worst]:.1f} units off {want[worst]}"


@pytest.mark.parametrize("cpu", ["host", "x86-64-v3"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "erf", "round"])
def test_results_stay_between_their_bounds_and_keep_the_sign_of_zero(name: str, cpu: str) -> None:
    values = values_of(name)
    got = run_call(lambda _b, _m, x: FUNCTIONS[name][0](x), [values], profile_of(cpu))
    numbers = ~np.isnan(values)
    if name == "sigmoid":
        assert np.all((got[numbers] >= 0) & (got[numbers] <= 1))
        return
    if name != "round":
        assert np.all(np.abs(got[numbers]) <= 1)
    assert np.array_equal(np.signbit(got[numbers]), np.signbit(values[numbers]))


COMPOSED: dict[str, Function] = {
    "silu": lambda x: relax.op.multiply(x, relax.op.sigmoid(x)),
    "gelu": lambda x: relax.op.nn.gelu(x),
    "gelu by tanh": lambda x: relax.op.nn.gelu_tanh(x),
    "mish": lambda x: relax.op.multiply(x, relax.op.tanh(relax.op.log(relax.op.add(relax.op.exp(x), _one())))),
}


def _one() -> Any:
    return relax.const(np.float32(1))


@pytest.mark.parametrize("isa", ["avx2", "avx512", "neon"])
@pytest.mark.parametrize("name", [*FUNCTIONS, *COMPOSED])
def test_no_function_is_called_or_computed_lane_by_lane(name: str, isa: str) -> None:
    operator = COMPOSED[name] if name in COMPOSED else FUNCTIONS[name][0]
    text = kernel_assembly(isa_profile(isa), (1, 4, 9, 7, 16), lambda _b, x, _m: operator(x))
    for call in ("expf", "logf", "tanhf", "erff", "sqrtf", "rintf", "nearbyintf", "floorf", "ceilf"):
        assert call not in text
    assert "vgather" not in text and "vscatter" not in text
