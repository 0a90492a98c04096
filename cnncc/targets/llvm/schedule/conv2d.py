"""Convolutions: a register tile of output channels × pixels, fed by broadcast weights and vectors of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Anchor, Tail, find_anchor
from cnncc.targets.llvm.schedule.planes import Place, Window, finish

CONV2D = "conv2d"
_UNROLLED_STEPS = 96
"""Multiply-adds of one loop body beyond which kernel columns are looped over: code must fit the instruction cache."""


_CHAIN = 256
"""Multiply-adds that follow each other in one register; adding the tile to the sums then costs 1 to 3 %."""


@dataclass(frozen=True)
class Shape:
    """A convolution.

    Attributes:
        batch: Images.
        groups: Groups of channels.
        inputs: Input channels of a group.
        outputs: Output channels of a group.
        window: How the kernel slides.
        rows: Output channels of the register tile; the weights are packed by them.
        vectors: Vectors of pixels of the register tile.
    """

    batch: int
    groups: int
    inputs: int
    outputs: int
    window: Window
    rows: int
    vectors: int

    @property
    def blocks(self) -> int:
        """Register tiles that cover a group's output channels."""
        return -(-self.outputs // self.rows)


@dataclass(frozen=True)
class Conv2d:
    """Direct convolution with packed weights."""

    name: str = "conv2d"

    def apply(self, function: Any, machine: Machine) -> Any | None:
        """Return the convolution's kernel, or None where the function is not one."""
        anchor = find_anchor(function, CONV2D)
        if anchor is None:
            return None
        shape = _shape(anchor)
        return _Builder(anchor, shape, machine).function(function)


def _shape(anchor: Anchor) -> Shape:
    data, weight = anchor.reads
    *numbers, vectors = anchor.parameters
    batch, _, height, width = tir.shape_of(data)
    groups, _, inputs, kernel_h, kernel_w, rows = tir.shape_of(weight)
    _, channels, out_h, out_w = tir.shape_of(anchor.tail.result)
    window = Window(
        (height, width), (kernel_h, kernel_w), (numbers[0], numbers[1]), (numbers[2], numbers[3]),
        (numbers[4], numbers[5]), (out_h, out_w),
    )  # fmt: skip
    return Shape(batch, groups, inputs, channels // groups, window, rows, vectors)


class _Builder:
    """Writes one convolution's loops."""

    def __init__(self, anchor: Anchor, shape: Shape, machine: Machine) -> None:
        self.shape = shape
        self.machine = machine
        self.data, self.weight = anchor.reads
        self.tail = anchor.tail
        self.columns = machine.lanes * shape.vectors
        window = shape.window
        self.pixels = window.output[0] * window.width
        self.packed = not window.plain or self.pixels < self.columns
        self.chunk = _rows_per_chunk(shape, machine, self.columns)

    def function(self, like: Any) -> Any:
        shape, window = self.shape, self.shape.window
        planes = shape.batch * shape.groups * shape.inputs
        statements, allocate = [], []
        if self.packed:
            source = tir.buffer([planes * window.size + window.slack + self.columns], "planes")
            allocate.append(source)
            statements.append(self._pack(source, planes))
        else:
            source = tir.buffer([planes * window.size], f"{self.data.name}_flat")
        chunks = -(-window.output[0] // self.chunk)
        flat = self.tail.flat() if window.width == window.output[1] else None
        tasks = shape.batch * shape.groups * chunks * shape.blocks

        def task(number: Any) -> Any:
            block, rest = number % shape.blocks, number // shape.blocks
            part, rest = rest % chunks, rest // chunks
            where = (rest // shape.groups, rest % shape.groups, block)
            last = window.output[0] - (chunks - 1) * self.chunk
            whole = self._chunk(source, where, part, self.chunk, flat)
            if last == self.chunk:
                return whole
            ragged = self._chunk(source, where, part, last, flat)
            return ragged if chunks == 1 else tirx.IfThenElse(part < chunks - 1, whole, ragged)

        statements.append(tir.parallel(tasks, task))
        body = tir.sequence(statements)
        aliases = dict(flat[1]) if flat else {}
        if not self.packed:
            aliases[self.data] = source
        return tir.function(like, tir.views(aliases, body) if aliases else body, allocate)

    def _pack(self, planes: Any, count: int) -> Any:
        shape, window = self.shape, self.shape.window
        channels = shape.groups * shape.inputs
        zero = tirx.const(0.0, "float32")
        fill = tir.parallel(
            count,
            lambda i: window.pack(self.data, (i // channels, i % channels), planes, i * window.size, zero),
        )
        rest = tir.loop(window.slack + self.columns, lambda i: tir.store(planes, [count * window.size + i], zero))
        return tir.sequence([fill, rest])

    def _chunk(
        self, source: Any, where: tuple[Any, Any, Any], part: Any, rows: int, flat: tuple[Tail, Any] | None
    ) -> Any:
        """Return the work of one task: some rows of one tile of output channels."""
        shape, window = self.shape, self.shape.window
        image, group, block = where
        pixels = rows * window.width
        tiles = -(-pixels // self.columns)
        results = tir.buffer([shape.rows, max(tiles * self.columns, pixels)], "results", scope="local")
        first = part * (self.chunk * window.width)
        base = (image * shape.groups + group) * (shape.inputs * window.size) + first
        overlap = not self.packed or pixels % self.columns == 0

        def tile(number: Any) -> Any:
            start = number * self.columns
            if overlap and tiles * self.columns != pixels:
                start = tirx.min(start, tir.index(pixels - self.columns)) if pixels >= self.columns else start
            return self._tile(source, results, (group, block), base + start, start)

        statements = [tir.loop(tiles, tile, name="tile"), self._finish(results, where, part, rows, flat)]
        return tir.block(tir.sequence(statements), [results], "chunk")

    def _tile(self, source: Any, results: Any, where: tuple[Any, Any], base: Any, start: Any) -> Any:
        """Return one register tile over all input channels and taps."""
        shape, window = self.shape, self.shape.window
        group, block = where
        tile = tir.buffer([shape.rows, self.columns], "tile", scope="local")
        sums = tir.buffer([shape.rows, self.columns], "sums", scope="local")
        chain = _chain(shape)
        chains = shape.inputs // chain
        total = tile if chains == 1 else sums
        zero = tirx.const(0.0, "float32")
        lanes = self.machine.lanes
        registers = [(row, lanes * part) for part in range(shape.vectors) for row in range(shape.rows)]

        def clear(buffer: Any, register: tuple[int, int]) -> Any:
            row, column = register
            return tir.vector(lanes, lambda lane: tir.store(buffer, [row, column + lane], zero))

        def collect(register: tuple[int, int]) -> Any:
            row, column = register
            return tir.vector(
                lanes,
                lambda lane: tir.store(sums, [row, column + lane], sums[row, column + lane] + tile[row, column + lane]),
            )

        def step(channel: Any, down: Any, right: Any) -> list[Any]:
            place = base + channel * window.size + window.tap(down, right)

            def add(register: tuple[int, int]) -> Any:
                row, column = register
                weight = self.weight[group, block, channel, down, right, row]
                return tir.vector(
                    lanes,
                    lambda lane: tir.store(
                        tile, [row, column + lane], tile[row, column + lane] + source[place + column + lane] * weight
                    ),
                )

            return [add(register) for register in registers]

        def columns(channel: Any, down: Any) -> Any:
            if window.kernel[1] * len(registers) <= _UNROLLED_STEPS:
                steps = [s for right in range(window.kernel[1]) for s in step(channel, down, tir.index(right))]
                return tir.sequence(steps)
            return tir.loop(window.kernel[1], lambda right: tir.sequence(step(channel, down, right)), name="kw")

        def keep(register: tuple[int, int]) -> Any:
            row, column = register
            place = start + column
            return tir.vector(lanes, lambda lane: tir.store(results, [row, place + lane], total[row, column + lane]))

        def taps(first: Any) -> list[Any]:
            loop = tir.loop(
                chain,
                lambda channel: tir.loop(window.kernel[0], lambda down: columns(first + channel, down), name="kh"),
                name="ic",
            )
            return [*(clear(tile, register) for register in registers), loop]

        if chains == 1:
            return tir.block(tir.sequence([*taps(tir.index(0)), *map(keep, registers)]), [tile], "tile")
        loop = tir.loop(
            chains, lambda number: tir.sequence([*taps(number * chain), *map(collect, registers)]), name="chain"
        )
        start_sums = [clear(sums, register) for register in registers]
        return tir.block(tir.sequence([*start_sums, loop, *map(keep, registers)]), [tile, sums], "tile")

    def _finish(
        self, results: Any, where: tuple[Any, Any, Any], part: Any, rows: int, flat: tuple[Tail, Any] | None
    ) -> Any:
        """Return the loops that apply what follows the convolution and store."""
        shape, window = self.shape, self.shape.window
        image, group, block = where

        def channel(row: Any) -> Any:
            number = block * shape.rows + row
            place = Place((image, group * shape.outputs + number), lambda i: results[row, i], flat[0] if flat else None)
            body = finish(window, self.tail, place, (rows, part * self.chunk), self.machine.lanes)
            return body if shape.outputs % shape.rows == 0 else tir.when(number < shape.outputs, body)

        return tir.loop(shape.rows, channel, name="row")


def _chain(shape: Shape) -> int:
    """Return how many input channels one register tile adds up before it is added to the sums.

    The error of a sum of n terms, one after another, grows with n; of m sums of n / m terms with n / m + m (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.3). Long chains of equal signs were seen to lose
    a digit: DenseNet-121 with constant weights.
    """
    taps = shape.window.kernel[0] * shape.window.kernel[1]
    wanted = max(1, _CHAIN // taps)
    divisors = [n for n in range(1, shape.inputs + 1) if shape.inputs % n == 0]
    best = min(divisors, key=lambda n: abs(n - wanted))
    return best if wanted <= 2 * best <= 4 * wanted else shape.inputs


def _rows_per_chunk(shape: Shape, machine: Machine, columns: int) -> int:
    """Return how many output rows a task computes.

    Its input must stay in half of L2 while all output channels pass over it, its results in half of L1, and there
    should be enough tasks for the cores; few pixels should be computed in vain.
    """
    window = shape.window
    height = window.output[0]
    best, best_cost = height, float("inf")
    for rows in range(1, height + 1):
        pixels = rows * window.width
        if rows > 1 and (
            shape.inputs * pixels * window.stride[0] * window.stride[1] * 4 > machine.l2 // 2
            or shape.rows * pixels * 4 > machine.l1
        ):
            break
        chunks = -(-height // rows)
        last = height - (chunks - 1) * rows
        work = (chunks - 1) * -(-pixels // columns) + -(-(last * window.width) // columns)
        tasks = shape.batch * shape.groups * shape.blocks * chunks
        uneven = -(-tasks // machine.cores) * machine.cores / tasks
        ragged = 1.0 if last == rows else 1.03
        cost = work * columns / (height * window.width) * uneven * ragged * (1 + 0.02 * chunks / height)
        if cost < best_cost:
            best, best_cost = rows, cost
    return best


def tile_of(outputs: int, pixels: int, machine: Machine) -> tuple[int, int]:
    """Return rows and vectors of the register tile for a convolution.

    Args:
        outputs: Output channels of a group.
        pixels: Output pixels of an image.
        machine: Its register file bounds the tile.

    Returns:
        The pair that computes the least in vain, and among equals the one that loads the least.
    """

    def cost(tile: tuple[int, int]) -> float:
        rows, vectors = tile
        columns = vectors * machine.lanes
        waste = -(-outputs // rows) * rows / outputs * (-(-pixels // columns) * columns / pixels)
        return waste * (1 + 0.35 * (rows + vectors) / (rows * vectors)) * max(1.0, 8 / (rows * vectors))

    return min(machine.tiles, key=cost)
