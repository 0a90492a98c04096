"""This machine's CPU: what an engine may execute on it, how many cores it may use, and how fast they are clocked.

Features carry LLVM's names, since those are what an engine is built with. The parsers are pure: text in, records out.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cnncc_runtime.elf import read_elf
from cnncc_runtime.errors import BundleRefused

_X86_RENAMED = {
    "3dnowprefetch": "prfchw",
    "abm": "lzcnt",
    "avx512_bf16": "avx512bf16",
    "avx512_bitalg": "avx512bitalg",
    "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_vp2intersect": "avx512vp2intersect",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_ifma": "avxifma",
    "avx_ne_convert": "avxneconvert",
    "avx_vnni": "avxvnni",
    "avx_vnni_int16": "avxvnniint16",
    "avx_vnni_int8": "avxvnniint8",
    "amx_bf16": "amx-bf16",
    "amx_fp16": "amx-fp16",
    "amx_int8": "amx-int8",
    "amx_tile": "amx-tile",
    "bmi1": "bmi",
    "lahf_lm": "sahf",
    "pclmulqdq": "pclmul",
    "pni": "sse3",
    "rdrand": "rdrnd",
    "sha_ni": "sha",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "user_shstk": "shstk",
}
_X86_SAME = """
    adx aes avx avx2 avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl bmi2 cldemote clflushopt clwb
    clzero cmov cx8 cx16 enqcmd f16c fma fma4 fsgsbase fxsr gfni invpcid lwp mmx movbe movdir64b movdiri mwaitx pku
    popcnt ptwrite rdpid rdpru rdseed serialize sse sse2 sse4a ssse3 tbm vaes vpclmulqdq waitpkg wbnoinvd xop xsave
    xsavec xsaveopt xsaves
"""
_X86_IMPLIED = {"abm": ("popcnt",), "sse4_2": ("crc32",), "avx512f": ("evex512",), "lm": ("64bit", "x87", "cmov")}

# Linux arch/arm64/kernel/cpuinfo.c and arch/arm/kernel/setup.c → llvm/lib/Target/{AArch64,ARM}
_ARM = {
    "aes": ("aes",),
    "asimd": ("neon",),
    "asimddp": ("dotprod",),
    "asimdfhm": ("fp16fml",),
    "asimdhp": ("fullfp16",),
    "asimdrdm": ("rdm",),
    "atomics": ("lse",),
    "bf16": ("bf16",),
    "bti": ("bti",),
    "crc32": ("crc",),
    "dcpop": ("ccpp",),
    "fcma": ("complxnum",),
    "flagm": ("flagm",),
    "fp": ("fp-armv8",),
    "i8mm": ("i8mm",),
    "idiva": ("hwdiv-arm",),
    "idivt": ("hwdiv",),
    "jscvt": ("jsconv",),
    "lrcpc": ("rcpc",),
    "neon": ("neon",),
    "paca": ("pauth",),
    "sb": ("sb",),
    "sha2": ("sha2",),
    "sha3": ("sha3",),
    "sme": ("sme",),
    "sme2": ("sme2",),
    "ssbs": ("ssbs",),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "vfp": ("vfp2",),
    "vfpv3": ("vfp3",),
    "vfpv3d16": ("vfp3d16",),
    "vfpv4": ("vfp4",),
}

# What the kernel tells a process of its processor: Linux arch/{arm64,arm}/include/uapi/asm/hwcap.h
_HWCAP, _HWCAP2 = 16, 26
_HWCAPS = {
    "aarch64": {
        _HWCAP: {
            0: "fp",
            1: "asimd",
            3: "aes",
            6: "sha2",
            7: "crc32",
            8: "atomics",
            10: "asimdhp",
            12: "asimdrdm",
            13: "jscvt",
            14: "fcma",
            15: "lrcpc",
            16: "dcpop",
            17: "sha3",
            20: "asimddp",
            22: "sve",
            23: "asimdfhm",
            27: "flagm",
            28: "ssbs",
            29: "sb",
            30: "paca",
        },
        _HWCAP2: {1: "sve2", 13: "i8mm", 14: "bf16", 17: "bti", 23: "sme", 37: "sme2"},
    },
    "arm": {
        _HWCAP: {6: "vfp", 12: "neon", 13: "vfpv3", 14: "vfpv3d16", 16: "vfpv4", 17: "idiva", 18: "idivt"},
        _HWCAP2: {0: "aes", 3: "sha2", 4: "crc32"},
    },
}
"""ELF machine → entry of the auxiliary vector → bit → its name in ``/proc/cpuinfo``."""

# MIDR part numbers of Arm Ltd. (implementer 0x41): Linux arch/arm64/include/asm/cputype.h
_ARM_PARTS = {
    0xC07: "Cortex-A7",
    0xC09: "Cortex-A9",
    0xC0F: "Cortex-A15",
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD49: "Neoverse-N2",
    0xD4F: "Neoverse-V2",
}

_SYS_CPU = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Clock:
    """How the cores are clocked, for benchmark records.

    Attributes:
        governor: Frequency governor; empty where it cannot be read (virtual machines).
        current_mhz: Fastest core now; 0 where it cannot be read.
        max_mhz: Highest frequency; 0 where it cannot be read.
    """

    governor: str
    current_mhz: float
    max_mhz: float


@dataclass(frozen=True)
class HostCpu:
    """This machine's CPU, as this process may use it.

    Attributes:
        machine: As ELF files name it (``x86_64``, ``aarch64``).
        model: For people.
        features: ISA features that every core has, by LLVM's names.
        cores: Physical cores that this process may use (affinity, cgroup quota).
        logical: Hardware threads that this process may use.
    """

    machine: str
    model: str
    features: frozenset[str]
    cores: int
    logical: int


def host_cpu() -> HostCpu:
    """Describe the CPU that this process runs on; unknown parts are left empty, nothing is raised."""
    info = _read(Path("/proc/cpuinfo"))
    machine = host_machine()
    usable = _affinity()
    return HostCpu(
        machine=machine,
        model=parse_model(info) or platform.processor() or machine,
        features=parse_hwcaps(_bytes(Path("/proc/self/auxv")), machine) or parse_features(info),
        cores=usable_cores(),
        logical=len(usable),
    )


@functools.cache
def host_machine() -> str:
    """Return this process's machine as ELF files name it: a 32-bit Python on a 64-bit kernel is ``arm``."""
    try:
        return read_elf(Path(sys.executable)).machine
    except (OSError, BundleRefused):
        names = {"AMD64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "armv7l": "arm", "armv6l": "arm"}
        return names.get(platform.machine(), platform.machine())


def clock() -> Clock:
    """Read the governor and frequencies of the cores that this process may use."""
    folders = [_SYS_CPU / f"cpu{cpu}" / "cpufreq" for cpu in sorted(_affinity())]
    governors = {_read(folder / "scaling_governor").strip() for folder in folders}
    current = max((_number(_read(folder / "scaling_cur_freq")) for folder in folders), default=0.0) / 1e3
    return Clock(
        governor=", ".join(sorted(governors - {""})),
        current_mhz=current or parse_mhz(_read(Path("/proc/cpuinfo"))),
        max_mhz=max((_number(_read(folder / "cpuinfo_max_freq")) for folder in folders), default=0.0) / 1e3,
    )


def usable_cores() -> int:
    """Return how many physical cores this process may use: affinity, hyperthreads and cgroup quota counted."""
    siblings = {
        cpu: parse_cpu_list(_read(_SYS_CPU / f"cpu{cpu}" / "topology" / "thread_siblings_list")) for cpu in _affinity()
    }
    return count_cores(siblings, _quota())


def count_cores(siblings: Mapping[int, frozenset[int]], quota: float | None) -> int:
    """Return how many cores to use.

    Args:
        siblings: Usable hardware thread → the hardware threads of its core; empty when unknown.
        quota: Cores' worth of CPU time that the cgroup grants; None without a limit.

    Returns:
        At least 1. A quota of 2.5 cores gives 2: a third thread would be throttled.
    """
    cores = {group | {cpu} for cpu, group in siblings.items()}
    return max(1, min(len(cores), int(quota) if quota is not None else len(cores)))


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format: ``0-3,8``."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def parse_cpu_max(text: str) -> float | None:
    """Parse cgroup v2's ``cpu.max`` (``QUOTA PERIOD`` or ``max PERIOD``); None without a limit."""
    fields = text.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or int(fields[1]) == 0:
        return None
    return int(fields[0]) / int(fields[1])


def parse_features(cpuinfo: str) -> frozenset[str]:
    """Return the LLVM features that every core in ``/proc/cpuinfo`` has (big and little cores may differ)."""
    found: list[frozenset[str]] = []
    for key, value in _fields(cpuinfo):
        if key == "flags":
            found.append(_x86_features(value.split()))
        elif key == "Features":
            found.append(frozenset(name for flag in value.split() for name in _ARM.get(flag, ())))
        elif key == "isa":
            found.append(_riscv_features(value))
    return frozenset.intersection(*found) if found else frozenset()


def parse_hwcaps(auxv: bytes, machine: str) -> frozenset[str]:
    """Return the LLVM features that the kernel offers this very process; on ARM, better than ``/proc/cpuinfo``.

    A process of 32 bits on a kernel of 64 finds the features of 64 bits there, and one that is emulated those of
    another machine.

    Args:
        auxv: The auxiliary vector: pairs of words.
        machine: Whose words they are.

    Returns:
        The features; none on machines whose kernel names none here.
    """
    known = _HWCAPS.get(machine, {})
    pair = struct.Struct("<II" if machine == "arm" else "<QQ")
    entries = dict(pair.iter_unpack(auxv[: len(auxv) - len(auxv) % pair.size]))
    flags = [name for entry, bits in known.items() for bit, name in bits.items() if entries.get(entry, 0) >> bit & 1]
    return frozenset(name for flag in flags for name in _ARM[flag])


def parse_model(cpuinfo: str) -> str:
    """Return the CPU's name for people; empty when ``/proc/cpuinfo`` does not say."""
    fields = list(_fields(cpuinfo))
    first = dict(reversed(fields))
    parts = _arm_parts(fields)
    board = first.get("Model") or first.get("Hardware") or ""
    if board and parts:
        return f"{board} ({parts})"
    return first.get("model name") or board or parts or first.get("uarch") or ""


def parse_mhz(cpuinfo: str) -> float:
    """Return the fastest core's clock as ``/proc/cpuinfo`` gives it (x86); 0 when it does not."""
    return max((_number(value) for key, value in _fields(cpuinfo) if key == "cpu MHz"), default=0.0)


def _fields(cpuinfo: str) -> Iterable[tuple[str, str]]:
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()


def _x86_features(flags: list[str]) -> frozenset[str]:
    same = _X86_SAME.split()
    names = {_X86_RENAMED.get(flag, flag) for flag in flags if flag in _X86_RENAMED or flag in same}
    for flag in flags:
        names.update(_X86_IMPLIED.get(flag, ()))
    return frozenset(names)


def _riscv_features(isa: str) -> frozenset[str]:
    base, *extensions = isa.lower().split("_")
    letters = re.sub(r"^rv\d+", "", base).replace("g", "imafd")
    return frozenset(letters) | frozenset(extensions)


def _arm_parts(fields: list[tuple[str, str]]) -> str:
    numbers = [int(value, 16) for key, value in fields if key == "CPU part" and re.fullmatch(r"0x[0-9a-fA-F]+", value)]
    names = [_ARM_PARTS.get(number, f"part {number:#x}") for number in numbers]
    return " + ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _affinity() -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return frozenset(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """Return the tightest quota on the path of this process's cgroup, v2 or v1."""
    found: list[float] = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mount = Path("/sys/fs/cgroup") / ("" if number == "0" else controllers)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        folder = mount / group.strip().lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(mount):
                found.extend(limit for limit in (_limit(place),) if limit is not None)
    return min(found, default=None)


def _limit(folder: Path) -> float | None:
    v1 = f"{_read(folder / 'cpu.cfs_quota_us').strip()} {_read(folder / 'cpu.cfs_period_us').strip()}"
    v2 = parse_cpu_max(_read(folder / "cpu.max"))
    return v2 if v2 is not None else parse_cpu_max(v1)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
