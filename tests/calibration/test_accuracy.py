"""Accuracy on validation data: top-1, agreement, mIoU, and data that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from cnncc.calibration import accuracy as accuracy_module
from cnncc.calibration.accuracy import AGREEMENT, MIOU, TOP1, Validation
from cnncc.calibration.judge import BEST_DB, Judge
from cnncc.calibration.stream import DataStream
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import DataRefused
from tests.calibration.graphs import Array, Net, classifier, feeds_of, images, run, stream_of
from tests.graph.graphs import graph_of


def passing(*shape: Any) -> OnnxGraph:
    """A graph that gives out its input: what it "computes" is what the test says."""
    return graph_of([helper.make_node("Identity", ["x"], ["y"], name="y")], {"x": shape}, {})


def adding(noise: float, *shape: Any) -> OnnxGraph:
    return graph_of([helper.make_node("Add", ["x", "k"], ["y"], name="y")], {"x": shape}, {"k": np.float32(noise)})


def reversing(*shape: Any) -> OnnxGraph:
    """A graph that gives out minus its input: the least likely class becomes the first."""
    return graph_of([helper.make_node("Neg", ["x"], ["y"], name="y")], {"x": shape}, {})


def logits(count: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


# ---- top-1 and agreement


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 2**16))
def test_top_1_is_the_share_of_samples_whose_first_class_is_the_label(count: int, classes: int, seed: int) -> None:
    x = logits(count, classes, seed=seed)
    labels = np.random.default_rng(seed).integers(0, classes, count).tolist()
    found = Validation(passing("N", classes), stream_of(x, labels)).measure()
    assert found.metric == TOP1
    assert found.value == pytest.approx(100 * float((x.argmax(1) == labels).mean()))
    assert (found.samples, found.sqnr_db) == (count, BEST_DB)


@pytest.mark.parametrize("batch", [1, 4, "N"])
@pytest.mark.parametrize("count", [1, 4, 7, 16, 18])
def test_a_batch_that_is_not_full_counts_its_samples_once(batch: int | str, count: int) -> None:
    model, other = classifier(batch), classifier(batch, seed=1)
    x, labels = images(count), [index % 4 for index in range(count)]
    feeds = feeds_of(x)
    truth = np.concatenate([run(classifier(), each)["head"] for each in feeds])
    found = np.concatenate([run(classifier(seed=1), each)["head"] for each in feeds])
    validation = Validation(model, stream_of(x, labels))
    reached = validation.measure(other)
    assert reached.samples == count
    assert reached.value == pytest.approx(100 * float((found.argmax(1) == labels).mean()))
    assert validation.measure().value == pytest.approx(100 * float((truth.argmax(1) == labels).mean()))
    assert reached.sqnr_db == pytest.approx(Judge(classifier(), feeds).sqnr(classifier(seed=1)), abs=1e-3)


def test_without_labels_it_is_the_agreement_with_the_float_model() -> None:
    x = logits(30, 4)
    validation = Validation(passing(1, 4), stream_of(x))
    assert (validation.measure().metric, validation.measure().value) == (AGREEMENT, 100.0)
    reached = validation.measure(reversing(1, 4))
    assert (reached.metric, reached.value) == (AGREEMENT, 0.0)
    assert validation.measure(adding(0.5, 1, 4)).value == 100.0
    assert validation.measure(adding(0.5, 1, 4)).sqnr_db < BEST_DB


def test_agreement_on_a_map_of_classes_is_counted_per_pixel() -> None:
    x = logits(3, 2, 4, 4)
    half = np.ones((1, 2, 4, 4), np.float32)
    half[..., :2] = -1.0
    flipped = graph_of([helper.make_node("Mul", ["x", "k"], ["y"], name="y")], {"x": (1, 2, 4, 4)}, {"k": half})
    assert Validation(passing(1, 2, 4, 4), stream_of(x)).measure(flipped).value == pytest.approx(50.0)


@pytest.mark.parametrize("shape", [(1,), (1, 3, 3)])
def test_outputs_that_are_no_classes_have_no_metric_but_noise(shape: tuple[int, ...]) -> None:
    found = Validation(passing(1, *shape), stream_of(logits(5, *shape))).measure(adding(0.1, 1, *shape))
    assert (found.metric, found.value, found.samples) == ("", 0.0, 5)
    assert 0 < found.sqnr_db < BEST_DB


def test_classes_of_a_map_of_one_pixel_are_classes() -> None:
    x = logits(6, 3, 1, 1)
    labels = x[:, :, 0, 0].argmax(1).tolist()
    found = Validation(passing(1, 3, 1, 1), stream_of(x, labels)).measure()
    assert (found.metric, found.value) == (TOP1, 100.0)


def test_the_first_output_is_what_counts_and_all_are_in_the_noise() -> None:
    net = Net(1, 3)
    net.node("Identity", ["x"], "first")
    net.node("Neg", ["x"], "second")
    graph = net.graph("first", "second")
    net = Net(1, 3)
    net.node("Identity", ["x"], "first")
    net.node("Add", ["x", net.constant("k", np.float32(1.0))], "second")
    x = logits(6, 3)
    reached = Validation(graph, stream_of(x, x.argmax(1).tolist())).measure(net.graph("first", "second"))
    assert reached.value == 100.0
    assert reached.sqnr_db < 10


# ---- mIoU


def brute_force_miou(found: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]], classes: int) -> float:
    shares = []
    for each in range(classes):
        inside = outside = 0
        for a, b in zip(found, wanted, strict=True):
            for p, q in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
                if 0 <= q < classes:
                    inside += p == each and q == each
                    outside += p == each or q == each
        if outside:
            shares.append(inside / outside)
    return 100.0 * sum(shares) / len(shares) if shares else 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**16), st.sampled_from([255, -1]))
def test_miou_is_that_of_a_count_by_hand(count: int, classes: int, seed: int, unknown: int) -> None:
    random = np.random.default_rng(seed)
    x = logits(count, classes, 3, 4, seed=seed)
    labels = [random.integers(0, classes, (3, 4)).astype(np.int16) for _ in range(count)]
    labels[0][random.random((3, 4)) < 0.4] = unknown
    reached = Validation(passing(1, classes, 3, 4), stream_of(x, labels)).measure()
    assert reached.metric == MIOU
    expected = brute_force_miou([each.argmax(0) for each in x], labels, classes)
    assert reached.value == pytest.approx(expected)


def test_a_perfect_map_reaches_a_hundred_percent_whatever_classes_are_missing() -> None:
    x = logits(2, 5, 4, 4)
    x[:, 3:] -= 100.0
    labels = [each.argmax(0).astype(np.uint8) for each in x]
    assert Validation(passing(1, 5, 4, 4), stream_of(x, labels)).measure().value == 100.0


def test_maps_without_a_known_pixel_reach_nothing() -> None:
    labels = [np.full((2, 2), 255, np.uint8)] * 2
    reached = Validation(passing(1, 3, 2, 2), stream_of(logits(2, 3, 2, 2), labels)).measure()
    assert (reached.metric, reached.value) == (MIOU, 0.0)


# ---- data that does not fit


@pytest.mark.parametrize("labels", [[1, None, 2], [None, None, 1]])
def test_labels_for_some_samples_only_are_refused(labels: list[int | None]) -> None:
    with pytest.raises(DataRefused, match=r"x\[\d\] has (no|a) label, unlike the samples before it") as caught:
        Validation(passing(1, 4), stream_of(logits(3, 4), labels)).measure()
    assert "for all samples or for none" in caught.value.hint


def test_a_map_of_another_size_is_refused() -> None:
    with pytest.raises(DataRefused, match=r"x\[0\]: the map of classes is \[4, 4\], the output \[2, 2\]"):
        labels = [np.zeros((4, 4), np.uint8)]
        Validation(passing(1, 3, 2, 2), stream_of(logits(1, 3, 2, 2), labels)).measure()


@pytest.mark.parametrize("label", [4, 1000, -1])
def test_a_label_that_is_no_class_of_the_output_is_refused(label: int) -> None:
    """As where labels count from 1."""
    with pytest.raises(DataRefused, match=rf"x\[1\] has the label {label}, and the output 4 classes") as caught:
        Validation(passing(1, 4), stream_of(logits(2, 4), [3, label])).measure()
    assert "from 0" in caught.value.hint


def test_one_label_for_a_map_of_classes_is_refused() -> None:
    with pytest.raises(DataRefused, match=r"x\[0\] has one label, and the output is a map of classes \[2, 2\]"):
        Validation(passing(1, 3, 2, 2), stream_of(logits(1, 3, 2, 2), [1])).measure()


# ---- what is computed once


@pytest.mark.parametrize("room", [0, 100, 1 << 20])
def test_the_float_model_s_outputs_are_kept_as_far_as_they_have_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy_module, "_KEPT_BYTES", room)
    x, labels = logits(9, 4), [index % 4 for index in range(9)]
    validation = Validation(passing(1, 4), stream_of(x, labels))
    first = validation.measure(adding(0.3, 1, 4))
    assert len(validation._kept) == min(9, room // 16)
    assert validation.measure(adding(0.3, 1, 4)) == first
    assert validation.measure(reversing(1, 4)).value != first.value


def test_free_sizes_are_run_one_by_one() -> None:
    """Images of different sizes make no batch."""
    x = logits(4, 3, 5, 5)
    assert accuracy_module._batch(passing("N", 3, "H", "W")) == (1, False)
    assert accuracy_module._batch(passing("N", 3, 5, 5)) == (16, False)
    assert accuracy_module._batch(passing(4, 3, 5, 5)) == (4, True)
    labels = [each.argmax(0).astype(np.uint8) for each in x]
    stream: DataStream = stream_of(x, labels)
    assert Validation(passing("N", 3, "H", "W"), stream).measure().value == 100.0
