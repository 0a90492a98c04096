"""Products that instructions compute, and the instructions that compute most of them.

A product is one multiply-accumulate of two elements. Vectors without a fixed length (SVE, RISC-V's V) are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cnncc.targets.llvm.cycles.disassembly import Instruction


@dataclass(frozen=True)
class Products:
    """What one instruction multiplies.

    Attributes:
        type: Of its factors: ``fp32``, ``fp16``, ``int8``, ``int16``, …
        count: How many.
        sums: Whether it adds as well, or is one of two that do; others count only where none of the type does.
    """

    type: str
    count: int
    sums: bool = True


@dataclass(frozen=True)
class Peak:
    """Instructions that a CPU computes products by at best, as a template.

    Attributes:
        type: Of the factors.
        count: Products of one copy of the template.
        lines: Instructions; ``{sum}`` is a register of its own in each copy.
        needs: Feature that has these instructions; empty where every CPU of the machine does.
    """

    type: str
    count: int
    lines: tuple[str, ...]
    needs: str = ""


_FLOATS = {"h": "fp16", "s": "fp32", "d": "fp64"}
_BITS = {"b": 8, "h": 16, "s": 32, "d": 64}
_X86_FLOATS = {"ph": ("fp16", 2), "ps": ("fp32", 4), "pd": ("fp64", 8), "sh": ("fp16", 0), "ss": ("fp32", 0),
               "sd": ("fp64", 0)}  # fmt: skip
"""Suffix → type, and bytes of an element of a vector; 0 for a scalar."""
_X86_BYTES = {"x": 16, "y": 32, "z": 64}
_DOTS = {"sdot": 4, "udot": 4, "usdot": 4, "sudot": 4, "smmla": 8, "ummla": 8, "usmmla": 8}
"""Products of int8 for each int32 of the result."""


def _pairs(size: str) -> tuple[str, ...]:
    """Return how x86 sums four products of int8 each: pairs, pairs of pairs, and then in int32."""
    a, b, pairs, sums = (f"%{size}mm{register}" for register in (14, 15, 13, "{sum}"))
    return (f"vpmaddubsw {a}, {b}, {pairs}", f"vpmaddwd {pairs}, {a}, {pairs}", f"vpaddd {pairs}, {sums}, {sums}")


def products_of(one: Instruction) -> Products | None:
    """Return what an instruction multiplies; None for one that multiplies no elements."""
    return _aarch64(one) or _arm(one) or _x86(one) or _riscv(one)


def _aarch64(one: Instruction) -> Products | None:
    vector = re.match(r"v\d+\.(\d+)([bhsd])\b", one.operands)
    if vector is None:
        if one.mnemonic in ("fmadd", "fmla", "fmul", "fnmul") and (scalar := re.match(r"([hsd])\d+,", one.operands)):
            return Products(_FLOATS[scalar[1]], 1, one.mnemonic in ("fmadd", "fmla"))
        return None
    lanes, element = int(vector[1]), vector[2]
    if one.mnemonic in _DOTS:
        return Products("int8", lanes * _DOTS[one.mnemonic])
    if one.mnemonic in ("bfdot", "bfmmla"):
        return Products("bf16", lanes * (2 if one.mnemonic == "bfdot" else 4))
    if one.mnemonic in ("fmla", "fmls", "fmul"):
        return Products(_FLOATS[element], lanes, one.mnemonic != "fmul")
    if re.fullmatch(r"[su](mull|mlal)2?", one.mnemonic):  # the result is twice as wide as its factors
        return Products(f"int{_BITS[element] // 2}", lanes)
    if one.mnemonic in ("mla", "mul"):
        return Products(f"int{_BITS[element]}", lanes, one.mnemonic == "mla")
    return None


def _arm(one: Instruction) -> Products | None:
    match = re.fullmatch(r"(vmla|vfma|vmul|vmlal|vmull)\.([fsui])(\d+)", one.mnemonic)
    if match is None:
        return None
    name, kind, bits = match[1], match[2], int(match[3])
    wide = {"q": 128, "d": 64, "s": bits}.get(one.operands[:1], bits)
    long = name in ("vmlal", "vmull")  # the register named first is that of the sums, twice as wide
    count = wide // (2 * bits if long else bits)
    return Products(f"fp{bits}" if kind == "f" else f"int{bits}", count, name != "vmul")


def _x86(one: Instruction) -> Products | None:
    register = re.search(r"%([xyz])mm\d+(?:\s*\{[^}]*\})*$", one.operands)
    if register is None:
        return None
    size = _X86_BYTES[register[1]]
    if match := re.fullmatch(r"(?:vfn?madd\d+|v?mul)([ps][hsd])", one.mnemonic):
        kind, element = _X86_FLOATS[match[1]]
        return Products(kind, size // element if element else 1, "madd" in one.mnemonic)
    if re.fullmatch(r"vpdpb\w+", one.mnemonic):
        return Products("int8", size)
    if re.fullmatch(r"vpdpw\w+", one.mnemonic):
        return Products("int16", size // 2)
    if one.mnemonic in ("vpmaddubsw", "pmaddubsw"):
        return Products("int8", size)
    if one.mnemonic in ("vpmaddwd", "pmaddwd"):
        return Products("int16", size // 2)
    return None


def _riscv(one: Instruction) -> Products | None:
    if one.mnemonic in ("mul", "mulw") and re.match(r"[ast]\d+,", one.operands):  # which other machines' are not called
        return Products("int32", 1, sums=False)
    match = re.fullmatch(r"f(madd|mul)\.([hsd])", one.mnemonic)
    return Products(_FLOATS[match[2]], 1, match[1] == "madd") if match else None


def counted(code: Iterable[Instruction]) -> dict[int, Products]:
    """Return what is multiplied where, by address.

    Multiplications alone are left out where others of that type sum too: those scale results. So is what sums pairs of
    products that another instruction made, which multiplies by ones.
    """
    found = {one.address: (one, products) for one in code if (products := products_of(one))}
    summed = {products.type for _one, products in found.values() if products.sums}
    pairs = any(one.mnemonic.endswith("pmaddubsw") for one, _products in found.values())
    return {
        address: products
        for address, (one, products) in found.items()
        if (products.sums or products.type not in summed) and not (pairs and one.mnemonic.endswith("pmaddwd"))
    }


_SUMMING = re.compile(
    r"fml[as]|(u|s|us|su)dot|(u|s|us)mmla|bfdot|bfmmla|[su]mlal2?|[su]adalp|mla|v(mla|fma|mlal|padal)\..+|"
    r"vfn?madd231.+|vpdp.+|addp[sd]|padd[dw]"
)
"""Instructions that add to what their result's register holds."""
_ADDING = re.compile(r"f?add|fn?madd(\.[hsd])?|vadd\..+|v(p?add[psdw]+)")
"""Those that do so where that register is an operand, too."""


def carries_sums(code: Iterable[Instruction]) -> bool:
    """Whether an iteration adds to what the one before left in a vector register.

    Loops that sum over channels do so; Winograd's transforms, which multiply as well, begin anew in each iteration.
    """
    seen: set[str] = set()
    for one in code:
        result, operands = _registers(one)
        adds = _SUMMING.fullmatch(one.mnemonic) or (_ADDING.fullmatch(one.mnemonic) and result & operands)
        if adds and result and result.isdisjoint(seen):
            return True
        seen |= result | operands
    return False


def _registers(one: Instruction) -> tuple[set[str], set[str]]:
    """Return the vector registers that the first operand (x86: the last) names, and those that the others do."""
    x86 = "%" in one.operands
    found = [
        (match.start(), match[1] or match[2], int(match[3]))
        for match in re.finditer(r"(?:%([xyz])mm|\b(?:([vqdsh])|f[ats]?))(\d+)\b", one.operands)
    ]
    if not found:
        return set(), set()
    named = [_parts(one, kind or one.operands[at : at + 2], number) for at, kind, number in found]
    at = len(named) - 1 if x86 else 0
    return named[at], set().union(*named[:at], *named[at + 1 :])


def _parts(one: Instruction, kind: str, number: int) -> set[str]:
    """Return the names of a register that others that overlap share."""
    if one.mnemonic.startswith("v") and kind in "qds":  # 32-bit ARM: q1 is d2 and d3
        return {"q": {f"d{2 * number}", f"d{2 * number + 1}"}, "d": {f"d{number}"}, "s": {f"d{number // 2}"}}[kind]
    return {f"{kind}{number}" if kind.startswith("f") else str(number)}


_COPIES = {"aarch64": 24, "arm": 12, "riscv64": 24, "x86_64": 12}
"""ELF machine → copies of a template in a loop: enough to hide the latency of sums, and as many as registers hold."""

_PEAKS = {
    "aarch64": (
        Peak("fp32", 4, ("fmla v{sum}.4s, v30.4s, v31.4s",)),
        Peak("fp64", 2, ("fmla v{sum}.2d, v30.2d, v31.2d",)),
        Peak("fp16", 8, ("fmla v{sum}.8h, v30.8h, v31.8h",), "fullfp16"),
        Peak("bf16", 8, ("bfdot v{sum}.4s, v30.8h, v31.8h",), "bf16"),
        Peak("bf16", 16, ("bfmmla v{sum}.4s, v30.8h, v31.8h",), "bf16"),
        Peak(
            "int8",
            16,
            ("smull v29.8h, v30.8b, v31.8b", "smlal2 v29.8h, v30.16b, v31.16b", "sadalp v{sum}.4s, v29.8h"),
        ),
        Peak("int8", 16, ("sdot v{sum}.4s, v30.16b, v31.16b",), "dotprod"),
        Peak("int8", 32, ("smmla v{sum}.4s, v30.16b, v31.16b",), "i8mm"),
        Peak("int16", 4, ("smlal v{sum}.4s, v30.4h, v31.4h",)),
        Peak("int32", 4, ("mla v{sum}.4s, v30.4s, v31.4s",)),
    ),
    "arm": (
        Peak("fp32", 1, ("vmla.f32 s{sum}, s30, s31",), "vfp2"),
        Peak("fp32", 4, ("vmla.f32 q{sum}, q14, q15",), "neon"),
        Peak("fp32", 4, ("vfma.f32 q{sum}, q14, q15",), "vfp4"),
        Peak("int8", 16, ("vmull.s8 q13, d28, d29", "vmlal.s8 q13, d30, d31", "vpadal.s16 q{sum}, q13"), "neon"),
        Peak("int16", 4, ("vmlal.s16 q{sum}, d28, d29",), "neon"),
        Peak("int32", 4, ("vmla.i32 q{sum}, q14, q15",), "neon"),
    ),
    "riscv64": (
        Peak("fp32", 1, ("fmadd.s f{sum}, f30, f31, f{sum}",), "f"),
        Peak("fp64", 1, ("fmadd.d f{sum}, f30, f31, f{sum}",), "d"),
        Peak("int32", 1, ("mulw t6, t4, t5", "addw x{sum}, x{sum}, t6"), "m"),
    ),
    "x86_64": (
        Peak("fp32", 4, ("movaps %xmm14, %xmm13", "mulps %xmm15, %xmm13", "addps %xmm13, %xmm{sum}")),
        Peak("fp32", 8, ("vmulps %ymm14, %ymm15, %ymm13", "vaddps %ymm13, %ymm{sum}, %ymm{sum}"), "avx"),
        Peak("fp32", 8, ("vfmadd231ps %ymm14, %ymm15, %ymm{sum}",), "fma"),
        Peak("fp32", 16, ("vfmadd231ps %zmm14, %zmm15, %zmm{sum}",), "avx512f"),
        Peak("fp64", 4, ("vfmadd231pd %ymm14, %ymm15, %ymm{sum}",), "fma"),
        Peak("fp64", 8, ("vfmadd231pd %zmm14, %zmm15, %zmm{sum}",), "avx512f"),
        Peak("fp16", 32, ("vfmadd231ph %zmm14, %zmm15, %zmm{sum}",), "avx512fp16"),
        Peak("int8", 32, _pairs("y"), "avx2"),
        Peak("int8", 64, _pairs("z"), "avx512bw"),
        Peak("int8", 32, ("{vex} vpdpbusd %ymm14, %ymm15, %ymm{sum}",), "avxvnni"),
        Peak("int8", 64, ("vpdpbusd %zmm14, %zmm15, %zmm{sum}",), "avx512vnni"),
        Peak("int16", 8, ("movdqa %xmm14, %xmm13", "pmaddwd %xmm15, %xmm13", "paddd %xmm13, %xmm{sum}")),
        Peak("int16", 16, ("vpmaddwd %ymm14, %ymm15, %ymm13", "vpaddd %ymm13, %ymm{sum}, %ymm{sum}"), "avx2"),
        Peak("int16", 32, ("vpmaddwd %zmm14, %zmm15, %zmm13", "vpaddd %zmm13, %zmm{sum}, %zmm{sum}"), "avx512bw"),
        Peak("int16", 32, ("vpdpwssd %zmm14, %zmm15, %zmm{sum}",), "avx512vnni"),
    ),
}
"""ELF machine → the best ways to sum products. int8 without dot products is summed in int16 first, two at a time."""


def peaks_of(machine: str, features: Iterable[str], kind: str) -> tuple[Peak, ...]:
    """Return the ways to compute products of a type on a machine.

    Args:
        machine: ELF machine.
        features: That code may use.
        kind: Type of the factors.
    """
    has = frozenset(features)
    return tuple(one for one in _PEAKS[machine] if one.type == kind and (not one.needs or one.needs in has))


def peak_loop(machine: str, peak: Peak) -> tuple[tuple[str, ...], int]:
    """Return the body of a loop that computes products as fast as they can be, and how many in an iteration.

    Its sums are independent, and nothing is loaded or stored.
    """
    copies = range(_COPIES[machine])
    return tuple(line.replace("{sum}", str(copy)) for copy in copies for line in peak.lines), len(copies) * peak.count
