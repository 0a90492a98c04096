"""CPU facts from the texts that real machines give, and from this one."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest

from cnncc.targets.devices import resolve_profile
from cnncc_runtime.bundle import TargetRecord
from cnncc_runtime.cpu import (
    HostCpu,
    clock,
    count_cores,
    host_cpu,
    host_machine,
    parse_cpu_list,
    parse_cpu_max,
    parse_features,
    parse_hwcaps,
    parse_mhz,
    parse_model,
)
from cnncc_runtime.session import engine_mismatch

ZEN3 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 33
model name\t: AMD Ryzen 9 5900X 12-Core Processor
cpu MHz\t\t: 2200.000
flags\t\t: fpu vme tsc msr cx8 cmov mmx fxsr sse sse2 ht syscall nx rdtscp lm pni pclmulqdq monitor ssse3 fma cx16 \
sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand lahf_lm abm sse4a 3dnowprefetch fsgsbase bmi1 avx2 bmi2 rdseed \
adx clflushopt clwb sha_ni xsaveopt xsavec xsaves clzero umip vaes vpclmulqdq rdpid

processor\t: 1
model name\t: AMD Ryzen 9 5900X 12-Core Processor
cpu MHz\t\t: 3700.000
flags\t\t: fpu cx8 cmov mmx fxsr sse sse2 lm pni ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt avx f16c abm bmi1 avx2 bmi2
"""

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz
cpu MHz\t\t: 2300.000
flags\t\t: fpu sse sse2 lm pni pclmulqdq ssse3 fma sse4_1 sse4_2 popcnt avx f16c abm bmi1 avx2 bmi2 avx512f avx512dq \
avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 gfni avx512_vnni avx512_bitalg avx512_vpopcntdq avx_vnni \
avx512_bf16 amx_tile amx_int8
"""

PI4 = (
    "".join(
        f"""\
processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
        for core in range(4)
    )
    + "Revision\t: c03111\nModel\t\t: Raspberry Pi 4 Model B Rev 1.1\n"
)

PI5 = (
    PI4.replace("0xd08", "0xd0b")
    .replace("crc32 cpuid", "aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp")
    .replace("Pi 4 Model B Rev 1.1", "Pi 5 Model B Rev 1.0")
)

BIG_LITTLE = """\
processor\t: 0
Features\t: fp asimd crc32 atomics
CPU part\t: 0xd05
processor\t: 1
Features\t: fp asimd crc32 atomics asimddp i8mm bf16 sve
CPU part\t: 0xd41
processor\t: 2
Features\t: fp asimd crc32 atomics asimddp
CPU part\t: 0xd41
"""

VISIONFIVE = (
    "processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdc_zicntr_zba_zbb\nmmu\t\t: sv39\nuarch\t\t: sifive,u74-mc\n"
)


@pytest.mark.parametrize(
    ("text", "has", "lacks"),
    [
        (ZEN3, {"sse3", "sse4.1", "sse4.2", "avx2", "fma", "bmi", "lzcnt", "popcnt", "64bit", "crc32"}, {"avx512f"}),
        (
            XEON,
            {"avx512f", "avx512vnni", "avx512vbmi2", "avx512bf16", "avxvnni", "amx-int8", "gfni", "pclmul"},
            {"avx512_vnni", "avx512fp16", "aes"},
        ),
        (PI4, {"neon", "fp-armv8", "crc"}, {"dotprod", "fullfp16", "lse", "aes"}),
        (PI5, {"neon", "dotprod", "fullfp16", "lse", "rdm", "rcpc", "sha2"}, {"i8mm", "sve", "bf16"}),
        (BIG_LITTLE, {"neon", "lse", "crc"}, {"dotprod", "i8mm", "sve"}),
        (VISIONFIVE, {"i", "m", "a", "f", "d", "c", "zba", "zbb"}, {"v"}),
        (
            "Features\t: half thumb neon vfpv3 tls vfpv4 idiva idivt vfpd32\n",
            {"neon", "vfp4", "hwdiv", "hwdiv-arm"},
            set(),
        ),
        ("", set(), {"neon"}),
    ],
    ids=["Zen 3", "Xeon", "Pi 4", "Pi 5", "big.LITTLE", "RISC-V", "32-bit ARM", "nothing"],
)
def test_features_carry_llvms_names(text: str, has: set[str], lacks: set[str]) -> None:
    found = parse_features(text)
    assert has <= found
    assert not lacks & found


def auxv(machine: str, hwcap: int, hwcap2: int) -> bytes:
    """Return an auxiliary vector as the kernel makes it, page size and end included."""
    entries = [(6, 4096), (16, hwcap), (26, hwcap2), (0, 0)]
    return b"".join(struct.pack("<II" if machine == "arm" else "<QQ", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("machine", "hwcap", "hwcap2", "has", "lacks"),
    [
        # what qemu-user's processors say by getauxval(); Neoverse V1 by Linux's own list of its bits
        ("aarch64", 0x8FB, 0, {"neon", "fp-armv8", "crc", "aes"}, {"dotprod", "fullfp16", "lse"}),
        ("aarch64", 0x119FFB, 0, {"dotprod", "fullfp16", "lse", "rdm", "rcpc"}, {"i8mm", "bf16", "sve"}),
        ("aarch64", 0x119FFB & ~(1 << 20), 0, {"fullfp16"}, {"dotprod"}),
        ("aarch64", 0xEFFFFFFB, 0x6000, {"dotprod", "fp16fml", "i8mm", "bf16", "sve"}, {"sve2", "sme"}),
        ("arm", 0x1FB8D7, 0, {"neon", "vfp2", "vfp3", "vfp4", "hwdiv", "hwdiv-arm"}, {"fp-armv8", "dotprod", "crc"}),
        ("arm", 0x8B8D7, 0, {"neon", "vfp3"}, {"vfp4", "hwdiv", "hwdiv-arm"}),
        ("arm", 0x1FB8D7, 0x1F, {"vfp4", "crc"}, set()),
        ("x86_64", 0xFFFFFFFF, 0xFFFFFFFF, set(), {"avx2"}),
    ],
    ids=["Cortex-A72", "Cortex-A76", "no dotprod", "Neoverse V1", "Cortex-A7", "Cortex-A9", "32 bits of 64", "x86"],
)
def test_the_kernels_word_carries_llvms_names(
    machine: str, hwcap: int, hwcap2: int, has: set[str], lacks: set[str]
) -> None:
    found = parse_hwcaps(auxv(machine, hwcap, hwcap2), machine)
    assert has <= found
    assert not lacks & found
    assert parse_hwcaps(b"", machine) == frozenset()
    assert parse_hwcaps(auxv(machine, hwcap, hwcap2)[:-5], machine) == found


@pytest.mark.parametrize(
    ("device", "machine", "hwcap", "lacks"),
    [
        ("raspberry-pi-5", "aarch64", 0x119FFB, ""),
        ("raspberry-pi-5", "aarch64", 0x8FB, "dotprod, fullfp16, lse, rcpc, rdm"),
        ("raspberry-pi-4", "aarch64", 0x8FB, ""),
        ("cortex-a7", "arm", 0x1FB8D7, ""),
        ("cortex-a7", "arm", 0x8B8D7, "hwdiv, hwdiv-arm, vfp4"),
    ],
)
def test_an_engine_is_refused_in_words_where_a_feature_is_missing(
    device: str, machine: str, hwcap: int, lacks: str
) -> None:
    profile = resolve_profile(device)
    target = TargetRecord("llvm", device, profile.triple, profile.cpu, machine, profile.features)
    host = HostCpu(machine, "a board", parse_hwcaps(auxv(machine, hwcap, 0), machine), 4, 4)
    found = engine_mismatch(target, host)
    if lacks:
        assert found is not None
        assert found.message == f"built for: {profile.cpu}, found: a board, which lacks {lacks}"
    else:
        assert found is None


def test_a_feature_counts_only_where_every_core_has_it() -> None:
    assert "sha" not in parse_features(ZEN3)  # the second core of the text lacks it


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (ZEN3, "AMD Ryzen 9 5900X 12-Core Processor"),
        (PI4, "Raspberry Pi 4 Model B Rev 1.1 (4 × Cortex-A72)"),
        (PI5, "Raspberry Pi 5 Model B Rev 1.0 (4 × Cortex-A76)"),
        (BIG_LITTLE, "1 × Cortex-A55 + 2 × Cortex-A78"),
        (VISIONFIVE, "sifive,u74-mc"),
        ("", ""),
    ],
)
def test_models_are_named_for_people(text: str, model: str) -> None:
    assert parse_model(text) == model


def test_the_fastest_core_gives_the_clock() -> None:
    assert parse_mhz(ZEN3) == 3700.0
    assert parse_mhz(PI4) == 0.0


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("0", {0}), ("", set()), ("0,2-3,64-65", {0, 2, 3, 64, 65})]
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("200000 100000\n", 2.0),
        ("max 100000", None),
        ("50000 100000", 0.5),
        ("-1 100000", None),
        ("", None),
        ("1 0", None),
    ],
)
def test_cgroup_quotas(text: str, quota: float | None) -> None:
    assert parse_cpu_max(text) == quota


@pytest.mark.parametrize(
    ("title", "siblings", "quota", "cores"),
    [
        ("four threads of two cores", {0: {0, 2}, 1: {1, 3}, 2: {0, 2}, 3: {1, 3}}, None, 2),
        ("one thread of each of two cores", {0: {0, 2}, 1: {1, 3}}, None, 2),
        ("unknown topology", {0: set(), 1: set()}, None, 2),
        ("a quota of 2.5 cores", {0: {0}, 1: {1}, 2: {2}, 3: {3}}, 2.5, 2),
        ("a quota of half a core", {0: {0}, 1: {1}}, 0.5, 1),
        ("a quota above what there is", {0: {0}}, 8.0, 1),
    ],
)
def test_usable_cores(title: str, siblings: dict[int, set[int]], quota: float | None, cores: int) -> None:
    assert count_cores({cpu: frozenset(group) for cpu, group in siblings.items()}, quota) == cores, title


def test_this_machine_is_described() -> None:
    here = host_cpu()
    assert here.machine == host_machine()
    assert here.model
    assert 1 <= here.cores <= here.logical <= (os.cpu_count() or 1)
    if here.machine == "x86_64":
        assert {"sse2", "64bit"} <= here.features
    assert clock().current_mhz >= 0.0


def test_the_affinity_mask_counts() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from cnncc_runtime.cpu import host_cpu; here = host_cpu(); print(here.cores, here.logical)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
