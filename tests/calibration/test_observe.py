"""One pass over the data: what it sees, whoever computes it, wherever it was cut short; what it refuses; memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.calibration import observe as observe_module
from cnncc.calibration import taps as taps_module
from cnncc.calibration.histogram import Histogram
from cnncc.calibration.observations import Observations
from cnncc.calibration.observe import batch_of, observe, observe_batches
from cnncc.calibration.stream import DataStream, batches
from cnncc.calibration.taps import Taps
from cnncc.calibration.thresholds import percentile
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import DataRefused, ModelRefused
from tests.calibration.graphs import Net, classifier, feeds_of, images, run, stream_of
from tests.graph.graphs import graph_of

TENSORS = ("x", "relu_1", "relu_3", "flatten_7", "head")
"""Of `classifier`: an input, tensors inside, an output."""


def assert_same(one: Observations, other: Observations) -> None:
    assert (one.samples, one.position, one.course) == (other.samples, other.position, other.course)
    assert one.histograms.keys() == other.histograms.keys()
    for name, histogram in one.histograms.items():
        assert_equal(histogram, other.histograms[name])


def assert_equal(one: Histogram, other: Histogram) -> None:
    assert (one.exponent, one.largest, one.lowest) == (other.exponent, other.largest, other.lowest)
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_array_equal(one.channels, other.channels)


# ---- what it sees


def test_each_tensor_s_histogram_is_that_of_all_its_values() -> None:
    graph, x = classifier(), images(7)
    seen = observe(graph, TENSORS, stream_of(x))
    values = [{**feeds, **run(graph.with_outputs(TENSORS[1:]), feeds)} for feeds in feeds_of(x)]
    for name in TENSORS:
        assert_equal(seen.histograms[name], Histogram.of(np.concatenate([each[name] for each in values])))
    assert seen.samples == 7
    assert seen.position.drawn == 7


def test_the_course_is_noted_at_every_power_of_two_and_at_the_end() -> None:
    graph, x = classifier(), images(11)
    seen = observe(graph, TENSORS, stream_of(x))
    assert list(seen.course) == [1, 2, 4, 8, 11]
    for count, now in seen.course.items():
        part = observe(graph, TENSORS, stream_of(x[:count]))
        assert now == {name: percentile(histogram) for name, histogram in part.histograms.items()}


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_the_number_of_workers_changes_nothing(workers: int) -> None:
    graph, x = classifier(), images(21)
    assert_same(observe(graph, TENSORS, stream_of(x), workers=workers), observe(graph, TENSORS, stream_of(x)))


def test_a_fixed_batch_sees_what_single_samples_show() -> None:
    x = images(12)
    one, four = observe(classifier(1), TENSORS, stream_of(x)), observe(classifier(4), TENSORS, stream_of(x))
    np.testing.assert_array_equal(four.histograms["x"].counts, one.histograms["x"].counts)
    assert four.histograms["head"].total == one.histograms["head"].total
    assert four.samples == 12
    assert list(four.course) == [4, 8, 12]


def test_what_does_not_fill_a_fixed_batch_is_left_out() -> None:
    x = images(11)
    assert observe(classifier(4), TENSORS, stream_of(x)).samples == 8
    with pytest.raises(DataRefused, match="too few samples"):
        observe(classifier(4), TENSORS, stream_of(x[:3]))


def test_the_data_s_digest_is_known_afterwards() -> None:
    stream = stream_of(images(3))
    observe(classifier(), TENSORS, stream)
    assert stream.digest.startswith("sha256:")


def test_progress_is_told_up_to_the_end() -> None:
    told: list[tuple[str, float]] = []
    observe(classifier(), TENSORS, stream_of(images(9)), progress=lambda what, share: told.append((what, share)))
    shares = [share for _what, share in told]
    assert shares == sorted(shares)
    assert told[-1] == ("observed 9 samples", 1.0)


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (4, 4), ("N", 1)])
def test_a_symbolic_batch_is_one_sample(batch: Any, size: int) -> None:
    assert batch_of(classifier(batch)) == size


def test_samples_in_memory_show_what_a_pass_over_them_does() -> None:
    graph, x = classifier(), images(5)
    found = observe_batches(graph, TENSORS, list(batches(stream_of(x), 1)))
    for name, histogram in observe(graph, TENSORS, stream_of(x)).histograms.items():
        np.testing.assert_allclose(found[name].largest, histogram.largest, rtol=1e-6)
        assert found[name].total == histogram.total


# ---- cut short


def interrupted(stream: DataStream, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        observe(classifier(), TENSORS, stream, **options)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 12, 14])
@pytest.mark.parametrize("workers", [(1, 1), (1, 2), (3, 1)])
def test_a_pass_that_was_cut_short_goes_on_to_the_same_result(
    stop: int, workers: tuple[int, int], tmp_path: Path
) -> None:
    x, leftover = images(15), tmp_path / "cache" / "pass.npz"
    whole = stream_of(x)
    expected = observe(classifier(), TENSORS, whole)
    interrupted(stream_of(x, stop=stop), workers=workers[0], resume=leftover)
    assert leftover.exists() == (stop >= 4 * workers[0])
    resumed = stream_of(x)
    assert_same(observe(classifier(), TENSORS, resumed, workers=workers[1], resume=leftover), expected)
    assert resumed.digest == whole.digest
    assert list(tmp_path.rglob("*.npz*")) == []


@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_a_pass_may_be_cut_short_again_and_again(stops: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    x, leftover = images(13), tmp_path_factory.mktemp("passes") / "pass.npz"
    for stop in sorted(stops):
        interrupted(stream_of(x, stop=stop), resume=leftover)
    assert_same(
        observe(classifier(), TENSORS, stream_of(x), resume=leftover), observe(classifier(), TENSORS, stream_of(x))
    )
    assert not leftover.exists()


def test_only_what_was_not_observed_is_read_again(tmp_path: Path) -> None:
    leftover, read = tmp_path / "pass.npz", []
    interrupted(stream_of(images(15), stop=9), resume=leftover)
    stream = stream_of(images(15))
    rows = stream._reader.rows

    def counted(start: int) -> Iterator[Any]:
        read.append(start)
        yield from rows(start)

    stream._reader = type("Counted", (), {"rows": staticmethod(counted)})()
    observe(classifier(), TENSORS, stream, resume=leftover)
    assert read == [8]


def test_a_long_pass_saves_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves what it had."""
    monkeypatch.setattr(observe_module, "_SAVE_EVERY", 0.0)
    leftover, there = tmp_path / "pass.npz", []
    observe(
        classifier(),
        TENSORS,
        stream_of(images(12)),
        resume=leftover,
        progress=lambda _what, _share: there.append(leftover.exists()),
    )
    assert there == [False, True, True]
    assert not leftover.exists()


def test_without_a_place_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    interrupted(stream_of(images(9), stop=8))
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_of_other_tensors_is_not_used(tmp_path: Path) -> None:
    leftover, x = tmp_path / "pass.npz", images(9)
    interrupted(stream_of(x, stop=8), resume=leftover)
    assert_same(
        observe(classifier(), TENSORS[:2], stream_of(x), resume=leftover),
        observe(classifier(), TENSORS[:2], stream_of(x)),
    )


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"PK\x03\x04 and no more"])
def test_a_damaged_leftover_is_not_used(damage: bytes, tmp_path: Path) -> None:
    leftover, x = tmp_path / "pass.npz", images(9)
    leftover.write_bytes(damage)
    assert_same(
        observe(classifier(), TENSORS, stream_of(x), resume=leftover), observe(classifier(), TENSORS, stream_of(x))
    )
    assert not leftover.exists()


# ---- refusals


def dividing(batch: int = 1) -> OnnxGraph:
    """``1 / x``, which a convolution reads: infinite where x is zero."""
    net = Net(batch, 3, 4, 4)
    inverse = net.node("Div", [net.constant("one", np.float32(1.0)), "x"], "inverse", 3)
    net.conv(inverse, 2, "last")
    return net.graph()


def with_zero(count: int, place: int) -> Any:
    x = np.abs(images(count, shape=(3, 4, 4))) + 1
    x[place, 1, 2, 3] = 0.0
    return x


@pytest.mark.parametrize("workers", [1, 3])
def test_infinite_activations_are_refused_by_tensor_module_and_sample(workers: int) -> None:
    with pytest.raises(ModelRefused, match=r"'inverse' holds NaN or Inf on x\[3\]") as caught:
        observe(dividing(), ["inverse"], stream_of(with_zero(6, 3)), workers=workers)
    assert caught.value.where == ("net.inverse",)
    assert "float model" in caught.value.hint


def test_of_a_batch_the_samples_are_named_that_it_holds() -> None:
    with pytest.raises(ModelRefused, match=r"on x\[2\] to x\[3\]"):
        observe(dividing(2), ["inverse"], stream_of(with_zero(6, 3)))


def test_samples_in_memory_are_refused_alike() -> None:
    with pytest.raises(ModelRefused, match=r"'inverse' holds NaN or Inf on x\[3\]") as caught:
        observe_batches(dividing(), ["inverse"], list(batches(stream_of(with_zero(6, 3)), 1)))
    assert caught.value.where == ("net.inverse",)


def test_nan_activations_are_refused() -> None:
    net = Net(1, 3, 4, 4)
    net.conv(net.node("Sqrt", ["x"], "root"), 2, "last")
    x = images(4, shape=(3, 4, 4)) ** 2
    x[2] = -1.0
    with pytest.raises(ModelRefused, match=r"'root' holds NaN or Inf on x\[2\]"):
        observe(net.graph(), ["root"], stream_of(x))


def test_what_was_seen_before_a_refusal_is_kept_for_the_next_pass(tmp_path: Path) -> None:
    leftover = tmp_path / "pass.npz"
    with pytest.raises(ModelRefused):
        observe(dividing(), ["inverse"], stream_of(with_zero(9, 6)), resume=leftover)
    assert leftover.exists()


# ---- taps and memory


def test_tensors_beyond_the_bound_are_given_out_in_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds = classifier(), feeds_of(images(1))[0]
    whole = dict(Taps(graph, TENSORS).values(feeds))
    monkeypatch.setattr(taps_module, "_FETCH", 4 * 8 * 8 * 8)
    taps = Taps(graph, TENSORS)
    assert len(taps._runs) == 3
    parts = dict(taps.values(feeds))
    assert list(parts) == list(TENSORS)
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value)


def test_inputs_alone_need_no_run() -> None:
    feeds = feeds_of(images(1))[0]
    [(name, value)] = Taps(classifier(), ["x"]).values(feeds)
    assert name == "x"
    assert value is feeds["x"]


def test_an_input_is_called_by_its_own_name() -> None:
    taps = Taps(classifier(), TENSORS)
    assert taps.place("x") == "x"
    assert taps.place("relu_1") == "net.relu_1"


def test_memory_does_not_grow_with_the_samples() -> None:
    nodes = Net(1, 3, 64, 64)
    nodes.node("Relu", [nodes.node("Relu", ["x"], "a")], "b")
    graph = graph_of(nodes.nodes, nodes.inputs, {}, ["b"])
    one = images(1, shape=(3, 64, 64))

    def peak(count: int) -> int:
        stream = stream_of(np.broadcast_to(one, (count, 3, 64, 64)))
        tracemalloc.start()
        try:
            observe(graph, ["x", "a", "b"], stream)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)
    few, many = peak(32), peak(320)
    # how far the reader is ahead of the worker differs from run to run, by a few samples and their histograms
    assert many - few < 24 * one.nbytes
    assert 24 * one.nbytes < (320 - 32) * one.nbytes / 10


def test_no_more_samples_are_read_ahead_than_workers_can_use() -> None:
    ahead: list[int] = []
    stream, done = stream_of(images(20)), itertools.count()
    read = 0
    rows = stream._reader.rows

    def counted(start: int) -> Iterator[Any]:
        nonlocal read
        for row in rows(start):
            read += 1
            yield row

    stream._reader = type("Counted", (), {"rows": staticmethod(counted)})()
    observe(classifier(), ["x"], stream, progress=lambda _what, _share: ahead.append(read - 4 * (next(done) + 1)))
    assert max(ahead) <= 0
