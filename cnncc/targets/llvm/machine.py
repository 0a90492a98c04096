"""What kernels need to know of the processor they are made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cnncc.targets.base import Profile
from cnncc.targets.devices.isa import AARCH64, ARM, RISCV64, isa_of_triple
from cnncc.targets.devices.llvm_lists import attributes

_KIB = 1024
_X86 = 8
"""Addresses in 16 general registers."""
_BROADCASTS = 10
"""Without operands that broadcast from memory, LLVM loads those of several steps ahead: sums were spilt from 11 pixels
on."""
_FOUR_CHANNELS = 3
"""NEON multiplies by a lane of a register, which LLVM loads with four channels of a pixel. On 32-bit ARMs a few pixels
are loaded ahead."""

HALF = 2
"""Bytes of float16."""
_SPLIT = 4
"""Registers that share a sum of float16: it costs no instruction but those that join them, once a chain."""


@dataclass(frozen=True)
class Beside:
    """Vector registers that a register tile takes beside its sums.

    Attributes:
        spare: For what is at work.
        vector: For each vector of weights.
        pixel: For each pixel, or for each `rows` of them.
        rows: Pixels that an instruction multiplies at once.
    """

    spare: int
    vector: int = 1
    pixel: int = 0
    rows: int = 1


@dataclass(frozen=True)
class Machine:
    """A processor, as schedules see it.

    Attributes:
        lanes: Elements in a vector register: float32, or float16 in what `of` returns for it.
        block: Channels that lie side by side in a blocked tensor; one or more whole vectors.
        registers: Vector registers.
        spare: Vector registers that a register tile leaves to broadcasts.
        broadcasts: Pixels of a register tile at most.
        pointers: Pixels of a register tile that may have an address each: general registers hold so many beside those
            that every kernel needs. None on NEON, where LLVM then loads four channels of each pixel and spills.
        tiles: Register tiles that do not spill: rows (values broadcast against each loaded vector) and vectors.
        cores: Threads that share the work.
        tight: Whether vector registers are few and nothing is multiplied from memory.
        dot: LLVM's instruction that sums products of int8 (see `schedule.products`); empty for plain arithmetic.
        matrix: The one that multiplies matrices of int8; empty for none.
        l1: Bytes of first-level data cache to plan with.
        l2: Bytes of second-level cache to plan with.
        halves: Whether it multiplies vectors of float16, of twice as many lanes.
        width: Bytes of an element.
        abreast: Channels of a pixel that kernels of floats load at once, where instructions multiply by a lane.
        split: Registers that share a sum of floats in a register tile: each adds up fewer products.
    """

    lanes: int
    block: int
    registers: int
    tiles: tuple[tuple[int, int], ...]
    cores: int
    spare: int = 1
    broadcasts: int = 32
    pointers: int = 0
    tight: bool = False
    dot: str = ""
    matrix: str = ""
    l1: int = 32 * _KIB
    l2: int = 512 * _KIB
    halves: bool = False
    width: int = 4
    abreast: int = 1
    split: int = 1

    def computes(self, dtype: str) -> bool:
        """Whether kernels for an element type of floats are to be had."""
        return dtype == "float32" or (dtype == "float16" and self.halves)

    def of(self, dtype: str) -> Machine:
        """Return the machine as kernels of an element type see it."""
        if dtype != "float16" or not self.halves or self.width == HALF:
            return self
        return replace(self, lanes=2 * self.lanes, width=HALF, abreast=2 * self.lanes, split=_SPLIT)

    def beside_floats(self) -> Beside:
        """Return what a register tile of floats leaves to other things than its sums."""
        return Beside(self.spare) if self.abreast == 1 else Beside(1, pixel=1)

    def beside_dots(self, together: int) -> Beside:
        """Return what a register tile of int8 leaves to other things than its sums.

        Args:
            together: Channels that a step sums over.
        """
        if together > FEW_CHANNELS:
            return _BESIDE_MATRICES
        if together > _PAIR and self.dot in _PAIRS:
            return Beside(3)  # a pixel, its products as int16, and the ones that these are multiplied by
        return _BESIDE_DOTS.get(self.dot, Beside(self.spare))


_TILES_OF_16 = ((6, 2), (4, 2), (3, 3), (2, 4), (12, 1), (8, 1), (6, 1), (4, 1), (2, 2), (1, 8), (1, 4), (1, 2))
_TILES_OF_32 = ((12, 2), (8, 3), (6, 4), (4, 6), (8, 2), (4, 4), (2, 8), (2, 4), (16, 1), (12, 1), (8, 1), (4, 2),
                (4, 1), (1, 8), (1, 4), (1, 2))  # fmt: skip
"""Accumulators leave registers for the loaded vectors and a broadcast; on AVX2 one row more than 6 × 2 spills and
halves the speed."""
_TILES_OF_ARM = tuple(tile for tile in _TILES_OF_16 if tile not in ((6, 2), (3, 3), (12, 1)))
"""No operand comes from memory: pixels and weights of a step take registers, too."""
_TILES_OF_SCALARS = ((2, 8), (4, 4), (1, 16), (1, 8), (8, 2), (16, 1), (8, 1), (4, 1), (1, 4), (1, 2))
"""Without vectors a block's channels are a register each: 16 sums, the weights of a step, and a broadcast or two."""

_ARM_SCHEDULING = ("+use-misched", "-slowfpvfmx", "-slowfpvmlx", "-vmlx-hazards")
"""How LLVM orders and joins instructions for 32-bit ARMs; no processor needs to have any of these.

Without its machine scheduler, LLVM loads the pixels of eight steps ahead, and spills every sum of a tile; the others
have it multiply and add in one instruction on Cortex-A7 as well. That keeps a sum's next product waiting there, which
the sums of a tile are many enough for.
"""
_DOTS = {
    "avx512vnni": "llvm.x86.avx512.vpdpbusd.512",
    "avx512bw": "llvm.x86.avx512.pmaddw.d.512",
    "avxvnni": "llvm.x86.avx512.vpdpbusd.256",
    "avx2": "llvm.x86.avx2.pmadd.wd",
    "sse2": "llvm.x86.sse2.pmadd.wd",
    "dotprod": "llvm.aarch64.neon.sdot.v4i32.v16i8",
    "neon": "llvm.aarch64.neon.smull.v8i16",
}
"""Feature → its instruction for products of int8."""

_ARM_DOT = "llvm.arm.neon.vmulls.v8i16"
"""The same instruction as NEON's of AArch64, by the name that LLVM has for it on 32-bit ARMs."""

_MATRIX = "llvm.aarch64.neon.smmla.v4i32.v16i8"
"""i8mm's instruction for matrices of int8."""

FEW_CHANNELS = 4
"""Channels of int8 that instructions sum over at most, but for those of matrices, which do two pixels at once."""
_PAIR = 2
_PAIRS = frozenset({_DOTS["avx512bw"], _DOTS["avx2"], _DOTS["sse2"]})
"""Those that sum over two channels."""

_BESIDE_DOTS = {
    _DOTS["dotprod"]: Beside(1, pixel=1),  # multiplies by a lane of what was loaded of a pixel
    **dict.fromkeys(
        (_DOTS["neon"], _ARM_DOT), Beside(3, vector=2, pixel=1)
    ),  # sums in int16, and each vector of weights in two halves
}
"""Those that take their pixels from lanes → what else they need registers for."""

_BESIDE_MATRICES = Beside(5, vector=2, pixel=1, rows=2)
"""The weights of four channels are two vectors, and so are their sums with two pixels. With less to spare, LLVM was
seen to spill sums: it keeps pixels for the next taps."""


def machine_of(profile: Profile) -> Machine:
    """Return the register file of a profile's instruction set."""
    features = set(profile.features)

    def dot(*names: str) -> str:
        return next((_DOTS[name] for name in names if name in features), "")

    if "avx512f" in features:
        wide = dot("avx512vnni", "avx512bw")
        return Machine(16, 16, 32, _TILES_OF_32, profile.cores, pointers=_X86, dot=wide, l2=_KIB * _KIB)
    if "avx" in features:
        half = dot("avxvnni", "avx2")
        return Machine(8, 8, 16, _TILES_OF_16, profile.cores, spare=2, broadcasts=_BROADCASTS, pointers=_X86, dot=half)
    isa = isa_of_triple(profile.triple)
    if isa is AARCH64:
        lanes, matrix = dot("dotprod", "neon"), _MATRIX if "i8mm" in features else ""
        return Machine(
            4, 8, 32, _TILES_OF_32, profile.cores, spare=_FOUR_CHANNELS, dot=lanes, matrix=matrix,
            halves="fullfp16" in features,
        )  # fmt: skip
    if isa is ARM and "neon" in features:
        return Machine(4, 8, 16, _TILES_OF_ARM, profile.cores, spare=_FOUR_CHANNELS, tight=True, dot=_ARM_DOT)
    if isa is RISCV64 and "v" in features:
        return Machine(4, 8, 32, _TILES_OF_32, profile.cores, spare=2)
    if isa is ARM or isa is RISCV64:
        return Machine(1, 8, 32, _TILES_OF_SCALARS, profile.cores)
    sse = _DOTS["sse2"]  # which every x86-64 has
    return Machine(4, 8, 16, _TILES_OF_16, profile.cores, spare=2, broadcasts=_BROADCASTS, dot=sse)


def target_options(profile: Profile) -> dict[str, Any]:
    """Return TVM's target description of a profile; every feature is spelt out."""
    options: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": profile.triple,
        "mcpu": profile.cpu,
        "num-cores": profile.cores,
        "opt-level": 3,
    }
    if changes := attributes(profile):
        options["mattr"] = list(changes)
    isa = isa_of_triple(profile.triple)
    if isa is ARM:
        options["mattr"] = [*options.get("mattr", []), *_ARM_SCHEDULING]
        options["mfloat-abi"] = "hard"
    if isa is RISCV64:
        options["mabi"] = "lp64d"
    return options
