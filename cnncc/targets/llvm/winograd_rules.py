"""Where Winograd's convolution is worth it, and its knobs: from shapes, registers and caches, never by trying.

Costs are in cycles of one core, as in `rules`; predictions were within 15 % of measurements on Zen 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from typing import TypeVar

from cnncc.targets.llvm.blocked.geometry import blocks_of
from cnncc.targets.llvm.blocked.transforms import transform_of
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import ConvShape, most_pixels
from cnncc.targets.llvm.tiling import groups_of

Layer = TypeVar("Layer")

_NEAR = 32.0
"""Bytes that a core takes from L2 in a cycle."""
_FAR = 8.0
"""Bytes that a core takes from beyond L2 in a cycle, a prefetched stream."""
_NEIGHBOUR = 16.0
"""Bytes that a core takes from what lies in other cores' L2 in a cycle."""
_ISSUE = 1.7
"""Vector instructions that a core completes in a cycle of a transform: loads, stores and sums mixed."""
_LATENCY = 4
"""Cycles until a multiply-add's result can be added to."""
_LOOP = 0.25
"""Cycles of a step's own."""
_CHAIN = 32
"""Multiply-adds that follow each other in one register.

The error of a chain grows with the root of its length, and the transforms amplify it: with chains of 256 that of F(4×4)
is 7 times the direct method's at 256 channels, with chains of 32 it is 3 times at any number of channels. Shorter ones
gain little; the time differs by less than could be measured.
"""
_COLLECT = 0.75
"""Cycles to clear and to collect a vector of sums, beside the steps of other register tiles."""
_REGION = 1000.0
"""Cycles that it takes to share out a region and to wait for the last: a third of a microsecond."""
_DIRECT = 0.88
"""Share of peak speed that the direct method reaches."""
_DEPTHWISE = 4.0
"""Time of a depthwise convolution against what its multiply-adds would take: it waits for memory."""
_MARGIN = 0.93
"""Predicted time, against the direct method's, above which Winograd's is not taken."""
_MOST = 512
"""Tiles of a task beyond which nothing is gained: the weights have been used often enough."""
_PARTS = 16
"""Parts of a row of tiles that are tried."""
_TAIL = 4
"""Vector instructions of what follows the convolution, for each vector: bias, residual, activation, store."""

AMPLIFICATION: Mapping[int, float] = {2: 1.2, 4: 3.2}
"""Tile size → root mean square error of one layer, as a multiple of our direct method's.

Measured against float64 with random weights on random images after ReLU, 16 to 512 channels: 0.9 to 1.15 and 2.4 to
3.2 (direct: 1.6e-7 of the result's root mean square). Where all weights are equal, 0.7 to 1.1 and 0.8 to 1.2.
"""
NETWORK_LIMIT = 5.0
"""Predicted error of a network against the direct method's that is still allowed; verification allows 8 times."""


@dataclass(frozen=True)
class WinogradPlan:
    """Knobs of a Winograd convolution.

    Attributes:
        size: Rows and columns of an output tile: 2 or 4.
        staged: Whether each stage (input transform, products, output transform) is a parallel region of its own over
            the whole tensor; otherwise a task takes some tiles through all three.
        rows: Rows of tiles of a task.
        columns: Tiles of a row of a task.
        pixels: Tiles of the register tile.
        panel: Blocks of output channels of the register tile; weights are packed by panels.
        chain: Blocks of input channels that one register tile adds up before it joins the sums.
        cycles: Predicted time.
        saved: Predicted time that the direct method needs longer.
        added: Bytes by which transformed weights are larger than plain ones.
        measured: Whether the knobs come from a measurement.
    """

    size: int
    staged: bool
    rows: int
    columns: int
    pixels: int
    panel: int
    chain: int
    cycles: float = 0.0
    saved: float = 0.0
    added: int = 0
    measured: bool = field(default=False, compare=False)

    @property
    def numbers(self) -> list[int]:
        """The knobs as a list; `of_numbers` is the inverse."""
        return [self.size, int(self.staged), self.rows, self.columns, self.pixels, self.panel, self.chain]

    @staticmethod
    def of_numbers(numbers: Sequence[int]) -> WinogradPlan:
        """Return the plan with knobs as `numbers` lists them."""
        size, staged, rows, columns, pixels, panel, chain = numbers
        return WinogradPlan(size, bool(staged), rows, columns, pixels, panel, chain)


def tiles_of(shape: ConvShape, size: int) -> tuple[int, int]:
    """Return rows and columns of tiles of an image."""
    return ceil(shape.output[0] / size), ceil(shape.output[1] / size)


def applies(shape: ConvShape, machine: Machine) -> bool:
    """Whether a convolution has Winograd's form: 3 × 3, step 1, and groups of whole blocks."""
    whole = shape.groups == 1 or (shape.inputs % machine.block == 0 and shape.outputs % machine.block == 0)
    plain = shape.kernel == (3, 3) and shape.stride == (1, 1) and shape.dilation == (1, 1)
    return shape.blocked and whole and plain and max(shape.padding) <= 2


def winograd_plans(shape: ConvShape, machine: Machine) -> tuple[WinogradPlan, ...]:
    """Return the tile sizes that are predicted to beat the direct method, each with its knobs."""
    plans = (winograd_plan(shape, machine, size) for size in sorted(AMPLIFICATION))
    return tuple(plan for plan in plans if plan is not None and plan.cycles < _MARGIN * (plan.cycles + plan.saved))


def winograd_plan(shape: ConvShape, machine: Machine, size: int) -> WinogradPlan | None:
    """Return the best knobs of one tile size, or None where the convolution has not Winograd's form.

    Args:
        shape: The convolution.
        machine: What the kernel is for.
        size: Rows and columns of an output tile.
    """
    if not applies(shape, machine):
        return None
    best = predicted_plans(shape, machine, size)[0]
    return replace(best, saved=direct_cycles(shape, machine) - best.cycles, added=added_bytes(shape, machine, best))


def predicted_plans(shape: ConvShape, machine: Machine, size: int) -> list[WinogradPlan]:
    """Return `candidates` with their predicted times, the fastest first."""
    plans = [_predicted(plan, shape, machine) for plan in candidates(shape, machine, size)]
    return sorted(plans, key=lambda plan: plan.cycles)


def added_bytes(shape: ConvShape, machine: Machine, plan: WinogradPlan) -> int:
    """Return by how many bytes transformed weights are larger than plain ones."""
    plain = shape.groups * shape.outputs * shape.inputs * shape.taps * 4
    return _weight_bytes(shape, machine, plan) - plain


def direct_cycles(shape: ConvShape, machine: Machine) -> float:
    """Return the time of the direct method: its products at a usual share of peak, or the stream of its weights."""
    lanes = blocks_of(shape.outputs, machine.block) * machine.block / shape.outputs
    sums = shape.macs * lanes / (2 * machine.lanes) / _DIRECT
    weights = shape.groups * shape.outputs * shape.inputs * shape.taps * shape.element_bytes(machine)
    stream = weights / (_NEAR if weights <= machine.l2 // 2 else _FAR)
    return max(sums, stream) / machine.cores


def depthwise_cycles(shape: ConvShape, machine: Machine) -> float:
    """Return the time of a depthwise convolution."""
    return _DEPTHWISE * shape.macs / (2 * machine.lanes) / machine.cores


def choose_winograd(
    candidates: Mapping[Layer, Sequence[WinogradPlan]], budget: int, layers: int
) -> dict[Layer, WinogradPlan]:
    """Choose the layers that use Winograd's method so that they save the most time for the bytes they add.

    A greedy knapsack: the change that saves the most cycles for each byte goes first, whether it is a new layer or a
    larger tile in place of a smaller one.

    Args:
        candidates: Layer → what it could use.
        budget: Bytes by which the network's weights may grow.
        layers: Convolutions of the network, candidates or not.

    Returns:
        Layer → what it uses; the others stay direct.
    """
    chosen: dict[Layer, WinogradPlan] = {}
    while True:
        spent = sum(plan.added for plan in chosen.values())
        changes = [
            (layer, plan)
            for layer, plan in _changes(candidates, chosen)
            if spent + _more(plan, chosen.get(layer)) <= budget and _accurate({**chosen, layer: plan}, layers)
        ]
        if not changes:
            return chosen
        layer, plan = max(changes, key=lambda change: _worth(change[1], chosen.get(change[0])))
        chosen[layer] = plan


def network_factor(plans: Sequence[WinogradPlan], layers: int) -> float:
    """Return the predicted error of a network's output against the same network with direct convolutions.

    Rounding errors of layers are independent and add in quadrature; each layer is taken to contribute as much as
    another, so that the factor is the root of the mean square of the layers' own.

    Args:
        plans: Of the layers that use Winograd's method.
        layers: Convolutions of the network.
    """
    layers = max(layers, len(plans), 1)
    return sqrt((layers - len(plans) + sum(AMPLIFICATION[plan.size] ** 2 for plan in plans)) / layers)


def _accurate(chosen: Mapping[Layer, WinogradPlan], layers: int) -> bool:
    return network_factor(list(chosen.values()), layers) <= NETWORK_LIMIT


def _changes(
    candidates: Mapping[Layer, Sequence[WinogradPlan]], chosen: Mapping[Layer, WinogradPlan]
) -> Iterator[tuple[Layer, WinogradPlan]]:
    for layer, plans in candidates.items():
        held = chosen[layer].saved if layer in chosen else 0.0
        yield from ((layer, plan) for plan in plans if plan.saved > held)


def _more(plan: WinogradPlan, held: WinogradPlan | None) -> int:
    return plan.added - (held.added if held else 0)


def _worth(plan: WinogradPlan, held: WinogradPlan | None) -> float:
    return (plan.saved - (held.saved if held else 0.0)) / max(_more(plan, held), 1)


def _weight_bytes(shape: ConvShape, machine: Machine, plan: WinogradPlan) -> int:
    panels = blocks_of(shape.outputs, plan.panel * machine.block)
    outputs = panels * plan.panel * machine.block
    return shape.groups * transform_of(plan.size).frequencies * shape.inputs * outputs * 4


def candidates(shape: ConvShape, machine: Machine, size: int) -> Iterator[WinogradPlan]:
    """Yield every way to split the tiles, each with the register tile that suits it; without predictions.

    Args:
        shape: A convolution of Winograd's form.
        machine: What the kernel is for.
        size: Rows and columns of an output tile.
    """
    down, across = tiles_of(shape, size)
    blocks = blocks_of(shape.outputs, machine.block)
    chain = longest_chain(shape, machine)
    pixels, panel = _register_tile(shape.batch * down * across, blocks, machine)
    yield WinogradPlan(size, True, down, across, pixels, panel, chain)
    whole = [(rows, across) for rows in range(1, down + 1) if rows == 1 or rows * across <= _MOST]
    parts = [(1, ceil(across / n)) for n in range(2, min(across, _PARTS) + 1)]
    for rows, columns in [*whole, *parts]:
        pixels, panel = _register_tile(rows * columns, blocks, machine)
        yield WinogradPlan(size, False, rows, columns, pixels, panel, chain)


def longest_chain(shape: ConvShape, machine: Machine) -> int:
    """Return how many blocks of input channels one register tile adds up."""
    total = blocks_of(shape.inputs, machine.block)
    return ceil(total / ceil(total * machine.block / _CHAIN))


def _register_tile(tiles: int, blocks: int, machine: Machine) -> tuple[int, int]:
    """Return tiles and blocks of channels of the register tile that cost the least for each useful product."""
    vectors = machine.block // machine.lanes
    best, best_cost = (1, 1), float("inf")
    for panel in range(1, min(blocks, 4) + 1):
        held = panel * vectors
        covered = ceil(blocks / panel) * panel / blocks
        most = most_pixels(held, machine)
        if most < 1:
            break
        groups = ceil(tiles / most)
        cost = covered * sum(step_cycles(size, held) for size in groups_of(tiles, most)) / (tiles * held)
        if cost < best_cost * 0.999:
            best, best_cost = (ceil(tiles / groups), panel), cost
    return best


def step_cycles(pixels: int, vectors: int) -> float:
    """Return the time of one step of a register tile: two multiply-adds and two loads a cycle."""
    return max(pixels * vectors / 2, (pixels + vectors) / 2, _LATENCY) + _LOOP


def _predicted(plan: WinogradPlan, shape: ConvShape, machine: Machine) -> WinogradPlan:
    return replace(plan, cycles=_staged(plan, shape, machine) if plan.staged else _chunked(plan, shape, machine))


def _chunked(plan: WinogradPlan, shape: ConvShape, machine: Machine) -> float:
    """Return the time where a task takes its tiles through all stages.

    Each task streams all weights, from L2 if they fit there beside its own tiles; and its transformed input once for
    every panel, which is slower, and written and read at the speed of outer caches, if it does not fit.
    """
    down, across = tiles_of(shape, plan.size)
    tiles = plan.rows * plan.columns
    spread, products = _scratch_bytes(plan, shape, machine, tiles)
    weights = _weight_bytes(shape, machine, plan) // shape.groups
    fits = spread + products <= machine.l2
    near = spread + products + weights <= machine.l2
    panels = blocks_of(shape.outputs, plan.panel * machine.block)
    sums = panels * transform_of(plan.size).frequencies * _product_cycles(plan, shape, machine, tiles)
    stream = weights / (_NEAR if near else _FAR) + panels * spread / (_NEAR if fits else _FAR)
    moved = 0.0 if fits else 2 * (spread + panels * products) / _FAR
    tasks = shape.batch * shape.groups * ceil(down / plan.rows) * ceil(across / plan.columns)
    work = max(sums, stream) + moved + tiles * _transform_cycles(plan, shape, machine)
    return ceil(tasks / machine.cores) * work + _REGION * (machine.cores > 1)


def _staged(plan: WinogradPlan, shape: ConvShape, machine: Machine) -> float:
    """Return the time where each stage is a region of its own: weights pass once, tiles go through outer caches."""
    down, across = tiles_of(shape, plan.size)
    tiles = shape.batch * down * across
    panels = shape.groups * blocks_of(shape.outputs, plan.panel * machine.block)
    tasks = panels * transform_of(plan.size).frequencies
    sums = ceil(tasks / machine.cores) * _product_cycles(plan, shape, machine, tiles)
    stream = _weight_bytes(shape, machine, plan) / _FAR / machine.cores
    spread, products = _scratch_bytes(plan, shape, machine, tiles)
    products *= panels // shape.groups
    beside = _NEAR if machine.cores == 1 else _NEIGHBOUR
    speed = beside if spread + products <= machine.cores * machine.l2 // 2 else _FAR
    moved = 2 * shape.groups * (spread + products) / speed / machine.cores
    transforms = tiles * shape.groups * _transform_cycles(plan, shape, machine) / machine.cores
    return max(sums, stream) + transforms + moved + 3 * _REGION * (machine.cores > 1)


def _scratch_bytes(plan: WinogradPlan, shape: ConvShape, machine: Machine, tiles: int) -> tuple[int, int]:
    """Return the sizes of transformed input and of one panel's products."""
    each = transform_of(plan.size).frequencies * machine.block * 4 * tiles
    return each * blocks_of(shape.inputs, machine.block), each * plan.panel


def _product_cycles(plan: WinogradPlan, shape: ConvShape, machine: Machine, tiles: int) -> float:
    """Return the time of one frequency and panel: the steps, and what its sums take besides."""
    vectors = plan.panel * machine.block // machine.lanes
    chains = ceil(blocks_of(shape.inputs, machine.block) / plan.chain)
    steps = shape.inputs * sum(step_cycles(size, vectors) for size in groups_of(tiles, plan.pixels))
    return steps + _COLLECT * chains * tiles * vectors


def _transform_cycles(plan: WinogradPlan, shape: ConvShape, machine: Machine) -> float:
    """Return the time of one tile's transforms over all channels of a group.

    Along one axis, m + 2 pixels take two multiply-adds each, and so do m results.
    """
    transform = transform_of(plan.size)
    outputs, size = transform.outputs, transform.size
    columns = outputs * 4 * size
    rows = size * 4 * size
    into = columns + rows
    back = size * size + (size + outputs) * (2 * size - 2) + outputs * outputs * _TAIL
    vectors = machine.block // machine.lanes
    into *= blocks_of(shape.inputs, machine.block)
    back *= blocks_of(shape.outputs, machine.block)
    return (into + back) * vectors / _ISSUE


__all__ = ["AMPLIFICATION", "NETWORK_LIMIT", "WinogradPlan", "choose_winograd", "network_factor", "winograd_plans"]
