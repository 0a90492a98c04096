"""A board's CPU, from what a TVM RPC server can read of it.

A server hands out files, but only those whose size the system tells: all of ``/proc`` is empty to it. sysfs is not, and
says the same in numbers: the bits that ``/proc/cpuinfo`` has names for. So they are given these names, and read as that
file is read on the device itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from cnncc_runtime.cpu import HostCpu, parse_cpu_list, parse_features, parse_model
from cnncc_runtime.elf import parse_elf
from cnncc_runtime.errors import BundleRefused, EngineMismatch

Read = Callable[[str], bytes]
"""Returns a file of the board; raises OSError where it cannot."""

EXECUTABLE = "/proc/self/exe"
_CPUS = "/sys/devices/system/cpu"
MODALIAS = f"{_CPUS}/modalias"
ONLINE = f"{_CPUS}/online"
MIDR = f"{_CPUS}/cpu%d/regs/identification/midr_el1"
BOARD = "/sys/firmware/devicetree/base/model"

# Linux arch/x86/include/asm/cpufeatures.h: word of 32 bits → bit → name, of what compilers use
_X86 = {
    0: {0: "fpu", 8: "cx8", 15: "cmov", 23: "mmx", 24: "fxsr", 25: "sse", 26: "sse2"},
    1: {29: "lm"},
    4: {
        0: "pni", 1: "pclmulqdq", 9: "ssse3", 12: "fma", 13: "cx16", 19: "sse4_1", 20: "sse4_2", 22: "movbe",
        23: "popcnt", 25: "aes", 26: "xsave", 28: "avx", 29: "f16c", 30: "rdrand",
    },
    6: {
        0: "lahf_lm", 5: "abm", 6: "sse4a", 8: "3dnowprefetch", 11: "xop", 15: "lwp", 16: "fma4", 21: "tbm",
        29: "mwaitx",
    },
    9: {
        0: "fsgsbase", 3: "bmi1", 5: "avx2", 8: "bmi2", 10: "invpcid", 16: "avx512f", 17: "avx512dq", 18: "rdseed",
        19: "adx", 21: "avx512ifma", 23: "clflushopt", 24: "clwb", 28: "avx512cd", 29: "sha_ni", 30: "avx512bw",
        31: "avx512vl",
    },
    10: {0: "xsaveopt", 1: "xsavec", 3: "xsaves"},
    11: {23: "user_shstk"},
    12: {4: "avx_vnni", 5: "avx512_bf16", 21: "amx_fp16", 23: "avx_ifma"},
    13: {0: "clzero", 4: "rdpru", 9: "wbnoinvd"},
    16: {
        1: "avx512vbmi", 3: "pku", 5: "waitpkg", 6: "avx512_vbmi2", 8: "gfni", 9: "vaes", 10: "vpclmulqdq",
        11: "avx512_vnni", 12: "avx512_bitalg", 14: "avx512_vpopcntdq", 22: "rdpid", 25: "cldemote", 27: "movdiri",
        28: "movdir64b", 29: "enqcmd",
    },
    18: {
        8: "avx512_vp2intersect", 14: "serialize", 22: "amx_bf16", 23: "avx512_fp16", 24: "amx_tile", 25: "amx_int8",
    },
}  # fmt: skip

# Linux arch/arm64/include/uapi/asm/hwcap.h; word 0 is HWCAP, word 2 HWCAP2. Kernels that still put HWCAP2 at word 1,
# where newer ones have more of HWCAP, lose its features here: an engine that needs one is refused.
_HWCAP = """
    fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4
    asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg
"""
_AARCH64 = {
    0: dict(enumerate(_HWCAP.split())),
    2: {1: "sve2", 13: "i8mm", 14: "bf16", 17: "bti", 23: "sme", 37: "sme2"},
}

_FLAGS = {"x86": ("flags", _X86), "aarch64": ("Features", _AARCH64)}
_TYPES = {"x86_64": "x86", "x86": "x86", "aarch64": "aarch64"}
"""ELF machine → the kernel's word for it in ``modalias``."""


def board_cpu(read: Read) -> HostCpu:
    """Describe a board's CPU.

    Args:
        read: Reads the board's files.

    Raises:
        EngineMismatch: The board does not say which machine it is, or what its CPU can execute: an engine might die
            of an illegal instruction, and the board's server with it.
    """
    try:
        machine = parse_elf(read(EXECUTABLE), "the board's server").machine
        modalias = _text(read(MODALIAS))
    except (OSError, BundleRefused) as exc:
        raise _unknown(str(exc)) from exc
    cores = len(parse_cpu_list(_optional(read, ONLINE))) or 1
    flags = parse_modalias(modalias, machine)
    if flags is None:
        raise _unknown(f"a server for {machine} runs on a kernel that says '{modalias[:20]}…'")
    lines = [flags, f"Model : {_optional(read, BOARD)}"]
    lines += [_part(_optional(read, MIDR % number)) for number in range(cores)]
    cpuinfo = "\n".join(lines)
    return HostCpu(machine, parse_model(cpuinfo) or _x86_model(modalias), parse_features(cpuinfo), cores, cores)


def parse_modalias(text: str, machine: str) -> str | None:
    """Return ``modalias`` as the line of ``/proc/cpuinfo`` that says the same; None where it is for another machine.

    Args:
        text: ``cpu:type:x86,ven0002fam0019mod0021:feature:,0000,0001,…``, the numbers in hexadecimal.
        machine: As ELF files name it.
    """
    kind, _, features = text.partition(":feature:")
    known = _TYPES.get(machine)
    if known is None or kind.removeprefix("cpu:type:").partition(",")[0] != known:
        return None
    key, words = _FLAGS[known]
    return f"{key} : {' '.join(_names(features.split(','), words))}"


def _names(numbers: Iterable[str], words: Mapping[int, Mapping[int, str]]) -> Iterable[str]:
    """Return the names of bits; some words are 64 wide."""
    named = {32 * word + bit: name for word, names in words.items() for bit, name in names.items()}
    return (named[number] for text in numbers if (number := _hexadecimal(text)) in named)


def _part(midr: str) -> str:
    """Return a core's identification register as ``/proc/cpuinfo`` shows its part; only Arm's own have names."""
    value = _hexadecimal(midr)
    return f"CPU part : {value >> 4 & 0xFFF:#05x}" if value >> 24 & 0xFF == 0x41 else ""


def _x86_model(modalias: str) -> str:
    """Return what ``modalias`` says of an x86: sysfs does not have the name that its maker gave it."""
    found = re.search(r"ven([0-9A-F]{4})fam([0-9A-F]{4})mod([0-9A-F]{4})", modalias)
    if found is None:
        return "unknown CPU"
    maker = {"0000": "Intel", "0002": "AMD"}.get(found[1], "x86")  # arch/x86/include/asm/processor.h: X86_VENDOR_…
    return f"{maker} family {int(found[2], 16):#x} model {int(found[3], 16):#x}"


def _hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return -1


def _optional(read: Read, path: str) -> str:
    try:
        return _text(read(path))
    except OSError:
        return ""


def _text(data: bytes) -> str:
    """Return a file of sysfs: the system gives its size as a page, and what is not there are zeros."""
    return data.rstrip(b"\0").decode("utf-8", "replace").strip()


def _unknown(why: str) -> EngineMismatch:
    return EngineMismatch(
        f"the board does not say what its CPU can execute: {why}", hint="run `cnncc verify` on the board itself"
    )
