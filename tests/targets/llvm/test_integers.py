"""int8 on the CPU: sums of steps are exact on every instruction set; what breaks the contract stays in float."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference
from cnncc.targets.base import Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.blocked.geometry import blocked_shape
from cnncc.targets.llvm.blocked.integers import MOST_PRODUCTS, MOST_TAPS, integer_conv2d
from cnncc.targets.llvm.machine import machine_of
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.rules import ConvShape, direct_plan
from cnncc.targets.llvm.schedule.products import ZERO, dots_of
from tests.calibration.graphs import Net, feeds_of, images, scales_for
from tests.targets.conformance import graph_of
from tests.targets.llvm.assembly import inner_loops, kernel_assembly
from tests.targets.llvm.running import kernels_of, operands_of, run_graph, tensors_of
from tests.targets.llvm.test_convolutions import Case, cases

X86 = ("x86-64", "x86-64-v3", "x86-64-v4")
"""Instruction sets whose products are pairs: SSE2, AVX2, AVX-512 without VNNI."""

STEP = 2.0**-5
"""A scale whose multiples float32 holds exactly, so that nothing but a wrong sum can differ."""

Run = Callable[[OnnxGraph, Mapping[str, NDArray[Any]]], list[NDArray[Any]]]
"""Graph and feeds → its outputs, by an engine."""

EXTREMES = st.sampled_from(["random", "largest", "smallest", "opposite"])


def profile_of(cpu: str | None) -> Profile:
    return resolve_profile(mcpu=cpu)


def on_this_machine(cpu: str | None) -> Run:
    return functools.partial(run_graph, profile=profile_of(cpu))


def runs_here(cpu: str | None) -> bool:
    if cpu is None:
        return True
    return set(named(profile_of(cpu)).features) <= set(named(resolve_profile()).features)


def steps_of(extreme: str, shape: tuple[int, ...], lowest: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return integers from ``lowest`` to 127: random ones, or those whose products are largest."""
    if extreme == "random":
        return rng.integers(lowest, 128, shape)
    ends = {"largest": [127, 127], "smallest": [lowest, lowest], "opposite": [lowest, 127]}[extreme]
    return np.resize(np.array(ends, np.int64), shape)


def pair(name: str, scale: str) -> list[Any]:
    """Return QuantizeLinear and DequantizeLinear of a tensor."""
    return [
        helper.make_node("QuantizeLinear", [name, scale, "zero"], [f"{name}_q"], f"{name}_quantize"),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, "zero"], [f"{name}_dq"], f"{name}_dequantize"),
    ]


def constants(values: Mapping[str, Any]) -> list[TensorProto]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def quantized_graph(
    case: Case, weight: NDArray[np.int64], scales: NDArray[np.float32], *, rectified: bool = False
) -> OnnxGraph:
    """Return Q/DQ → convolution → residual → ReLU → Q/DQ, whose output is the last dequantized tensor.

    Args:
        case: The convolution.
        weight: int8 in wide integers.
        scales: Of the output channels.
        rectified: Whether the input passes through a ReLU first, as kernels for steps that are never negative want.
    """
    outputs = case.groups * case.outputs
    values: dict[str, Any] = {
        "scale": np.float32(STEP), "zero": np.int8(0), "end": np.float32(1.0), "w_q": weight.astype(np.int8),
        "w_scale": scales, "w_zero": np.zeros(outputs, np.int8),
    }  # fmt: skip
    read = "x_relu" if rectified else "x"
    operands = [f"{read}_dq", "w"]
    if case.bias:
        values["bias"] = biases_of(case)
        operands.append("bias")
    result = [case.batch, outputs, *out_of(case)]
    inputs: dict[str, Any] = {"x": [case.batch, case.groups * case.inputs, *case.image]}
    nodes = [
        *([helper.make_node("Relu", ["x"], ["x_relu"], "before")] if rectified else []),
        *pair(read, "scale"),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], "weights", axis=0),
        helper.make_node("Conv", operands, ["c"], "conv", group=case.groups, kernel_shape=case.kernel,
                         strides=case.stride, pads=case.padding, dilations=case.dilation),
    ]  # fmt: skip
    last = "c"
    if case.residual:
        inputs["r"] = result
        nodes += [*pair("r", "end"), helper.make_node("Add", ["c", "r_dq"], ["a"], "residual")]
        last = "a"
    if case.activation == "relu":
        nodes.append(helper.make_node("Relu", [last], ["b"], "act"))
        last = "b"
    if case.activation != "none":
        nodes += pair(last, "end")
        last = f"{last}_dq"
    nodes.append(helper.make_node("Identity", [last], ["y"], "result"))
    return graph_of(nodes, inputs, {"y": result}, constants(values), opset=20)


def biases_of(case: Case) -> NDArray[np.float32]:
    """Return biases so small that float32 holds their sum with any sum of products, before a residual is added."""
    return np.arange(case.groups * case.outputs, dtype=np.float32) % 7 - 3


def out_of(case: Case) -> tuple[int, int]:
    reach = [(k - 1) * d + 1 for k, d in zip(case.kernel, case.dilation, strict=True)]
    high, wide = (
        (case.image[axis] + case.padding[axis] + case.padding[axis + 2] - reach[axis]) // case.stride[axis] + 1
        for axis in (0, 1)
    )
    return high, wide


def exact(case: Case, steps: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the convolution of integers: float64 holds all of them."""
    top, left, bottom, right = case.padding
    data = np.pad(steps, ((0, 0), (0, 0), (top, bottom), (left, right))).astype(np.float64)
    found = torch.nn.functional.conv2d(
        torch.from_numpy(data), torch.from_numpy(weight.astype(np.float64)), stride=case.stride,
        dilation=case.dilation, groups=case.groups,
    )  # fmt: skip
    return found.numpy().astype(np.int64)


def check(case: Case, run: Run, of_steps: str, of_weights: str, seed: int, *, rectified: bool = False) -> None:
    """Compare an engine with integer arithmetic, bit for bit."""
    rng = np.random.default_rng(seed)
    outputs = case.groups * case.outputs
    steps = steps_of(of_steps, (case.batch, case.groups * case.inputs, *case.image), -128, rng)
    weight = steps_of(of_weights, (outputs, case.inputs, *case.kernel), -127, rng)
    scales = np.float32(2.0) ** rng.integers(-12, -6, outputs).astype(np.float32)
    graph = quantized_graph(case, weight, scales, rectified=rectified)
    feeds = {"x": (steps * STEP).astype(np.float32)}
    steps = np.maximum(steps, 0) if rectified else steps
    want = exact(case, steps, weight) * (STEP * scales.astype(np.float64)).reshape(-1, 1, 1)
    if case.bias:
        want = want + biases_of(case).reshape(-1, 1, 1)
    if case.residual:
        skip = rng.integers(-128, 128, want.shape)
        feeds["r"], want = skip.astype(np.float32), want + skip
    if case.activation == "relu":
        want = np.maximum(want, 0.0)
    if case.activation != "none":
        want = np.clip(np.rint(want), -128, 127)
    (got,) = run(graph, feeds)
    np.testing.assert_array_equal(got, want.astype(np.float32))


@st.composite
def integer_cases(draw: Any) -> Case:
    """Draw convolutions, depthwise ones among them, of few enough products that float32 holds their sums."""
    case: Case = draw(cases())
    activation = draw(st.sampled_from(["none", "relu", "quantized"]))
    if draw(st.integers(0, 3)) == 0:
        case = replace(case, groups=draw(st.integers(2, 40)), inputs=1, outputs=1)
    return replace(case, activation=activation, inputs=min(case.inputs, 1000 // (case.kernel[0] * case.kernel[1])))


@pytest.mark.parametrize("cpu", [None, *X86])
@given(case=integer_cases(), steps=EXTREMES, weights=EXTREMES, rectified=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_a_convolution_of_int8_is_exact(
    cpu: str | None, case: Case, steps: str, weights: str, rectified: bool, seed: int
) -> None:
    if not runs_here(cpu):
        pytest.skip(f"this machine does not run {cpu}")
    check(case, on_this_machine(cpu), steps, weights, seed, rectified=rectified)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", [None, "x86-64-v3"])
@given(case=integer_cases(), steps=EXTREMES, weights=EXTREMES, rectified=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_many_convolutions_of_int8_are_exact(
    cpu: str | None, case: Case, steps: str, weights: str, rectified: bool, seed: int
) -> None:
    if not runs_here(cpu):
        pytest.skip(f"this machine does not run {cpu}")
    check(case, on_this_machine(cpu), steps, weights, seed, rectified=rectified)


LARGE = Case(1, 1, 512, 40, (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "none")
"""4608 products: their sums exceed what float32 counts exactly, and what int16 pairs would hold."""


LARGEST = [("largest", "largest"), ("smallest", "smallest"), ("smallest", "largest")]
"""Of steps, and of weights."""


def check_largest(run: Run, of_steps: str, of_weights: str) -> None:
    """Compare sums beyond float32's whole numbers with integer arithmetic, bit for bit."""
    rng = np.random.default_rng(0)
    steps = steps_of(of_steps, (1, LARGE.inputs, *LARGE.image), -128, rng)
    weight = steps_of(of_weights, (LARGE.outputs, LARGE.inputs, 3, 3), -127, rng)
    graph = quantized_graph(LARGE, weight, np.full(LARGE.outputs, 2.0**-9, np.float32))
    (got,) = run(graph, {"x": (steps * STEP).astype(np.float32)})
    sums = exact(LARGE, steps, weight)
    assert np.abs(sums).max() > 2**24
    np.testing.assert_array_equal(got, sums.astype(np.float32) * np.float32(STEP * 2.0**-9))


@pytest.mark.parametrize("cpu", [None, *X86])
@pytest.mark.parametrize(("of_steps", "of_weights"), LARGEST)
def test_the_largest_sums_are_exact_to_the_last_bit(cpu: str | None, of_steps: str, of_weights: str) -> None:
    if not runs_here(cpu):
        pytest.skip(f"this machine does not run {cpu}")
    check_largest(on_this_machine(cpu), of_steps, of_weights)


@pytest.mark.parametrize("cpu", [None, *X86])
@pytest.mark.parametrize("of_weights", ["largest", "smallest", "opposite"])
def test_pairs_of_the_largest_products_of_positive_steps_do_not_saturate(cpu: str | None, of_weights: str) -> None:
    """2 · 127 · 127 is what `pmaddubsw` has to hold in int16 at most."""
    if not runs_here(cpu):
        pytest.skip(f"this machine does not run {cpu}")
    check(replace(LARGE, inputs=64), on_this_machine(cpu), "largest", of_weights, 0, rectified=True)


def test_a_nan_before_positive_steps_is_a_step_of_zero_to_127() -> None:
    case = Case(1, 1, 8, 8, (4, 4), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), False, False, "none")
    graph = quantized_graph(case, np.full((8, 8, 1, 1), 127), np.full(8, 2.0**-9, np.float32), rectified=True)
    x = np.ones((1, 8, 4, 4), np.float32)
    x[0, :, 1, 2] = np.nan
    (got,) = run_graph(graph, {"x": x}, profile_of("x86-64-v3") if runs_here("x86-64-v3") else None)
    one = 32 * 127 * 8 * STEP * 2.0**-9
    assert got[0, 0, 0, 0] == one
    assert 0 <= got[0, 0, 1, 2] <= one / 32 * 127


POSITIVE = {
    "relu": ([helper.make_node("Relu", ["x"], ["a"])], True),
    "relu6": ([helper.make_node("Clip", ["x", "low", "high"], ["a"])], True),
    "a clip from below 0": ([helper.make_node("Clip", ["x", "minus", "high"], ["a"])], False),
    "a pool of a relu": (
        [helper.make_node("Relu", ["x"], ["r"]),
         helper.make_node("MaxPool", ["r"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])], True,
    ),
    "a relu, shifted": ([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Sub", ["r", "high"], ["a"])], False),
    "a sum of relus": ([helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "r"], ["a"])], True),
    "a relu and a number below 0": (
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "minus"], ["a"])], False,
    ),
    "a convolution": ([helper.make_node("Identity", ["x"], ["a"])], False),
}  # fmt: skip
"""Name → what lies before the first quantized tensor, and whether that is never negative."""


@pytest.mark.parametrize("name", POSITIVE)
def test_tensors_that_are_never_negative_are_told_from_those_that_may_be(name: str) -> None:
    before, positive = POSITIVE[name]
    values = {
        "scale": np.float32(STEP), "zero": np.int8(0), "w_q": np.ones((8, 8, 1, 1), np.int8),
        "w_scale": np.ones(8, np.float32), "w_zero": np.zeros(8, np.int8), "low": np.float32(0),
        "high": np.float32(6), "minus": np.float32(-1),
    }  # fmt: skip
    nodes = [
        *before,
        *pair("a", "scale"),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], "weights", axis=0),
        helper.make_node("Conv", ["a_dq", "w"], ["y"], "conv"),
    ]
    graph = graph_of(nodes, {"x": [1, 8, 6, 6]}, {"y": [1, 8, 6, 6]}, constants(values), opset=20)
    found = tensors_of(graph, named(resolve_profile(mtriple="x86_64-linux-gnu", mcpu="x86-64-v3")))
    [held] = [types[0] for name, types in found.items() if "conv2d_int8" in name]
    assert held == ("int8" if positive else "int16")


# ---- products, pools, scales


def product_graph(weight: NDArray[np.int64], *, transposed: bool, axis: int) -> OnnxGraph:
    """Return Q/DQ → product with ``weight``, ``[outputs, depth]``, which the graph holds transposed or not."""
    outputs, depth = weight.shape
    held = weight if transposed else weight.T
    values = {
        "scale": np.float32(STEP), "zero": np.int8(0), "w_q": np.ascontiguousarray(held).astype(np.int8),
        "w_scale": np.full(held.shape[axis], 2.0**-8, np.float32), "w_zero": np.zeros(held.shape[axis], np.int8),
    }  # fmt: skip
    nodes = [
        *pair("x", "scale"),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], "weights", axis=axis),
        helper.make_node("Gemm", ["x_dq", "w"], ["y"], "gemm", transB=int(transposed)),
    ]
    return graph_of(nodes, {"x": [2, depth]}, {"y": [2, outputs]}, constants(values), opset=20)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("depth", "outputs"), [(40, 10), (1, 1), (512, 100), (7, 33), (20, 20)])
def test_a_product_of_int8_is_exact(depth: int, outputs: int, transposed: bool) -> None:
    rng = np.random.default_rng(depth)
    steps, weight = rng.integers(-128, 128, (2, depth)), rng.integers(-127, 128, (outputs, depth))
    graph = product_graph(weight, transposed=transposed, axis=0 if transposed else 1)
    (got,) = run_graph(graph, {"x": (steps * STEP).astype(np.float32)})
    np.testing.assert_array_equal(got, ((steps @ weight.T) * STEP * 2.0**-8).astype(np.float32))
    if outputs > 1:  # a single scale says nothing of which axis is whose
        assert "int8" in operands_of(graph)


def test_scales_of_input_channels_are_computed_in_float() -> None:
    rng = np.random.default_rng(0)
    steps, weight = rng.integers(-128, 128, (2, 20)), rng.integers(-127, 128, (20, 20))
    graph = product_graph(weight, transposed=False, axis=0)
    (got,) = run_graph(graph, {"x": (steps * STEP).astype(np.float32)})
    np.testing.assert_array_equal(got, ((steps @ weight.T) * STEP * 2.0**-8).astype(np.float32))
    assert "int8" not in operands_of(graph)


def test_a_sum_that_int32_might_not_hold_stays_in_float() -> None:
    depth = MOST_PRODUCTS + 1
    steps, weight = np.full((2, depth), 127), np.full((3, depth), 127)
    graph = product_graph(weight, transposed=True, axis=0)
    assert "int8" not in operands_of(graph)
    (got,) = run_graph(graph, {"x": (steps * STEP).astype(np.float32)})
    np.testing.assert_allclose(got, (steps @ weight.T) * STEP * 2.0**-8, rtol=1e-4)


def test_a_depthwise_sum_that_float32_might_not_hold_stays_in_float() -> None:
    side = math.isqrt(MOST_TAPS) + 1
    case = Case(1, 16, 1, 1, (side, side), (side, side), (1, 1), (0, 0, 0, 0), (1, 1), False, False, "none")
    steps, weight = np.full((1, 16, side, side), 127), np.full((16, 1, side, side), 127)
    graph = quantized_graph(case, weight, np.full(16, 2.0**-9, np.float32))
    assert "int8" not in operands_of(graph)
    (got,) = run_graph(graph, {"x": (steps * STEP).astype(np.float32)})
    np.testing.assert_allclose(got, exact(case, steps, weight) * STEP * 2.0**-9, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 3e-3, 1e12, 1e30])
def test_extreme_scales_give_what_onnx_runtime_gives(scale: float) -> None:
    case = Case(1, 1, 8, 8, (5, 5), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "none")
    rng = np.random.default_rng(1)
    weight = rng.integers(-127, 128, (8, 8, 3, 3))
    graph = quantized_graph(case, weight, np.full(8, 1.0, np.float32))
    proto = graph.copy_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "scale":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(scale), "scale"))
    graph = with_shapes(OnnxGraph(proto))
    feeds = {"x": (rng.standard_normal((1, 8, 5, 5)) * 90 * scale).astype(np.float32)}
    (got,) = run_graph(graph, feeds)
    want = Reference(graph).run(feeds)["y"]  # its float32 sums err where ours do not
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_what_is_no_number_or_beyond_the_range_becomes_an_end_of_the_range() -> None:
    case = Case(1, 1, 4, 1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), False, False, "none")
    graph = quantized_graph(case, np.array([1, 0, 0, 0]).reshape(1, 4, 1, 1), np.ones(1, np.float32))
    for value, step in ((np.inf, 127), (-np.inf, -128), (1e30, 127), (-1e30, -128), (np.nan, -128)):
        x = np.zeros((1, 4, 1, 1), np.float32)
        x[0, 0] = value
        (got,) = run_graph(graph, {"x": x})
        assert got.ravel()[0] == step * STEP


# ---- the contract


def changed(**values: Any) -> OnnxGraph:
    """Return a small quantized convolution with some of its constants replaced."""
    case = Case(1, 1, 8, 8, (5, 5), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False, False, "none")
    weight = np.random.default_rng(2).integers(-127, 128, (8, 8, 3, 3))
    proto = quantized_graph(case, weight, np.full(8, 2.0**-8, np.float32)).copy_proto()
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return with_shapes(OnnxGraph(proto))


CONTRACT = {
    "a zero-point that is not 0": {"zero": np.int8(3)},
    "unsigned activations": {"zero": np.uint8(128)},
    "weights of −128": {"w_q": np.full((8, 8, 3, 3), -128, np.int8)},
    "a zero-point of weights": {"w_zero": np.full(8, 1, np.int8)},
}


@pytest.mark.parametrize("values", CONTRACT.values(), ids=CONTRACT)
def test_what_does_not_keep_the_contract_is_computed_in_float(values: dict[str, Any]) -> None:
    graph = changed(**values)
    assert "int8" not in operands_of(graph)
    feeds = {"x": np.random.default_rng(3).standard_normal((1, 8, 5, 5)).astype(np.float32)}
    (got,) = run_graph(graph, feeds)
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-4, atol=1e-5)


def test_what_keeps_the_contract_is_computed_in_int8() -> None:
    assert "int8" in operands_of(changed())


# ---- the kernels, by their assembly

INSTRUCTIONS = {
    "AVX-512 VNNI": ("x86_64-linux-gnu", "znver4", r"vpdpbusd"),
    "AVX-VNNI": ("x86_64-linux-gnu", "alderlake", r"vpdpbusd"),
    "AVX-512": ("x86_64-linux-gnu", "x86-64-v4", r"vpmaddwd\s+.*%zmm"),
    "AVX-512, positive": ("x86_64-linux-gnu", "x86-64-v4", r"vpmaddubsw\s+.*%zmm"),
    "AVX2": ("x86_64-linux-gnu", "x86-64-v3", r"vpmaddwd\s+.*%ymm"),
    "AVX2, positive": ("x86_64-linux-gnu", "x86-64-v3", r"vpmaddubsw\s+.*%ymm"),
    "dotprod": ("aarch64-linux-gnu", "cortex-a76", r"\bsdot\b.*\.4b\[\d\]"),
    "i8mm": ("aarch64-linux-gnu", "neoverse-v1", r"\bsmmla\b"),
    "NEON": ("aarch64-linux-gnu", "cortex-a72", r"\bsadalp\b"),
}
"""Name → triple, CPU and the instruction that its products are made of."""


@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("size", [7, 28])
@pytest.mark.parametrize("kernel", [1, 3])
def test_int8_uses_the_instruction_of_its_set_and_spills_nothing(name: str, kernel: int, size: int) -> None:
    triple, cpu, instruction = INSTRUCTIONS[name]
    profile = named(resolve_profile(mtriple=triple, mcpu=cpu))
    machine = machine_of(profile)
    image = (size, size)
    shape = ConvShape(1, 1, 64, 64, image, (kernel, kernel), (1, 1), (kernel // 2,) * 4, (1, 1), image)
    weight = np.ones((64, 64, kernel, kernel), np.int8)
    held = dots_of(machine, positive=name.endswith("positive")).steps
    dots = Plans(machine).dots(shape, held)
    text = kernel_assembly(
        profile, blocked_shape((1, 64, *image), machine.block),
        lambda builder, x, m: integer_conv2d(builder, x, weight, shape, Plans(m)), held,
    )  # fmt: skip
    plan = direct_plan(shape.in_elements(dots.channels), machine)
    registers = plan.columns * plan.panel * (machine.block // machine.lanes)
    hot = [loop for loop in inner_loops(text) if loop.count(instruction) >= registers]
    assert hot, f"no inner loop holds {registers} of {instruction}"
    for loop in hot:
        assert loop.stack_traffic == [], f"{loop.label} of {plan} spills"


def test_zero_is_held_as_the_middle_of_what_an_unsigned_operand_takes() -> None:
    assert ZERO == {"uint8": 128, "int8": 0, "int16": 0}


# ---- whole chains


def chain(seed: int, channels: int) -> OnnxGraph:
    """Return a quantized network of what lies between layers: a pool, a concatenation, a skip, a depthwise layer, rows.

    Args:
        seed: Of its weights.
        channels: Of the image whose channels and pixels become rows of features.
    """
    net = Net(1, 3, 16, 16, seed=seed)
    stem = net.node("Relu", [net.conv("x", 24, "stem")], "trunk")
    pooled = net.node("MaxPool", [stem], "pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    left = net.node("Relu", [net.conv(pooled, 20, "left", kernel=1)])
    right = net.node("Relu", [net.conv(pooled, 12, "right")])
    joined = net.node("Concat", [left, right], "joined", 32, axis=1)
    deep = net.node("Relu", [net.conv(joined, 32, "deep", group=32)], "deepened")
    total = net.node("Relu", [net.node("Add", [net.conv(deep, 32, "back", kernel=1), joined], "sum")])
    net.gemm(net.flat(net.node("Relu", [net.conv(total, channels, "last")])), 10, "head")
    graph = with_shapes(net.graph())
    plan = plan_for(graph, layers_of(graph))
    return with_shapes(insert_qdq(graph, plan, scales_for(graph, plan, feeds_of(images(4, shape=(3, 16, 16))))))


@pytest.mark.parametrize("cpu", [None, "x86-64-v3"])
@pytest.mark.parametrize(("seed", "channels"), [(0, 32), (1, 16), (2, 10)])
def test_tensors_stay_int8_between_layers(seed: int, channels: int, cpu: str | None) -> None:
    graph = chain(seed, channels)
    feeds = feeds_of(images(4, shape=(3, 16, 16)))[0]
    (got,) = run_graph(graph, feeds, profile_of(cpu))
    want = next(iter(Reference(graph).run(feeds).values()))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    kernels = kernels_of(graph, profile_of(cpu))
    apart = [name for name in kernels if "dequantize" in name and "conv2d" not in name]
    if channels % 16 == 0:  # other images are unpacked before they become rows
        assert apart == [], "what is dequantized is so inside the kernel that reads it"
    assert operands_of(graph, profile_of(cpu)) >= {"int8"}


@pytest.mark.parametrize("channels", [16, 24, 58])
def test_a_shuffle_of_channels_moves_int8_or_nothing(channels: int) -> None:
    net = Net(1, 3, 8, 8, seed=channels)
    halves = [net.node("Relu", [net.conv("x", channels, name)]) for name in ("left", "right")]
    joined = net.node("Concat", halves, "joined", 2 * channels, axis=1)
    grid = net.constant("grid", np.array([1, 2, channels, 8, 8]))
    flat = net.constant("flat", np.array([1, 2 * channels, 8, 8]))
    split = net.node("Reshape", [joined, grid], "split")
    turned = net.node("Transpose", [split], "turned", perm=[0, 2, 1, 3, 4])
    net.conv(net.node("Reshape", [turned, flat], "shuffled", 2 * channels), 8, "last")
    graph = with_shapes(net.graph())
    plan = plan_for(graph, layers_of(graph))
    feeds = feeds_of(images(4, shape=(3, 8, 8)))
    graph = with_shapes(insert_qdq(graph, plan, scales_for(graph, plan, feeds)))
    (got,) = run_graph(graph, feeds[0])
    want = next(iter(Reference(graph).run(feeds[0]).values()))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not [name for name in kernels_of(graph) if "dequantize" in name]


def test_products_of_pixels_whose_channels_are_last_are_int8() -> None:
    """As in ConvNeXt: a depthwise layer, then products over the last axis."""
    net = Net(1, 3, 8, 8, seed=4)
    stem = net.node("Relu", [net.conv("x", 16, "stem")])
    deep = net.node("Transpose", [net.conv(stem, 16, "deep", group=16)], "last_axis", perm=[0, 2, 3, 1])
    rng = np.random.default_rng(5)
    wide = net.node("MatMul", [deep, net.constant("up_w", rng.normal(0, 0.2, (16, 40)).astype(np.float32))], "up")
    thin = net.constant("down_w", rng.normal(0, 0.2, (40, 16)).astype(np.float32))
    down = net.node("MatMul", [net.node("Relu", [wide], "rectified"), thin], "down")
    net.node("Transpose", [down], "first_axis", perm=[0, 3, 1, 2])
    graph = with_shapes(net.graph())
    plan = plan_for(graph, layers_of(graph))
    assert len(plan.layers) == 4
    feeds = feeds_of(images(4, shape=(3, 8, 8)))
    graph = with_shapes(insert_qdq(graph, plan, scales_for(graph, plan, feeds)))
    (got,) = run_graph(graph, feeds[0])
    want = next(iter(Reference(graph).run(feeds[0]).values()))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert sum("conv2d_int8" in name for name in kernels_of(graph)) == 3
