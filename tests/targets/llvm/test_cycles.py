"""Cycles of inner loops by llvm-mca: which loop is found, what it multiplies, and how near it comes to a CPU's peak."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cnncc.compiler.bench.prediction import LIMITS, Prediction, predict_bundle
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.cycles.analyzer import Tools, analyze, find_tools
from cnncc.targets.llvm.cycles.disassembly import Flow, Instruction, blocks_of, instruction, parse
from cnncc.targets.llvm.cycles.predict import Cpu, Cycles, disassemble, forecast, hot_loop
from cnncc.targets.llvm.cycles.products import carries_sums, counted, peak_loop, peaks_of, products_of
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.errors import BundleRefused, DependencyMissing, ToolchainFailed, UsageError
from tests.runtime.engine_files import make_bundle
from tests.targets.llvm.mca import bundle_of, layers_by_schedule, require
from tests.targets.llvm.test_aot import digits, int8_digits

AARCH64 = "aarch64-linux-gnu"


def code_of(text: str) -> tuple[Instruction, ...]:
    """Return code by its lines; ``label:`` stands before a line, and ``@label`` for a target."""
    places: dict[str, int] = {}
    lines: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            places[line[:-1]] = 4 * len(lines)
        else:
            lines.append(line)
    listing = "0000 <kernel>:\n"
    for number, line in enumerate(lines):
        for label, place in places.items():
            line = line.replace(f"@{label}", f"0x{place:x} <kernel+0x{place:x}>")
        listing += f"  {4 * number:x}:      \t{line}\n"
    [(name, code)] = parse(listing)
    assert name == "kernel"
    return code


def loop_of(*lines: str) -> tuple[Instruction, ...]:
    """Return a loop of AArch64 over some lines."""
    return code_of("\n".join(["mov x8, xzr", "loop:", *lines, "add x8, x8, #1", "cmp x8, #64", "b.ne @loop", "ret"]))


def cycles_of(code: tuple[Instruction, ...], cpu: str = "cortex-a76", *features: str) -> Cycles:
    found = hot_loop(code)
    assert found is not None
    [cycles] = forecast(
        require(), AARCH64, "aarch64", Cpu(cpu, ("neon", *features)), {"kernel": found}
    ).kernels.values()
    assert isinstance(cycles, Cycles), cycles
    return cycles


# ---- instructions


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("fmla v1.4s, v4.4s, v3.s[0]", "fp32", 4),
        ("fmla v1.2s, v4.2s, v3.2s", "fp32", 2),
        ("fmla v1.8h, v4.8h, v3.h[0]", "fp16", 8),
        ("fmadd s0, s1, s2, s0", "fp32", 1),
        ("sdot v1.4s, v4.16b, v3.4b[1]", "int8", 16),
        ("sdot v1.2s, v4.8b, v3.8b", "int8", 8),
        ("smmla v1.4s, v4.16b, v3.16b", "int8", 32),
        ("bfmmla v1.4s, v4.8h, v3.8h", "bf16", 16),
        ("smull2 v1.8h, v4.16b, v3.16b", "int8", 8),
        ("smlal v1.4s, v4.4h, v3.4h", "int16", 4),
        ("vmla.f32 q8, q0, d2[0]", "fp32", 4),
        ("vfma.f32 d8, d0, d2", "fp32", 2),
        ("vfma.f32 s8, s0, s2", "fp32", 1),
        ("vmlal.s8 q8, d0, d2", "int8", 8),
        ("vmull.s16 q8, d0, d2", "int16", 4),
        ("vfmadd231ps (%rax), %ymm1, %ymm2", "fp32", 8),
        ("vfmadd231ps 0x40(%rax){1to16}, %zmm1, %zmm2", "fp32", 16),
        ("vfmadd213ss %xmm0, %xmm1, %xmm2", "fp32", 1),
        ("vfmadd231pd %ymm0, %ymm1, %ymm2", "fp64", 4),
        ("mulps %xmm0, %xmm1", "fp32", 4),
        ("{vex} vpdpbusd %ymm0, %ymm1, %ymm2", "int8", 32),
        ("vpdpbusd %zmm0, %zmm1, %zmm2", "int8", 64),
        ("vpmaddubsw %ymm0, %ymm1, %ymm2", "int8", 32),
        ("pmaddwd (%rax), %xmm2", "int16", 8),
        ("vpmaddwd %zmm0, %zmm1, %zmm2", "int16", 32),
        ("fmadd.s fa0, fa1, fa2, fa0", "fp32", 1),
        ("mulw a1, a2, a3", "int32", 1),
    ],
)
def test_products_of_an_instruction(text: str, kind: str, count: int) -> None:
    found = products_of(instruction(0, text))
    assert found is not None
    assert (found.type, found.count) == (kind, count)


@pytest.mark.parametrize(
    "text",
    ["mul x8, x9, x10", "smull x8, w9, w10", "madd x8, x9, x10, x11", "mla r3, r0, r1, r3", "mul r3, r0, r1",
     "imulq $0x40, %rax, %rcx", "vaddps %ymm0, %ymm1, %ymm2", "sadalp v0.4s, v1.8h", "ldr q0, [x1]",
     "vmovups %ymm0, (%rax)"],
)  # fmt: skip
def test_arithmetic_of_addresses_multiplies_no_elements(text: str) -> None:
    assert products_of(instruction(0, text)) is None


@pytest.mark.parametrize(
    ("text", "flow", "target"),
    [
        ("b.ne\t0x40 <kernel+0x20>", Flow.BRANCH, 0x40),
        ("b\t0x40 <kernel+0x20>", Flow.JUMP, 0x40),
        ("cbz\tx9, 0x40 <kernel+0x20>", Flow.BRANCH, 0x40),
        ("tbnz\tw9, #0x3, 0x40 <kernel+0x20>", Flow.BRANCH, 0x40),
        ("bl\t0x40 <sqrtf@plt>", Flow.NEXT, None),
        ("blr\tx8", Flow.NEXT, None),
        ("br\tx8", Flow.END, None),
        ("ret", Flow.END, None),
        ("adrp\tx8, 0x2a000 <extent+0x29ff8>", Flow.NEXT, None),
        ("jne\t0x40 <kernel+0x20>", Flow.BRANCH, 0x40),
        ("jmp\t0x40 <kernel+0x20>", Flow.JUMP, 0x40),
        ("jmpq\t*%rax", Flow.END, None),
        ("callq\t0x40 <kernel+0x20>", Flow.NEXT, None),
        ("vmovaps\t0x12(%rip), %ymm0         # 0x40 <x>", Flow.NEXT, None),
        ("bge\t0x1a444 <kernel+0x1f0> @ imm = #0x150", Flow.BRANCH, 0x1A444),
        ("blne\t0x40 <kernel>", Flow.NEXT, None),
        ("blt\t0x40 <kernel>", Flow.BRANCH, 0x40),
        ("bx\tlr", Flow.END, None),
        ("pop\t{r4, r5, pc}", Flow.END, None),
        ("popne\t{r4, r5, pc}", Flow.NEXT, None),
        ("bltu\ta0, a1, 0x40 <kernel+0x20>", Flow.BRANCH, 0x40),
        ("j\t0x40 <kernel+0x20>", Flow.JUMP, 0x40),
        ("beqz\ta0, 0x40 <kernel+0x20>", Flow.BRANCH, 0x40),
    ],
)
def test_where_an_instruction_leads(text: str, flow: Flow, target: int | None) -> None:
    found = instruction(0, text)
    assert (found.flow, found.target) == (flow, target)
    assert "<" not in found.text, "an assembler must take it"
    assert "imm =" not in found.text


def test_multiplications_that_scale_sums_are_not_counted_beside_those_that_sum() -> None:
    code = loop_of("fmla v0.4s, v1.4s, v2.4s", "fmul v3.4s, v0.4s, v4.4s")
    assert [(one.type, one.count) for one in counted(code).values()] == [("fp32", 4)]
    assert len(counted(loop_of("fmul v3.4s, v0.4s, v4.4s"))) == 1
    pairs = code_of("vpmaddubsw %ymm0, %ymm1, %ymm2\nvpmaddwd %ymm2, %ymm3, %ymm2\nvpaddd %ymm2, %ymm4, %ymm4")
    assert [(one.type, one.count) for one in counted(pairs).values()] == [("int8", 32)]


def test_code_is_cut_where_it_forks_and_joins() -> None:
    blocks = blocks_of(code_of("cbz x0, @end\nloop:\nsub x0, x0, #1\ncbnz x0, @loop\nend:\nret\nmov x0, x1\nb @loop"))
    assert [len(block) for block in blocks.code] == [1, 2, 1, 2]
    assert blocks.successors == ((2, 1), (1, 2), (), (1,))


def test_labels_inside_of_a_function_do_not_end_it() -> None:
    listing = "00 <kernel>:\n 0:\tnop\n02 <.Lpcrel_hi1>:\n 2:\tret\n04 <other>:\n 4:\tret\n"
    assert [(name, len(code)) for name, code in parse(listing)] == [("kernel", 2), ("other", 1)]


# ---- which loop


SUM = "fmla v0.4s, v1.4s, v2.4s"


def test_the_inner_loop_is_taken_though_its_nest_multiplies_more_behind_it() -> None:
    code = code_of(
        f"rows:\nmov x8, x7\nloop:\n{SUM}\nadd x8, x8, #1\ncbnz x8, @loop\n{SUM}\n{SUM}\ncbnz x9, @rows\nret"
    )
    found = hot_loop(code)
    assert found is not None
    assert (found.products, len(found.code)) == (4, 3)


def test_the_loop_whose_sums_go_on_is_taken_and_not_one_that_transforms() -> None:
    transform = "\n".join(["fadd v3.4s, v4.4s, v5.4s", *["fmla v3.4s, v4.4s, v5.4s"] * 12])
    code = code_of(f"one:\n{transform}\ncbnz x8, @one\ntwo:\n{SUM}\nfmla v6.4s, v1.4s, v2.4s\ncbnz x9, @two\nret")
    found = hot_loop(code)
    assert found is not None
    assert found.products == 8


def test_of_two_ways_through_a_loop_the_one_with_most_products_is_taken() -> None:
    code = code_of(f"loop:\ncbz x1, @none\n{SUM}\n{SUM}\nb @join\nnone:\nnop\nnop\nnop\njoin:\ncbnz x8, @loop\nret")
    found = hot_loop(code)
    assert found is not None
    assert [one.mnemonic for one in found.code] == ["cbz", "fmla", "fmla", "b", "cbnz"]


def test_code_that_multiplies_outside_of_loops_alone_has_no_hot_loop() -> None:
    assert hot_loop(code_of(f"{SUM}\nloop:\nnop\ncbnz x8, @loop\n{SUM}\nret")) is None
    assert hot_loop(code_of("loop:\nnop\ncbnz x8, @loop\nret")) is None


@pytest.mark.parametrize(
    ("text", "carried"),
    [
        ("ldr q1, [x0]\nfmla v0.4s, v1.4s, v2.4s", True),
        ("ldr q0, [sp]\nfmla v0.4s, v1.4s, v2.4s\nstr q0, [sp]", False),
        ("smull v1.8h, v2.8b, v3.8b\nsmlal v1.8h, v4.8b, v5.8b\nsadalp v0.4s, v1.8h", True),
        ("vpmaddwd %ymm0, %ymm1, %ymm2\nvpaddd %ymm2, %ymm3, %ymm3", True),
        ("vpmaddwd %ymm0, %ymm1, %ymm2\nvpaddd %ymm2, %ymm3, %ymm4", False),
        ("vld1.32 {d0, d1}, [r0]\nvmla.f32 q0, q1, q2", False),
        ("vld1.32 {d2, d3}, [r0]\nvmla.f32 q0, q1, q2", True),
        ("fmadd.s ft0, fa1, fa2, ft0", True),
        ("flw ft0, 0(a0)\nfmadd.s ft0, fa1, fa2, ft0", False),
    ],
)
def test_sums_go_on_where_their_register_is_first_added_to(text: str, carried: bool) -> None:
    assert carries_sums(code_of(text)) is carried


# ---- by llvm-mca


TILE = [f"fmla v{sum_}.4s, v24.4s, v{25 + sum_ % 4}.s[0]" for sum_ in range(16)]
LOADS = ["ldr q24, [x1], #16", "ldr q25, [x2], #16"]


def test_a_register_tile_comes_near_the_peak() -> None:
    found = cycles_of(loop_of(*LOADS, *TILE))
    assert 0.9 < found.share <= 1.01
    assert found.rate == pytest.approx(16 * 4 / found.cycles)


def test_a_loop_that_spills_its_sums_scores_worse() -> None:
    spilt = [line for i, one in enumerate(TILE)
             for line in (f"ldr q{i}, [sp, #{16 * i}]", one, f"str q{i}, [sp, #{16 * i}]")]  # fmt: skip
    assert cycles_of(loop_of(*LOADS, *spilt)).share < 0.7 * cycles_of(loop_of(*LOADS, *TILE)).share


def test_scalar_code_scores_worse_than_vectors() -> None:
    scalar = [f"fmadd s{i}, s24, s25, s{i}" for i in range(16)]
    assert cycles_of(loop_of("ldr s24, [x1], #4", "ldr s25, [x2], #4", *scalar)).share < 0.3


def test_one_sum_waits_for_itself() -> None:
    alone, many = cycles_of(loop_of(*LOADS, TILE[0])), cycles_of(loop_of(*LOADS, *TILE))
    assert alone.share < 0.5 * many.share


def test_the_peak_of_int8_is_that_of_the_best_instruction_that_a_cpu_has() -> None:
    sums = loop_of("sdot v0.4s, v1.16b, v2.16b", "sdot v3.4s, v1.16b, v2.16b")
    found = hot_loop(sums)
    assert found is not None

    def peak(*features: str) -> float:
        return forecast(require(), AARCH64, "aarch64", Cpu("neoverse-v1", features), {"k": found}).peaks["int8"]

    assert peak("neon", "dotprod", "i8mm") == pytest.approx(2 * peak("neon", "dotprod"), rel=0.02)
    assert peak("neon", "dotprod") > 2 * peak("neon")


@pytest.mark.parametrize(
    ("triple", "machine", "cpu", "features"),
    [
        (AARCH64, "aarch64", "neoverse-v1", ("neon", "dotprod", "i8mm", "fullfp16", "bf16")),
        (AARCH64, "aarch64", "cortex-a72", ("neon",)),
        ("armv7l-linux-gnueabihf", "arm", "cortex-a72", ("neon", "vfp4", "vfp2")),
        ("riscv64-linux-gnu", "riscv64", "sifive-u54", ("m", "f", "d")),
        ("x86_64-linux-gnu", "x86_64", "x86-64-v2", ()),
        ("x86_64-linux-gnu", "x86_64", "x86-64-v3", ("avx", "avx2", "fma")),
        ("x86_64-linux-gnu", "x86_64", "alderlake", ("avx", "avx2", "fma", "avxvnni")),
        ("x86_64-linux-gnu", "x86_64", "znver4", ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vnni")),
        ("x86_64-linux-gnu", "x86_64", "sapphirerapids", ("avx512f", "avx512fp16", "avx512vnni", "avx512bw")),
    ],
)
def test_every_peak_assembles_and_counts_its_products_right(
    triple: str, machine: str, cpu: str, features: tuple[str, ...]
) -> None:
    kinds = ("fp64", "fp32", "fp16", "bf16", "int8", "int16", "int32")
    peaks = [peak for kind in kinds for peak in peaks_of(machine, features, kind)]
    assert peaks
    loops = [peak_loop(machine, peak) for peak in peaks]
    found = analyze(require(), triple, machine, cpu, features, [lines for lines, _count in loops])
    assert [one for one in found.cycles if isinstance(one, str)] == []
    for peak, (lines, count) in zip(peaks, loops, strict=True):
        code = tuple(instruction(4 * number, line) for number, line in enumerate(lines))
        assert sum(one.count for one in counted(code).values() if one.type == peak.type) == count, peak
        assert carries_sums(code) or peak.type == "int32", peak


def test_cortex_a76_is_predicted_by_the_model_of_neoverse_n1() -> None:
    tools = require()
    a76, a57 = (analyze(tools, AARCH64, "aarch64", cpu, ("neon",), [TILE]) for cpu in ("cortex-a76", "cortex-a57"))
    assert (a76.by, a76.units, a57.by, a57.units) == ("neoverse-n1", "N1", "cortex-a57", "A57")
    assert a76.cycles < a57.cycles


def test_a_cpu_without_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match="no scheduling model of cortex-a7"):
        analyze(require(), "armv7l-linux-gnueabihf", "arm", "cortex-a7", ("neon",), [["vmla.f32 q0, q1, q2"]])
    with pytest.raises(DependencyMissing, match="does not know it"):
        analyze(require(), AARCH64, "aarch64", "cortex-a9999", ("neon",), [TILE])


def test_a_loop_that_the_analyzer_cannot_take_leaves_the_others() -> None:
    found = analyze(require(), AARCH64, "aarch64", "cortex-a72", ("neon",), [TILE, ["no such instruction"], TILE])
    assert found.cycles[0] == found.cycles[2] == pytest.approx(16, rel=0.05)
    assert "instruction" in str(found.cycles[1])
    with pytest.raises(ToolchainFailed, match="instruction"):
        analyze(require(), AARCH64, "aarch64", "cortex-a72", ("neon",), [["no such instruction"]])


# ---- tools that are not as they should be


def stand_in(folder: Path, name: str, said: str, version: str = "14.0.6", code: int = 0) -> str:
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print('Debian LLVM version {version}' if '--version' in sys.argv else {said!r})\nsys.exit({code})\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


REPORT = (
    '{"CodeRegions": [{"SummaryView": {"TotalCycles": 100}}], "TargetInfo": {"Resources": ["A57UnitB", "A57UnitW"]}}'
)


def test_an_analyzer_that_takes_another_cpus_model_is_too_old(tmp_path: Path) -> None:
    tools = Tools(stand_in(tmp_path, "llvm-mca", REPORT), "", (14, 0, 6))
    with pytest.raises(DependencyMissing, match=r"of neoverse-n1, for cortex-a76, is needed, and .* takes that of A57"):
        analyze(tools, AARCH64, "aarch64", "cortex-a76", (), [TILE])
    assert analyze(tools, AARCH64, "aarch64", "cortex-a72", (), [TILE]).cycles == (0.0,)


def test_an_analyzer_that_answers_nonsense_is_a_failure_of_the_toolchain(tmp_path: Path) -> None:
    for said, code in (("nonsense", 0), ("", 1), (REPORT.replace("[{", "[{}, {"), 0)):
        tools = Tools(stand_in(tmp_path, "llvm-mca", said, code=code), "", (14, 0, 6))
        with pytest.raises(ToolchainFailed):
            analyze(tools, AARCH64, "aarch64", "cortex-a72", (), [TILE])
    gone = Tools(str(tmp_path / "none"), str(tmp_path / "none"), (14, 0, 6))
    with pytest.raises(ToolchainFailed):
        analyze(gone, AARCH64, "aarch64", "cortex-a72", (), [TILE])
    with pytest.raises(ToolchainFailed, match="cannot be disassembled"):
        disassemble(gone, tmp_path / "library.a", "aarch64", ())


def test_the_newest_pair_of_tools_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stand_in(tmp_path, "llvm-mca", "", "20.1.0")
    with pytest.raises(DependencyMissing, match="llvm-objdump") as refused:
        find_tools()
    assert "apt-get install llvm" in refused.value.hint
    for name, version in (
        ("mca-14", "14.0.6"),
        ("objdump-14", "14.0.6"),
        ("mca-19", "19.1.7"),
        ("objdump-19", "19.1.7"),
    ):
        stand_in(tmp_path, f"llvm-{name}", "", version)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    assert find_tools() == Tools(str(tmp_path / "llvm-mca-19"), str(tmp_path / "llvm-objdump-19"), (19, 1, 7))


# ---- engines


def predicted(graph: OnnxGraph, triple: str, cpu: str, folder: Path, *cpus: str, runtime: str = "vm") -> Prediction:
    require()
    profile = named(resolve_profile(mtriple=triple, mcpu=cpu))
    return predict_bundle(bundle_of(graph, profile, folder, runtime), cpus)


def near_its_peak(report: Prediction, least: float) -> None:
    """Check that the convolutions of every CPU come near the peak, and none beyond it."""
    for layer in report.layers:
        assert layer.problems == {}
        for name, found in layer.cpus.items():
            assert found.share <= 1.01, (layer.kernel, name)
            if layer.schedule in ("conv2d", "winograd"):
                assert found.share > least, (layer.kernel, name)


@pytest.mark.slow
def test_fp32_on_the_cortexes_and_the_neoverse_comes_near_their_peaks(tmp_path: Path) -> None:
    report = predicted(digits(), AARCH64, "cortex-a72", tmp_path)
    assert [cpu.name for cpu in report.cpus] == ["cortex-a72", "cortex-a76", "neoverse-v1"]
    assert report.notes == LIMITS
    near_its_peak(report, 0.85)
    peaks = [cpu.peaks["fp32"] for cpu in report.cpus]
    assert peaks == sorted(peaks)
    assert peaks[2] == pytest.approx(2 * peaks[1], rel=0.02)
    winograd = layers_by_schedule(report)["winograd"]
    assert winograd.loop is not None
    assert set(winograd.loop.mix) == {"fmla"}, "its products, and none of its transforms"
    assert [layer.modules for layer in report.layers[:1]] == [("net.conv_0", "net.relu_1")]


@pytest.mark.slow
def test_int8_on_cortex_a76_does_more_products_a_cycle_than_fp32(tmp_path: Path) -> None:
    floats = predicted(digits(), AARCH64, "cortex-a76", tmp_path / "fp32", "cortex-a76")
    steps = predicted(int8_digits(), AARCH64, "cortex-a76", tmp_path / "int8")
    assert "lacks dotprod" in steps.notes[-1], "Cortex-A72 is left out, and that is told"
    assert [cpu.name for cpu in steps.cpus] == ["cortex-a76", "neoverse-v1"]
    near_its_peak(steps, 0)
    convolutions = [layer for layer in steps.layers if layer.loop is not None and "sdot" in layer.loop.mix][:2]
    assert len(convolutions) == 2
    assert convolutions[1].cpus["cortex-a76"].share >= 0.6, "the 3×3 convolution"
    fastest = max(layer.cpus["cortex-a76"].rate for layer in floats.layers if layer.cpus)
    assert all(layer.cpus["cortex-a76"].rate > 2 * fastest for layer in convolutions)


@pytest.mark.slow
def test_int8_without_dot_products_is_counted_by_its_halves(tmp_path: Path) -> None:
    report = predicted(int8_digits(), AARCH64, "cortex-a72", tmp_path, "cortex-a72")
    near_its_peak(report, 0)
    for layer in report.layers:
        if layer.loop is not None and layer.schedule == "int8":
            assert layer.loop.type == "int8"
            assert layer.loop.mix["smull"] == layer.loop.mix["smlal"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("triple", "cpu", "by", "mnemonic"),
    [
        ("x86_64-linux-gnu", "x86-64-v2", "x86-64-v2", "mulps"),
        ("x86_64-linux-gnu", "x86-64-v3", "x86-64-v3", r"vfmadd\d+ps"),
        ("x86_64-linux-gnu", "x86-64-v4", "x86-64-v4", r"vfmadd\d+ps"),
        ("armv7l-linux-gnueabihf", "cortex-a7", "cortex-a72", r"vfma\.f32"),
        ("riscv64-linux-gnu", "sifive-u54", "sifive-u54", r"fmadd\.s"),
    ],
)
def test_other_machines_are_predicted(tmp_path: Path, triple: str, cpu: str, by: str, mnemonic: str) -> None:
    report = predicted(digits(), triple, cpu, tmp_path, by)
    near_its_peak(report, 0.25)
    for layer in report.layers:
        assert layer.loop is not None
        assert all(re.fullmatch(mnemonic, name) for name in layer.loop.mix)


@pytest.mark.slow
def test_avx512_has_twice_the_peak_of_avx2(tmp_path: Path) -> None:
    peaks = [
        predicted(digits(), "x86_64-linux-gnu", cpu, tmp_path / cpu).cpus[0].peaks["fp32"]
        for cpu in ("x86-64-v3", "x86-64-v4")
    ]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.02)


@pytest.mark.slow
def test_an_engine_without_the_virtual_machine_is_predicted_by_its_library(tmp_path: Path) -> None:
    report = predicted(digits(), "x86_64-linux-gnu", "x86-64-v3", tmp_path, runtime="aot-static")
    assert sum(layer.loop is not None for layer in report.layers) == 4
    near_its_peak(report, 0.5)


@pytest.mark.slow
def test_an_engine_of_32_bits_has_no_model_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no scheduling model of cortex-a7") as refused:
        predicted(digits(), "armv7l-linux-gnueabihf", "cortex-a7", tmp_path)
    assert "--cpu cortex-a72" in refused.value.hint


@pytest.mark.slow
def test_a_stripped_or_damaged_engine_is_refused(tmp_path: Path) -> None:
    tools = require()
    bundle = bundle_of(digits(), named(resolve_profile(mcpu="x86-64-v3")), tmp_path)
    engine = bundle / "engine.so"
    code = disassemble(tools, engine, "x86_64", ())
    assert any(name.endswith("_compute_") for name in code)
    with pytest.raises(BundleRefused, match="x86_64, and its manifest says aarch64"):
        disassemble(tools, engine, "aarch64", ())
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(engine.read_bytes()[:-200])
    with pytest.raises(BundleRefused, match="truncated"):
        disassemble(tools, damaged, "x86_64", ())
    archive = tmp_path / "damaged.a"
    archive.write_bytes(b"!<arch>\nnothing of the kind")
    with pytest.raises(BundleRefused, match="cannot be read"):
        disassemble(tools, archive, "x86_64", ())
    stripped = tmp_path / "engine.so"
    subprocess.run([tools.disassembler.replace("objdump", "strip"), "--strip-all", engine, "-o", stripped], check=True)
    described = replace(read_bundle(bundle).manifest, files={})
    with pytest.raises(BundleRefused, match="symbols were stripped"):
        predict_bundle(make_bundle(tmp_path / "stripped.cnncc", described, stripped, bundle / "weights.bin"))
    engine.write_bytes(stripped.read_bytes())
    with pytest.raises(BundleRefused, match="bytes, the manifest says"):
        predict_bundle(bundle)
