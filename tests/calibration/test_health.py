"""Findings on a calibration: each kind is found where it is, and not where it is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cnncc.calibration.health import DEAD, ENOUGH_SAMPLES, examine, settled
from cnncc.calibration.histogram import Histogram
from cnncc.calibration.observations import Observations
from cnncc.calibration.observe import observe
from cnncc.calibration.table import Finding, GroupRecord, counts_text
from cnncc.calibration.thresholds import percentile
from tests.calibration.graphs import Array, Net, classifier, images, stream_of

TENSORS = ("x", "relu_1", "relu_3", "flatten_7")


def record(name: str, histogram: Histogram, **changes: Any) -> GroupRecord:
    values: dict[str, Any] = {
        "tensors": (name,),
        "read": (name,),
        "module": f"net.{name}",
        "exponent": histogram.exponent,
        "counts": counts_text(histogram),
        "largest": histogram.largest,
        "lowest": histogram.lowest,
        "channels": histogram.channels.size,
        "dead": int((histogram.channels == 0).sum()),
        "thresholds": {},
        "method": "max",
        "threshold": histogram.largest,
        "scale": 1.0,
    }
    return GroupRecord(**{**values, **changes})


def bell(count: int = 20_000, *, seed: int = 0, channels: int = 10) -> Array:
    return np.random.default_rng(seed).standard_normal((1, channels, count // channels)).astype(np.float32)


def findings(
    arrays: dict[str, Array], *, samples: int = 512, course: dict[int, float] | None = None, **changes: Any
) -> list[Finding]:
    """Examine tensors; ``course`` is samples → range, relative to the final one."""
    histograms = {name: Histogram.of(array) for name, array in arrays.items()}
    final = {name: percentile(histogram) for name, histogram in histograms.items()}
    noted = {count: {name: share * final[name] for name in final} for count, share in (course or {}).items()}
    seen = Observations(histograms, samples, course={**noted, samples: final})
    return list(examine([record(name, histogram, **changes) for name, histogram in histograms.items()], seen))


def kinds(found: list[Finding]) -> list[str]:
    return [finding.kind for finding in found]


HEALTHY = {1: 0.8, 256: 0.99}


def test_a_healthy_calibration_has_no_findings() -> None:
    assert findings({"a": bell(), "b": np.maximum(bell(seed=1), 0)}, course=HEALTHY) == []


@pytest.mark.parametrize(("samples", "found"), [(1, True), (ENOUGH_SAMPLES - 1, True), (ENOUGH_SAMPLES, False)])
def test_few_samples_are_found(samples: int, found: bool) -> None:
    [*all_found] = findings({"a": bell()}, samples=samples, course={1: 0.9, samples // 2 or 1: 0.99})
    assert ("few-samples" in kinds(all_found)) is found
    if found:
        assert str(samples) in all_found[0].message
        assert "512" in all_found[0].advice


@pytest.mark.parametrize("course", [{1: 1.0, 2: 1.0, 256: 1.0}, {1: 1.0 + 1e-12, 256: 1.0 - 1e-12}])
def test_samples_that_are_all_alike_are_found(course: dict[int, float]) -> None:
    """Ranges of n times the same image are equal up to the rounding of a percentile."""
    assert kinds(findings({"a": bell(), "b": bell(seed=1)}, course=course)) == ["alike"]


def test_samples_of_one_range_in_one_tensor_only_are_not_alike() -> None:
    arrays = {"a": bell(), "b": bell(seed=1)}
    histograms = {name: Histogram.of(array) for name, array in arrays.items()}
    final = {name: percentile(histogram) for name, histogram in histograms.items()}
    seen = Observations(histograms, 512, course={256: {**final, "b": 0.99 * final["b"]}, 512: final})
    assert kinds(list(examine([record(n, h) for n, h in histograms.items()], seen))) == []


def test_one_sample_cannot_be_like_others() -> None:
    assert kinds(findings({"a": bell()}, samples=1)) == ["few-samples"]


@pytest.mark.parametrize(
    ("course", "found"),
    [
        ({256: 0.85}, True),
        ({256: 0.95}, False),
        ({128: 0.5, 256: 0.95}, False),
        ({256: 1.15}, True),
        ({400: 0.5}, False),  # more than half of the samples
    ],
)
def test_ranges_that_twice_the_data_moves_are_found(course: dict[int, float], found: bool) -> None:
    all_found = findings({"a": bell()}, course=course)
    assert kinds(all_found) == (["unsettled"] if found else [])
    if found:
        assert (all_found[0].module, all_found[0].tensor) == ("net.a", "a")
        assert "256" in all_found[0].message
        assert "512" in all_found[0].message
        assert "15%" in all_found[0].message or "18%" in all_found[0].message


@pytest.mark.parametrize(("outlier", "found"), [(100.0, True), (20.0, False)])
def test_outliers_are_found(outlier: float, found: bool) -> None:
    x = bell(200_000)
    x[0, 0, 0] = outlier
    all_found = findings({"a": x, "b": bell()}, course=HEALTHY)
    assert kinds(all_found) == (["outlier"] if found else [])
    if found:
        assert all_found[0].tensor == "a"
        assert "25 times" in all_found[0].message
        assert "--keep" in all_found[0].advice


@pytest.mark.parametrize(("part", "found"), [(0.3, True), (0.9, False)])
def test_clipping_is_found(part: float, found: bool) -> None:
    x = bell()
    all_found = findings({"a": x}, course=HEALTHY, threshold=part * float(np.abs(x).max()))
    assert kinds(all_found) == (["clipped"] if found else [])
    if found:
        share = float((np.abs(x) > part * np.abs(x).max()).mean())
        assert f"{share:.0%}"[:-1] in all_found[0].message


@pytest.mark.parametrize(("dead", "found"), [(0, False), (1, False), (2, True), (9, True)])
def test_dead_channels_are_found(dead: int, found: bool) -> None:
    x = bell(channels=10)
    x[:, :dead] = 0.0
    all_found = findings({"a": x}, course=HEALTHY)
    assert kinds(all_found) == (["dead-channels"] if found else [])
    assert found == (dead / 10 > DEAD)
    if found:
        assert f"{dead * 10}%" in all_found[0].message


def test_a_tensor_of_zeros_is_constant_and_nothing_else() -> None:
    found = findings({"a": np.zeros((1, 10, 5), np.float32), "b": bell()}, course=HEALTHY)
    assert [(each.kind, each.tensor) for each in found] == [("constant", "a")]


def test_the_worst_tensors_are_named_and_the_others_counted() -> None:
    arrays = {}
    for number in range(8):
        arrays[f"t{number}"] = bell(200_000, seed=number)
        arrays[f"t{number}"][0, 0, 0] = 100.0 * (1 + number)
    found = findings(arrays, course=HEALTHY)
    assert kinds(found) == ["outlier"] * 6
    assert [each.tensor for each in found] == ["t7", "t6", "t5", "t4", "t3", ""]
    assert "3 more tensors" in found[-1].message


def test_every_finding_says_what_to_do() -> None:
    x = bell()
    x[:, :5] = 0.0
    x[0, 9, 0] = 300.0
    found = findings({"a": x}, samples=8, course={1: 0.1, 4: 0.5}, threshold=0.5)
    assert set(kinds(found)) == {"few-samples", "unsettled", "outlier", "clipped", "dead-channels"}
    assert all(each.message and each.advice for each in found)


# ---- on real passes


@pytest.mark.parametrize("count", [2, 3, 5, 10, 33])
@pytest.mark.parametrize("side", [8, 64])
def test_one_image_many_times_is_found_whatever_their_number(count: int, side: int) -> None:
    """Of more than ten thousand elements the percentile lies inside a bin."""
    x = np.repeat(images(1, shape=(3, side, side)), count, axis=0)
    net = Net(1, 3, side, side)
    net.node("Relu", [net.conv("x", 8, "first")], "relu_1")
    seen = observe(net.graph(), ["x", "relu_1"], stream_of(x))
    assert "alike" in kinds(list(examine([record(n, h) for n, h in seen.histograms.items()], seen)))


@pytest.mark.parametrize("count", [2, 3, 5, 10, 33])
def test_images_that_differ_are_not_alike(count: int) -> None:
    seen = observe(classifier(), TENSORS, stream_of(images(count)))
    assert "alike" not in kinds(list(examine([record(n, h) for n, h in seen.histograms.items()], seen)))


def test_the_course_tells_how_much_of_the_range_was_known() -> None:
    seen = observe(classifier(), TENSORS, stream_of(images(20)))
    course = settled(seen)
    assert list(course) == [1, 2, 4, 8, 16, 20]
    assert course[20] == 1.0
    for count, share in course.items():
        ratios = [seen.course[count][name] / seen.course[20][name] for name in TENSORS]
        assert share == pytest.approx(sum(ratios) / len(ratios), abs=1e-6)


def test_a_tensor_that_is_always_zero_is_settled() -> None:
    seen = observe(classifier(), ["x"], stream_of(0 * images(4)))
    assert set(settled(seen).values()) == {1.0}
    assert dataclasses.replace(seen).samples == 4
