"""What the peers' benchmark prints: a block per network, then one line for each and their geometric means."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peak import FP32, UNITS
from cnncc.compiler.bench.report import BenchmarkReport, Interval, Ratio, SubjectResult
from cnncc.compiler.bench.statistics import geometric_mean


@dataclass(frozen=True)
class Runs:
    """One network with one number of threads, measured once or several times over.

    Attributes:
        name: Of the network.
        operations: Of one inference: two for each multiply-add of its convolutions and matrix products.
        peak: Operations per second that this machine's vector units give on as many threads.
        reports: One per run.
        precision: ``fp32``, or ``int8``, whose peak is the integer one, for peers in float too.
    """

    name: str
    operations: int
    peak: float
    reports: tuple[BenchmarkReport, ...]
    precision: str = FP32

    @property
    def threads(self) -> int:
        """Threads that everyone computed with."""
        return self.reports[0].threads

    @property
    def peers(self) -> tuple[str, ...]:
        """Peers that were measured in every run."""
        everyone = [{ratio.peer for ratio in report.ratios} for report in self.reports]
        return tuple(ratio.peer for ratio in self.reports[0].ratios if all(ratio.peer in names for names in everyone))

    @property
    def fastest(self) -> str | None:
        """The peer that our latency exceeds most, or None without peers."""
        return max(self.peers, key=lambda peer: self.versus(peer).value, default=None)

    def ratios(self, peer: str) -> list[Ratio]:
        """Return our ratio to a peer in each run."""
        return [ratio for report in self.reports for ratio in report.ratios if ratio.peer == peer]

    def versus(self, peer: str) -> Interval:
        """Return our latency over a peer's: the median run's value, and the interval that holds those of all runs."""
        found = [ratio.trusted for ratio in self.ratios(peer)]
        value = statistics.median(interval.value for interval in found)
        return Interval(value, min(interval.low for interval in found), max(interval.high for interval in found))

    def spread(self, peer: str) -> str:
        """Return the range of the runs' ratios to a peer, where there are several."""
        values = [ratio.trusted.value for ratio in self.ratios(peer)]
        return f"  {len(values)} runs: {min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""

    def results(self, name: str) -> list[SubjectResult]:
        """Return an engine's figures in each run."""
        return [result for report in self.reports if (result := report.subject(name)) is not None]

    def latency(self, name: str) -> float:
        """Return an engine's median latency in seconds, by the clock that the ratios trust."""
        clocks = {ratio.basis for report in self.reports for ratio in report.ratios}
        by_cpu = clocks == {"cpu"}
        return statistics.median((r.cpu if by_cpu else r.wall).p50 for r in self.results(name))

    def memory(self, name: str) -> int:
        """Return the largest resident set of an engine's process, bytes."""
        return max(result.peak_resident for result in self.results(name))

    def share(self, name: str) -> float:
        """Return the fraction of the machine's peak that an engine's arithmetic would need; Winograd's needs less."""
        return self.operations / self.latency(name) / self.peak


def block(runs: Runs) -> Iterable[str]:
    """Yield a network's lines: every engine's, and the reasons why others are missing."""
    ours = runs.reports[0].subjects[0].name
    threads = f"{runs.threads} thread{'s' if runs.threads > 1 else ''}"
    yield f"{runs.name}, {threads}, {runs.operations / 1e9:.3g} GFLOP"
    yield (
        f"  {'engine':22}{'computes':13}{'ms':>9}{'ours/theirs':>13}  {'95 % interval':16}{'clock':7}{'':8}"
        f"{'% peak':>7}{'MB':>7}"
    )
    for name in (ours, *runs.peers):
        yield _engine(runs, name)
    absent = {peer.name: peer.reason for report in runs.reports for peer in report.refused}
    for name, reason in absent.items():
        yield f"  {name:22}not measured: {reason}"
    for reason in sorted({reason for report in runs.reports for reason in report.noise.reasons}):
        yield f"  noisy machine: {reason}"


def _engine(runs: Runs, name: str) -> str:
    line = f"  {name:22}{runs.results(name)[0].precision:13}{runs.latency(name) * 1e3:>9.3f}"
    if name in runs.peers:
        found = runs.versus(name)
        interval = f"[{found.low:.2f}, {found.high:.2f}]"
        line += f"{found.value:>13.2f}  {interval:16}{runs.ratios(name)[0].basis:7}{verdict(found):8}"
    else:
        line += " " * 46
    line += f"{100 * runs.share(name):>7.0f}{runs.memory(name) / 1e6:>7.0f}"
    return line + (runs.spread(name) if name in runs.peers else "")


def summary(everything: Sequence[Runs]) -> Iterable[str]:
    """Yield the lines about all networks with one number of threads: each against its fastest peer, and the means."""
    measured = [runs for runs in everything if runs.fastest is not None]
    threads = everything[0].threads
    yield (
        f"{f'{threads} thread' + 's' * (threads > 1):22}{'ours, ms':>9}  {'fastest peer':20}{'ours/theirs':>11}  "
        f"{'95 % interval':16}{'':8}{'% peak ours/theirs':>18}{'MB ours/least':>15}"
    )
    for runs in measured:
        yield _line(runs)
    peers = dict.fromkeys(peer for runs in measured for peer in runs.peers)
    for peer in peers:
        ratios = [runs.versus(peer).value for runs in measured if peer in runs.peers]
        yield f"geometric mean of ours / {peer}: {geometric_mean(ratios):.3f} over {len(ratios)} networks"
    if measured:
        best = [runs.versus(runs.fastest or "").value for runs in measured]
        yield f"geometric mean of ours / fastest peer: {geometric_mean(best):.3f} over {len(best)} networks"
        wins = sum(runs.versus(runs.fastest or "").high < 1 for runs in measured)
        yield f"faster than every peer, beyond doubt: {wins} of {len(measured)} networks"
        yield f"peak: {measured[0].peak / 1e9:.0f} {UNITS[measured[0].precision]}, measured"


def _line(runs: Runs) -> str:
    ours, peer = runs.reports[0].subjects[0].name, runs.fastest or ""
    found = runs.versus(peer)
    interval = f"[{found.low:.2f}, {found.high:.2f}]"
    shares = f"{100 * runs.share(ours):.0f} / {100 * runs.share(peer):.0f}"
    least = min(runs.memory(name) for name in runs.peers)
    memory = f"{runs.memory(ours) / 1e6:.0f} / {least / 1e6:.0f}"
    return (
        f"{runs.name:22}{runs.latency(ours) * 1e3:>9.3f}  {peer:20}{found.value:>11.2f}  {interval:16}"
        f"{verdict(found):8}{shares:>18}{memory:>15}{runs.spread(peer)}"
    )


def verdict(found: Interval) -> str:
    """Return the word for a ratio: a tie where its interval holds 1."""
    return "tie" if found.low <= 1 <= found.high else "faster" if found.value < 1 else "slower"
