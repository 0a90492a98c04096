"""What a step of a register tile adds to its sums: products of floats, or of a few int8 channels at a time.

Steps of int8 are multiplied by int8 weights and summed in int32, exactly, whatever the numbers: no instruction is used
where it might saturate. (x86's ``pmaddubsw`` might: two products of u8 and s8 exceed int16. Two products of a step that
is never negative, 0 to 127, do not.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir

ZERO = {"uint8": 128, "int8": 0, "int16": 0}
"""Element type that holds steps → what stands for 0: steps of −128 to 127 may be held as 0 to 255."""

Weight = Callable[[Any], Any]
"""Place in a panel's row of weights → the element there."""


def as_float(element: Any, dtype: str = "float32") -> Any:
    """Return an element as a float of a type; an integer is a step (`ZERO`), which float32 holds."""
    zero = ZERO.get(str(element.ty.dtype))
    if zero is None:
        return element.astype(dtype)
    whole = element.astype("int32")
    return (whole - tirx.const(zero, "int32") if zero else whole).astype("float32")


class Products(Protocol):
    """How sums are made."""

    @property
    def dtype(self) -> str:
        """Element type of the sums."""
        ...

    @property
    def total(self) -> str:
        """Element type in which the sums of several chains are added up."""
        ...

    @property
    def blank(self) -> Any:
        """An element that stands for zeros."""
        ...

    @property
    def abreast(self) -> int:
        """Neighbouring elements of a pixel that are loaded as one vector, where instructions multiply by a lane."""
        ...

    @property
    def rows(self) -> int:
        """Pixels that an instruction multiplies at once: they are one source, and their sums lie in one buffer."""
        ...

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """Return the statement that adds one product to each lane of a vector of sums.

        Args:
            held: The sums of a pixel, or of `rows` of them.
            first: The vector's first channel.
            lanes: Of the vector.
            source: The pixel's element; of several pixels, a vector of them.
            weight: The panel's elements.
        """
        ...

    def apart(self, held: Any, pixels: Sequence[Any], channels: int) -> list[Any]:
        """Return the statements that give each of `rows` pixels its sums; none where a buffer is of one pixel.

        Args:
            held: The sums, in the order of the instruction.
            pixels: Buffers of the pixels, ``[channels]``; the last may be missing.
            channels: Of a pixel.
        """
        ...


@dataclass(frozen=True)
class FloatProducts:
    """Multiply-adds of floats."""

    dtype: str = "float32"
    abreast: int = 1
    rows: int = 1

    @property
    def total(self) -> str:
        """Always float32."""
        return "float32"

    @property
    def blank(self) -> Any:
        """Zero."""
        return tirx.const(0.0, self.dtype)

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """See `Products`."""
        if self.abreast > 1:  # TVM does not vectorize what picks a lane
            own = tirx.Ramp(tir.index(first), tir.index(1), lanes)
            return tir.store(held, [own], held[own] + _spread(source, lanes) * weight(own))

        def add(lane: Any) -> Any:
            channel = first + lane
            return tir.store(held, [channel], held[channel] + source * weight(channel))

        return tir.vector(lanes, add)

    def apart(self, _held: Any, _pixels: Sequence[Any], _channels: int) -> list[Any]:
        """See `Products`."""
        return []


FLOATS = FloatProducts()


@dataclass(frozen=True)
class Dots:
    """Sums in int32 over a few channels of int8, which are one element.

    Attributes:
        steps: Element type that holds steps, and weights but for their sign.
        dtype: Of the sums.
        abreast: See `Products`.
        rows: See `Products`.
        element: Type of an element.
    """

    steps: str = "uint8"
    dtype: str = "int32"
    abreast: int = 1
    rows: int = 1
    element: str = "int32"

    @property
    def total(self) -> str:
        """As the sums."""
        return self.dtype

    @property
    def channels(self) -> int:
        """Channels of an element."""
        return np.dtype(self.element).itemsize // np.dtype(self.steps).itemsize

    @property
    def instructions(self) -> float:
        """Cycles of a step, where a multiply-add of float32 takes one; plain arithmetic extends, multiplies, adds."""
        return 4.0 * self.channels

    @property
    def weights(self) -> str:
        """Element type of the weights."""
        return "int16" if self.steps == "int16" else "int8"

    @property
    def blank(self) -> Any:
        """Zeros."""
        zeros = np.full(self.channels, ZERO[self.steps], self.steps)
        return tirx.const(int(zeros.view(self.element)[0]), self.element)

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """See `Products`."""
        own = tirx.Ramp(tir.index(first), tir.index(1), lanes) if lanes > 1 else tir.index(first)
        return tir.store(held, [own], self.added(held[own], lanes, _spread(source, lanes), weight(own)))

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """Return vectors of sums with products added; here in plain arithmetic, for machines without an instruction.

        Args:
            sums: int32, of so many lanes.
            lanes: Of every operand.
            pixel: Elements of steps, as int32.
            weights: Elements of weights, as int32.
        """

        def shifted(value: Any, number: int) -> Any:
            """Return one of the four bytes of each lane, sign and all."""
            left = _spread(tirx.const(8 * (self.channels - 1 - number), "int32"), lanes)
            return (value << left) >> _spread(tirx.const(24, "int32"), lanes)

        for number in range(self.channels):
            step = shifted(pixel, number) & _spread(tirx.const(255, "int32"), lanes)
            sums = sums + step * shifted(weights, number)
        return sums

    def apart(self, _held: Any, _pixels: Sequence[Any], _channels: int) -> list[Any]:
        """See `Products`."""
        return []


@dataclass(frozen=True)
class FourDots(Dots):
    """One instruction sums four products and adds them up.

    Attributes:
        instruction: LLVM's name of it.
    """

    instruction: str = ""

    @property
    def instructions(self) -> float:
        """As one multiply-add of float32."""
        return 1.0

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """See `Dots.added`."""
        operands = [tirx.reinterpret(f"{kind}x{4 * lanes}", value)
                    for kind, value in ((self.steps, pixel), (self.weights, weights))]  # fmt: skip
        if self.abreast > 1:  # the operand that may be a lane comes last
            operands.reverse()
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.instruction, sums, *operands)


@dataclass(frozen=True)
class PairDots(Dots):
    """One instruction sums two products of int16, another adds them up.

    Attributes:
        instruction: LLVM's name of the first.
    """

    steps: str = "int16"
    instruction: str = ""

    @property
    def instructions(self) -> float:
        """A product and a sum, which more units can do: measured 1.1 to 1.7 on Zen 3."""
        return 1.4

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """See `Dots.added`."""
        operands = [tirx.reinterpret(f"int16x{2 * lanes}", value) for value in (pixel, weights)]
        added = sums + tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.instruction, *operands)
        return _fenced(added, lanes)


@dataclass(frozen=True)
class PositiveDots(Dots):
    """Steps of 0 to 127 alone: one instruction sums two products to int16, another pairs of sums, a third adds them up.

    |2 · 127 · 127| is less than 2¹⁵: nothing saturates (Intel SDM, PMADDUBSW).

    Attributes:
        instruction: LLVM's name of the first.
        pairs: LLVM's name of the second.
    """

    steps: str = "int8"
    instruction: str = ""
    pairs: str = ""

    @property
    def instructions(self) -> float:
        """Three instructions: measured 1.4 to 2.4 on Zen 3, a quarter less than two of `PairDots` each."""
        return 2.1

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """See `Dots.added`."""
        operands = [tirx.reinterpret(f"int8x{4 * lanes}", value) for value in (pixel, weights)]
        half = tirx.call_llvm_pure_intrin(f"int16x{2 * lanes}", self.instruction, *operands)
        ones = tirx.Broadcast(tirx.const(1, "int16"), 2 * lanes)
        added = sums + tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.pairs, half, ones)
        return _fenced(added, lanes)


@dataclass(frozen=True)
class LongDots(Dots):
    """Two products of int8 are summed in int16, which holds them (128 · 127 · 2), and pairs of such sums in int32.

    Attributes:
        instruction: LLVM's name of the one that multiplies eight int8.
        pairs: LLVM's name of the one that adds neighbours.
    """

    steps: str = "int8"
    abreast: int = 2
    instruction: str = "llvm.aarch64.neon.smull.v8i16"
    pairs: str = "llvm.aarch64.neon.saddlp.v4i32.v8i16"

    @property
    def instructions(self) -> float:
        """By llvm-mca's model of a Cortex-A72: 6.7 products a cycle, where float32 does 4."""
        return 2.4

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """See `Products`."""
        own = tirx.Ramp(tir.index(first), tir.index(1), lanes)
        pixel, weights = tirx.reinterpret("int16x2", source), tirx.reinterpret(f"int16x{2 * lanes}", weight(own))

        def times(number: int) -> Any:
            """Return products with two of four channels, ``[lanes, 2]``."""
            pair = tirx.Broadcast(tirx.Shuffle([pixel], [tirx.const(number, "int32")]), lanes)
            own_pairs = tirx.Shuffle([weights], [tirx.const(2 * lane + number, "int32") for lane in range(lanes)])
            operands = [tirx.reinterpret(f"int8x{2 * lanes}", value) for value in (pair, own_pairs)]
            return tirx.call_llvm_pure_intrin(f"int16x{2 * lanes}", self.instruction, *operands)

        sums = tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.pairs, times(0) + times(1))
        return tir.store(held, [own], _fenced(held[own] + sums, lanes))


@dataclass(frozen=True)
class MatrixDots(Dots):
    """One instruction multiplies two pixels by two output channels, and sums over eight channels: 2 × 8 by 8 × 2.

    The sums of two pixels are ``[channels / 2, pixel, channel of two]``: a vector is what an instruction adds to.

    Attributes:
        instruction: LLVM's name of it.
    """

    steps: str = "int8"
    rows: int = 2
    element: str = "int64"
    instruction: str = ""

    @property
    def instructions(self) -> float:
        """As one multiply-add of float32."""
        return 1.0

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """See `Products`."""
        stores = []
        for channel in range(first, first + lanes, 2):
            own = tirx.Ramp(tir.index(2 * channel), tir.index(1), lanes)
            weights = weight(tirx.Ramp(tir.index(channel), tir.index(1), 2))
            stores.append(tir.store(held, [own], self.added(held[own], lanes, source, weights)))
        return tir.sequence(stores)

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """See `Dots.added`; the operands are of two pixels, and of two channels."""
        operands = [tirx.reinterpret(f"int8x{4 * lanes}", value) for value in (pixel, weights)]
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.instruction, sums, *operands)

    def apart(self, held: Any, pixels: Sequence[Any], channels: int) -> list[Any]:
        """See `Products`."""
        stores = []
        for first in range(0, channels, 4):
            pairs = [held[tirx.Ramp(tir.index(2 * first + 4 * half), tir.index(1), 4)] for half in range(2)]
            for number, pixel in enumerate(pixels):
                lanes = [tirx.const(2 * number + lane, "int32") for lane in (0, 1, 4, 5)]
                own = tirx.Ramp(tir.index(first), tir.index(1), 4)
                stores.append(tir.store(pixel, [own], tirx.Shuffle(pairs, lanes)))
        return stores


def _spread(value: Any, lanes: int) -> Any:
    """Return a vector of a value; of one lane, the value."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def _fenced(sums: Any, lanes: int) -> Any:
    """Return sums that LLVM takes as they are: it would add several steps to each other first, and spill them."""
    fenced = tirx.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.arithmetic.fence", _as(sums, "float32", lanes))
    return _as(fenced, "int32", lanes)


def _as(value: Any, kind: str, lanes: int) -> Any:
    return tirx.reinterpret(f"{kind}x{lanes}", value)


_BY_INSTRUCTION: dict[str, Dots] = {
    each.instruction: each
    for each in (
        # u8 · s8 over four channels, without saturation (Intel SDM, VPDPBUSD)
        FourDots(instruction="llvm.x86.avx512.vpdpbusd.512"),
        FourDots(instruction="llvm.x86.avx512.vpdpbusd.256"),
        # s16 · s16 over two channels (Intel SDM, PMADDWD): no two products of int8 exceed int32
        PairDots(instruction="llvm.x86.avx512.pmaddw.d.512"),
        PairDots(instruction="llvm.x86.avx2.pmadd.wd"),
        PairDots(instruction="llvm.x86.sse2.pmadd.wd"),
        # s8 · s8 over four channels (Arm ARM, SDOT by element); to broadcast a pixel would take a vector unit's time
        FourDots(instruction="llvm.aarch64.neon.sdot.v4i32.v16i8", steps="int8", abreast=2),
        # s8 · s8 to s16, and s16 to s32 in pairs (Arm ARM, SMULL, SMLAL, SADALP), on ARMs without SDOT
        LongDots(),
        LongDots(instruction="llvm.arm.neon.vmulls.v8i16", pairs="llvm.arm.neon.vpaddls.v4i32.v8i16"),
        # s8 · s8 over eight channels, two rows by two columns (Arm ARM, SMMLA)
        MatrixDots(instruction="llvm.aarch64.neon.smmla.v4i32.v16i8"),
    )
}


_POSITIVE: dict[str, Dots] = {
    pairs: PositiveDots(instruction=instruction, pairs=pairs)
    for pairs, instruction in (
        ("llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pmaddubs.w.512"),
        ("llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pmadd.ub.sw"),
    )
}
"""Instruction for any steps → what is faster for those that are never negative."""


def dots_of(machine: Machine, *, positive: bool = False) -> Dots:
    """Return how a machine sums products of int8.

    Args:
        machine: The processor.
        positive: Whether steps are 0 to 127.
    """
    any_steps = _BY_INSTRUCTION.get(machine.dot, Dots())
    return _POSITIVE.get(machine.dot, any_steps) if positive else any_steps


def dots_for(machine: Machine, held: str) -> tuple[Dots, ...]:
    """Return how a machine may sum products of steps that are held as some element type: for any image, and faster."""
    any_image = next(dots for dots in (dots_of(machine), dots_of(machine, positive=True)) if dots.steps == held)
    return (any_image, *([_BY_INSTRUCTION[machine.matrix]] if machine.matrix else []))
