"""What the peers' benchmark makes of its reports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.table import Runs, block, summary, verdict
from cnncc.compiler.bench.machine import Machine
from cnncc.compiler.bench.report import (
    SCHEMA,
    BenchmarkReport,
    Interval,
    Latency,
    Noise,
    Ratio,
    Refused,
    SubjectResult,
)

MACHINE = Machine("x86_64", "CPU", 4, ("avx2",), "performance", 3000.0, "Linux 6", 0.0, 0.0, 0.0)
REFUSED = (Refused("far", "Far is not installed – pip install far"),)


def result(name: str, seconds: float, memory: int) -> SubjectResult:
    latency = Latency(seconds, seconds, seconds, None, None, 0.01)
    return SubjectResult(
        name, name, name, "1", "fp32", 50, 9, True, latency, latency, 1 / seconds, 0.1, 0.2, memory, 8, 7, 0, None
    )


def report(ours: float, **peers: float) -> BenchmarkReport:
    """A report of medians in seconds; every interval is 2 % wide on either side."""
    ratios = tuple(
        Ratio("cnncc", name, *(Interval(ours / time, 0.98 * ours / time, 1.02 * ours / time),) * 2, "wall")
        for name, time in peers.items()
    )
    subjects = (result("cnncc", ours, 100_000_000), *(result(name, t, 200_000_000) for name, t in peers.items()))
    inputs = {"x": "float32[1]"}
    return BenchmarkReport(SCHEMA, 1, 12, 0, inputs, MACHINE, Noise(False, ()), ratios, subjects, REFUSED)


ONE = Runs("net", 2_000_000_000, 100e9, (report(0.04, ort=0.05, mnn=0.03),))


def test_the_fastest_peer_is_the_one_that_we_exceed_most() -> None:
    assert ONE.fastest == "mnn"
    assert ONE.versus("mnn").value == pytest.approx(4 / 3)


def test_the_share_of_the_peak_counts_the_operations_of_the_graph() -> None:
    assert ONE.share("cnncc") == pytest.approx(2e9 / 0.04 / 100e9)
    assert ONE.share("mnn") == pytest.approx(2e9 / 0.03 / 100e9)


def test_several_runs_give_their_median_and_an_interval_that_holds_them_all() -> None:
    runs = replace(ONE, reports=tuple(report(ours, mnn=0.03) for ours in (0.033, 0.030, 0.036)))
    found = runs.versus("mnn")
    assert found.value == pytest.approx(1.1)
    assert (found.low, found.high) == (pytest.approx(0.98), pytest.approx(1.2 * 1.02))
    assert runs.spread("mnn") == "  3 runs: 1.00 to 1.20"
    assert ONE.spread("mnn") == ""


def test_a_peer_that_left_in_one_run_is_not_compared() -> None:
    runs = replace(ONE, reports=(report(0.04, ort=0.05, mnn=0.03), report(0.04, ort=0.05)))
    assert runs.peers == ("ort",)
    assert runs.fastest == "ort"


def test_a_block_names_everyone_and_who_is_missing_with_the_reason() -> None:
    text = "\n".join(block(ONE))
    assert "net, 1 thread, 2 GFLOP" in text
    for name in ("cnncc", "ort", "mnn"):
        assert f"  {name} " in text
    assert "0.80  [0.78, 0.82]" in text
    assert "1.33  [1.31, 1.36]" in text
    assert "not measured: Far is not installed – pip install far" in text


def test_a_network_without_peers_has_a_block() -> None:
    assert "cnncc" in "\n".join(block(replace(ONE, reports=(report(0.04),))))


def test_the_summary_has_geometric_means_over_the_networks() -> None:
    other = replace(ONE, name="other", reports=(report(0.01, ort=0.04, mnn=0.08),))
    lines = list(summary([ONE, other]))
    assert "geometric mean of ours / ort: 0.447 over 2 networks" in lines  # √(0.8 · 0.25)
    assert "geometric mean of ours / fastest peer: 0.577 over 2 networks" in lines  # √(4/3 · 0.25)
    assert "faster than every peer, beyond doubt: 1 of 2 networks" in lines
    assert any(
        line.startswith("net ") and "mnn" in line and "50 / 67" in line and "100 / 200" in line for line in lines
    )


@pytest.mark.parametrize(
    ("interval", "word"),
    [((0.9, 0.88, 0.92), "faster"), ((1.1, 1.05, 1.2), "slower"), ((0.99, 0.9, 1.01), "tie"), ((1.0, 1.0, 1.1), "tie")],
)
def test_a_ratio_whose_interval_holds_one_is_a_tie(interval: tuple[float, float, float], word: str) -> None:
    assert verdict(Interval(*interval)) == word
