"""Measured knobs: what is tried is sound, what is chosen is never slower than the rule's choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc.targets.base import BuildOptions, KernelOptions, Measured, MeasureOptions, Profile
from cnncc.targets.llvm import measured
from cnncc.targets.llvm.candidates import candidates_of
from cnncc.targets.llvm.kernel_database import Conditions, KernelDatabase, Measurement, MethodTimes, Timed
from cnncc.targets.llvm.knobs import DEPTHWISE, DIRECT, WINOGRAD, decode
from cnncc.targets.llvm.machine import Machine, machine_of
from cnncc.targets.llvm.plans import MARGIN, MeasuredPlans, Plans, rule_knobs
from cnncc.targets.llvm.rules import ConvShape
from cnncc.targets.llvm.target import LlvmTarget
from cnncc.targets.llvm.timing import ratio_of
from cnncc.targets.llvm.winograd_rules import network_factor, winograd_plan
from cnncc_runtime.errors import DataRefused
from tests.targets.conformance import feeds_of, graph_of
from tests.targets.llvm.blocked_calls import profile_of
from tests.targets.llvm.running import run_engine

HERE = profile_of("host")
CPUS = ("host", "x86-64-v3", "x86-64")


def square(channels: int, extent: int) -> ConvShape:
    return ConvShape(1, 1, channels, channels, (extent, extent), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (extent, extent))


@st.composite
def shapes(draw: Any) -> ConvShape:
    image = (draw(st.integers(1, 60)), draw(st.integers(1, 60)))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 7)]))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (kernel[0] // 2, kernel[1] // 2) * 2
    output = tuple((image[axis] - 1) // stride[axis] + 1 for axis in (0, 1))
    channels = draw(st.integers(2, 300))
    depthwise = draw(st.booleans())
    return ConvShape(
        draw(st.integers(1, 3)), channels if depthwise else 1, 1 if depthwise else channels,
        1 if depthwise else draw(st.integers(1, 300)), image, kernel, stride, padding, (1, 1), (output[0], output[1]),
    )  # fmt: skip


# ---- what is tried


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("cores", [1, 6])
@given(shape=shapes())
@settings(max_examples=60)
def test_every_candidate_is_sound_and_the_rules_choice_is_the_first(cpu: str, cores: int, shape: ConvShape) -> None:
    machine = replace(machine_of(profile_of(cpu)), cores=cores)
    found = candidates_of(shape, machine, winograd=True)
    assert set(found) & {DIRECT, DEPTHWISE}
    for method, candidates in found.items():
        knobs = [tuple(candidate.plan.numbers) for candidate in candidates]
        assert knobs[0] == tuple(rule_knobs(method, shape, machine))
        assert len(set(knobs)) == len(knobs)
        for numbers in knobs:
            assert decode(method, numbers, shape, machine).numbers == list(numbers)


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        (DIRECT, (57, 1, 1, 1, 1)),  # wider than a row, and more pixels than addresses
        (DIRECT, (14, 9, 1, 1, 1)),  # more blocks than there are
        (DIRECT, (30, 2, 1, 1, 1)),  # more sums than registers
        (DIRECT, (14, 1, 99, 1, 1)),  # a chain that loses digits
        (DIRECT, (14, 1, 1, 225, 1)),  # more tiles than there are
        (DIRECT, (14, 1, 1, 0, 1)),
        (DIRECT, (14, 1, 1, 1)),
        ("winograd-4", (2, 0, 1, 14, 14, 1, 1)),  # another tile size
        ("winograd-4", (4, 0, 15, 14, 14, 1, 1)),
        ("winograd-4", (4, 1, 1, 14, 14, 1, 1)),
        ("winograd-2", (3, 0, 1, 14, 14, 1, 1)),
        ("winograd-2", ()),
        (DEPTHWISE, (60, 1, 1, 0, 0)),
        (DEPTHWISE, (8, 4, 1, 0, 0)),
    ],
)
def test_knobs_that_no_kernel_has_are_refused(method: str, knobs: tuple[int, ...]) -> None:
    shape = square(64, 56)
    if method == DEPTHWISE:
        shape = replace(shape, groups=64, inputs=1, outputs=1)
    machine = machine_of(HERE)
    measurement = Measurement(shape, (MethodTimes(method, Timed(knobs, 1e-3), Timed(knobs, 1e-3)),))  # type: ignore[arg-type]
    with pytest.raises(DataRefused, match="knobs"):
        MeasuredPlans(machine, [measurement]).check()


# ---- what is chosen


def measurement_of(shape: ConvShape, machine: Machine, seconds: dict[str, float]) -> Measurement:
    """Return a measurement in which the rule's knobs are the best of each method."""
    times = []
    for method, value in seconds.items():
        timed = Timed(tuple(rule_knobs(method, shape, machine)), value)
        times.append(MethodTimes(method, timed, timed))  # type: ignore[arg-type]
    return Measurement(shape, tuple(times))


DIRECT_S = 1e-3


def chosen_size(shape: ConvShape, winograd: dict[int, float]) -> int:
    """Return the tile size that measured times lead to, 0 for the direct method."""
    machine = machine_of(HERE)
    seconds = {DIRECT: DIRECT_S} | {WINOGRAD[size]: value for size, value in winograd.items()}
    plans = MeasuredPlans(machine, [measurement_of(shape, machine, seconds)])
    found = plans.choose({"layer": shape}, 1 << 40, 10)
    return found["layer"].size if found else 0


@pytest.mark.parametrize(
    ("winograd", "size"),
    [
        ({2: 0.5e-3, 4: 0.3e-3}, 4),
        ({2: 0.3e-3, 4: 0.5e-3}, 2),  # the rule prefers 4 here
        ({2: 1.2e-3, 4: 1.1e-3}, 0),
        ({2: 0.999e-3, 4: 1.1e-3}, 2),  # the rule has it faster too: no margin is asked for
    ],
)
def test_measured_times_replace_predicted_ones(winograd: dict[int, float], size: int) -> None:
    shape = square(64, 56)
    assert [plan.size for plan in Plans(machine_of(HERE)).choose({0: shape}, 1 << 40, 10).values()] == [4]
    assert chosen_size(shape, winograd) == size


def test_what_the_rule_would_not_take_must_be_faster_by_a_margin() -> None:
    shape, machine = square(2048, 2), machine_of(HERE)
    assert not Plans(machine).choose({0: shape}, 1 << 40, 10)
    assert chosen_size(shape, {2: DIRECT_S * (MARGIN + 0.01)}) == 0
    assert chosen_size(shape, {2: DIRECT_S * (MARGIN - 0.01)}) == 2


@given(data=st.data())
@settings(max_examples=60)
def test_the_choice_is_accurate_fits_and_saves_what_the_rules_choice_saves(data: Any) -> None:
    machine = machine_of(HERE)
    layers = {name: square(*size) for name, size in enumerate([(64, 56), (128, 28), (256, 14), (64, 14), (32, 30)])}
    fraction = st.floats(0.1, 1.5)
    seconds = {
        name: {DIRECT: DIRECT_S * data.draw(fraction)}
        | {method: DIRECT_S * data.draw(fraction) for method in WINOGRAD.values()}
        for name in layers
    }
    budget = data.draw(st.sampled_from([0, 1 << 20, 4 << 20, 1 << 30]))
    plans = MeasuredPlans(machine, [measurement_of(layers[name], machine, seconds[name]) for name in layers])
    chosen, ruled = plans.choose(layers, budget, len(layers)), Plans(machine).choose(layers, budget, len(layers))

    def total(picked: dict[int, Any]) -> float:
        return sum(seconds[n][WINOGRAD[picked[n].size] if n in picked else DIRECT] for n in layers)

    assert sum(plan.added for plan in chosen.values()) <= budget
    assert network_factor(list(chosen.values()), len(layers)) <= 5.0
    assert total(chosen) <= total(ruled) * (1 + 1e-9)


def test_a_layer_that_nobody_measured_is_chosen_by_rule() -> None:
    machine, known, unknown = machine_of(HERE), square(64, 56), square(128, 28)
    plans = MeasuredPlans(machine, [measurement_of(known, machine, {DIRECT: 1e-3, "winograd-4": 2e-3})])
    chosen = plans.choose({"known": known, "unknown": unknown}, 1 << 40, 10)
    assert chosen["unknown"].numbers == winograd_plan(unknown, machine, 4).numbers  # type: ignore[union-attr]
    assert "known" not in chosen or chosen["known"].size != 4
    assert plans.direct(unknown) == Plans(machine).direct(unknown)


def test_noise_makes_no_winner() -> None:
    generator = np.random.default_rng(0)
    base = 1 + 0.2 * generator.random(9)
    ratio, doubt = ratio_of([0.98 * t * f for t, f in zip(base, 1 + 0.1 * generator.random(9), strict=True)], base)
    assert ratio + doubt > MARGIN
    ratio, doubt = ratio_of([0.9 * t for t in base], base)
    assert ratio == pytest.approx(0.9)
    assert ratio + doubt < MARGIN


# ---- measuring, for real


def two_layers() -> OnnxGraph:
    """Return a convolution of Winograd's form and a depthwise one."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.1).astype("float32"), name)
        for name, shape in (("w", (32, 32, 3, 3)), ("d", (32, 1, 3, 3)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "d"], ["y"], "depthwise", group=32, pads=[1] * 4),
    ]
    return graph_of(nodes, {"x": [1, 32, 20, 20]}, {"y": [1, 32, 20, 20]}, weights)


class Run:
    """A measurement of the two layers, and what it said."""

    def __init__(self, database: str = "", budget: float | None = 3.0, profile: Profile = HERE, **kernels: Any) -> None:
        self.kept: list[str] = []
        self.notes: list[str] = []
        self.steps: list[str] = []
        build = BuildOptions(
            profile, kernels=KernelOptions(**kernels), progress=lambda what, _: self.steps.append(what)
        )
        options = MeasureOptions(build, database, "db.json", budget, self.kept.append, self.notes.append)
        self.result: Measured = LlvmTarget(profile).measure(two_layers(), options)


@pytest.fixture(scope="module")
def first() -> Run:
    return Run(budget=30.0)


def conditions() -> Conditions:
    return Conditions.of(HERE, machine_of(HERE))


def test_each_layer_is_kept_as_soon_as_it_is_measured(first: Run) -> None:
    assert (first.result.measured, first.result.reused, first.result.left) == (2, 0, 0)
    assert [len(KernelDatabase.parse(text.encode(), "db").of(conditions())) for text in first.kept] == [1, 2]
    assert first.kept[-1] == first.result.plans
    assert first.steps.count("measure kernels") == 3
    assert first.notes == []


def test_the_best_is_the_rules_choice_or_faster(first: Run) -> None:
    found = KernelDatabase.parse(first.kept[-1].encode(), "db").of(conditions())
    methods = {times.method: times for measurement in found.values() for times in measurement.methods}
    assert set(methods) >= {"direct", "depthwise"}
    for times in methods.values():
        assert times.best == times.rule or times.best.seconds < times.rule.seconds


def test_an_engine_of_measured_kernels_computes_the_same(first: Run, tmp_path: Path) -> None:
    graph = two_layers()
    engine = LlvmTarget(HERE).build(graph, BuildOptions(HERE, measured=first.result.plans), tmp_path)
    feeds = feeds_of(graph)
    (got,) = run_engine(engine, "main", list(feeds.values()))
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-4, atol=1e-4)
    measured_ones = [layer.schedule for layer in engine.layers if layer.schedule.endswith(", measured")]
    assert len(measured_ones) == 2
    ruled = LlvmTarget(HERE).build(graph, BuildOptions(HERE), tmp_path)
    assert not any("measured" in layer.schedule for layer in ruled.layers)


def test_what_is_known_is_not_measured_again(first: Run) -> None:
    again = Run(first.kept[-1])
    assert (again.result.measured, again.result.reused) == (0, 2)
    assert again.kept == []
    assert "measure kernels" not in again.steps
    assert again.result.plans == first.result.plans


def test_without_a_budget_the_database_is_only_looked_up(first: Run) -> None:
    known, unknown = Run(first.kept[-1], None), Run("", None)
    assert (known.result.reused, known.result.left, known.kept) == (2, 0, [])
    assert (unknown.result.reused, unknown.result.left, unknown.result.plans) == (0, 2, "")
    assert any("holds nothing for this network" in note for note in unknown.notes)


def test_the_budget_ends_the_measurement_and_what_is_left_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(measured, "monotonic", lambda: next(moments))
    found = Run(budget=3.0)
    assert (found.result.measured, found.result.left) == (1, 1)
    monkeypatch.undo()
    rest = Run(found.kept[-1], 30.0)
    assert (rest.result.measured, rest.result.reused, rest.result.left) == (1, 1, 0)


def test_a_method_that_was_forbidden_then_is_measured_when_it_is_allowed(first: Run) -> None:
    plain = Run(budget=30.0, winograd=False)
    found = KernelDatabase.parse(plain.kept[-1].encode(), "db").of(conditions())
    assert {times.method for m in found.values() for times in m.methods} == {"direct", "depthwise"}
    allowed = Run(plain.kept[-1], 30.0)
    assert (allowed.result.measured, allowed.result.reused) == (1, 1)
    assert Run(first.kept[-1], 30.0, winograd=False).result.measured == 0


def changed(text: str, **conditions_: Any) -> str:
    """Return a database whose measurements were taken under other conditions."""
    found = KernelDatabase.parse(text.encode(), "db").of(conditions())
    other = KernelDatabase()
    for measurement in found.values():
        other.put(msgspec.structs.replace(conditions(), **conditions_), measurement)
    return other.text().decode()


@pytest.mark.parametrize("other", [{"kernels": "sha256:of other kernels"}, {"tvm": "0.26.0"}])
def test_measurements_of_other_versions_are_not_used_and_that_is_said(first: Run, other: dict[str, Any]) -> None:
    found = Run(changed(first.kept[-1], **other), None)
    assert (found.result.reused, found.result.left, found.result.plans) == (0, 2, "")
    assert any("2 convolutions in db.json were measured with another TVM or other kernels" in n for n in found.notes)


def test_measurements_against_another_choice_of_the_rules_are_not_used(first: Run) -> None:
    found = KernelDatabase.parse(first.kept[-1].encode(), "db").of(conditions())
    database = KernelDatabase()
    for measurement in found.values():
        times = tuple(
            msgspec.structs.replace(t, rule=Timed((*t.rule.knobs[:-1], 99), t.rule.seconds))
            for t in measurement.methods
        )
        database.put(conditions(), Measurement(measurement.shape, times))
    assert Run(database.text().decode(), None).result.left == 2


def test_an_engine_built_for_another_machine_takes_none_of_ours(first: Run) -> None:
    found = Run(first.kept[-1], None, profile_of("x86-64"))
    assert found.result.reused == 0
    assert any("on x86-64" in note for note in found.notes)


def test_hostile_knobs_are_refused_before_a_kernel_is_built(first: Run) -> None:
    found = KernelDatabase.parse(first.kept[-1].encode(), "db").of(conditions())
    database = KernelDatabase()
    for measurement in found.values():
        times = tuple(
            msgspec.structs.replace(t, best=Timed((1000, *t.best.knobs[1:]), 1e-9)) for t in measurement.methods
        )
        database.put(conditions(), Measurement(measurement.shape, times))
    with pytest.raises(DataRefused, match="knobs"):
        Run(database.text().decode(), None)
