"""Winograd's convolution against float64, whatever the shape, tiling, epilogue and instruction set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relax

from cnncc.targets.llvm.blocked.geometry import blocked_shape, pack_channels
from cnncc.targets.llvm.blocked.transforms import transform_of
from cnncc.targets.llvm.blocked.winograd import winograd_conv2d
from cnncc.targets.llvm.expansions import Expansions
from cnncc.targets.llvm.machine import Machine, machine_of
from cnncc.targets.llvm.rules import ConvShape
from cnncc.targets.llvm.schedule.rules import RULES
from cnncc.targets.llvm.winograd_rules import WinogradPlan, candidates, winograd_plan
from tests.targets.llvm import blocked_calls
from tests.targets.llvm.assembly import EMBEDDED, ISAS, inner_loops, isa_profile, kernel_assembly
from tests.targets.llvm.blocked_calls import compile_call, per_channel, profile_of, unpacked

CPUS = ("host", "x86-64-v3")
TAILS = ("none", "bias and relu", "residual", "silu")


@dataclass(frozen=True)
class Case:
    """A convolution and its operands."""

    shape: ConvShape
    data: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    residual: NDArray[np.float32]

    def reference(self, tail: str) -> NDArray[np.float64]:
        """Return the result in float64."""
        done = direct(self.data.astype("float64"), self.weight.astype("float64"), self.shape)
        return {
            "none": lambda: done,
            "bias and relu": lambda: np.maximum(done + self.bias[:, None, None], 0),
            "residual": lambda: done + self.residual,
            "silu": lambda: done / (1 + np.exp(-done)),
        }[tail]()

    def emit(self, plan: WinogradPlan, tail: str) -> Any:
        """Return what emits the convolution and what follows it."""

        def call(builder: Any, machine: Machine, data: Any, residual: Any) -> Any:
            done = builder.emit(winograd_conv2d(builder, data, self.weight, self.shape, plan, machine, Expansions()))
            if tail == "bias and relu":
                return relax.op.nn.relu(builder.emit(relax.op.add(done, per_channel(self.bias, machine))))
            if tail == "residual":
                return relax.op.add(done, residual)
            return relax.op.nn.silu(done) if tail == "silu" else done

        return call

    def run(self, plan: WinogradPlan, tail: str, cpu: str) -> NDArray[np.float32]:
        """Return the kernel's result; lanes of its operands after the last channel are NaN."""
        profile = profile_of(cpu)
        block = machine_of(profile).block
        operands = [pack_channels(image, block, 1, np.nan) for image in (self.data, self.residual)]
        run, rules = compile_call(self.emit(plan, tail), [operand.shape for operand in operands], profile)
        assert {kernel.rule for kernel in rules.values()} == {"winograd"}
        result = run(*[tvm.runtime.tensor(operand) for operand in operands]).numpy()
        return unpacked(result, self.shape.groups * self.shape.outputs)


def direct(data: NDArray[Any], weight: NDArray[Any], shape: ConvShape) -> NDArray[Any]:
    """Return the convolution, 16 input channels after each other, in the operands' type."""
    top, left, bottom, right = shape.padding
    padded = np.pad(data, [(0, 0), (0, 0), (top, bottom), (left, right)])
    high, wide = shape.output
    total = np.zeros((shape.batch, shape.groups * shape.outputs, high, wide), data.dtype)
    for group in range(shape.groups):
        own = slice(group * shape.outputs, (group + 1) * shape.outputs)
        for start in range(0, shape.inputs, 16):
            part = np.zeros_like(total[:, own])
            for channel in range(start, min(start + 16, shape.inputs)):
                for y, x in np.ndindex(3, 3):
                    seen = padded[:, group * shape.inputs + channel, None, y : y + high, x : x + wide]
                    part += seen * weight[own, channel, y, x][:, None, None]
            total[:, own] += part
    return total


def case_of(
    images: tuple[int, int, int], channels: tuple[int, int], padding: tuple[int, int, int, int], groups: int = 1
) -> Case:
    batch, high, wide = images
    inputs, outputs = channels
    output = (high + padding[0] + padding[2] - 2, wide + padding[1] + padding[3] - 2)
    shape = ConvShape(batch, groups, inputs, outputs, (high, wide), (3, 3), (1, 1), padding, (1, 1), output)
    rng = np.random.default_rng(abs(hash((images, channels, padding))) % 2**32)

    def normal(*size: int) -> NDArray[np.float32]:
        return rng.standard_normal(size).astype("float32")

    weight = normal(groups * outputs, inputs, 3, 3) / np.float32(np.sqrt(9 * inputs))
    data = np.maximum(normal(batch, groups * inputs, high, wide), -0.5)
    return Case(shape, data, weight, normal(groups * outputs), normal(batch, groups * outputs, *output))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    least = [max(1, 3 - padding[0] - padding[2]), max(1, 3 - padding[1] - padding[3])]
    high, wide = (draw(st.integers(low, 40)) for low in least)
    channels = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    return case_of((draw(st.integers(1, 3)), high, wide), channels, padding)


@pytest.mark.parametrize("cpu", CPUS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_convolution_in_any_tiling_is_right(cpu: str, data: st.DataObject) -> None:
    case = data.draw(cases())
    plans = list(candidates(case.shape, machine_of(profile_of(cpu)), data.draw(st.sampled_from((2, 4)))))
    plan, tail = data.draw(st.sampled_from(plans)), data.draw(st.sampled_from(TAILS))
    want = case.reference(tail)
    np.testing.assert_allclose(case.run(plan, tail, cpu), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_groups_of_whole_blocks(size: int, staged: bool, cpu: str) -> None:
    case = case_of((2, 9, 7), (32, 16), (1, 1, 1, 1), groups=3)
    plans = candidates(case.shape, machine_of(profile_of(cpu)), size)
    plan = next(plan for plan in plans if plan.staged == staged)
    np.testing.assert_allclose(case.run(plan, "bias and relu", cpu), case.reference("bias and relu"), atol=3e-5)


@pytest.mark.parametrize(("size", "limit"), [(2, 2.0), (4, 5.0)])
@pytest.mark.parametrize("channels", [16, 64, 320])
def test_the_error_stays_near_the_direct_methods_at_any_depth(channels: int, size: int, limit: float) -> None:
    case = case_of((1, 16, 16), (channels, 32), (1, 1, 1, 1))
    plan = winograd_plan(case.shape, machine_of(profile_of("host")), size)
    assert plan is not None
    want = case.reference("none")

    def error(result: NDArray[np.float32]) -> float:
        return float(np.sqrt(np.mean((result - want) ** 2)))

    assert error(case.run(plan, "none", "host")) <= limit * error(direct(case.data, case.weight, case.shape))


def test_the_definition_is_right_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    without = tuple(rule for rule in RULES if rule.name != "winograd")
    monkeypatch.setattr(blocked_calls, "RULES", without)
    case = case_of((1, 6, 7), (3, 20), (1, 2, 0, 1))
    profile = profile_of("host")
    machine = machine_of(profile)
    for size in (2, 4):
        plan = winograd_plan(case.shape, machine, size)
        assert plan is not None
        for staged in (False, True):
            emit = case.emit(replace(plan, staged=staged), "none")
            operands = [pack_channels(image, machine.block, 1, np.nan) for image in (case.data, case.residual)]
            got = unpacked(blocked_calls.run_call(emit, operands, profile), case.shape.outputs)
            np.testing.assert_allclose(got, case.reference("none"), rtol=0, atol=3e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_transforms_compute_a_correlation(size: int) -> None:
    transform = transform_of(size)
    rng = np.random.default_rng(1)
    line, kernel = rng.standard_normal(size + 2), rng.standard_normal(3)
    spread = np.array(transform.spread(list(line), lambda value: value))
    np.testing.assert_allclose(spread, np.array(transform.data) @ line)
    got = transform.gather(list(spread * (np.array(transform.kernel) @ kernel)), lambda value: value)
    np.testing.assert_allclose(got, np.correlate(line, kernel, "valid"))


@pytest.mark.parametrize("size", [2, 4])
def test_the_matrices_that_the_kernel_uses_are_exact_in_float32(size: int) -> None:
    transform = transform_of(size)
    for matrix in (transform.data, transform.result):
        assert np.array_equal(np.array(matrix), np.array(matrix, "float32"))


@pytest.mark.parametrize("isa", [*ISAS, *EMBEDDED])
@pytest.mark.parametrize("name", ["64 channels on 56×56", "512 channels on 14×14"])
def test_the_products_spill_nothing(name: str, isa: str) -> None:
    channels, extent = (64, 56) if name.startswith("64") else (512, 14)
    profile = isa_profile(isa)
    machine = machine_of(profile)
    shape = case_of((1, extent, extent), (channels, 32), (1, 1, 1, 1)).shape
    weight = np.ones((32, channels, 3, 3), "float32")
    plan = winograd_plan(shape, machine, 4)
    assert plan is not None
    data = blocked_shape((1, channels, extent, extent), machine.block)
    text = kernel_assembly(
        profile, data, lambda builder, x, m: winograd_conv2d(builder, x, weight, shape, plan, m, Expansions())
    )
    vectors = plan.panel * machine.block // machine.lanes
    hot = [loop for loop in inner_loops(text) if loop.multiply_adds >= (plan.pixels - 1) * vectors and not loop.stores]
    assert hot, "no inner loop holds the register tile"
    for loop in hot:
        assert loop.stack_traffic == [], f"{loop.label} of {plan} spills"
