"""The runner and its workers: interleaving, stopping, crashes, and that no child outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cnncc.compiler.bench.process import WorkerProcess
from cnncc.compiler.bench.protocol import Measure, Open, Opened, Timed
from cnncc.compiler.bench.referee import Referee
from cnncc.compiler.bench.report import Refused, from_plain
from cnncc.compiler.bench.runner import run_benchmark
from cnncc.compiler.bench.subjects import KINDS, Kind, Subject, make_subjects
from cnncc_runtime.bundle import to_plain
from cnncc_runtime.errors import DataRefused, DependencyMissing, Interrupted, ParityFailed, RunFailed, UsageError

HERE = Path(__file__).parent
FEEDS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3) + 1}
QUICK = {"rounds": 3, "min_time": 0.01, "timeout": 60.0}


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    """Workers find the fake adapters, and warm up briefly."""
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.setattr("cnncc.compiler.bench.runner.WARM_UP_S", 0.01)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Register a fake kind and return a subject of it."""

    def make(adapter: str, name: str = "", **options: str) -> Subject:
        name = name or adapter.lower()
        monkeypatch.setitem(KINDS, name, Kind(name, adapter, f"fake_adapters:{adapter}", "numpy", "", "onnx", options))
        path = tmp_path / "model"
        path.write_bytes(b"12345678")
        return Subject(name, name, path)

    return make


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return state(pid) != "Z"  # a zombie that its new parent has not reaped yet is dead


def state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def pids(mark: Path) -> list[int]:
    return [int(line) for line in mark.read_text().split()]


def wait_until(condition) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


class TestReport:
    def test_has_everyone_and_compares_the_first_with_the_others(self, fake):
        subjects = [fake("Steady", "fast", ms="0.3"), fake("Steady", "slow", ms="3"), fake("Talkative", ms="0.3")]
        steps = []
        report = run_benchmark(
            subjects, feeds=FEEDS, progress=lambda what, fraction: steps.append((what, fraction)), **QUICK
        )
        assert [result.name for result in report.subjects] == ["fast", "slow", "talkative"]
        assert [(r.subject, r.peer) for r in report.ratios] == [("fast", "slow"), ("fast", "talkative")]
        assert 0.03 < report.ratios[0].wall.value < 0.5
        assert report.inputs == {"x": "float32[2, 3]"}
        for result in report.subjects:
            assert result.runs >= 3
            assert result.wall.minimum <= result.wall.p50
            assert result.throughput == pytest.approx(2 / result.wall.p50)
            assert result.peak_resident >= result.resident_before > 1 << 20
            assert result.size == 8
            assert result.cpu.p50 <= result.wall.p50 * 1.5
        assert report.subject("fast").agreement is None
        assert report.subject("slow").agreement == 0
        assert steps[-1] == ("round 3 of 3", 1.0)
        assert [fraction for _, fraction in steps] == sorted(fraction for _, fraction in steps)
        assert from_plain(json.loads(json.dumps(to_plain(report)))) == report

    def test_one_subject_alone_has_no_ratios(self, fake):
        report = run_benchmark([fake("Steady")], feeds=FEEDS, **QUICK)
        assert report.ratios == ()


class TestRounds:
    def test_measure_everyone_equally_often_in_an_order_that_the_seed_decides(self, fake, monkeypatch):
        orders = []
        original = WorkerProcess.ask

        def spy(self, command, wanted):
            if isinstance(command, Measure):
                orders[-1].append(self._name)
            return original(self, command, wanted)

        monkeypatch.setattr(WorkerProcess, "ask", spy)
        subjects = [fake("Steady", name) for name in "abc"]
        for seed in (1, 1, 2):
            orders.append([])
            run_benchmark(subjects, feeds=FEEDS, seed=seed, rounds=4, min_time=0.001)
        for order in orders:
            assert [sorted(order[n : n + 3]) for n in range(0, 12, 3)] == [["a", "b", "c"]] * 4
        assert orders[0] == orders[1] != orders[2]

    def test_all_but_the_measured_one_are_stopped(self, fake, monkeypatch):
        workers = []
        seen = []
        original = WorkerProcess.ask
        monkeypatch.setattr(WorkerProcess, "__enter__", lambda self: workers.append(self) or self)

        def spy(self, command, wanted):
            if isinstance(command, Measure):
                others = [worker for worker in workers if worker is not self]
                assert wait_until(lambda: all(state(worker.pid) == "T" for worker in others))
                seen.append(len(others))
            return original(self, command, wanted)

        monkeypatch.setattr(WorkerProcess, "ask", spy)
        run_benchmark([fake("Steady", name) for name in "ab"], feeds=FEEDS, **QUICK)
        assert seen == [1] * 6


class TestFailures:
    @pytest.mark.parametrize(
        ("adapter", "error", "words"),
        [
            ("Late", RunFailed, "late: ValueError: shapes do not match"),
            ("Crashes", RunFailed, "crashes was killed by SIGSEGV"),
            ("Killed", RunFailed, "killed was killed, most likely because memory ran out"),
            ("Exits", RunFailed, "exits ended with exit code 7"),
            ("OutOfMemory", RunFailed, "outofmemory: memory ran out"),
            ("NotInstalled", DependencyMissing, "notinstalled: .*a_module_that_does_not_exist"),
        ],
    )
    def test_name_the_subject_and_leave_nobody_behind(self, fake, tmp_path, adapter, error, words):
        mark = tmp_path / "pids"
        with pytest.raises(error, match=words) as caught:
            run_benchmark([fake("Steady", mark=str(mark)), fake(adapter, mark=str(mark))], feeds=FEEDS, **QUICK)
        assert not any(alive(pid) for pid in pids(mark))
        if adapter == "Crashes":
            assert "double free or corruption" in caught.value.where

    def test_a_hang_is_ended_with_all_that_it_started(self, fake, tmp_path):
        mark = tmp_path / "pids"
        with pytest.raises(RunFailed, match="hangs did not answer within 2 s"):
            run_benchmark([fake("Hangs", mark=str(mark))], feeds=FEEDS, **(QUICK | {"timeout": 2.0}))
        assert len(pids(mark)) == 2
        assert wait_until(lambda: not any(alive(pid) for pid in pids(mark)))

    def test_ctrl_c_leaves_nobody_behind(self, fake, tmp_path):
        mark = tmp_path / "pids"

        def interrupt(what, _fraction):
            if what.startswith("round"):
                raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            run_benchmark([fake("Steady", mark=str(mark))], feeds=FEEDS, progress=interrupt, **QUICK)
        assert len(pids(mark)) == 1
        assert not any(alive(pid) for pid in pids(mark))

    def test_workers_die_with_a_parent_that_is_killed(self, tmp_path):
        """Also while they are stopped, as they are between turns."""
        np.savez(tmp_path / "feeds.npz", **{"0": FEEDS["x"]})
        script = """
import pathlib, sys, time
from cnncc.compiler.bench.process import WorkerProcess
from cnncc.compiler.bench.protocol import Open, Opened
home = sys.argv[1]
worker = WorkerProcess("w", pathlib.Path(home), threads=1, timeout=60)
worker.ask(Open("fake_adapters:Steady", {}, home, 1, home + "/feeds.npz", ("x",)), Opened)
print(worker.pid, flush=True)
time.sleep(600)
"""
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            pid = int(parent.stdout.readline())
            assert wait_until(lambda: state(pid) == "T")
            os.kill(parent.pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid))


class TestGpus:
    """Engines that are timed alone too; whether there is a GPU here matters to the watch alone."""

    @pytest.fixture
    def report(self, fake, monkeypatch):
        subjects = [fake("OnGpu", "cnncc", ms="2"), fake("OnGpu", "peer", ms="4"), fake("ByItself", "apart", ms="4")]
        monkeypatch.setitem(KINDS, "apart", replace(KINDS["apart"], needs="", times_itself=True))
        monkeypatch.setattr("cnncc.compiler.bench.subjects.find_trtexec", lambda: "apart")
        return run_benchmark(subjects, feeds=FEEDS, gpu=0, **QUICK)

    def test_both_times_stand_apart_and_what_is_left_is_the_hosts(self, report):
        ours = report.subject("cnncc")
        assert ours.device.p50 == pytest.approx(1e-3)
        assert ours.wall.p50 > 2e-3
        assert ours.overhead == ours.wall.p50 - ours.device.p50
        assert (ours.clock, ours.note) == ("CUDA events", "channels last")

    def test_ratios_of_engines_alone_are_trusted_where_a_peer_times_itself(self, report):
        peer, apart = report.ratios
        assert (peer.basis, apart.basis) == ("wall", "device")
        assert peer.device.value == pytest.approx(0.5)
        assert apart.trusted == apart.device
        assert apart.device.value == pytest.approx(1.0)
        assert report.subject("apart").wall.p50 == pytest.approx(4e-3)

    def test_the_gpu_is_described_or_it_is_said_why_not(self, report):
        assert report.gpu.driver or report.gpu.problem.startswith("its clocks were not watched")
        assert not any("computed on" in reason for reason in report.noise.reasons)
        assert from_plain(json.loads(json.dumps(to_plain(report)))) == report

    def test_on_a_cpu_nothing_of_it_is_said(self, fake):
        report = run_benchmark([fake("Steady", "a"), fake("Steady", "b")], feeds=FEEDS, **QUICK)
        assert (report.gpu, report.ratios[0].device) == (None, None)
        assert (report.subjects[0].device, report.subjects[0].overhead, report.subjects[0].gpu) == (None, None, None)


class TestAgreement:
    def test_a_subject_that_computes_something_else_is_not_measured(self, fake):
        with pytest.raises(ParityFailed, match="do not compute what good computes") as caught:
            run_benchmark([fake("Steady", "good"), fake("Steady", "bad", factor="2.1")], feeds=FEEDS, **QUICK)
        assert caught.value.where == ("bad: 5.0e-02 relative L2",)

    def test_rounding_is_no_disagreement(self, fake):
        report = run_benchmark([fake("Steady", "a"), fake("Steady", "b", factor="2.000001")], feeds=FEEDS, **QUICK)
        assert 0 < report.subject("b").agreement < 1e-5

    def test_may_be_asked_to_be_closer(self, fake):
        subjects = [fake("Steady", "a"), fake("Steady", "b", factor="2.01")]
        assert run_benchmark(subjects, feeds=FEEDS, **QUICK).subject("b").agreement == pytest.approx(5e-3, rel=0.01)
        with pytest.raises(ParityFailed):
            run_benchmark(subjects, feeds=FEEDS, agreement=1e-3, **QUICK)

    def test_an_approximation_is_nobodys_reference_and_may_be_far_away(self, fake):
        far, other = (
            replace(fake("Steady", "far", factor="4"), approximate=True),
            fake("Steady", "other", factor="2.01"),
        )
        report = run_benchmark([fake("Steady", "ours"), far, other], feeds=FEEDS, **QUICK)
        assert report.subject("far").agreement == pytest.approx(1)
        report = run_benchmark([far, other], feeds=FEEDS, **QUICK)
        assert report.subject("other").agreement is None
        assert report.subject("far").agreement == pytest.approx(0.99, rel=0.01)

    def test_an_approximation_that_is_not_finite_is_not_measured(self, fake):
        bad = replace(fake("Steady", "bad", factor="nan"), approximate=True)
        with pytest.raises(ParityFailed, match="NaN differ"):
            run_benchmark([fake("Steady", "ours"), bad], feeds=FEEDS, **QUICK)

    def test_what_a_subject_multiplies_stands_in_the_report(self, fake):
        report = run_benchmark([replace(fake("Steady"), precision="int8")], feeds=FEEDS, **QUICK)
        assert report.subject("steady").precision == "int8"

    def test_nan_is_a_disagreement(self, fake):
        with pytest.raises(ParityFailed, match="NaN differ"):
            run_benchmark([fake("Steady", "a"), fake("Steady", "b", factor="nan")], feeds=FEEDS, **QUICK)


class TestLeniency:
    """Benchmarks that go on without peers that fail, and say why."""

    @pytest.mark.parametrize(
        ("adapter", "reason"),
        [
            ("Late", "ValueError: shapes do not match"),
            ("Crashes", "crashes was killed by SIGSEGV"),
            ("OutOfMemory", "memory ran out"),
            ("NotInstalled", "a_module_that_does_not_exist"),
            ("Hangs", "did not answer within 5 s"),
        ],
    )
    def test_a_peer_that_fails_leaves_and_its_reason_stays(self, fake, tmp_path, adapter, reason):
        mark = tmp_path / "pids"
        subjects = [fake("Steady", "good"), fake(adapter, mark=str(mark)), fake("Steady", "other")]
        report = run_benchmark(subjects, feeds=FEEDS, referee=Referee(lenient=True), **(QUICK | {"timeout": 5.0}))
        assert [result.name for result in report.subjects] == ["good", "other"]
        assert [(r.subject, r.peer) for r in report.ratios] == [("good", "other")]
        [refused] = report.refused
        assert refused.name == adapter.lower()
        assert reason in refused.reason
        if mark.exists():
            assert wait_until(lambda: not any(alive(pid) for pid in pids(mark)))
        assert from_plain(json.loads(json.dumps(to_plain(report)))) == report

    def test_a_peer_that_computes_something_else_leaves(self, fake):
        subjects = [fake("Steady", "good"), fake("Steady", "bad", factor="2.1"), fake("Steady", "nan", factor="nan")]
        report = run_benchmark(subjects, feeds=FEEDS, referee=Referee(lenient=True), **QUICK)
        assert [result.name for result in report.subjects] == ["good"]
        assert [peer.name for peer in report.refused] == ["bad", "nan"]
        assert "it does not compute what good computes: 5.0e-02 relative L2" in report.refused[0].reason

    def test_our_own_failure_is_an_error_all_the_same(self, fake):
        with pytest.raises(RunFailed, match="cnncc: ValueError"):
            run_benchmark([fake("Late", "cnncc"), fake("Steady")], feeds=FEEDS, referee=Referee(lenient=True), **QUICK)

    def test_nobody_left_is_an_error_that_says_why(self, fake):
        with pytest.raises(RunFailed, match="nobody") as caught:
            run_benchmark([fake("Late")], feeds=FEEDS, referee=Referee(lenient=True), **QUICK)
        assert "late: ValueError" in caught.value.where[0]

    def test_who_left_before_is_reported_too_and_may_fail_anew_in_the_next_run(self):
        before = Referee(lenient=True, refused=(Refused("far", "not installed"),))
        run = before.copy()
        run.refuse("near", RunFailed("near: it broke", hint="mend it"))
        assert run.refused == (Refused("far", "not installed"), Refused("near", "it broke – mend it"))
        assert before.stays("near")


class TestRequests:
    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"subjects": 0}, UsageError),
            ({"subjects": 2}, UsageError),
            ({"threads": 0}, UsageError),
            ({"rounds": 1}, UsageError),
            ({"min_time": 0.0}, UsageError),
            ({"feeds": {}}, DataRefused),
        ],
    )
    def test_that_make_no_sense_are_refused(self, fake, change, error):
        subjects = [fake("Steady", "same")] * change.pop("subjects", 1)
        with pytest.raises(error):
            run_benchmark(subjects, **({"feeds": FEEDS} | QUICK | change))

    def test_for_a_missing_file_are_refused(self, tmp_path):
        with pytest.raises(UsageError, match="does not exist"):
            run_benchmark([Subject("ort", "ort", tmp_path / "none.onnx")], feeds=FEEDS, **QUICK)


def test_a_worker_speaks_the_protocol_and_times_what_it_is_asked(tmp_path):
    np.savez(tmp_path / "feeds.npz", **{"0": FEEDS["x"]})
    home = tmp_path / "home"
    home.mkdir()
    with WorkerProcess("w", home, threads=3, timeout=60) as worker:
        command = Open("fake_adapters:Steady", {"ms": "5"}, str(tmp_path), 3, str(tmp_path / "feeds.npz"), ("x",))
        opened = worker.ask(command, Opened)
        assert opened.version == "1.0"
        timed = worker.ask(Measure(4, 2), Timed)
        assert len(timed.wall) == len(timed.cpu) == 4
        assert all(0.005 <= wall < 5 for wall in timed.wall)
        assert worker.finish() > 1 << 20


def test_real_peers_agree(tmp_path):
    import torch

    class Double(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x) * 2

    node = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["r", "r"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    graph = helper.make_graph(node, "double", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    torch.export.save(torch.export.export(Double(), (torch.ones(2, 3),)), tmp_path / "m.pt2")
    subjects = make_subjects(
        None, ["ort", "torch", "torch-channels-last"], onnx=tmp_path / "m.onnx", program=tmp_path / "m.pt2"
    )
    report = run_benchmark(subjects, feeds=FEEDS, threads=2, **QUICK)
    assert [result.agreement for result in report.subjects] == [None, 0, 0]
    assert report.subject("torch").version == torch.__version__
    assert report.subject("torch").import_s > report.subject("ort").import_s / 100


def test_importing_the_library_imports_no_engine():
    modules = ["parity", *(f"bench.{name}" for name in ("runner", "worker", "subjects", "report", "machine"))]
    script = (
        "import sys, importlib\n"
        f"for name in {modules!r}: importlib.import_module('cnncc.compiler.' + name)\n"
        "print(*[name for name in ('torch', 'onnxruntime', 'tvm', 'onnx') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
