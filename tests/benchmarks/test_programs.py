"""The benchmarks' programs, on the digits CNN."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import NETWORKS, find
from benchmarks.peak import ACCUMULATORS, INT8, build_kernel
from cnncc.targets.devices import named, resolve_profile
from tests.calibration.rtx import tensorrt_rtx
from tests.conftest import ROOT


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program as `make bench` does."""
    command = [sys.executable, str(ROOT / "benchmarks" / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_peers_prints_ratios_and_the_reason_for_every_peer_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNCC_BENCH_PYTHON_NCNN", "/bin/false")  # finds no module
    result = run(
        *("peers.py", "digits", "--against", "ort,ncnn", "--threads", "1,2", "--rounds", "2", "--min-time", "0.02"),
        *("--repeat", "2", "--output", str(tmp_path / "out.json")),
    )
    assert result.returncode == 0, result.stderr
    assert "digits, 1 thread, 0.00939 GFLOP" in result.stdout
    assert "digits, 2 threads, 0.00939 GFLOP" in result.stdout
    assert result.stdout.count("not measured: ncnn is not installed") == 2
    assert len(re.findall(r"^geometric mean of ours / fastest peer: [\d.]+ over 1 networks$", result.stdout, re.M)) == 2
    assert "2 runs: " in result.stdout
    one, two = json.loads((tmp_path / "out.json").read_bytes())
    assert (one["name"], one["threads"], two["threads"], one["fastest"]) == ("digits", 1, 2, "ort")
    assert one["peak"] > 1e9
    assert len(one["reports"]) == 2
    assert [peer["name"] for peer in one["reports"][0]["refused"]] == ["ncnn"]


@pytest.mark.slow
def test_peers_in_int8_says_what_everyone_multiplies() -> None:
    result = run(
        *("peers.py", "digits", "--precision", "int8", "--against", "ort,ort-int8", "--threads", "1", "--rounds", "2"),
        *("--min-time", "0.02"),
    )
    assert result.returncode == 0, result.stderr + result.stdout
    engines = dict(
        re.findall(r"^  (cnncc|ort|ort-int8|fp32-direct) +(int8|fp32, Q/DQ|fp32) +[\d.]+ ", result.stdout, re.M)
    )
    assert engines == {"cnncc": "int8", "ort": "fp32, Q/DQ", "ort-int8": "int8", "fp32-direct": "fp32"}
    assert re.search(r"^peak: \d+ GOP/s, measured$", result.stdout, re.M)


@pytest.mark.slow
def test_peers_names_networks_that_it_cannot_measure() -> None:
    result = run("peers.py", "none.onnx", "--against", "ort")
    assert result.returncode == 1
    assert "none.onnx was not measured: " in result.stdout


def test_peers_refuses_peers_that_nobody_knows() -> None:
    result = run("peers.py", "digits", "--against", "orc")
    assert result.returncode == 2
    assert "'orc' is not a known peer" in result.stderr


@pytest.mark.slow
def test_kernels_prints_every_kernel_and_their_sum() -> None:
    result = run("kernels.py", "digits", "--rounds", "1", "--threads", "1")
    assert result.returncode == 0, result.stderr + result.stdout
    assert re.search(r"^digits, 1 thread, peak \d+ GFLOP/s$", result.stdout, re.M)
    assert len(re.findall(r"GFLOP/s +\d+  ", result.stdout)) >= 4  # two convolutions, two matrix products
    change = r"\([+-][\d.]+ %\)"
    line = rf"kernels [\d.]+ ms alone, [\d.]+ ms inside the network {change}, network [\d.]+ ms {change}"
    assert re.search(line, result.stdout)


@pytest.mark.slow
def test_kernels_of_an_int8_engine_are_held_to_the_integer_peak() -> None:
    result = run("kernels.py", "digits", "--rounds", "1", "--threads", "1", "--precision", "int8")
    assert result.returncode == 0, result.stderr + result.stdout
    assert re.search(r"^digits, 1 thread, peak \d+ GOP/s, of fp32 \d+ GFLOP/s$", result.stdout, re.M)
    shares = [int(share) for share in re.findall(r" int8 .* GOP/s +(\d+)  ", result.stdout)]
    assert len(shares) == 4  # two convolutions, two matrix products
    assert all(share <= 110 for share in shares)  # all of them direct; a noisy machine may measure too low a peak


@pytest.mark.slow
def test_threads_prints_the_cost_of_a_loop_and_of_a_neighbour() -> None:
    result = run("threads.py", "digits", "--threads", "2", "--rounds", "3")
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^  [12] threads?, µs +[\d.]+ +[\d.]+$", result.stdout, re.M)) == 2
    assert len(re.findall(r"^  .*, (?:median|worst), ms +[\d.]+ +[\d.]+$", result.stdout, re.M)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_peak_is_more_than_a_scalar_unit_gives(precision: str) -> None:
    result = run("peak.py", "--precision", precision, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["precision"] == precision
    assert found["lanes"] >= 4
    assert found["operations_per_second"] > 2e9 * found["lanes"] / 4


@pytest.mark.slow
def test_the_integer_peak_is_as_many_times_that_of_float32_as_its_instruction_multiplies() -> None:
    """Eight with i8mm; four with VNNI and NEON; two at most with pairs of int16, which a second instruction adds up."""
    features = set(resolve_profile("host").features)
    if not features & {"avx512vnni", "avxvnni", "avx2", "dotprod"}:
        pytest.skip("this machine has no instruction for products of int8")
    rates = [
        json.loads(run("peak.py", "--precision", precision, "--json").stdout)["operations_per_second"]
        for precision in ("int8", "fp32")
    ]
    least = 1.2 if not features & {"avx512vnni", "avxvnni", "dotprod"} else 2.5
    assert least < rates[0] / rates[1] < (9 if "i8mm" in features else 4.5)


@pytest.mark.parametrize(("cpu", "instruction"), [("neoverse-v1", "smmla"), ("cortex-a76", "sdot")])
def test_the_integer_peak_is_that_of_the_fastest_instruction(cpu: str, instruction: str) -> None:
    profile = named(resolve_profile(mtriple="aarch64-linux-gnu", mcpu=cpu))
    code = str(build_kernel(1, INT8, profile).function.mod.inspect_source("asm"))
    assert len(re.findall(rf"\t{instruction}\t", code)) == ACCUMULATORS


def test_networks_have_names_of_their_own_and_others_are_models() -> None:
    assert len({network.name for network in NETWORKS}) == len(NETWORKS) == 14
    assert find(()) == NETWORKS
    [known, other] = find(("resnet18", "torchvision:alexnet"))
    assert known.shape == "1,3,224,224"
    assert (other.model, other.shape) == ("torchvision:alexnet", "")


def test_cuda_builds_prints_sizes_and_executed_types() -> None:
    tensorrt_rtx()
    result = run("cuda_builds.py", "digits", "--precision", "fp32", "--precision", "int8", "--device", "sm89")
    assert result.returncode == 0, result.stderr + result.stdout
    found = re.findall(r"^digits (\w+) sm89: ([\d.]+) MB, [\d.]+ s, (4 \w+)$", result.stdout, re.M)
    assert [(precision, types) for precision, _, types in found] == [("fp32", "4 float32"), ("int8", "4 int8")]
    assert float(found[1][1]) < float(found[0][1])
