"""Knobs of convolution kernels as lists of numbers, as the kernel database holds them, and which numbers are sound.

A kernel trusts its knobs: a tile wider than the image would write beyond it. So what comes out of a file is checked
against the shape and the machine first.
"""

from __future__ import annotations

from collections.abc import Sequence

from cnncc.targets.llvm.blocked.geometry import blocks_of
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import ConvShape, DirectPlan, WindowPlan, longest_chain, tiling_of, widest_tile
from cnncc.targets.llvm.winograd_rules import WinogradPlan, applies, tiles_of
from cnncc.targets.llvm.winograd_rules import longest_chain as longest_winograd_chain
from cnncc_runtime.errors import DataRefused

DIRECT = "direct"
DEPTHWISE = "depthwise"
WINOGRAD = {2: "winograd-2", 4: "winograd-4"}
"""Tile size → name of the method."""
METHODS = (DIRECT, DEPTHWISE, *WINOGRAD.values())

Plan = DirectPlan | WindowPlan | WinogradPlan

_MOST_COLUMNS = 16
"""Columns of a sliding window's register tile at most: its code is unrolled."""


def decode(method: str, numbers: Sequence[int], shape: ConvShape, machine: Machine) -> Plan:
    """Return a plan of any method.

    Args:
        method: One of `METHODS`.
        numbers: Its knobs.
        shape: The convolution.
        machine: What the kernel is for.

    Raises:
        DataRefused: The numbers are no knobs of this method for this shape.
    """
    if method == DIRECT:
        return decode_direct(numbers, shape, machine)
    if method == DEPTHWISE:
        return decode_depthwise(numbers, shape, machine)
    plan = decode_winograd(numbers, shape, machine)
    if WINOGRAD[plan.size] != method:
        raise _refusal(method, numbers)
    return plan


def decode_direct(numbers: Sequence[int], shape: ConvShape, machine: Machine) -> DirectPlan:
    """Return a direct plan.

    Raises:
        DataRefused: The numbers are no knobs for this shape.
    """
    if len(numbers) == 5:
        plan = DirectPlan.of_numbers(numbers)
        if (
            1 <= plan.columns <= widest_tile(shape, machine)
            and _panel_fits(plan.columns, plan.panel, shape, machine)
            and 1 <= plan.chain <= longest_chain(shape, machine)
            and 1 <= plan.chunk <= tiling_of(shape, plan.columns, machine).count
        ):
            return plan
    raise _refusal(DIRECT, numbers)


def decode_depthwise(numbers: Sequence[int], shape: ConvShape, machine: Machine) -> WindowPlan:
    """Return a plan of a depthwise convolution.

    Raises:
        DataRefused: The numbers are no knobs for this shape.
    """
    if len(numbers) == 5:
        plan = WindowPlan.of_numbers(numbers)
        vectors = machine.block // machine.lanes
        if (
            1 <= plan.columns <= min(shape.output[1], _MOST_COLUMNS)
            and 1 <= plan.split <= shape.kernel[1]
            and plan.columns * plan.split * vectors <= machine.registers
            and 1 <= plan.chunk <= shape.output[0]
        ):
            return plan
    raise _refusal(DEPTHWISE, numbers)


def decode_winograd(numbers: Sequence[int], shape: ConvShape, machine: Machine) -> WinogradPlan:
    """Return a plan of Winograd's method, without predictions.

    Raises:
        DataRefused: The numbers are no knobs for this shape.
    """
    if len(numbers) == 7 and numbers[0] in WINOGRAD and applies(shape, machine):
        plan = WinogradPlan.of_numbers(numbers)
        down, across = tiles_of(shape, plan.size)
        inside = 1 <= plan.rows <= down and 1 <= plan.columns <= across
        whole = not plan.staged or (plan.rows, plan.columns) == (down, across)
        tiles = plan.rows * plan.columns * (shape.batch if plan.staged else 1)
        if (
            inside
            and whole
            and 1 <= plan.pixels <= tiles
            and _panel_fits(plan.pixels, plan.panel, shape, machine)
            and 1 <= plan.chain <= longest_winograd_chain(shape, machine)
        ):
            return plan
    raise _refusal("winograd", numbers)


def _panel_fits(pixels: int, panel: int, shape: ConvShape, machine: Machine) -> bool:
    """Whether a register tile's sums, weights and one broadcast fit the registers."""
    held = panel * (machine.block // machine.lanes)
    return 1 <= panel <= blocks_of(shape.outputs, machine.block) and (pixels + 1) * held + 1 <= machine.registers


def _refusal(method: str, numbers: Sequence[int]) -> DataRefused:
    return DataRefused(
        f"the kernel database holds knobs that no kernel has: {method} {list(numbers)}",
        hint="measure again: remove the file and compile with --optimize measured",
    )
