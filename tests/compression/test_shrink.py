"""Which variant is taken: the front, and budgets."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cnncc.compression.pareto_plot import plot
from cnncc.compression.recipe import Recipe
from cnncc.compression.shrink import Budget, Plan, Point, Shrunk, choose, describe, front_of, lost, shrink
from cnncc.compression.task import task_of
from cnncc.compression.train import Material
from cnncc_runtime.errors import UsageError
from tests.compression.sets import Silence, bars, check_same_weights
from tests.compression.stand_ins import NET, REQUEST, jumpy

TOP_1, ERROR = task_of("classification"), task_of("regression")


def point(seconds: float, metric: float, size: int = 100, share: float = 0.5, precision: str = "fp32") -> Point:
    return Point(share, precision, metric, seconds, (seconds, seconds, seconds), size, 10, "w", f"{seconds}-{metric}")


WHOLE = point(1.0, 0.95, share=0.0)
POINTS = st.lists(st.builds(point, st.floats(0.01, 2), st.floats(0, 1), st.integers(1, 200)), min_size=1, max_size=12)


@given(POINTS, st.sampled_from([TOP_1, ERROR]))
def test_nothing_beats_the_front_and_the_front_beats_all_else(points: list[Point], task: object) -> None:
    front = front_of(points, task)  # type: ignore[arg-type]
    sign = 1 if task is TOP_1 else -1

    def beats(one: Point, other: Point) -> bool:
        as_good = one.ratio[0] <= other.ratio[0] and sign * one.metric >= sign * other.metric
        return as_good and (one.ratio[0] < other.ratio[0] or sign * one.metric > sign * other.metric)

    assert front
    assert not any(beats(one, other) for one in points for other in front)
    left = [each for each in points if each not in front]
    assert all(any(beats(one, each) or one.ratio == each.ratio for one in front) for each in left)


def test_a_budget_of_points_holds_to_the_point() -> None:
    assert 100 * (0.9975 - 0.9875) > 1, "as floats have it"
    assert lost(0.9875, 0.9975, TOP_1) == 1
    assert lost(0.98749, 0.9975, TOP_1) > 1
    assert lost(2.5, 2.0, ERROR) == 0.5


@given(POINTS, st.floats(0.01, 2), st.integers(1, 200), st.floats(0, 50))
def test_what_is_chosen_holds_to_every_budget(points: list[Point], latency: float, size: int, drop: float) -> None:
    all_points = [WHOLE, *points]
    budget = Budget(latency, size, drop)
    found = choose(all_points, budget, TOP_1)
    within = [
        each
        for each in all_points
        if each.seconds <= latency and each.size <= size and lost(each.metric, WHOLE.metric, TOP_1) <= drop
    ]
    assert (found is None) == (not within)
    assert found is None or found.metric == max(each.metric for each in within)


def test_without_a_bound_of_time_or_size_the_fastest_is_taken() -> None:
    points = [WHOLE, point(0.5, 0.945), point(0.3, 0.942), point(0.1, 0.8)]
    assert choose(points, Budget(drop=1.0), TOP_1) is points[2]
    assert choose(points, Budget(latency=0.6), TOP_1) is points[1]
    assert choose(points, Budget(latency=0.01), TOP_1) is None


def test_what_is_lost_is_counted_in_points_and_from_the_better_side() -> None:
    assert lost(0.90, 0.95, TOP_1) == pytest.approx(5)
    assert lost(0.99, 0.95, TOP_1) == pytest.approx(-4)
    assert lost(0.99, 0.95, ERROR) == pytest.approx(0.04)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(shares=()), Plan(shares=(0.5, 0.2)), Plan(shares=(0.0,)), Plan(shares=(0.5, 1.0)), Plan(precisions=()),
        Plan(precisions=("fp16",)), Plan(importance="luck"), Plan(multiple=0), Plan(qat=-1),
    ],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused(plan: Plan) -> None:
    with pytest.raises(UsageError):
        plan.check()


def test_the_plot_is_the_same_picture_each_time(tmp_path: Path) -> None:
    points = [WHOLE, point(0.5, 0.94), point(0.4, 0.93, precision="int8")]
    for name in ("one.svg", "two.svg"):
        plot(points, front_of(points, TOP_1), TOP_1, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert "latency, ms" in text.replace("<!-- ", "").replace(" -->", "")


def test_a_point_is_described_beside_the_whole() -> None:
    said = describe(point(0.25, 0.94, 40, precision="int8"), WHOLE, TOP_1)
    assert said == "50% of the channels gone, int8: top-1 94.00 %, 250.000 ms, 4.00 × as fast, 40% of the size"
    assert "int8 qat: top-1" in describe(replace(point(0.25, 0.94, precision="int8"), qat=2), WHOLE, TOP_1)


def test_a_size_goes_on_with_the_channels_that_were_chosen_before_the_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What ends a run from outside."""

    class Cut(Silence):
        def step(self, epoch: int, done: float) -> None:
            if epoch == 2:
                raise Killed

    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    for name, seed in (("train", 0), ("held", 1)):
        x, y = bars(64, seed)
        np.savez(f"{name}.npz", x=x, y=y)
    engines, plan = jumpy(), Plan(shares=(0.4,), precisions=("fp32",), importance="magnitude", multiple=2)

    def run(watcher: Silence) -> Shrunk:
        return shrink(REQUEST, Material("train.npz", "held.npz"), Budget(drop=99.0), plan, Recipe(epochs=2, batch=16),
                      Path("shrunk"), watcher, engines, accelerator="cpu")  # fmt: skip

    with pytest.raises(Killed):
        run(Cut())
    kept = {path.name: path.read_bytes() for path in Path("shrunk").iterdir()}
    for name in ("first.safetensors", "second.safetensors"):
        for path in Path("shrunk").iterdir():
            path.unlink()
        for file, data in kept.items():
            (Path("shrunk") / file).write_bytes(data)
        watcher = Silence()
        found = run(watcher)
        assert "goes on from shrunk/0.40.safetensors.checkpoint: epoch 2" in watcher.notes
        assert [point.share for point in found.points] == [0.0, 0.4]
        Path("shrunk/0.40.safetensors").rename(name)
    check_same_weights("first.safetensors", "second.safetensors")
