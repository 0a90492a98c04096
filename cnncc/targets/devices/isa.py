"""Instruction sets: the processor features that decide whether an engine runs, by LLVM's names."""

from __future__ import annotations

from dataclasses import dataclass

from cnncc.targets.devices.names import unknown
from cnncc_runtime.errors import UsageError


@dataclass(frozen=True)
class Isa:
    """An instruction set architecture that engines are built for.

    Attributes:
        machine: As ELF files name it.
        prefixes: How LLVM triples of it begin.
        triple: The triple taken when none is given.
        cpu: The CPU name taken when none is given.
        features: Features that code generation may use; a device checks those of an engine before it loads it.
    """

    machine: str
    prefixes: tuple[str, ...]
    triple: str
    cpu: str
    features: tuple[str, ...]


X86_64 = Isa(
    "x86_64",
    ("x86_64-", "amd64-"),
    "x86_64-linux-gnu",
    "x86-64",
    tuple(
        [
            "sse3",
            "ssse3",
            "sse4.1",
            "sse4.2",
            "sse4a",
            "popcnt",
            "lzcnt",
            "movbe",
            "bmi",
            "bmi2",
            "f16c",
            "fma",
            "fma4",
            "xop",
            "tbm",
            "avx",
            "avx2",
            "avxvnni",
            "avxvnniint8",
            "avxvnniint16",
            "avxifma",
            "avxneconvert",
            "avx512f",
            "avx512cd",
            "avx512dq",
            "avx512bw",
            "avx512vl",
            "avx512ifma",
            "avx512vbmi",
            "avx512vbmi2",
            "avx512vnni",
            "avx512bitalg",
            "avx512vpopcntdq",
            "avx512bf16",
            "avx512fp16",
            "gfni",
            "amx-tile",
            "amx-int8",
            "amx-bf16",
        ]
    ),
)
AARCH64 = Isa(
    "aarch64",
    ("aarch64-", "arm64-"),
    "aarch64-linux-gnu",
    "generic",
    tuple(
        [
            "neon",
            "fp-armv8",
            "crc",
            "lse",
            "rdm",
            "rcpc",
            "dotprod",
            "fullfp16",
            "fp16fml",
            "bf16",
            "i8mm",
            "jsconv",
            "complxnum",
            "sve",
            "sve2",
            "sme",
        ]
    ),
)
ARM = Isa(
    "arm",
    ("armv7", "arm-"),
    "armv7l-linux-gnueabihf",
    "generic",
    tuple(["vfp2", "vfp3", "vfp4", "neon", "hwdiv", "hwdiv-arm", "crc"]),
)
RISCV64 = Isa(
    "riscv64",
    ("riscv64-",),
    "riscv64-linux-gnu",
    "sifive-u54",  # rv64gc, what Linux distributions are built for
    tuple(["m", "a", "f", "d", "c", "v", "zba", "zbb", "zbs", "zfh", "zvfh"]),
)

ISAS = (X86_64, AARCH64, ARM, RISCV64)


def isa_of(triple: str) -> Isa | None:
    """Return the instruction set of an LLVM triple, or None where engines are not built for it."""
    return next((isa for isa in ISAS if triple.startswith(isa.prefixes)), None)


def gnu_triple(machine: str) -> str:
    """Return the triple by which GNU's and zig's tools, and so Debian's packages, know an ELF machine."""
    return "arm-linux-gnueabihf" if machine == ARM.machine else f"{machine}-linux-gnu"


def isa_of_machine(machine: str) -> Isa | None:
    """Return the instruction set that ELF files call by this name."""
    return next((isa for isa in ISAS if isa.machine == machine), None)


def isa_of_triple(triple: str, where: str = "") -> Isa:
    """Return the instruction set of a triple that engines are built for.

    Args:
        triple: An LLVM triple.
        where: File and field that hold it.

    Raises:
        UsageError: An unknown architecture, or another system than Linux.
    """
    isa = isa_of(triple)
    if isa is None:
        raise unknown("target triple", triple, [isa.triple for isa in ISAS], where)
    if "linux" not in triple:
        raise UsageError(
            f"engines are built for Linux; the triple '{triple}' is not",
            where=[where] if where else (),
            hint=f"take {isa.triple}",
        )
    return isa
