"""Records of a benchmark, and the budgets that a report can be held to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cnncc.compiler.bench.gpu import Gpu, GpuTurns
from cnncc.compiler.bench.machine import Machine
from cnncc_runtime.errors import BudgetExceeded, BundleRefused, UsageError

SCHEMA = "cnncc.benchmark/3"


@dataclass(frozen=True)
class Latency:
    """Seconds per run over all measured runs.

    Attributes:
        minimum: Fastest run.
        mean: Arithmetic mean.
        p50: Median.
        p90: 90th percentile; None with fewer than 10 runs.
        p99: 99th percentile; None with fewer than 100 runs.
        spread: Median absolute deviation of the rounds' medians, relative to their median.
    """

    minimum: float
    mean: float
    p50: float
    p90: float | None
    p99: float | None
    spread: float


@dataclass(frozen=True)
class SubjectResult:
    """One engine's figures.

    Attributes:
        name: As the report calls it.
        kind: Key of `cnncc.compiler.bench.subjects.KINDS`.
        title: As tables show it.
        version: Of its library.
        precision: What it multiplies: ``fp32``, ``fp16``, ``bf16``, ``int8``, or ``fp32, Q/DQ``: floats, rounded to
            int8 in between.
        runs: Measured runs.
        warm_up_runs: Runs before them.
        settled: Whether the warm-up's latency settled before its time was up.
        wall: Wall time per run.
        cpu: CPU time of the whole process per run.
        throughput: Samples per second (batch size / median wall time).
        import_s: Seconds to import the library.
        open_s: Seconds to open the engine, once imported; for torch.compile, to compile it.
        peak_resident: Largest resident set of its process, bytes.
        resident_before: Resident set before its library was imported (Python and NumPy), bytes.
        size: Bytes of the engine file.
        switches: Involuntary context switches during the measured runs.
        agreement: Relative L2 distance of its outputs to the first reference's; None for that reference.
        device: Time of the engine alone per run, its inputs on the GPU and its outputs staying there; None on a CPU.
        clock: What that was taken by: ``CUDA events``, ``the host's clock`` or, in a program that times itself,
            ``its own clock``. That program's ``wall`` is then the sum of the copies and of the engine.
        gpu: The GPU around its turns; None where it was not watched.
        note: What its library chose when it was opened.
    """

    name: str
    kind: str
    title: str
    version: str
    precision: str
    runs: int
    warm_up_runs: int
    settled: bool
    wall: Latency
    cpu: Latency
    throughput: float
    import_s: float
    open_s: float
    peak_resident: int
    resident_before: int
    size: int
    switches: int
    agreement: float | None
    device: Latency | None = None
    clock: str = ""
    gpu: GpuTurns | None = None
    note: str = ""

    @property
    def overhead(self) -> float | None:
        """Seconds of a median run that are not the engine's own: copies to and from the GPU, and the host's work."""
        return None if self.device is None else self.wall.p50 - self.device.p50


@dataclass(frozen=True)
class Interval:
    """A ratio of medians with its 95 % confidence interval (bootstrap over paired rounds).

    Attributes:
        value: The ratio.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Our latency over a peer's; below 1 we are faster.

    Attributes:
        subject: Ours.
        peer: Theirs.
        wall: Of wall times.
        cpu: Of CPU times.
        basis: Which of them to trust: ``cpu`` for one thread on a noisy machine, ``device`` for a peer that times
            itself on a GPU, else ``wall``.
        device: Of the times of the engines alone; None where one of them is not timed so.
    """

    subject: str
    peer: str
    wall: Interval
    cpu: Interval
    basis: str
    device: Interval | None = None

    @property
    def trusted(self) -> Interval:
        """The ratio that ``basis`` names."""
        if self.basis == "device" and self.device is not None:
            return self.device
        return self.cpu if self.basis == "cpu" else self.wall


@dataclass(frozen=True)
class Refused:
    """A peer that was asked for and not measured.

    Attributes:
        name: As ``--against`` takes it.
        reason: Why, as its error says it.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Noise:
    """Whether the machine was quiet.

    Attributes:
        noisy: Whether differences of a few per cent mean nothing here.
        reasons: Sentences; empty on a quiet machine.
    """

    noisy: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkReport:
    """A benchmark.

    Attributes:
        schema: `SCHEMA`.
        threads: Threads that every subject computed with.
        rounds: Rounds, each of which measured every subject once.
        seed: Of the order within rounds.
        inputs: Name → dtype and shape.
        machine: Where it ran.
        noise: Whether to believe it.
        ratios: Ours against every peer.
        subjects: Everyone's figures.
        refused: Peers that could not be measured, where that was not an error.
        gpu: The GPU that everyone computed on; None for a CPU.
    """

    schema: str
    threads: int
    rounds: int
    seed: int
    inputs: dict[str, str]
    machine: Machine
    noise: Noise
    ratios: tuple[Ratio, ...]
    subjects: tuple[SubjectResult, ...]
    refused: tuple[Refused, ...] = ()
    gpu: Gpu | None = None

    def subject(self, name: str) -> SubjectResult | None:
        """Return one engine's figures, or None."""
        return next((subject for subject in self.subjects if subject.name == name), None)


def from_plain(value: Any) -> BenchmarkReport:
    """Read a report back from plain data (the content of ``benchmark.json``).

    Raises:
        BundleRefused: Another schema, or not a report.
    """
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise BundleRefused(f"the benchmark's schema is not '{SCHEMA}'", hint="measure again with `cnncc bench`")
    try:
        return msgspec.convert(value, BenchmarkReport)
    except msgspec.ValidationError as exc:
        raise BundleRefused(f"the benchmark is not valid: {exc}", hint="measure again with `cnncc bench`") from exc


def parse_budgets(texts: Iterable[str]) -> dict[str, float]:
    """Read budgets like ``ort=1.0``.

    Returns:
        Peer → largest allowed ratio of our latency to the peer's.

    Raises:
        UsageError: Not PEER=NUMBER with a positive number, or a peer named twice.
    """
    budgets: dict[str, float] = {}
    for text in texts:
        peer, _, number = text.partition("=")
        try:
            ratio = float(number)
        except ValueError:
            ratio = math.nan
        if not peer or not math.isfinite(ratio) or ratio <= 0 or peer in budgets:
            raise UsageError(f"'{text}' is not a latency budget", hint="give PEER=RATIO once per peer, as in ort=1.0")
        budgets[peer] = ratio
    return budgets


def check_budget(report: BenchmarkReport, budgets: Mapping[str, float]) -> None:
    """Hold our latency to budgets relative to peers.

    The ratio judged is the one that the report trusts (`Ratio.basis`).

    Args:
        report: A benchmark.
        budgets: Peer → largest allowed ratio of our median latency to the peer's.

    Raises:
        UsageError: A peer was not measured.
        BudgetExceeded: Names every peer whose budget was missed.
    """
    ratios = {ratio.peer: ratio for ratio in report.ratios}
    if unknown := sorted(set(budgets) - set(ratios)):
        raise UsageError(
            f"no such peer was measured: {', '.join(unknown)}",
            hint=f"measured were {', '.join(ratios) or 'no peers'}; add them with --against",
        )
    missed = [_miss(ratios[peer], limit) for peer, limit in budgets.items() if ratios[peer].trusted.value > limit]
    if missed:
        hint = "the machine was noisy: measure again on a quiet one" if report.noise.noisy else ""
        raise BudgetExceeded("the engine is slower than its budget allows", where=missed, hint=hint)


def _miss(ratio: Ratio, limit: float) -> str:
    found = ratio.trusted
    text = (
        f"{ratio.subject} takes {found.value:.3g} × the time of {ratio.peer} ({ratio.basis} time, 95 % interval "
        f"{found.low:.3g} to {found.high:.3g}); allowed is {limit:.3g}"
    )
    return text + (", which the interval does not rule out" if found.low <= limit else "")
