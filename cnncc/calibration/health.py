"""Health of a calibration: what a person should know of the data and the ranges, and can act on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from cnncc.calibration.observations import Observations
from cnncc.calibration.table import Finding, GroupRecord, histogram_of

ENOUGH_SAMPLES = 32
"""Fewer samples seldom hold a tensor's range: on benchmarks/accuracy.py's networks 16 of 512 gave 85 to 102 % of it."""

UNSETTLED = 0.1
"""Share by which twice the data may move a range."""

OUTLIER = 8.0
"""Largest magnitude over the 99.99th percentile, from which on 3 of the 7 bits are spent on a ten-thousandth."""

CLIPPED = 0.01
"""Share of elements beyond the threshold."""

DEAD = 0.1
"""Share of channels that are never anything but zero."""

_SHOWN = 5
"""Tensors named of a kind of finding."""


def settled(seen: Observations) -> dict[int, float]:
    """Return samples → mean over tensors of the range known by then, as a share of the final one."""
    final = seen.course[seen.samples]
    return {count: _mean(_ratio(now[name], final[name]) for name in final) for count, now in seen.course.items()}


def examine(groups: Sequence[GroupRecord], seen: Observations) -> tuple[Finding, ...]:
    """Return findings, the most serious kinds first."""
    return (*_of_data(groups, seen), *_of_tensors(groups, seen))


def _of_data(groups: Sequence[GroupRecord], seen: Observations) -> Iterable[Finding]:
    if seen.samples < ENOUGH_SAMPLES:
        yield Finding(
            "few-samples",
            "",
            "",
            f"{seen.samples} samples: ranges are guessed from little",
            f"give {ENOUGH_SAMPLES} to 512 samples that look like what the device will see",
        )
    if len(seen.course) > 1 and all(_same(now, seen.course[seen.samples]) for now in seen.course.values()):
        yield Finding(
            "alike",
            "",
            "",
            "every sample gives the same ranges: are they all the same image?",
            "check the data: a calibration set must be as varied as what the device will see",
        )
    half = max((count for count in seen.course if 2 * count <= seen.samples), default=0)
    if half:
        moved = {
            name: abs(_ratio(seen.course[half][name], final) - 1.0) for name, final in seen.course[seen.samples].items()
        }
        yield from _named(
            "unsettled",
            groups,
            {name: share for name, share in moved.items() if share > UNSETTLED},
            lambda share: f"{seen.samples} samples moved its range by {share:.0%} from what {half} gave",
            "give more samples, until the ranges stay",
        )


def _of_tensors(groups: Sequence[GroupRecord], seen: Observations) -> Iterable[Finding]:
    final = seen.course[seen.samples]
    outliers, clipped, dead, constant = {}, {}, {}, {}
    for group in groups:
        usual = max((final[name] for name in group.read), default=0.0)
        name = group.tensors[0]
        if group.largest == 0.0:
            constant[name] = 0.0
            continue
        if usual and group.largest / usual > OUTLIER:
            outliers[name] = group.largest / usual
        if (share := histogram_of(group).beyond(group.threshold)) > CLIPPED:
            clipped[name] = share
        if group.dead > DEAD * group.channels:
            dead[name] = group.dead / group.channels
    yield from _named(
        "outlier",
        groups,
        outliers,
        lambda ratio: f"its largest value is {ratio:.0f} times its 99.99th percentile",
        "keep the layers that read it in float (--keep MODULE), or look for what makes the outlier",
    )
    yield from _named(
        "clipped",
        groups,
        clipped,
        lambda share: f"{share:.1%} of its elements lie beyond the threshold",
        "compare --method max, or keep the layers that read it in float (--keep MODULE)",
    )
    yield from _named(
        "dead-channels",
        groups,
        dead,
        lambda share: f"{share:.0%} of its channels are zero on all samples",
        "prune them, or check that the data covers what the model was trained for",
    )
    yield from _named(
        "constant", groups, constant, lambda _: "it is zero on all samples", "check the data, or prune the layer"
    )


def _named(
    kind: str,
    groups: Sequence[GroupRecord],
    found: Mapping[str, float],
    wording: Callable[[float], str],
    advice: str,
) -> Iterator[Finding]:
    """Yield a finding for each of the worst tensors, and one for the number of the others."""
    modules = {name: group.module for group in groups for name in (*group.tensors, *group.read)}
    worst = sorted(found, key=lambda name: -found[name])
    for name in worst[:_SHOWN]:
        yield Finding(kind, modules.get(name, ""), name, wording(found[name]), advice)
    if len(worst) > _SHOWN:
        yield Finding(kind, "", "", f"the same of {len(worst) - _SHOWN} more tensors", advice)


def _same(now: Mapping[str, float], final: Mapping[str, float]) -> bool:
    """Whether ranges are equal: a percentile of n times the same image is, up to its rounding."""
    return all(math.isclose(now[name], final[name], rel_tol=1e-9) for name in final)


def _ratio(now: float, final: float) -> float:
    return now / final if final else 1.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return round(sum(found) / len(found), 6) if found else 1.0
