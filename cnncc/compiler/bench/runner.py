"""Measures subjects side by side: each in a process of its own, in interleaved rounds of shuffled order.

Interleaving makes whatever disturbs the machine disturb everybody alike; a process each, stopped while others are
measured, keeps thread pools that spin after a run from stealing each other's cores.
"""

from __future__ import annotations

import contextlib
import math
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.compiler.bench.gpu import GpuState, GpuWatch, gpu_noise, summarize_turns
from cnncc.compiler.bench.machine import Machine, describe_machine, read_clocks, read_load
from cnncc.compiler.bench.process import WorkerProcess
from cnncc.compiler.bench.protocol import Measure, Open, Opened, Save, Saved, Timed, Warm
from cnncc.compiler.bench.referee import Referee
from cnncc.compiler.bench.report import (
    SCHEMA,
    BenchmarkReport,
    Interval,
    Latency,
    Noise,
    Ratio,
    SubjectResult,
)
from cnncc.compiler.bench.statistics import paired_ratio, percentile, spread
from cnncc.compiler.bench.subjects import OURS, Subject, engine_size, find_kind
from cnncc.compiler.parity import compare, judge_output
from cnncc_runtime.errors import DataRefused, Interrupted, ParityFailed, RunFailed, UsageError
from cnncc_runtime.specs import Feeds

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done (0 to 1)."""

WAKE_RUNS = 2
"""Unmeasured runs when a subject's turn comes: others have emptied the caches since its last one."""

WARM_UP_S = 10.0
"""Longest warm-up, seconds."""

MAX_RUNS_PER_ROUND = 1000
"""A tiny model's turn ends here, so that a report stays small."""

AGREEMENT_LIMIT = 1e-2
"""Largest relative L2 distance between subjects' outputs. A guard against measuring the wrong model, not a proof:
that is what `cnncc.compiler.parity` is for; int8 engines of one model differ by about this much."""

NOISY_SPREAD = 0.05
"""A machine is noisy when the medians of a subject's rounds scatter by more than this: interleaved figures on shared
machines agree between runs to 5 to 10 %, on quiet ones to 1 to 2 %."""

NOISY_STEAL = 0.01
"""Fraction of CPU time taken by the hypervisor above which a machine is noisy."""

NOISY_OTHERS = 0.2
"""CPUs' worth of other processes' work, beyond what idle cores absorb, above which a machine is noisy.

Measured: with 0.1 of 2 CPUs taken, two workers of the same 2-thread engine agreed to 0.1 %.
"""


MORE_CORES = 0.3
"""Cores beyond its threads on which a subject's process may be busy: some have a helper that watches the others."""


@dataclass(frozen=True)
class _Course:
    """What `run_benchmark` was asked for."""

    feeds: Feeds
    threads: int
    rounds: int
    min_time: float
    seed: int
    timeout: float
    agreement: float
    referee: Referee
    watch: GpuWatch | None = None


@dataclass
class _Turns:
    """What one subject measured so far."""

    subject: Subject
    worker: WorkerProcess
    opened: Opened
    warm: Timed
    outputs: list[NDArray[Any]]
    wall: list[tuple[float, ...]] = field(default_factory=list)
    cpu: list[tuple[float, ...]] = field(default_factory=list)
    device: list[tuple[float, ...]] = field(default_factory=list)
    looks: list[tuple[GpuState, GpuState]] = field(default_factory=list)
    switches: int = 0
    peak: int = 0


def run_benchmark(
    subjects: Sequence[Subject],
    *,
    feeds: Feeds,
    threads: int = 1,
    rounds: int = 12,
    min_time: float = 3.0,
    seed: int = 0,
    timeout: float = 600.0,
    progress: Progress | None = None,
    agreement: float = AGREEMENT_LIMIT,
    referee: Referee | None = None,
    gpu: int | None = None,
) -> BenchmarkReport:
    """Measure subjects and compare the first with every other one.

    Args:
        subjects: Ours first, then its peers; names are unique.
        feeds: One batch of inputs, in the model's order.
        threads: Threads that every subject computes with.
        rounds: Rounds; each measures every subject once, in shuffled order. At least 2.
        min_time: Seconds that each subject is measured for, over all rounds.
        seed: Of the order.
        timeout: Seconds that one step of one subject (opening it, a round) may take.
        progress: Told how far the benchmark is.
        agreement: Largest relative L2 distance between subjects' outputs. An approximation's are only reported.
        referee: Says whether to go on without peers that fail; without one, their errors are raised.
        gpu: The GPU that everyone computes on, in CUDA's order, which is watched; None for a CPU.

    Raises:
        UsageError: No subjects, names that repeat, an unknown kind, or absurd counts.
        DependencyMissing: A peer is not installed.
        DataRefused: There are no feeds.
        ParityFailed: Subjects do not compute the same.
        RunFailed: A subject crashed, hung or ran out of memory; names it.
        Interrupted: Ctrl-C.
    """
    referee = referee or Referee(lenient=False)
    _check(subjects, feeds, threads, rounds, min_time)
    tell = progress or (lambda _what, _fraction: None)
    load, clocks, spent = read_load(), read_clocks(), _cpu_spent()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="cnncc-bench-") as name,
            contextlib.nullcontext() if gpu is None else GpuWatch(gpu) as watch,
        ):
            course = _Course(feeds, threads, rounds, min_time, seed, timeout, agreement, referee, watch)
            turns = _measure(subjects, course, tell, Path(name))
            device = watch.describe() if watch else None
    except KeyboardInterrupt as exc:
        raise Interrupted("the benchmark was interrupted; its processes are gone") from exc
    machine = describe_machine(clocks, read_clocks(), load_before=load, own_cpu_s=_cpu_spent() - spent)
    noise = judge_noise(
        machine,
        {turn.subject.name: turn.wall for turn in turns},
        threads,
        {turn.subject.name: _cores(turn) for turn in turns} if gpu is None else {},  # there, cores wait
    )
    reasons = (*noise.reasons, *gpu_noise({turn.subject.name: summarize_turns(turn.looks) for turn in turns}))
    noise = Noise(bool(reasons), reasons)
    batch = batch_of(feeds)
    basis = "cpu" if gpu is None and threads == 1 and noise.noisy else "wall"
    distances = _agreement(turns)
    return BenchmarkReport(
        SCHEMA,
        threads,
        rounds,
        seed,
        {name: f"{array.dtype}{list(array.shape)}" for name, array in feeds.items()},
        machine,
        noise,
        tuple(_ratio(turns[0], peer, basis) for peer in turns[1:]),
        tuple(_result(turn, batch, distances[turn.subject.name]) for turn in turns),
        referee.refused,
        device,
    )


def _cores(turn: _Turns) -> float:
    return float(np.sum(np.concatenate(turn.cpu)) / np.sum(np.concatenate(turn.wall)))


def judge_noise(
    machine: Machine, rounds: dict[str, list[tuple[float, ...]]], threads: int, cores: dict[str, float]
) -> Noise:
    """Say whether a machine was quiet while it measured.

    Args:
        machine: What it was busy with.
        rounds: Subject → wall times, a tuple per round.
        threads: Threads that were measured with.
        cores: Subject → CPU time over wall time: the cores that it computed on.
    """
    reasons = [
        f"{name} computed on {used:.1f} cores instead of {threads}"
        for name, used in cores.items()
        if used > threads + MORE_CORES
    ]
    reasons += [
        f"{name}: the medians of its rounds scatter by {scatter:.0%}"
        for name, times in rounds.items()
        if (scatter := spread(times)) > NOISY_SPREAD
    ]
    if machine.steal > NOISY_STEAL:
        reasons.append(f"the hypervisor took {machine.steal:.0%} of the CPU time")
    idle_cores = max(0, machine.cores - threads)
    if machine.others > idle_cores + NOISY_OTHERS:
        reasons.append(f"other processes kept {machine.others:.1f} CPUs busy meanwhile")
    if machine.load_before > idle_cores + 0.5:  # half a process may be this one's own start
        reasons.append(f"the load average was {machine.load_before:.1f} on {machine.cores} cores before it began")
    if threads > machine.cores:
        reasons.append(f"{threads} threads share {machine.cores} cores")
    return Noise(bool(reasons), tuple(reasons))


def _check(subjects: Sequence[Subject], feeds: Feeds, threads: int, rounds: int, min_time: float) -> None:
    if not subjects:
        raise UsageError("there is nothing to measure")
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise UsageError(f"subjects' names repeat: {', '.join(names)}")
    if threads < 1 or rounds < 2 or not 0 < min_time < math.inf:
        raise UsageError(
            f"cannot measure with {threads} threads, {rounds} rounds and {min_time:g} s",
            hint="give at least 1 thread, 2 rounds and some time",
        )
    if not feeds:
        raise DataRefused("there are no inputs to run on")
    for subject in subjects:
        find_kind(subject.kind)
        if not subject.path.exists():
            raise UsageError(f"{subject.name}: {subject.path} does not exist")


def _measure(subjects: Sequence[Subject], course: _Course, tell: Progress, folder: Path) -> list[_Turns]:
    inputs = folder / "feeds.npz"
    write_feeds(inputs, course.feeds)
    with contextlib.ExitStack() as stack:
        turns = []
        for number, subject in enumerate(subjects):
            tell(f"opening {subject.name}", 0.3 * number / len(subjects))
            home = folder / str(number)
            home.mkdir()
            worker = stack.enter_context(_worker(subject, course, home))
            with _watched(course, subject, worker):
                turns.append(_open(subject, worker, inputs, course, home))
        _refuse_disagreement(turns, course)
        turns = _staying(turns, course)
        plan = [(turn, _runs_per_round(turn.warm.wall, course.rounds, course.min_time)) for turn in turns]
        for done in _rounds(plan, course):
            tell(f"round {done} of {course.rounds}", (3 + 7 * done / course.rounds) / 10)
        for turn in _staying(turns, course):
            with _watched(course, turn.subject, turn.worker):
                turn.peak = turn.worker.finish()
    return _staying(turns, course)


def _worker(subject: Subject, course: _Course, home: Path) -> WorkerProcess:
    python = find_kind(subject.kind).python
    return WorkerProcess(subject.name, home, threads=course.threads, timeout=course.timeout, python=python)


@contextlib.contextmanager
def _watched(course: _Course, subject: Subject, worker: WorkerProcess) -> Iterator[None]:
    """Do something with a worker, which ends at once where its subject leaves the benchmark."""
    with course.referee.watch(subject.name):
        yield
    if not course.referee.stays(subject.name):
        worker.end()


def _staying(turns: Sequence[_Turns], course: _Course) -> list[_Turns]:
    """Return the subjects that are still there.

    Raises:
        RunFailed: None is.
    """
    staying = [turn for turn in turns if course.referee.stays(turn.subject.name)]
    if not staying:
        raise RunFailed(
            "nobody could be measured", where=[f"{peer.name}: {peer.reason}" for peer in course.referee.refused]
        )
    return staying


def write_feeds(path: Path, feeds: Feeds) -> None:
    """Write inputs as a worker reads them."""
    arrays = {str(n): np.ascontiguousarray(array) for n, array in enumerate(feeds.values())}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def open_engine(subject: Subject, threads: int, inputs: Path, feeds: Feeds) -> Open:
    """Return the command that opens a subject's engine, with inputs that `write_feeds` wrote."""
    kind = find_kind(subject.kind)
    options = {**kind.options, **subject.options}
    return Open(kind.adapter, options, str(subject.path.resolve()), threads, str(inputs), tuple(feeds))


def _open(subject: Subject, worker: WorkerProcess, inputs: Path, course: _Course, home: Path) -> _Turns:
    opened = worker.ask(open_engine(subject, course.threads, inputs, course.feeds), Opened)
    warm = worker.ask(Warm(WARM_UP_S), Timed)
    outputs = home / "outputs.npz"
    saved = worker.ask(Save(str(outputs)), Saved)
    with np.load(outputs, allow_pickle=False) as arrays:
        return _Turns(subject, worker, opened, warm, [arrays[str(number)] for number in range(saved.count)])


def _runs_per_round(warm: Sequence[float], rounds: int, min_time: float) -> int:
    typical = float(np.median(warm[-10:]))
    return max(1, min(MAX_RUNS_PER_ROUND, math.ceil(min_time / rounds / max(typical, 1e-9))))


def _rounds(plan: Sequence[tuple[_Turns, int]], course: _Course) -> Iterator[int]:
    """Measure round by round; yields the number of rounds done."""
    shuffle = random.Random(course.seed)
    for done in range(1, course.rounds + 1):
        for turn, runs in shuffle.sample(plan, len(plan)):
            if course.referee.stays(turn.subject.name):
                with _watched(course, turn.subject, turn.worker):
                    _take_turn(turn, runs, course.watch)
        yield done


def _take_turn(turn: _Turns, runs: int, watch: GpuWatch | None) -> None:
    before = watch.look() if watch else None
    timed = turn.worker.ask(Measure(runs, WAKE_RUNS), Timed)
    after = watch.look() if watch else None
    if before is not None and after is not None:
        turn.looks.append((before, after))
    turn.wall.append(timed.wall)
    turn.cpu.append(timed.cpu)
    if timed.device:
        turn.device.append(timed.device)
    turn.switches += timed.switches


def _reference(turns: Sequence[_Turns]) -> _Turns:
    """Return the subject that the others are compared with: the first peer that runs our very model, or ours."""
    exact = (turn for turn in turns if turn.subject.kind != OURS and not turn.subject.approximate)
    return next(exact, turns[0])


def _agreement(turns: Sequence[_Turns]) -> dict[str, float | None]:
    """Return each subject's largest relative L2 distance to the reference."""
    reference = _reference(turns)
    found: dict[str, float | None] = {}
    for turn in turns:
        pairs = list(zip(reference.outputs, turn.outputs, strict=False))
        same = len(reference.outputs) == len(turn.outputs)
        distance = max((_distance(a, b) for a, b in pairs), default=0.0) if same else math.inf
        found[turn.subject.name] = None if turn is reference else distance
    return found


def _distance(reference: NDArray[Any], found: NDArray[Any]) -> float:
    comparison = compare(reference, found)
    if comparison.problem or comparison.nonfinite or comparison.differing:
        return math.inf
    judged = judge_output("", "", [""], [comparison])
    return judged.max_scaled if judged.rel_l2 is None else judged.rel_l2


def _refuse_disagreement(turns: Sequence[_Turns], course: _Course) -> None:
    """Send away whoever computes something else; where that is an error, name all of them."""
    if not turns:
        return
    reference = _reference(turns)
    bad = {
        turn.subject.name: _difference(reference, turn, distance)
        for turn in turns
        if (distance := _agreement([reference, turn])[turn.subject.name]) is not None
        and distance > _limit(reference.subject, turn.subject, course)
    }
    if not bad:
        return
    message = f"the subjects do not compute what {reference.subject.name} computes"
    hint = "check that all of them were made from the same model; `cnncc verify` says more about ours"
    everyone = ParityFailed(message, where=[f"{name}: {text}" for name, text in bad.items()], hint=hint)
    for name, text in bad.items():
        one = ParityFailed(f"it does not compute what {reference.subject.name} computes: {text}")
        course.referee.refuse(name, one, otherwise=everyone)


def _limit(one: Subject, other: Subject, course: _Course) -> float:
    """Return how far apart two subjects' outputs may lie."""
    return sys.float_info.max if one.approximate or other.approximate else course.agreement


def _difference(reference: _Turns, turn: _Turns, distance: float) -> str:
    if len(reference.outputs) != len(turn.outputs):
        return f"{len(turn.outputs)} outputs instead of {len(reference.outputs)}"
    return "shapes, dtypes or NaN differ" if math.isinf(distance) else f"{distance:.1e} relative L2"


def _ratio(ours: _Turns, peer: _Turns, basis: str) -> Ratio:
    device = Interval(*paired_ratio(ours.device, peer.device)) if ours.device and peer.device else None
    if device is not None and find_kind(peer.subject.kind).times_itself:
        basis = "device"
    return Ratio(
        ours.subject.name,
        peer.subject.name,
        Interval(*paired_ratio(ours.wall, peer.wall)),
        Interval(*paired_ratio(ours.cpu, peer.cpu)),
        basis,
        device,
    )


def _result(turn: _Turns, batch: int, agreement: float | None) -> SubjectResult:
    kind = find_kind(turn.subject.kind)
    wall = summarize_latency(turn.wall)
    return SubjectResult(
        name=turn.subject.name,
        kind=kind.name,
        title=kind.title,
        version=turn.opened.version,
        precision=turn.subject.precision,
        runs=sum(len(times) for times in turn.wall),
        warm_up_runs=len(turn.warm.wall),
        settled=turn.warm.settled,
        wall=wall,
        cpu=summarize_latency(turn.cpu),
        throughput=batch / wall.p50,
        import_s=turn.opened.import_s,
        open_s=turn.opened.open_s,
        peak_resident=turn.peak,
        resident_before=turn.opened.resident_before,
        size=engine_size(turn.subject),
        switches=turn.switches,
        agreement=agreement,
        device=summarize_latency(turn.device) if turn.device else None,
        clock=turn.opened.clock,
        gpu=summarize_turns(turn.looks),
        note=turn.opened.note,
    )


def summarize_latency(rounds: Sequence[Sequence[float]]) -> Latency:
    """Return the latency over all runs, from the seconds of each, a sequence per round."""
    times = [time for one in rounds for time in one]
    return Latency(
        minimum=min(times),
        mean=float(np.mean(times)),
        p50=float(np.median(times)),
        p90=percentile(times, 90),
        p99=percentile(times, 99),
        spread=spread(rounds),
    )


def batch_of(feeds: Feeds) -> int:
    """Return how many samples feeds hold."""
    first = next(iter(feeds.values()))
    return int(first.shape[0]) if first.ndim else 1


def _cpu_spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
