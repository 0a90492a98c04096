"""Element-wise chains, broadcasts and reductions on blocked and plain tensors, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relax

from tests.targets.llvm.assembly import inner_loops, isa_profile, kernel_assembly
from tests.targets.llvm.blocked_calls import per_channel, profile_of, run_blocked, run_call

CPUS = ["host", "x86-64-v3"]
op = relax.op

shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 19), st.integers(1, 33))


def constant(value: float) -> Any:
    return relax.const(np.float32(value))


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-x))


CHAINS: dict[str, tuple[Callable[..., Any], Callable[..., NDArray[Any]]]] = {
    "silu": (lambda x, _y, _g: op.multiply(x, op.sigmoid(x)), lambda x, _y, _g: x * sigmoid(x)),
    "residual and relu": (
        lambda x, y, _g: op.maximum(op.add(x, y), constant(0)),
        lambda x, y, _g: np.maximum(x + y, 0),
    ),
    "gate": (lambda x, _y, g: op.multiply(x, g), lambda x, _y, g: x * g),
    "gate by sigmoid": (lambda x, _y, g: op.multiply(x, op.sigmoid(g)), lambda x, _y, g: x * sigmoid(g)),
    "gate and residual": (lambda x, y, g: op.add(op.multiply(g, x), y), lambda x, y, g: g * x + y),
    "tanh twice read": (
        lambda x, y, _g: op.add(op.multiply(op.tanh(x), y), op.tanh(x)),
        lambda x, y, _g: np.tanh(x) * y + np.tanh(x),
    ),
}


def inputs(shape: tuple[int, int, int, int]) -> list[NDArray[np.float32]]:
    source = np.random.default_rng(7)
    small = (shape[0], shape[1], 1, 1)
    return [source.standard_normal(size).astype("float32") for size in (shape, shape, small)]


@pytest.mark.parametrize("cpu", CPUS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, name=st.sampled_from(list(CHAINS)), blocked=st.booleans())
@example(shape=(1, 64, 28, 28), name="gate and residual", blocked=True)
@example(shape=(2, 17, 1, 1), name="gate", blocked=True)
@example(shape=(1, 3, 200, 130), name="gate", blocked=True)
def test_chains_compute_what_numpy_computes(
    cpu: str, shape: tuple[int, int, int, int], name: str, blocked: bool
) -> None:
    chain, reference = CHAINS[name]
    operands = inputs(shape)
    profile = profile_of(cpu)
    if blocked:
        got = run_blocked(lambda _b, _m, *xs: chain(*xs), operands, shape[1], profile)
    else:
        got = run_call(lambda _b, _m, *xs: chain(*xs), operands, profile)
    want = reference(*[operand.astype("float64") for operand in operands])
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("cpu", CPUS)
def test_constants_of_channels_meet_their_channels(cpu: str) -> None:
    x = inputs((2, 21, 6, 5))[0]
    scale, shift = np.random.default_rng(3).standard_normal((2, 21)).astype("float32")
    got = run_blocked(
        lambda _b, m, v: op.maximum(op.add(op.multiply(v, per_channel(scale, m)), per_channel(shift, m)), constant(0)),
        [x], 21, profile_of(cpu),
    )  # fmt: skip
    want = np.maximum(x.astype("float64") * scale[:, None, None] + shift[:, None, None], 0)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., NDArray[Any]]]] = {
    "mean": (op.mean, np.mean),
    "sum": (op.sum, np.sum),
    "max": (op.max, np.max),
    "min": (op.min, np.min),
    "variance": (op.variance, np.var),
}


@pytest.mark.parametrize("cpu", CPUS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, name=st.sampled_from(list(REDUCTIONS)), blocked=st.booleans())
@example(shape=(1, 20, 37, 41), name="sum", blocked=True)
@example(shape=(1, 20, 1, 7), name="mean", blocked=True)
def test_reductions_over_pixels_compute_what_numpy_computes(
    cpu: str, shape: tuple[int, int, int, int], name: str, blocked: bool
) -> None:
    reduce, reference = REDUCTIONS[name]
    x = inputs(shape)[0]
    profile = profile_of(cpu)
    if blocked:
        got = run_blocked(lambda _b, _m, v: reduce(v, [2, 3], keepdims=True), [x], shape[1], profile)
    else:
        got = run_call(lambda _b, _m, v: reduce(v, [2, 3], keepdims=True), [x], profile)
    want = reference(x.astype("float64"), axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-7 * shape[2] * shape[3])


def test_a_mean_of_equal_signs_keeps_its_digits() -> None:
    x = np.abs(inputs((1, 16, 112, 112))[0]) + np.float32(0.5)
    got = run_blocked(lambda _b, _m, v: op.mean(v, [2, 3], keepdims=True), [x], 16, profile_of("host"))
    np.testing.assert_allclose(got, x.astype("float64").mean(axis=(2, 3), keepdims=True), rtol=6e-7)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_a_sum_over_pixels_has_four_sums_at_a_time(isa: str) -> None:
    lanes = {"avx2": 8, "avx512": 16}[isa]
    register = {"avx2": "ymm", "avx512": "zmm"}[isa]
    text = kernel_assembly(isa_profile(isa), (1, 3, 28, 28, lanes), lambda _b, x, _m: op.sum(x, [2, 3], keepdims=True))
    sums = [
        {line.rsplit("%", 1)[1] for line in loop.lines if "vaddps" in line and register in line}
        for loop in inner_loops(text)
    ]
    assert max(map(len, sums)) >= 4, "additions wait for each other"
