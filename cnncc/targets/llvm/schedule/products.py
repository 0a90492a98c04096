"""What a step of a register tile adds to its sums: products of float32, or of a few int8 channels at a time.

Steps of int8 are multiplied by int8 weights and summed in int32, exactly, whatever the numbers: no instruction is used
that saturates. (x86's ``pmaddubsw`` would: two products of u8 and s8 exceed int16.)
"""

from __future__ import annotations

from collections.abc import Callable
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


def as_float(element: Any) -> Any:
    """Return an element as float32; an integer is a step (`ZERO`)."""
    zero = ZERO.get(str(element.ty.dtype))
    if zero is None:
        return element
    whole = element.astype("int32")
    return (whole - tirx.const(zero, "int32") if zero else whole).astype("float32")


class Products(Protocol):
    """How sums are made."""

    @property
    def dtype(self) -> str:
        """Element type of the sums."""
        ...

    @property
    def blank(self) -> Any:
        """An element that stands for zeros."""
        ...

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """Return the statement that adds one product to each lane of a vector of sums.

        Args:
            held: The sums of a pixel.
            first: The vector's first.
            lanes: Of the vector.
            source: The pixel's element.
            weight: The panel's elements.
        """
        ...


@dataclass(frozen=True)
class FloatProducts:
    """Multiply-adds of float32."""

    dtype: str = "float32"

    @property
    def blank(self) -> Any:
        """Zero."""
        return tirx.const(0.0, "float32")

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """See `Products`."""

        def add(lane: Any) -> Any:
            channel = first + lane
            return tir.store(held, [channel], held[channel] + source * weight(channel))

        return tir.vector(lanes, add)


FLOATS = FloatProducts()


@dataclass(frozen=True)
class Dots:
    """Sums in int32 over a few channels of int8, which are one element of 32 bits.

    Attributes:
        steps: Element type that holds steps, and weights but for their sign.
        dtype: Of the sums.
    """

    steps: str = "uint8"
    dtype: str = "int32"

    @property
    def channels(self) -> int:
        """Channels of an element."""
        return 4 // np.dtype(self.steps).itemsize

    @property
    def weights(self) -> str:
        """Element type of the weights."""
        return "int16" if self.steps == "int16" else "int8"

    @property
    def blank(self) -> Any:
        """Zeros."""
        zeros = np.full(self.channels, ZERO[self.steps], self.steps)
        return tirx.const(int(zeros.view(np.int32)[0]), "int32")

    def step(self, held: Any, first: int, lanes: int, source: Any, weight: Weight) -> Any:
        """See `Products`."""
        own = tirx.Ramp(tir.index(first), tir.index(1), lanes)
        return tir.store(held, [own], self.added(held[own], lanes, tirx.Broadcast(source, lanes), weight(own)))

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
            left = tirx.Broadcast(tirx.const(8 * (self.channels - 1 - number), "int32"), lanes)
            return (value << left) >> tirx.Broadcast(tirx.const(24, "int32"), lanes)

        for number in range(self.channels):
            step = shifted(pixel, number) & tirx.Broadcast(tirx.const(255, "int32"), lanes)
            sums = sums + step * shifted(weights, number)
        return sums


@dataclass(frozen=True)
class FourDots(Dots):
    """One instruction sums four products and adds them up.

    Attributes:
        instruction: LLVM's name of it.
    """

    instruction: str = ""

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """See `Dots.added`."""
        operands = [tirx.reinterpret(f"{kind}x{4 * lanes}", value)
                    for kind, value in ((self.steps, pixel), (self.weights, weights))]  # fmt: skip
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.instruction, sums, *operands)


@dataclass(frozen=True)
class PairDots(Dots):
    """One instruction sums two products of int16, another adds them up.

    Attributes:
        instruction: LLVM's name of the first.
    """

    steps: str = "int16"
    instruction: str = ""

    def added(self, sums: Any, lanes: int, pixel: Any, weights: Any) -> Any:
        """See `Dots.added`."""
        operands = [tirx.reinterpret(f"int16x{2 * lanes}", value) for value in (pixel, weights)]
        added = sums + tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.instruction, *operands)
        # LLVM would add the products of several steps to each other first, and spill them
        fenced = tirx.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.arithmetic.fence", _as(added, "float32", lanes))
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
        # s8 · s8 over four channels (Arm ARM, SDOT)
        FourDots(instruction="llvm.aarch64.neon.sdot.v4i32.v16i8", steps="int8"),
    )
}


def dots_of(machine: Machine) -> Dots:
    """Return how a machine sums products of int8."""
    return _BY_INSTRUCTION.get(machine.dot, Dots())
