"""What the accuracy benchmark prints: a block per network, a line per quantizer, and whether we are ahead."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.quantizers.field import OURS
from benchmarks.quantizers.judge import Verdict
from benchmarks.quantizers.process import Cost

OWN = tuple(each.name for each in OURS)


@dataclass(frozen=True)
class Entry:
    """One quantizer on one network and seed.

    Attributes:
        seed: Of the network and its calibration images.
        cost: What the quantizer took; None where it failed.
        verdict: What it made; None where it failed, or where its graph does not run.
        failure: Why; empty otherwise.
    """

    seed: int
    cost: Cost | None = None
    verdict: Verdict | None = None
    failure: str = ""


@dataclass(frozen=True)
class Line:
    """One quantizer on all seeds of a network.

    Attributes:
        quantizer: Its name.
        about: What it does.
        entries: One per seed.
    """

    quantizer: str
    about: str
    entries: tuple[Entry, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Those of the seeds that it did."""
        return tuple(entry.verdict for entry in self.entries if entry.verdict is not None)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every reason, once."""
        return tuple(dict.fromkeys(entry.failure for entry in self.entries if entry.failure))

    @property
    def complete(self) -> bool:
        """Whether it did every seed."""
        return not self.failures and bool(self.entries)

    @property
    def legal(self) -> bool:
        """Whether TensorRT takes what it made."""
        return not any(verdict.faults for verdict in self.verdicts)

    @property
    def quantized(self) -> int:
        """Layers in int8, the fewest of the seeds."""
        return min((verdict.quantized for verdict in self.verdicts), default=0)

    def values(self, of: Callable[[Verdict], float]) -> list[float]:
        """Return a figure of each seed."""
        return [of(verdict) for verdict in self.verdicts]


@dataclass(frozen=True)
class Block:
    """One network.

    Attributes:
        net: Its name.
        metric: ``top-1`` or ``mIoU``.
        about: What it is tested on.
        calibration_images: How many.
        lines: One per quantizer, ours first where it was run.
    """

    net: str
    metric: str
    about: str
    calibration_images: int
    lines: tuple[Line, ...]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean, and the least and greatest where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def block(found: Block) -> Iterable[str]:
    """Yield a network's lines."""
    verdicts = [verdict for line in found.lines for verdict in line.verdicts]
    seeds = max((len(line.entries) for line in found.lines), default=0)
    head = f"{found.net}, {seeds} seed{'s' if seeds != 1 else ''}, {found.calibration_images} calibration images"
    head += f", {found.about}"
    if verdicts:
        longest = max(found.lines, key=lambda line: len(line.verdicts))
        head += f"; fp32 {found.metric} {spread(longest.values(lambda verdict: verdict.reference))}"
    yield head
    yield (
        f"  {'quantizer':20}{found.metric + ', %':22}{'points lost':22}{'SQNR, dB':21}{'int8':>7}"
        f"{'s':>7}{'MB':>7}  TensorRT"
    )
    for line in found.lines:
        yield from _line(line)
    for name in OWN:
        if verdict := margin(found, name):
            yield f"  {verdict}"


def _line(line: Line) -> Iterable[str]:
    if line.verdicts:
        first = line.verdicts[0]
        costs = [entry.cost for entry in line.entries if entry.cost is not None]
        yield (
            f"  {line.quantizer:20}{spread(line.values(lambda verdict: verdict.accuracy)):22}"
            f"{spread(line.values(lambda verdict: verdict.drop)):22}"
            f"{spread(line.values(lambda verdict: verdict.sqnr), 1):21}"
            f"{f'{line.quantized}/{first.layers}':>7}{statistics.median(cost.seconds for cost in costs):>7.0f}"
            f"{max(cost.peak_resident for cost in costs) / 1e6:>7.0f}  {_legality(line)}"
        )
    for reason in line.failures:
        seeds = ", ".join(str(entry.seed) for entry in line.entries if entry.failure == reason)
        yield f"  {line.quantizer:20}failed on seed {seeds}: {reason}"


def _legality(line: Line) -> str:
    faults = sorted({fault for verdict in line.verdicts for fault in verdict.faults})
    return f"no: {', '.join(faults)}" if faults else "yes"


def margin(found: Block, ours: str) -> str:
    """Return how far one of ours is ahead of the best peer that TensorRT takes and that quantizes as many layers.

    Empty where we were not run, or failed.
    """
    own = next((line for line in found.lines if line.quantizer == ours), None)
    if own is None or not own.complete:
        return ""
    peers = [
        line
        for line in found.lines
        if line.quantizer not in OWN and line.complete and line.legal and line.quantized >= own.quantized
    ]
    if not peers:
        return "no peer that TensorRT takes quantizes as many layers"
    best = max(peers, key=lambda line: statistics.fmean(line.values(lambda verdict: verdict.sqnr)))
    ahead = [a.sqnr - b.sqnr for a, b in zip(own.verdicts, best.verdicts, strict=True)]
    return f"{ours} beyond {best.quantizer}, the best at this coverage: {spread(ahead, 1)} dB"
