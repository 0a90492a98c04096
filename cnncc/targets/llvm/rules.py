"""Which kernel computes an operator, and its knobs: from shapes, registers and caches, never by trying.

Costs are in cycles of one core that retires two vector multiply-adds and two loads a cycle, as every CPU since Haswell
and Zen 2 does; only their ratios matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from cnncc.targets.llvm.blocked.geometry import blocks_of
from cnncc.targets.llvm.machine import FEW_CHANNELS, HALF, Beside, Machine
from cnncc.targets.llvm.tiling import Tiling

_LATENCY = 4.0
"""Cycles until a multiply-add's result can be added to."""
_LOOP = 0.8
"""Cycles of a step's own: the counter and what does not overlap (measured on Zen 3, 4 to 12 sums)."""
_PANEL = 8
"""Blocks of a register tile at most; many only where pixels are few, as behind global pooling."""
_ALONE = 6000
"""Cycles of work below which sharing it costs more than it saves: a region takes half a microsecond."""
_L2_LANES = 2
"""Bytes a cycle that one core reads from L2 into a kernel that also computes, for each lane of four bytes."""
_FROM_L2, _BEYOND_L2 = 16, 8
"""Bytes a cycle that one core reads in a stream, while it computes."""
_CHAIN = 160
"""Multiply-adds that follow each other in one register."""
HALF_CHAIN = 18
"""The same in float16, where each rounds what is summed so far: n have n / 2 times the variance of one rounding.
ResNet-18 and MobileNetV2 (64×64, under qemu) erred 2.1 and 1.8 times the floor of `cnncc.compiler.parity` with 18, both
3.3 times with 72; 4 are allowed, and what tensor cores do was measured as 2.8."""


@dataclass(frozen=True)
class ConvShape:
    """A convolution.

    Attributes:
        batch: Images.
        groups: Groups of channels.
        inputs: Input channels of a group.
        outputs: Output channels of a group.
        image: Height and width of the input.
        kernel: Height and width.
        stride: Down and right.
        padding: Top, left, bottom, right.
        dilation: Down and right.
        output: Height and width of the output.
        blocked: Whether the input is a blocked tensor; otherwise ``[n, c, h, w]``, of few channels.
        together: Channels of int8 that are one element, over which a product sums; ``inputs`` counts elements. Eight
            are multiplied for two pixels at once (`products.MatrixDots`).
    """

    batch: int
    groups: int
    inputs: int
    outputs: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]
    blocked: bool = True
    together: int = 1

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def flat(self) -> bool:
        """Whether output pixels need no neighbours: rows of an image are then one long row."""
        return self.taps == 1 and not any(self.padding)

    @property
    def pixels(self) -> int:
        """Pixels of an output image."""
        return self.output[0] * self.output[1]

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved with a kernel of its own."""
        return self.groups > 1 and self.inputs == self.outputs == 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the direct method."""
        return self.batch * self.groups * self.inputs * self.outputs * self.taps * self.pixels

    def element_bytes(self, machine: Machine) -> int:
        """Return the bytes of an element, as kernels for a machine hold it."""
        return max(machine.width, self.together)

    @property
    def rows(self) -> int:
        """Pixels that are multiplied at once."""
        return 2 if self.together > FEW_CHANNELS else 1

    def in_elements(self, channels: int) -> ConvShape:
        """Return the convolution of int8 whose inputs are counted in elements of so many channels."""
        return replace(self, inputs=blocks_of(self.inputs, channels), together=channels)

    def shared(self, machine: Machine) -> bool:
        """Return whether cores should share the work."""
        return self.macs / (2 * machine.lanes) > _ALONE

    def lane_block(self, machine: Machine) -> int:
        """Return how many input channels lie side by side."""
        if not self.blocked:
            return self.inputs
        return machine.block // self.together


@dataclass(frozen=True)
class DirectPlan:
    """Knobs of a direct convolution.

    Attributes:
        columns: Output columns of the register tile; the last tile of a row overlaps the one before.
        panel: Blocks of output channels of the register tile; weights are packed by panels.
        chain: Blocks of input channels that one register tile adds up before it joins the sums.
        chunk: Register tiles that one task computes.
        shared: Whether cores share the tasks.
        measured: Whether they come from a measurement.
    """

    columns: int
    panel: int
    chain: int
    chunk: int
    shared: bool
    measured: bool = field(default=False, compare=False)

    @property
    def numbers(self) -> list[int]:
        """The knobs as a list; `of_numbers` is the inverse."""
        return [self.columns, self.panel, self.chain, self.chunk, int(self.shared)]

    @staticmethod
    def of_numbers(numbers: Sequence[int]) -> DirectPlan:
        """Return the plan with knobs as `numbers` lists them."""
        columns, panel, chain, chunk, shared = numbers
        return DirectPlan(columns, panel, chain, chunk, bool(shared))


def direct_plan(shape: ConvShape, machine: Machine, tile: tuple[int, int] | None = None) -> DirectPlan:
    """Return the knobs of a direct convolution.

    Args:
        shape: The convolution.
        machine: What the kernel is for.
        tile: Columns and panel of the register tile, one of `register_tiles`; the cheapest by default.
    """
    columns, panel = tile or register_tile(shape, machine)
    chunk = _chunk(shape, (columns, panel), machine)
    return DirectPlan(columns, panel, longest_chain(shape, machine), chunk, shape.shared(machine))


def register_tile(shape: ConvShape, machine: Machine) -> tuple[int, int]:
    """Return the pixels and blocks of channels of the register tile that costs the least.

    Each step of the sum broadcasts one value of every pixel against the vectors of the panel's weights. Sums, weights
    and one broadcast must fit the registers: one too many and the speed halves. Tiles are of one size: LLVM was seen to
    spill the second of two loops in one function.
    """
    best, best_cost = (1, 1), float("inf")
    for cost, tile in register_tiles(shape, machine):
        if cost < best_cost * 0.999:
            best, best_cost = tile, cost
    return best


def register_tiles(shape: ConvShape, machine: Machine) -> Iterator[tuple[float, tuple[int, int]]]:
    """Yield every register tile that does not spill: what the image costs, and the pixels and blocks of the tile."""
    vectors = machine.block // machine.lanes
    blocks = blocks_of(shape.outputs, machine.block)
    for panel in range(1, min(blocks, _PANEL) + 1):
        held = panel * vectors
        most = most_pixels(held, machine, machine.beside_dots(shape.together) if shape.together > 1 else None)
        for columns in range(1, min(most, widest_tile(shape, machine)) + 1):
            if columns % shape.rows and columns + shape.rows > most:
                continue  # LLVM was seen to spill sums beside a pixel that is multiplied alone
            step = _step(shape, columns, held, machine)
            yield tiling_of(shape, columns, machine).count * step * -(-blocks // panel), (columns, panel)


def widest_tile(shape: ConvShape, machine: Machine) -> int:
    """Return how many pixels the register tile may have: beyond the end of a row there must be addresses for all."""
    return shape.pixels if shape.flat else max(shape.output[1], min(machine.pointers, shape.pixels))


def chain_products(lanes: int, machine: Machine) -> int:
    """Return how many products a chain should have.

    Args:
        lanes: Channels whose products go to the registers that share a sum in turn.
        machine: What the kernel is for.
    """
    return _CHAIN if machine.width > HALF else HALF_CHAIN * min(machine.split, lanes)


def most_pixels(vectors: int, machine: Machine, beside: Beside | None = None) -> int:
    """Return how many pixels a register tile of some vectors of channels may have.

    Args:
        vectors: Of a pixel's sums.
        machine: What the kernel is for.
        beside: Registers for other things than sums; what products of floats need by default.
    """
    beside = beside or machine.beside_floats()
    left = machine.registers - beside.spare - beside.vector * vectors
    return min(left // (beside.rows * machine.split * vectors + beside.pixel) * beside.rows, machine.broadcasts)


def tiling_of(shape: ConvShape, columns: int, machine: Machine) -> Tiling:
    """Return how register tiles of so many pixels cover the output."""
    rows, wide = (1, shape.pixels) if shape.flat else shape.output
    return Tiling.of(rows, wide, columns, pointers=machine.pointers)


def cycles_of_sums(shape: ConvShape, machine: Machine) -> float:
    """Return what the sums of an image cost with the cheapest register tile."""
    block = shape.lane_block(machine)
    steps = blocks_of(shape.inputs, block) * block * shape.taps
    return steps * min(cost for cost, _ in register_tiles(shape, machine))


def _step(shape: ConvShape, pixels: int, vectors: int, machine: Machine) -> float:
    """Return the cycles of one step of a register tile: multiply-adds, loads, or waiting for the last step.

    A load more asks for weights of the next chain. The weights of a chain pass once for every tile: from L2, where they
    do not leave half of L1 to the image.
    """
    element = shape.element_bytes(machine)
    chain = longest_chain(shape, machine) * shape.lane_block(machine) * shape.taps
    weights = vectors * machine.lanes * element
    a_cycle = _L2_LANES * machine.lanes * machine.width / 4
    stream = 0.0 if chain * weights <= machine.l1 // 2 else weights / a_cycle
    sources = -(-pixels // shape.rows)
    neighbours = shape.taps == 1 or shape.stride[1] == 1  # pixels that are multiplied at once are one load then
    inserted = 0 if neighbours else pixels - sources  # by a load and a vector unit
    products = sources * shape.rows * vectors + inserted + pixels % shape.rows
    loads = sources / machine.abreast + inserted + shape.rows * vectors
    return max(products / 2, (loads + 1) / 2, _LATENCY / machine.split, stream) + _LOOP


def longest_chain(shape: ConvShape, machine: Machine) -> int:
    """Return how many blocks of input channels one register tile adds up before it joins the sums.

    The error of a sum of n terms, one after another, grows with n; of m sums of n / m terms with n / m + m (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.3). Long chains of equal signs were seen to lose
    a digit: DenseNet-121 with constant weights. The weights of a chain stay in the first-level cache while all pixels
    of a task pass over them: chains of larger elements are shorter.
    """
    block = shape.lane_block(machine)
    total = blocks_of(shape.inputs, block)
    most = max(
        1, chain_products(block, machine) * machine.width // shape.element_bytes(machine) // (shape.taps * block)
    )
    if total <= most + (most // 2 if machine.width > HALF else 0):
        return total
    return -(-total // -(-total // most))


def _chunk(shape: ConvShape, tile: tuple[int, int], machine: Machine) -> int:
    """Return how many register tiles a task computes.

    Its input should stay in half of L2 while all panels pass over it, and its sums in a quarter; there must be enough
    tasks for the cores. Every task reads its panel's weights again.
    """
    columns, panel = tile
    tiles = tiling_of(shape, columns, machine).count
    panels = -(-blocks_of(shape.outputs, machine.block) // panel)
    element = shape.element_bytes(machine)
    weights = shape.groups * shape.inputs * shape.outputs * shape.taps * element
    a_cycle = _FROM_L2 if weights <= machine.l2 // 2 else _BEYOND_L2
    streamed = weights / a_cycle / (shape.macs / shape.batch / (2 * machine.lanes))
    reads = shape.inputs * columns * element * (1 if shape.flat else shape.stride[0] * shape.stride[1])
    sums = columns * panel * machine.block * 4
    most = max(1, min(machine.l2 // 2 // reads, machine.l2 // 4 // sums, tiles))
    best, best_cost = most, float("inf")
    for chunks in range(-(-tiles // most), tiles + 1):
        size = -(-tiles // chunks)
        tasks = shape.batch * shape.groups * panels * -(-tiles // size)
        uneven = -(-tasks // machine.cores) * machine.cores / tasks
        cost = uneven * (1 + 0.5 * chunks * streamed)
        if cost < best_cost * 0.999:
            best, best_cost = size, cost
        if cost > 2 * best_cost:
            break
    return best


@dataclass(frozen=True)
class Sliding:
    """How a window slides over an image; two numbers each, down and right.

    Attributes:
        image: Height and width of the input.
        kernel: Height and width.
        stride: Down and right.
        padding: Top, left, bottom, right.
        dilation: Down and right.
        output: Height and width of the output.
    """

    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True)
class WindowPlan:
    """Knobs of a sliding window.

    Attributes:
        columns: Output columns of the register tile.
        split: Registers that share the sum of one output.
        chunk: Output rows that one task computes.
        unrolled: Whether rows of the kernel are unrolled where all of them lie in the image.
        shared: Whether cores share the work.
        measured: Whether they come from a measurement.
    """

    columns: int
    split: int
    chunk: int
    unrolled: bool
    shared: bool
    measured: bool = field(default=False, compare=False)

    @property
    def numbers(self) -> list[int]:
        """The knobs as a list; `of_numbers` is the inverse."""
        return [self.columns, self.split, self.chunk, int(self.unrolled), int(self.shared)]

    @staticmethod
    def of_numbers(numbers: Sequence[int]) -> WindowPlan:
        """Return the plan with knobs as `numbers` lists them."""
        columns, split, chunk, unrolled, shared = numbers
        return WindowPlan(columns, split, chunk, bool(unrolled), bool(shared))


_IN_FLIGHT = 8
"""Sums that keep two multiply-add units of four cycles' latency busy."""
_SHARE = 12_000
"""Cycles of one core from which sharing pays: neighbours of a row may lie in the other core's cache."""
_ROW = 12
"""Cycles of a row's own: its bounds and addresses."""


def window_plan(sliding: Sliding, planes: int, machine: Machine, *, weighted: bool) -> WindowPlan:
    """Return the knobs of a sliding window.

    A tile is a piece of an output row: its inputs are loaded once per row of the kernel and meet all its taps, so that
    multiply-adds, not loads, are the limit. Its columns should divide the row and be enough to hide latency.

    Args:
        sliding: How it slides.
        planes: Images × blocks of channels.
        machine: What the kernel is for.
        weighted: Whether elements are multiplied by weights.
    """
    vectors = machine.block // machine.lanes
    high, wide = sliding.kernel
    held = min(wide, 3) if weighted else 0  # of a wider kernel's weights, the rest is read as it is used
    # Long rows of few taps are worth code of their own where all rows of the kernel lie in the image: measured 8 % on
    # AVX2 and 25 % on AVX-512 at 56 × 56, nothing at 28 × 28 or with a stride; smaller tiles keep that code small.
    tight = machine.tight and weighted
    unrolled = weighted and not tight and high <= 3 and sliding.stride == (1, 1) and sliding.output[0] >= 40
    least = min(4, -(-_IN_FLIGHT // vectors))
    most = min(max((machine.registers - 2) // vectors - held, least), 8 if unrolled else 14)
    if tight:  # a fourth weight, and inputs that neighbours do not share at once, take registers as well
        most -= (wide > held) + (sliding.stride[1] > 1 or sliding.dilation[1] > 1)
    row, columns = min(
        (_row_cycles(sliding.output[1], columns, high * wide, vectors), columns)
        for columns in range(1, min(most, sliding.output[1]) + 1)
    )
    split = 1 if tight and columns > 1 else max(1, min(wide, _IN_FLIGHT // (columns * vectors)))
    cycles = planes * sliding.output[0] * (row + _ROW)
    return WindowPlan(columns, split, _window_chunk(sliding, planes, machine), unrolled, cycles > _SHARE)


def depthwise_plan(shape: ConvShape, machine: Machine) -> WindowPlan:
    """Return the knobs of a depthwise convolution."""
    return window_plan(sliding_of(shape), planes_of(shape, machine), machine, weighted=True)


def sliding_of(shape: ConvShape) -> Sliding:
    """Return how a convolution's kernel slides."""
    return Sliding(shape.image, shape.kernel, shape.stride, shape.padding, shape.dilation, shape.output)


def planes_of(shape: ConvShape, machine: Machine) -> int:
    """Return images × blocks of channels of a depthwise convolution."""
    return shape.batch * blocks_of(shape.groups, machine.block)


def _row_cycles(width: int, columns: int, taps: int, vectors: int) -> float:
    """Return what an output row costs in tiles of some columns; the last one may be narrower."""

    def tile(count: int) -> float:
        busy = count * vectors
        return taps * (busy / 2 + max(0.0, _IN_FLIGHT - busy) / 8) + 2

    return width // columns * tile(columns) + (tile(width % columns) if width % columns else 0.0)


def _window_chunk(sliding: Sliding, planes: int, machine: Machine) -> int:
    """Return how many output rows a task computes: a whole plane, unless planes share badly among cores."""
    best, best_cost = sliding.output[0], float("inf")
    for chunks in range(1, min(sliding.output[0], 4 * machine.cores) + 1):
        size = -(-sliding.output[0] // chunks)
        tasks = planes * -(-sliding.output[0] // size)
        cost = -(-tasks // machine.cores) * size * (1 + 0.01 * chunks)
        if cost < best_cost * 0.999:
            best, best_cost = size, cost
    return best
