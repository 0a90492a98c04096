"""Calibration as a whole: what it keeps, what it says, what it refuses, and that it is the same every time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cnncc.calibration import calibrate as calibrate_module
from cnncc.calibration.calibrate import Job, Options, calibrate
from cnncc.calibration.data import open_data
from cnncc.calibration.judge import Judge
from cnncc.calibration.observe import observe
from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.quantize import quantize
from cnncc.calibration.search import Budget
from cnncc.calibration.table import CalibrationTable, histogram_of, table_from_bytes
from cnncc.calibration.thresholds import METHODS
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import BudgetExceeded, CnnccError, DataRefused, ModelRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing
from tests.calibration.graphs import Net, check, classifier, feeds_of, images, node_of, run, stream_of
from tests.graph.graphs import one_node

ALIKE, FEW = "alike", "few-samples"

QUICK: dict[str, Any] = {"method": "max", "equalize": False, "correct_bias": False}
"""Options for tests of what no step changes."""


def job(graph: OnnxGraph | None = None, *, data: Any = None, **changes: Any) -> Job:
    """A job on the classifier; unknown fields are options."""
    fields = {name: changes.pop(name) for name in tuple(changes) if name in Job.__dataclass_fields__}
    stream = data if data is not None else stream_of(images(12))
    return Job(graph or classifier(), "net", "0.0", stream, options=Options(**changes), **fields)


def table_of(graph: OnnxGraph | None = None, **changes: Any) -> CalibrationTable:
    return calibrate(job(graph, **changes))


@functools.cache
def known(make: Callable[[], OnnxGraph], method: str = "auto") -> CalibrationTable:
    """A table that several tests look at."""
    return table_of(make(), method=method)


def kinds(table: CalibrationTable) -> set[str]:
    return {finding.kind for finding in table.health}


def residual() -> OnnxGraph:
    """Residual additions, a pool, a concatenation, ReLU6, a depthwise layer, two outputs."""
    net = Net(1, 3, 8, 8, seed=3)
    low, high = net.constant("low", np.float32(0.0)), net.constant("high", np.float32(6.0))
    trunk = net.node("Relu", [net.conv("x", 8, "stem")], "trunk")
    inner = net.node("Clip", [net.conv(trunk, 8, "depthwise", group=8), low, high])
    total = net.node("Relu", [net.node("Add", [net.conv(inner, 8, "back", kernel=1), trunk], "sum")], "total")
    side = net.node("Relu", [net.conv("x", 4, "side", kernel=1)])
    joined = net.node("Concat", [total, side], "joined", 12, axis=1)
    pooled = net.node("MaxPool", [joined], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    last = net.node("Relu", [net.conv(pooled, 8, "last")], "map")
    net.gemm(net.flat(last), 4, "head")
    return net.graph("head", "map")


# ---- what comes out


@pytest.mark.parametrize(
    ("make", "method"), [(residual, "auto"), (classifier, "auto"), *((classifier, name) for name in METHODS)]
)
def test_a_table_of_every_method_quantizes_the_model_well(method: str, make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    table = known(make, method)
    assert table_from_bytes(table.to_bytes(), "x") == table
    assert table.method == method
    if method != "auto":
        assert {group.method for group in table.groups} == {method}
    quantized = quantize(graph, table, name="net")
    check(quantized)
    judge = Judge(graph, feeds_of(images(12)[:6]))
    assert judge.sqnr(quantized) == pytest.approx(table.sqnr_db, abs=0.01)
    assert table.sqnr_db is not None
    assert table.sqnr_db > 20


@pytest.mark.parametrize("make", [classifier, residual])
def test_a_table_says_what_the_pass_saw(make: Callable[[], OnnxGraph]) -> None:
    graph = make()
    table = table_of(graph, equalize=False)
    plan = plan_for(graph, layers_of(graph))
    read = [tensor for group in plan.groups for tensor in group.read]
    seen = observe(graph, read, stream_of(images(12)))
    assert [(group.tensors, group.read) for group in table.groups] == [(g.tensors, g.read) for g in plan.groups]
    for record in table.groups:
        [name, *others] = record.read
        histogram = histogram_of(record)
        if not others:
            np.testing.assert_array_equal(histogram.counts, seen.histograms[name].counts)
            assert record.channels == seen.histograms[name].channels.size
            assert record.dead == int((seen.histograms[name].channels == 0).sum())
        assert histogram.total == sum(seen.histograms[each].total for each in record.read)
    assert list(table.course) == [1, 2, 4, 8, 12]
    assert table.course[12] == 1.0


def test_a_table_says_what_it_was_made_of() -> None:
    stream = stream_of(images(12))
    contract = Preprocessing(size=(8, 8))
    table = table_of(data=stream, seed=7, preprocessing=contract, **QUICK)
    assert (table.cnncc, table.model.name) == ("0.0", "net")
    assert table.data is not None
    assert (table.data.source, table.data.digest, table.data.samples) == ("memory", stream.digest, 12)
    assert (table.data.seed, table.data.preprocessing) == (7, contract)
    assert (table.data.random, table.data.skipped) == (False, 0)
    assert [(layer.node, layer.module, layer.op) for layer in table.layers] == [
        ("first", "net.first", "Conv"),
        ("second", "net.second", "Conv"),
        ("third", "net.third", "Conv"),
        ("head", "net.head", "Gemm"),
    ]


@pytest.mark.parametrize(("make", "method"), [(classifier, "auto"), (classifier, "max"), (residual, "auto")])
def test_a_step_is_kept_only_where_the_outputs_come_nearer(method: str, make: Callable[[], OnnxGraph]) -> None:
    table = known(make, method)
    assert table.steps
    best = -np.inf
    for step in table.steps:
        assert step.kept == (step.after > step.before + calibrate_module._WORTH)
        best = max(best, step.after if step.kept else step.before)
    final = table.steps[-1]
    assert table.sqnr_db == (final.after if final.kept else final.before)
    kept = {step.step for step in table.steps if step.kept}
    assert bool(table.equalization) == any("equalization" in step for step in kept)
    assert any(layer.bias for layer in table.layers) == ("bias correction" in kept)
    if method == "auto" and "thresholds per tensor" not in kept:
        assert {group.method for group in table.groups} == {"mse"}


def test_float_additions_are_noted_written_and_less_noisy() -> None:
    table, known_table = table_of(residual(), float_adds=True), known(residual)
    assert (table.float_adds, known_table.float_adds) == (True, False)
    assert table.sqnr_db is not None
    assert known_table.sqnr_db is not None
    assert table.sqnr_db > known_table.sqnr_db
    found = quantize(residual(), table_from_bytes(table.to_bytes(), "table"), name="net")
    assert "trunk" in node_of(found, "sum").input


def test_every_step_can_be_left_out() -> None:
    table = table_of(method="mse", equalize=False, correct_bias=False)
    assert not table.shifts
    assert (table.steps, table.equalization, table.relu6_to_relu) == ((), (), False)
    assert not any(layer.bias for layer in table.layers)
    steps = {step.step for step in table_of(correct_bias=False, shift=False).steps}
    assert {step for step in steps if "equalization" not in step} <= {"thresholds per tensor"}
    assert {step.step for step in table_of(equalize=False, method="max").steps} == {"bias correction"}


# ---- the same every time


def test_the_bytes_are_the_same_every_time_and_with_any_number_of_workers() -> None:
    first = known(residual).to_bytes()
    assert table_of(residual()).to_bytes() == first
    assert table_of(residual(), workers=3).to_bytes() == first


@pytest.mark.parametrize("stop", [1, 29])
def test_a_calibration_that_was_cut_short_comes_to_the_same_bytes(stop: int, tmp_path: Path) -> None:
    """While the samples to judge by are read: nothing is left behind."""
    x = images(30)
    expected = table_of(data=stream_of(x), workers=2).to_bytes()
    with pytest.raises(KeyboardInterrupt):
        calibrate(job(data=stream_of(x, stop=stop), resume=tmp_path))
    assert table_of(data=stream_of(x), resume=tmp_path, workers=2).to_bytes() == expected
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_was_cut_short_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the pass itself, behind the samples that steps are judged by."""
    monkeypatch.setattr(calibrate_module, "_FEWEST", 2)
    monkeypatch.setattr(calibrate_module, "_MOST", 2)
    x = images(30)
    expected = table_of(data=stream_of(x)).to_bytes()
    with pytest.raises(KeyboardInterrupt):
        calibrate(job(data=stream_of(x, stop=21), resume=tmp_path))
    [leftover] = tmp_path.iterdir()
    assert leftover.suffix == ".npz"
    assert table_of(data=stream_of(x), resume=tmp_path).to_bytes() == expected
    assert list(tmp_path.iterdir()) == []


def test_another_calibration_s_leftover_is_not_taken_up(tmp_path: Path) -> None:
    plain = job(resume=tmp_path)
    others = [
        job(classifier(seed=1), resume=tmp_path),
        job(data=stream_of(images(13)), resume=tmp_path),
        job(validation=stream_of(images(3)), resume=tmp_path),
        job(keep=("head",), resume=tmp_path),
        job(equalize=False, resume=tmp_path),
        Job(classifier(), "net", "0.1", stream_of(images(12)), resume=tmp_path),
    ]
    names = {each.leftover("pass.npz") for each in (plain, *others)}
    assert len(names) == 7
    assert job(resume=tmp_path, workers=5).leftover("pass.npz") == plain.leftover("pass.npz")
    assert job().leftover("pass.npz") is None


# ---- layers in float


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (("head",), {"head"}),
        (("net.head",), {"head"}),
        (("net.*ir*",), {"first", "third"}),
        (("net.first", "sec*"), {"first", "second"}),
    ],
)
def test_layers_stay_in_float_where_it_is_asked(patterns: tuple[str, ...], kept: set[str]) -> None:
    table = table_of(keep=patterns, **QUICK)
    assert {layer.node for layer in table.kept} == kept
    assert all((layer.precision, layer.why, layer.bias) == ("fp32", "asked", "") for layer in table.kept)
    quantized = quantize(classifier(), table, name="net")
    assert sum(node.op_type == "DequantizeLinear" for node in quantized.nodes) == (4 - len(kept)) + len(table.scales)


def test_a_pattern_that_names_no_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--keep net\.haed names no layer") as caught:
        table_of(keep=("head", "net.haed"))
    assert "net.first, net.second" in caught.value.hint


def test_every_layer_in_float_is_refused_as_what_was_asked() -> None:
    with pytest.raises(UsageError, match="--keep leaves no layer to quantize"):
        table_of(keep=("*",))


# ---- budgets


def test_layers_are_kept_in_float_until_the_budget_is_met(tmp_path: Path) -> None:
    free = known(residual)
    assert free.sqnr_db is not None
    least = free.sqnr_db + 3
    table = table_of(residual(), budget=Budget(sqnr_db=least), resume=tmp_path)
    assert table.sqnr_db is not None
    assert table.sqnr_db >= least
    assert 0 < len(table.kept) < len(table.layers)
    assert {layer.why for layer in table.kept} == {"budget"}
    quantized = quantize(residual(), table, name="net")
    assert Judge(residual(), feeds_of(images(12)[:6])).sqnr(quantized) == pytest.approx(table.sqnr_db, abs=0.01)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(BudgetExceeded, match="no choice of layers"):
        table_of(budget=Budget(sqnr_db=400.0), **QUICK)


def test_a_budget_of_accuracy_needs_data_to_measure_it_on() -> None:
    with pytest.raises(UsageError, match="no accuracy that could drop"):
        table_of(budget=Budget(drop=1.0), **QUICK)


def labelled(graph: OnnxGraph, count: int) -> tuple[NDArray[np.float32], list[int]]:
    x = images(count, seed=9)
    return x, [int(run(graph, feeds)["head"].argmax()) for feeds in feeds_of(x)]


def test_accuracy_is_measured_and_its_budget_is_met() -> None:
    graph = classifier()
    x, labels = labelled(graph, 20)
    validation = stream_of(x, labels)
    table = table_of(graph, validation=validation, budget=Budget(drop=0.0), **QUICK)
    assert table.accuracy is not None
    assert (table.accuracy.metric, table.accuracy.samples, table.accuracy.source) == ("top-1", 20, "memory")
    assert table.accuracy.digest == validation.digest
    assert table.accuracy.fp32 == 100.0
    assert table.accuracy.int8 >= 100.0
    assert table.accuracy.sqnr_db > 20


def test_without_labels_the_agreement_is_measured() -> None:
    table = table_of(validation=stream_of(images(5, seed=9)), **QUICK)
    assert table.accuracy is not None
    assert (table.accuracy.metric, table.accuracy.fp32) == ("agreement", 100.0)


def test_an_output_without_classes_has_no_accuracy_that_could_drop() -> None:
    net = Net()
    net.conv(net.node("Relu", [net.conv("x", 4)]), 1, "y")
    with pytest.raises(UsageError, match="no accuracy that could drop"):
        table_of(net.graph(), validation=stream_of(images(3)), budget=Budget(drop=1.0), **QUICK)


# ---- data


@pytest.mark.parametrize("count", [2, 3, 9, 33])
def test_images_that_are_all_equal_are_told(count: int) -> None:
    table = table_of(data=stream_of(np.repeat(images(1), count, axis=0)), **(QUICK if count > 2 else {}))
    assert ALIKE in kinds(table)
    assert quantize(classifier(), table, name="net")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_image_is_enough_to_try_and_told_to_be_few(count: int) -> None:
    table = table_of(data=stream_of(images(count)))
    assert FEW in kinds(table)
    assert ALIKE not in kinds(table)
    assert table.sqnr_db is not None
    assert table.sqnr_db > 20


def test_enough_images_that_differ_are_healthy() -> None:
    assert not kinds(table_of(data=stream_of(images(64)), **QUICK)) & {FEW, ALIKE}


def test_random_numbers_are_marked() -> None:
    stream = open_data("random", classifier().inputs, None, limit=10)
    table = table_of(data=stream, **QUICK)
    assert table.data is not None
    assert table.data.random
    assert table.data.source == "random"


def test_images_of_zeros_give_scales_that_devices_can_use() -> None:
    table = table_of(data=stream_of(0 * images(10)))
    assert "constant" in kinds(table)
    assert all(scale >= np.finfo(np.float32).tiny for scale in table.scales.values())
    quantized = quantize(classifier(), table, name="net")
    assert np.isfinite(run(quantized, feeds_of(images(1))[0])["head"]).all()


def test_samples_that_were_skipped_are_counted(tmp_path: Path) -> None:
    x = images(12)
    x[4, 0, 0, 0] = np.nan
    np.savez(tmp_path / "x.npz", x=x)
    stream = open_data(str(tmp_path / "x.npz"), classifier().inputs, None, limit=None, skip_bad=True)
    table = table_of(data=stream, **QUICK)
    assert table.data is not None
    assert (table.data.samples, table.data.skipped) == (11, 1)


@pytest.mark.parametrize("batch", [4, "N"])
def test_a_fixed_or_free_batch_is_calibrated(batch: int | str) -> None:
    graph = classifier(batch)
    table = table_of(graph, data=stream_of(images(16)))
    assert table.data is not None
    assert table.data.samples == 16
    quantized = quantize(graph, table, name="net")
    check(quantized)
    assert run(quantized, {"x": images(4)})["head"].shape == (4, 4)


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(DataRefused, match="memory has fewer samples than the model's batch of 4"):
        table_of(classifier(4), data=stream_of(images(3)))


# ---- models


@pytest.mark.parametrize("equalize", [True, False])
@pytest.mark.parametrize("place", [0, 3, 11])
def test_infinite_activations_are_refused_wherever_they_are_met(place: int, equalize: bool) -> None:
    """Among the samples that steps are judged by, and among those that they are fitted on."""
    net = Net(1, 3, 8, 8)
    inverse = net.node("Div", [net.constant("one", np.float32(1.0)), "x"], "inverse", 3)
    net.conv(net.node("Relu", [net.conv(inverse, 4, "first")]), 4, "last")
    x = np.abs(images(12)) + 1
    x[place, 0, 0, 0] = 0.0
    with pytest.raises(ModelRefused, match=rf"'inverse' holds NaN or Inf on x\[{place}\]") as caught:
        table_of(net.graph(), data=stream_of(x), equalize=equalize)
    assert caught.value.where == ("net.inverse",)


@pytest.mark.parametrize("op", ["Relu", "Sigmoid"])
def test_a_model_with_nothing_to_quantize_is_refused(op: str) -> None:
    graph = one_node(op, {"x": (1, 3, 8, 8)})
    with pytest.raises(ModelRefused, match="nothing can be quantized") as caught:
        table_of(graph)
    assert "fp32" in caught.value.hint


def test_a_quantized_model_is_refused() -> None:
    quantized = quantize(classifier(), known(classifier), name="net")
    with pytest.raises(ModelRefused, match="quantized already"):
        table_of(quantized)


def test_an_unknown_method_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="'minmax' is no method") as caught:
        table_of(method="minmax", data=stream_of(images(2), stop=0))
    assert "auto, max" in caught.value.hint


def test_what_is_refused_is_a_refusal_of_cnncc() -> None:
    """A sample of another shape: caught by the stream, told as it is."""
    with pytest.raises(CnnccError):
        table_of(data=stream_of(images(4, shape=(3, 9, 9))))


def test_progress_is_told() -> None:
    told: list[str] = []
    calibrate(job(progress=lambda what, _share: told.append(what)))
    assert any("observed 12 samples" in what for what in told)
    assert any("biases" in what for what in told)
