"""Depthwise convolution and pooling on blocked tensors, against NumPy in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relax

from cnncc.targets.llvm.blocked.geometry import blocked_shape
from cnncc.targets.llvm.blocked.window import average_pool, depthwise, divisors_of, max_pool
from cnncc.targets.llvm.machine import Machine, machine_of
from cnncc.targets.llvm.rules import ConvShape, Sliding, window_plan
from cnncc.targets.llvm.schedule.window import GREATEST, SUM, WEIGHTED
from tests.targets.llvm.assembly import EMBEDDED, ISAS, inner_loops, isa_profile, kernel_assembly
from tests.targets.llvm.blocked_calls import compile_call, per_channel, profile_of, run_blocked

CPUS = ["host", "x86-64-v3"]
KINDS = [WEIGHTED, GREATEST, SUM]


@dataclass(frozen=True)
class Case:
    """A window over an image of some channels."""

    batch: int
    channels: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def sliding(self) -> Sliding:
        high, wide = (
            (self.image[a] + self.padding[a] + self.padding[a + 2] - self.dilation[a] * (self.kernel[a] - 1) - 1)
            // self.stride[a] + 1
            for a in (0, 1)
        )  # fmt: skip
        return Sliding(self.image, self.kernel, self.stride, self.padding, self.dilation, (high, wide))

    def values(self, seed: int = 1) -> NDArray[np.float32]:
        return np.random.default_rng(seed).standard_normal((self.batch, self.channels, *self.image)).astype("float32")

    def weight(self) -> NDArray[np.float32]:
        return np.random.default_rng(2).standard_normal((self.channels, 1, *self.kernel)).astype("float32")


@st.composite
def cases(draw: Any) -> Case:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = draw(st.one_of(st.sampled_from([(3, 3), (5, 5), (7, 7), (2, 2)]), st.tuples(*[st.integers(1, 9)] * 2)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (4, 1)]))
    padding = (*pair(0, 5), *pair(0, 5))
    reach = [dilation[axis] * (kernel[axis] - 1) + 1 for axis in (0, 1)]
    least = [max(1, reach[axis] - padding[axis] - padding[axis + 2]) for axis in (0, 1)]
    image = (least[0] + draw(st.integers(0, 24)), least[1] + draw(st.integers(0, 40)))
    return Case(draw(st.integers(1, 2)), draw(st.integers(1, 40)), image, kernel, pair(1, 3), padding, dilation)


def taps_of(case: Case, values: NDArray[Any], outside: float) -> NDArray[Any]:
    """Return what each output sees, ``[n, c, oh, ow, kh, kw]``."""
    sliding = case.sliding
    top, left, bottom, right = case.padding
    last = [(sliding.output[a] - 1) * case.stride[a] + (case.kernel[a] - 1) * case.dilation[a] + 1 for a in (0, 1)]
    below = max(bottom, last[0] - top - case.image[0])
    beyond = max(right, last[1] - left - case.image[1])
    padded = np.pad(values, [(0, 0), (0, 0), (top, below), (left, beyond)], constant_values=outside)
    rows, columns = (
        np.arange(sliding.output[a])[:, None] * case.stride[a] + np.arange(case.kernel[a])[None] * case.dilation[a]
        for a in (0, 1)
    )
    return padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]


def expected(case: Case, kind: int, values: NDArray[Any], include_padding: bool = False) -> NDArray[Any]:
    if kind == GREATEST:
        result: NDArray[Any] = taps_of(case, values, -np.inf).max(axis=(-2, -1))
        return result
    seen = taps_of(case, values.astype("float64"), 0.0)
    if kind == WEIGHTED:
        return np.einsum("nchwyx,cyx->nchw", seen, case.weight()[:, 0].astype("float64"))
    return seen.sum(axis=(-2, -1)) / divisors_of(case.sliding, include_padding).astype("float64")


def emit(case: Case, kind: int, builder: Any, machine: Machine, data: Any, include_padding: bool = False) -> Any:
    sliding = case.sliding
    if kind == GREATEST:
        return max_pool(builder, data, sliding, machine)
    if kind == SUM:
        return average_pool(builder, data, sliding, divisors_of(sliding, include_padding), machine)
    shape = ConvShape(
        case.batch, case.channels, 1, 1, sliding.image, sliding.kernel, sliding.stride, sliding.padding,
        sliding.dilation, sliding.output,
    )  # fmt: skip
    return depthwise(builder, data, case.weight(), shape, machine)


def check(got: NDArray[Any], want: NDArray[Any], terms: int) -> None:
    assert got.shape == want.shape
    if got.size:
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=6e-7 * max(1.0, float(terms) ** 0.5))


BATTERY = [
    Case(1, 17, (1, 1), (1, 1)),
    Case(2, 3, (1, 1), (3, 3), (1, 1), (1, 1, 1, 1)),
    Case(1, 20, (2, 3), (7, 7), (1, 1), (3, 3, 3, 3)),
    Case(1, 16, (7, 7), (7, 7)),
    Case(1, 24, (56, 56), (56, 56)),
    Case(1, 8, (33, 33), (3, 3), (1, 1), (12, 12, 12, 12), (12, 12)),
    Case(1, 4, (40, 40), (31, 31), (1, 1), (15, 15, 15, 15)),
    Case(1, 5, (3, 70), (1, 40), (1, 1), (0, 20, 0, 20)),
    Case(1, 5, (6, 90), (2, 60), (2, 3)),
    Case(1, 40, (28, 28), (3, 3), (1, 1), (1, 1, 1, 1)),
    Case(1, 9, (29, 31), (5, 5), (2, 2), (2, 1, 1, 2)),
    Case(1, 2, (4, 4), (2, 2), (1, 1), (5, 5, 5, 5)),
]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BATTERY, ids=str)
def test_windows_of_unusual_shapes_compute_what_numpy_computes(case: Case, kind: int, cpu: str) -> None:
    values = case.values()
    got = run_blocked(lambda b, m, x: emit(case, kind, b, m, x), [values], case.channels, profile_of(cpu))
    check(got, expected(case, kind, values), case.kernel[0] * case.kernel[1])


@pytest.mark.parametrize("cpu", CPUS)
@settings(max_examples=40, deadline=None)
@given(case=cases(), kind=st.sampled_from(KINDS), include_padding=st.booleans())
def test_windows_compute_what_numpy_computes(cpu: str, case: Case, kind: int, include_padding: bool) -> None:
    values = case.values()
    got = run_blocked(
        lambda b, m, x: emit(case, kind, b, m, x, include_padding), [values], case.channels, profile_of(cpu)
    )
    check(got, expected(case, kind, values, include_padding), case.kernel[0] * case.kernel[1])


EPILOGUES = ["relu6", "silu", "hard swish", "residual", "gate", "silu and residual"]


def follow(name: str, result: Any, others: tuple[Any, Any]) -> Any:
    residual, gate = others
    op = relax.op
    if name == "relu6":
        return op.minimum(op.maximum(result, relax.const(np.float32(0))), relax.const(np.float32(6)))
    if name == "hard swish":
        shifted = op.add(op.multiply(result, relax.const(np.float32(1 / 6))), relax.const(np.float32(0.5)))
        inside = op.minimum(op.maximum(shifted, relax.const(np.float32(0))), relax.const(np.float32(1)))
        return op.multiply(result, inside)
    if name == "gate":
        return op.multiply(result, gate)
    if name.startswith("silu"):
        result = op.multiply(result, op.sigmoid(result))
    return op.add(result, residual) if name.endswith("residual") else result


def followed(name: str, result: NDArray[Any], residual: NDArray[Any], gate: NDArray[Any]) -> NDArray[Any]:
    if name == "relu6":
        return np.clip(result, 0, 6)
    if name == "hard swish":
        return result * np.clip(result / 6 + 0.5, 0, 1)
    if name == "gate":
        return result * gate
    if name.startswith("silu"):
        result = result / (1 + np.exp(-result))
    return result + residual if name.endswith("residual") else result


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_window_is_computed_with_it(kind: int, name: str, cpu: str) -> None:
    case = Case(2, 19, (13, 22), (3, 3), (1, 2), (1, 1, 1, 1))
    profile, sliding = profile_of(cpu), case.sliding
    values, bias = case.values(), np.random.default_rng(4).standard_normal(19).astype("float32")
    residual = np.random.default_rng(5).standard_normal((2, 19, *sliding.output)).astype("float32")
    gate = np.random.default_rng(6).standard_normal((2, 19, 1, 1)).astype("float32")

    def whole(builder: Any, machine: Machine, x: Any, *others: Any) -> Any:
        result = builder.emit(emit(case, kind, builder, machine, x))
        return follow(name, relax.op.add(result, per_channel(bias, machine)), (others[0], others[1]))

    got = run_blocked(whole, [values, residual, gate], 19, profile)
    want = expected(case, kind, values) + bias[:, None, None]
    np.testing.assert_allclose(got, followed(name, want, residual, gate), rtol=1e-5, atol=3e-6)
    shapes = [blocked_shape(array.shape, machine_of(profile).block) for array in (values, residual, gate)]
    rules = {kernel.rule for kernel in compile_call(whole, shapes, profile)[1].values()}
    assert rules == {"window"}, "one kernel computes all"


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("kernel", [(3, 3), (4, 1), (6, 6)])
def test_the_greatest_of_nan_is_nan_wherever_it_lies(kernel: tuple[int, int], cpu: str) -> None:
    case = Case(1, 18, (6, 6), kernel)
    values = case.values()
    for channel in range(18):
        values[0, channel, channel // 6, channel % 6] = np.nan
    got = run_blocked(lambda b, m, x: emit(case, GREATEST, b, m, x), [values], 18, profile_of(cpu))
    np.testing.assert_array_equal(got, expected(case, GREATEST, values))
    assert np.isnan(got).any() and (kernel == (6, 6) or not np.isnan(got).all())


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_reach_their_windows_and_no_others(kind: int, cpu: str) -> None:
    case = Case(1, 3, (9, 9), (3, 3), (1, 1), (1, 1, 1, 1))
    values = case.values()
    values[0, 0, 4, 4], values[0, 1, 0, 0], values[0, 2, 8, 8] = np.inf, -np.inf, np.nan
    got = run_blocked(lambda b, m, x: emit(case, kind, b, m, x), [values], 3, profile_of(cpu))
    np.testing.assert_allclose(got, expected(case, kind, values), rtol=1e-5, atol=1e-6)


def test_a_long_sum_of_equal_signs_keeps_its_digits() -> None:
    case = Case(1, 16, (112, 112), (112, 112))
    values = np.abs(case.values()) + np.float32(0.5)
    got = run_blocked(lambda b, m, x: emit(case, SUM, b, m, x), [values], 16, profile_of("host"))
    np.testing.assert_allclose(got, expected(case, SUM, values), rtol=6e-7)


@settings(max_examples=200, deadline=None)
@given(case=cases(), weighted=st.booleans(), cpu=st.sampled_from([*CPUS, "x86-64"]))
@example(case=Case(1, 32, (112, 112), (3, 3), (1, 1), (1, 1, 1, 1)), weighted=True, cpu="x86-64-v3")
def test_a_plan_fits_the_registers_and_covers_the_image(case: Case, weighted: bool, cpu: str) -> None:
    machine = machine_of(profile_of(cpu))
    plan = window_plan(case.sliding, case.batch, machine, weighted=weighted)
    vectors = machine.block // machine.lanes
    assert 1 <= plan.columns <= case.sliding.output[1] and 1 <= plan.chunk <= case.sliding.output[0]
    assert plan.columns * plan.split * vectors <= machine.registers - 2


REGISTER_CASES = [
    Case(1, 48, (28, 28), (3, 3), (1, 1), (1, 1, 1, 1)),
    Case(1, 48, (56, 56), (3, 3), (2, 2), (1, 1, 1, 1)),
    Case(1, 48, (28, 28), (5, 5), (1, 1), (2, 2, 2, 2)),
    Case(1, 48, (56, 56), (7, 7), (1, 1), (3, 3, 3, 3)),
    Case(1, 48, (28, 28), (5, 5), (2, 2), (2, 2, 2, 2)),
    Case(1, 48, (28, 28), (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
]


LONG_ROWS = Case(1, 48, (112, 112), (3, 3), (1, 1), (1, 1, 1, 1))
"""Unrolled where there are registers for it."""


@pytest.mark.parametrize(
    ("case", "isa"), [*itertools.product(REGISTER_CASES, [*ISAS, *EMBEDDED]), (LONG_ROWS, "armv7")], ids=str
)
def test_sums_of_a_depthwise_convolution_stay_in_registers(case: Case, isa: str) -> None:
    profile = isa_profile(isa)
    shape = blocked_shape((case.batch, case.channels, *case.image), machine_of(profile).block)
    text = kernel_assembly(profile, shape, lambda builder, x, machine: emit(case, WEIGHTED, builder, machine, x))
    hot = [loop for loop in inner_loops(text) if loop.multiply_adds >= (30 if isa in ISAS else 16)]
    assert hot, "no inner loop holds a tile"
    for loop in hot:
        assert len(loop.stack_traffic) <= 0.1 * loop.multiply_adds, f"{loop.label} spills"
