"""Benchmark records and budgets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cnncc.compiler.bench.machine import Clocks, Machine, describe_machine, read_clocks
from cnncc.compiler.bench.report import (
    SCHEMA,
    BenchmarkReport,
    Interval,
    Latency,
    Noise,
    Ratio,
    SubjectResult,
    check_budget,
    from_plain,
    parse_budgets,
)
from cnncc.compiler.bench.runner import judge_noise
from cnncc_runtime.bundle import to_plain
from cnncc_runtime.errors import BudgetExceeded, BundleRefused, UsageError

MACHINE = Machine("x86_64", "CPU", 4, ("avx2",), "performance", 3000.0, "Linux 6", 0.0, 0.0, 0.0)
LATENCY = Latency(0.9, 1.0, 1.0, 1.1, None, 0.01)
RESULT = SubjectResult(
    "cnncc", "cnncc", "cnncc", "1", "fp32", 50, 9, True, LATENCY, LATENCY, 1.0, 0.1, 0.2, 9, 8, 7, 0, None
)


def report(*ratios: Ratio, noisy: bool = False) -> BenchmarkReport:
    noise = Noise(noisy, ("busy",) if noisy else ())
    return BenchmarkReport(SCHEMA, 1, 12, 0, {"x": "float32[1]"}, MACHINE, noise, ratios, (RESULT,))


def ratio(peer: str, wall: float, cpu: float, basis: str = "wall", width: float = 0.02) -> Ratio:
    return Ratio("cnncc", peer, *(Interval(v, v - width, v + width) for v in (wall, cpu)), basis)


class TestBudget:
    def test_within_passes(self):
        check_budget(report(ratio("ort", 0.8, 0.8), ratio("torch", 1.0, 1.0)), {"ort": 1.0, "torch": 1.0})

    def test_every_miss_is_named(self):
        with pytest.raises(BudgetExceeded) as caught:
            check_budget(report(ratio("ort", 1.2, 1.2), ratio("mnn", 1.5, 1.5)), {"ort": 1.0, "mnn": 1.4})
        assert [("ort" in line, "mnn" in line) for line in caught.value.where] == [(True, False), (False, True)]
        assert "1.2 × the time of ort (wall time, 95 % interval 1.18 to 1.22); allowed is 1" in caught.value.where[0]

    def test_the_trusted_ratio_is_judged(self):
        check_budget(report(ratio("ort", 1.5, 0.9, "cpu"), noisy=True), {"ort": 1.0})
        with pytest.raises(BudgetExceeded, match="cpu time") as caught:
            check_budget(report(ratio("ort", 0.9, 1.5, "cpu"), noisy=True), {"ort": 1.0})
        assert "noisy" in caught.value.hint

    def test_a_miss_that_may_be_chance_says_so(self):
        with pytest.raises(BudgetExceeded, match="does not rule out"):
            check_budget(report(ratio("ort", 1.01, 1.0)), {"ort": 1.0})

    def test_of_a_peer_that_was_not_measured_is_a_usage_error(self):
        with pytest.raises(UsageError, match="openvino") as caught:
            check_budget(report(ratio("ort", 0.5, 0.5)), {"openvino": 1.0})
        assert "ort" in caught.value.hint

    def test_is_parsed(self):
        assert parse_budgets(["ort=1.0", "torch-channels-last=0.5"]) == {"ort": 1.0, "torch-channels-last": 0.5}

    @pytest.mark.parametrize(
        "texts",
        [["ort"], ["=1"], ["ort="], ["ort=x"], ["ort=0"], ["ort=-1"], ["ort=nan"], ["ort=inf"], ["ort=1", "ort=2"]],
    )
    def test_that_is_none_is_refused(self, texts):
        with pytest.raises(UsageError, match="not a latency budget"):
            parse_budgets(texts)


class TestJson:
    def test_survives(self):
        original = report(ratio("ort", 0.8, 0.9))
        assert from_plain(json.loads(json.dumps(to_plain(original), allow_nan=False))) == original

    @pytest.mark.parametrize("bad", [None, [], {}, {"schema": "cnncc.benchmark/0"}, {"schema": SCHEMA, "threads": "1"}])
    def test_what_is_no_report_is_refused(self, bad):
        with pytest.raises(BundleRefused):
            from_plain(bad)


class TestNoise:
    QUIET = ((0.001,) * 5,) * 12

    @pytest.mark.parametrize(
        ("change", "threads", "word"),
        [
            ({}, 1, None),
            ({"steal": 0.05}, 1, "hypervisor"),
            ({"others": 3.0}, 1, None),
            ({"others": 3.0}, 4, "other processes"),
            ({"load_before": 2.0}, 1, None),
            ({"load_before": 4.0}, 1, "load average"),
            ({"cores": 2}, 4, "share 2 cores"),
        ],
    )
    def test_says_what_disturbed(self, change, threads, word):
        noise = judge_noise(replace(MACHINE, **change), {"ort": list(self.QUIET)}, threads, {})
        assert noise.noisy == (word is not None)
        assert [word in reason for reason in noise.reasons] == ([True] if word else [])

    def test_names_the_subject_that_takes_more_cores_than_it_was_given(self):
        """Nobody's ratio to it means anything."""
        noise = judge_noise(MACHINE, {"ort": list(self.QUIET)}, 1, {"fair": 1.02, "greedy": 1.9})
        assert noise.reasons == ("greedy computed on 1.9 cores instead of 1",)

    def test_names_the_subject_whose_rounds_scatter(self):
        scattered = [(0.001 * (1 + n % 3),) for n in range(12)]
        noise = judge_noise(MACHINE, {"calm": list(self.QUIET), "wild": scattered}, 1, {})
        assert noise.noisy
        assert [reason.startswith("wild:") for reason in noise.reasons] == [True]


class TestMachine:
    def test_clocks_only_grow(self):
        before, after = read_clocks(), read_clocks()
        assert after.total >= before.total
        assert after.busy >= before.busy

    def test_what_others_used_is_what_we_did_not(self):
        import os

        cpus = os.cpu_count()
        machine = describe_machine(
            Clocks(0, 0, 0), Clocks(5.0 * cpus, 1.0 * cpus, 10.0 * cpus), load_before=0.5, own_cpu_s=2.0 * cpus
        )
        assert machine.others == pytest.approx(0.3 * cpus)
        assert machine.steal == pytest.approx(0.1)
        assert machine.load_before == 0.5

    def test_without_clocks_says_nothing_of_others(self):
        machine = describe_machine(Clocks(0, 0, 0), Clocks(0, 0, 0), load_before=0.0, own_cpu_s=1.0)
        assert (machine.others, machine.steal) == (0.0, 0.0)
