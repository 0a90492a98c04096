"""Micro-kernels keep their accumulators in registers, on every instruction set, by their assembly."""

from __future__ import annotations

import numpy as np
import pytest

from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.blocked.convolution import conv2d
from cnncc.targets.llvm.blocked.geometry import blocked_shape
from cnncc.targets.llvm.blocked.integers import integer_conv2d
from cnncc.targets.llvm.blocked.window import depthwise
from cnncc.targets.llvm.machine import machine_of
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.rules import ConvShape, direct_plan
from tests.targets.llvm.assembly import EMBEDDED, ISAS, inner_loops, isa_profile, kernel_assembly

CONVOLUTIONS = {
    "3×3": (64, 64, 28, 3, 1, 1),
    "3×3 on 7×7": (128, 128, 7, 3, 1, 1),
    "3×3 stride 2": (64, 128, 28, 3, 2, 1),
    "1×1": (64, 256, 28, 1, 1, 0),
    "1×1 on 7×7": (256, 96, 7, 1, 1, 0),
    "1×1 to 24 channels": (96, 24, 28, 1, 1, 0),
    "first layer": (3, 32, 32, 7, 2, 3),
}


INTEGERS = {
    **{name: layer for name, layer in CONVOLUTIONS.items() if name != "first layer"},
    "3×3 stride 2 to 7×7": (64, 128, 14, 3, 2, 1),
    "3×3 of 8 channels": (8, 16, 28, 3, 1, 1),
    "1×1 of 8 channels": (8, 64, 28, 1, 1, 0),
    "1×1 of 16 channels": (16, 64, 28, 1, 1, 0),
    "1×1 of 24 channels": (24, 144, 28, 1, 1, 0),
}
"""Short sums among them: LLVM would unroll these."""


def shape_of(layer: tuple[int, ...]) -> ConvShape:
    inputs, outputs, size, kernel, stride, padding = layer
    out = (size + 2 * padding - kernel) // stride + 1
    return ConvShape(
        1, 1, inputs, outputs, (size, size), (kernel, kernel), (stride, stride), (padding,) * 4, (1, 1), (out, out),
        blocked=inputs > 4,
    )  # fmt: skip


@pytest.mark.parametrize("isa", [*ISAS, *EMBEDDED])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_spills_nothing_in_its_inner_loops(isa: str, name: str) -> None:
    profile, shape = isa_profile(isa), shape_of(CONVOLUTIONS[name])
    machine = machine_of(profile)
    plan = direct_plan(shape, machine)
    weight = np.ones((shape.outputs, shape.inputs, *shape.kernel), "float32")
    image = (1, shape.inputs, *shape.image)
    data = blocked_shape(image, machine.block) if shape.blocked else image
    text = kernel_assembly(profile, data, lambda builder, x, m: conv2d(builder, x, weight, shape, m))
    registers = plan.columns * plan.panel * (machine.block // machine.lanes)
    hot = [loop for loop in inner_loops(text) if loop.multiply_adds >= registers]
    assert hot, "no inner loop holds the whole register tile"
    for loop in hot:
        assert loop.stack_traffic == [], f"{loop.label} of {plan} spills"


@pytest.mark.parametrize("name", INTEGERS)
def test_a_convolution_of_int8_matrices_spills_nothing_in_its_inner_loops(name: str) -> None:
    profile, shape = named(resolve_profile(mtriple="aarch64-linux-gnu", mcpu="neoverse-v1")), shape_of(INTEGERS[name])
    machine = machine_of(profile)
    plan = direct_plan(shape.in_elements(8), machine)
    weight = np.ones((shape.outputs, shape.inputs, *shape.kernel), np.int8)
    text = kernel_assembly(
        profile, blocked_shape((1, shape.inputs, *shape.image), machine.block),
        lambda builder, x, m: integer_conv2d(builder, x, weight, shape, Plans(m)), "int8",
    )  # fmt: skip
    sums = -(-plan.columns // 2) * plan.panel * machine.block // 2
    hot = [loop for loop in inner_loops(text) if loop.count(r"\bsmmla\b") >= sums]
    assert hot, "no inner loop holds the whole register tile"
    for loop in hot:
        assert loop.count(r"\bsdot\b") == 0
        assert loop.stack_traffic == [], f"{loop.label} of {plan} spills"


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_of_float16_converts_and_spills_nothing_in_its_inner_loops(name: str) -> None:
    shape, profile = shape_of(CONVOLUTIONS[name]), isa_profile("neon")
    machine = machine_of(profile).of("float16")
    plan = direct_plan(shape, machine)
    weight = np.ones((shape.outputs, shape.inputs, *shape.kernel), "float16")
    image = (1, shape.inputs, *shape.image)
    data = blocked_shape(image, machine.block) if shape.blocked else image
    text = kernel_assembly(profile, data, lambda builder, x, _: conv2d(builder, x, weight, shape, machine), "float16")
    products = plan.columns * plan.panel * min(machine.block, shape.inputs)
    hot = [loop for loop in inner_loops(text) if loop.count(r"fmla\s.*\.8h") >= products]
    assert hot, "no inner loop holds the products of a block of channels"
    for loop in hot:
        assert loop.multiply_adds == loop.count(r"fmla\s.*\.8h")
        assert loop.count("fcvt") == 0
        assert loop.stack_traffic == [], f"{loop.label} of {plan} spills"


def test_a_depthwise_convolution_of_float16_converts_and_spills_nothing_in_its_inner_loops() -> None:
    profile = isa_profile("neon")
    machine = machine_of(profile).of("float16")
    shape = ConvShape(1, 64, 1, 1, (28, 28), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (28, 28))
    weight = np.ones((64, 1, 3, 3), "float16")
    data = blocked_shape((1, 64, 28, 28), machine.block)
    text = kernel_assembly(
        profile, data, lambda builder, x, _: depthwise(builder, x, weight, shape, machine), "float16"
    )
    hot = [loop for loop in inner_loops(text) if loop.count(r"fmla\s.*\.8h") >= 8]
    assert hot
    for loop in hot:
        assert loop.count(r"fcvt|\.4s") == 0
        assert loop.stack_traffic == []
