"""Products of int8 matrices: which layers use them, and that their register tiles fit, by rules and by assembly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnncc.targets.base import BuildOptions, Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.blocked.geometry import blocked_shape
from cnncc.targets.llvm.blocked.integers import integer_conv2d
from cnncc.targets.llvm.machine import Machine, machine_of
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.predict import predict_cycles
from cnncc.targets.llvm.rules import ConvShape, DirectPlan, direct_plan, register_tiles
from cnncc.targets.llvm.schedule.products import Dots, FourDots, LongDots, MatrixDots
from tests.targets.llvm.assembly import EMBEDDED, ISAS, inner_loops, isa_profile, kernel_assembly
from tests.targets.llvm.test_integers import chain

SMMLA = r"\bsmmla\b"


def aarch64(cpu: str, *changes: str) -> Profile:
    return named(resolve_profile(mtriple="aarch64-linux-gnu", mcpu=cpu, mattr=list(changes)))


def square(
    inputs: int, outputs: int, size: int, kernel: int, stride: int = 1, dilation: int = 1, **others: Any
) -> ConvShape:
    """Return a convolution of one image that keeps its size but for the stride."""
    out = (size - 1) // stride + 1
    return ConvShape(
        1, others.pop("groups", 1), inputs, outputs, (size, size), (kernel, kernel), (stride, stride),
        (kernel // 2 * dilation,) * 4, (dilation, dilation), (out, out), **others,
    )  # fmt: skip


LAYERS = {
    "3×3": (square(64, 64, 28, 3), True),
    "3×3 of odd channels and pixels": (square(13, 11, 7, 3), True),
    "3×3 stride 2": (square(64, 128, 28, 3, 2), True),
    "3×3 in groups": (square(16, 24, 14, 3, groups=4), True),
    "1×1": (square(64, 256, 28, 1), True),
    "1×1 of 4 channels": (square(4, 16, 28, 1), True),
    "two pixels": (ConvShape(1, 1, 64, 64, (1, 2), (1, 1), (1, 1), (0,) * 4, (1, 1), (1, 2)), True),
    "one pixel": (square(512, 1000, 1, 1), False),
    "as large as the image": (ConvShape(1, 1, 64, 10, (4, 4), (4, 4), (1, 1), (0,) * 4, (1, 1), (1, 1)), False),
    "the first layer": (square(3, 32, 32, 7, 2, blocked=False), False),
}
"""Name → a convolution, and whether products of matrices are predicted to make it faster."""


@pytest.mark.parametrize("name", LAYERS)
def test_products_of_matrices_are_used_where_they_cost_less(name: str) -> None:
    shape, expected = LAYERS[name]
    dots = Plans(machine_of(aarch64("neoverse-v1"))).dots(shape, "int8")
    assert isinstance(dots, MatrixDots if expected else FourDots)


@pytest.mark.parametrize("name", LAYERS)
def test_i8mm_alone_brings_products_of_matrices(name: str) -> None:
    shape, expected = LAYERS[name]
    dots = Plans(machine_of(aarch64("cortex-a72", "+i8mm"))).dots(shape, "int8")
    assert isinstance(dots, MatrixDots if expected else LongDots)


@pytest.mark.parametrize("isa", [*ISAS, *EMBEDDED])
def test_no_machine_without_i8mm_multiplies_matrices(isa: str) -> None:
    machine = machine_of(isa_profile(isa))
    assert machine.matrix == ""
    for held in ("int8", "uint8", "int16"):
        for shape, _ in LAYERS.values():
            try:
                dots = Plans(machine).dots(shape, held)
            except StopIteration:
                continue  # this machine never holds steps so
            assert not isinstance(dots, MatrixDots)


def test_int8_with_i8mm_is_predicted_to_take_less() -> None:
    profiles = (aarch64("neoverse-v1"), aarch64("neoverse-v1", "-i8mm"))
    with_matrices, without = (predict_cycles({"main": chain(0, 32)}, BuildOptions(profile)) for profile in profiles)
    assert with_matrices < 0.8 * without


class _Fixed(Plans):
    """Products of matrices with one register tile."""

    def __init__(self, machine: Machine, tile: tuple[int, int]) -> None:
        super().__init__(machine)
        self._tile = tile

    def integers(self, shape: ConvShape, dots: Dots) -> DirectPlan:
        assert isinstance(dots, MatrixDots)
        return direct_plan(shape, self.machine, self._tile)


TILED = {
    "3×3": square(64, 64, 28, 3),
    "3×3 on 7×7": square(64, 64, 7, 3),
    "3×3 stride 2": square(64, 64, 56, 3, 2),
    "3×3 stride 3": square(64, 64, 56, 3, 3),
    "3×3 of 8 channels": square(8, 64, 28, 3),
    "3×3 of dilation 2": square(24, 64, 28, 3, dilation=2),
    "5×5": square(40, 64, 28, 5),
    "5×5 stride 2": square(40, 64, 28, 5, 2),
    "7×7": square(40, 64, 28, 7),
    "1×1": square(64, 64, 28, 1),
    "1×1 of 24 channels": square(24, 64, 28, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TILED)
def test_no_register_tile_that_the_rules_know_spills(name: str) -> None:
    shape, profile = TILED[name], aarch64("neoverse-v1")
    machine = machine_of(profile)
    weight = np.ones((shape.outputs, shape.inputs, *shape.kernel), np.int8)
    tiles = [tile for _, tile in register_tiles(shape.in_elements(8), machine)]
    assert {panel for _, panel in tiles} == {1, 2, 3}
    for columns, panel in tiles:
        plans = _Fixed(machine, (columns, panel))
        text = kernel_assembly(
            profile, blocked_shape((1, shape.inputs, *shape.image), machine.block),
            lambda builder, x, _machine, plans=plans: integer_conv2d(builder, x, weight, shape, plans), "int8",
        )  # fmt: skip
        sums = -(-columns // 2) * panel * 4
        hot = [loop for loop in inner_loops(text) if loop.count(SMMLA) >= sums]
        assert hot, f"no inner loop holds the register tile of {columns} pixels × {panel} blocks"
        for loop in hot:
            assert loop.stack_traffic == [], f"{loop.label} of {columns} pixels × {panel} blocks spills"
