"""The search for layers that must stay in float: it meets the budget, with the fewest, and goes on where it was."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.calibration.accuracy import Accuracy
from cnncc.calibration.search import MOST_GIVEN_BACK, Budget, Found, Measured, search
from cnncc_runtime.errors import BudgetExceeded, StorageFailed

MODEL = Accuracy("top-1", 90.0, 300.0, 100)


@dataclass
class Network:
    """A network whose layers' quantization noise adds up; accuracy falls with it.

    Attributes:
        noise: Layer → its noise power, of a signal of 1.
        stop: Measurements before which the search is interrupted.
    """

    noise: dict[str, float]
    stop: int | None = None
    measured: list[frozenset[str]] = field(default_factory=list)
    ranked: list[frozenset[str]] = field(default_factory=list)

    def total(self, floats: Collection[str]) -> float:
        return sum(noise for layer, noise in self.noise.items() if layer not in floats)

    def sqnr(self, floats: Collection[str]) -> float:
        self._count(self.ranked, floats)
        total = self.total(floats)
        return -10 * math.log10(total) if total > 0 else 300.0

    def measure(self, floats: Collection[str]) -> Accuracy:
        self._count(self.measured, floats)
        total = self.total(floats)
        return Accuracy("top-1", 90.0 - 10 * total, -10 * math.log10(total) if total > 0 else 300.0, 100)

    def _count(self, done: list[frozenset[str]], floats: Collection[str]) -> None:
        if self.stop is not None and len(self.measured) + len(self.ranked) >= self.stop:
            raise KeyboardInterrupt
        done.append(frozenset(floats))

    def search(self, budget: Budget, path: Path | None = None) -> Found:
        return search(list(self.noise), budget, model=MODEL, sqnr=self.sqnr, measure=self.measure, known=Measured(path))


networks = st.lists(st.integers(0, 1000), min_size=1, max_size=9).map(
    lambda powers: {f"layer{index}": power / 1000 for index, power in enumerate(powers)}
)
budgets = st.one_of(
    st.floats(0.0, 30.0).map(lambda drop: Budget(drop=drop)),
    st.floats(-5.0, 60.0).map(lambda least: Budget(sqnr_db=least)),
    st.tuples(st.floats(0.0, 30.0), st.floats(-5.0, 60.0)).map(lambda pair: Budget(*pair)),
)


def met(network: Network, budget: Budget, floats: Collection[str]) -> bool:
    return budget.missed(Network(network.noise).measure(floats), MODEL) <= 0


# ---- budgets


@pytest.mark.parametrize(
    ("budget", "value", "db", "expected"),
    [
        (Budget(), 0.0, -300.0, -math.inf),
        (Budget(drop=0.5), 89.5, 0.0, 0.0),
        (Budget(drop=0.5), 89.0, 0.0, 0.5),
        (Budget(drop=0.5), 91.0, 0.0, -1.5),
        (Budget(sqnr_db=20.0), 0.0, 20.0, 0.0),
        (Budget(sqnr_db=20.0), 0.0, 17.0, 3.0),
        (Budget(1.0, 20.0), 89.5, 17.0, 3.0),
        (Budget(1.0, 20.0), 88.0, 30.0, 1.0),
    ],
)
def test_a_budget_is_missed_by_the_worse_of_what_it_asks(
    budget: Budget, value: float, db: float, expected: float
) -> None:
    assert budget.missed(Accuracy("top-1", value, db, 1), MODEL) == expected


# ---- what is found


@settings(max_examples=200, deadline=None)
@given(networks, budgets)
def test_the_budget_is_met_by_the_fewest_layers_that_can_meet_it(noise: dict[str, float], budget: Budget) -> None:
    network = Network(noise)
    found = network.search(budget)
    assert met(network, budget, found.floats)
    fewest = next(
        count
        for count in range(len(noise) + 1)
        if any(met(network, budget, floats) for floats in itertools.combinations(noise, count))
    )
    assert len(found.floats) == fewest
    assert found.reached == Network(noise).measure(found.floats)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=9),
    st.lists(st.integers(0, 1000), min_size=9, max_size=9),
    st.floats(0.0, 30.0),
)
def test_no_layer_is_kept_that_the_budget_can_do_without(powers: list[int], harm: list[int], drop: float) -> None:
    """Also where the ranking is wrong: accuracy falls by other layers than those that make the noise."""
    noise = {f"layer{index}": power / 1000 for index, power in enumerate(powers)}
    ranking = Network(noise)
    truth = Network({layer: harm[index] / 1000 for index, layer in enumerate(noise)})
    budget = Budget(drop=drop)
    found = search(list(noise), budget, model=MODEL, sqnr=ranking.sqnr, measure=truth.measure, known=Measured(None))
    assert met(truth, budget, found.floats)
    for layer in found.floats:
        assert not met(truth, budget, [each for each in found.floats if each != layer])
    ranked = sorted(noise, key=lambda layer: -found.gains.get(layer, 0.0))
    assert [layer for layer in ranked if layer in found.floats] == list(found.floats)


def test_a_budget_that_int8_meets_costs_one_measurement() -> None:
    network = Network({"a": 0.01, "b": 0.02})
    found = network.search(Budget(drop=1.0))
    assert (found.floats, found.gains) == ((), {})
    assert network.measured == [frozenset()]
    assert network.ranked == []


def test_gains_are_what_keeping_a_layer_alone_in_float_brings() -> None:
    network = Network({"a": 0.5, "b": 0.4, "c": 0.1})
    found = network.search(Budget(sqnr_db=2.0))
    assert found.gains == pytest.approx({"a": 3.0103, "b": 2.2185, "c": 0.4576}, abs=1e-4)
    assert found.floats == ("a",)


@pytest.mark.parametrize("count", [1, 3, 16, 40, 150])
def test_the_number_of_measurements_grows_with_the_logarithm_of_the_layers(count: int) -> None:
    network = Network({f"layer{index:03}": 1.0 for index in range(count)})
    found = network.search(Budget(sqnr_db=-10 * math.log10(max(count // 3, 0.5))))
    assert len(found.floats) == count - count // 3
    assert len(network.ranked) == count + 1
    assert len(network.measured) <= 3 + 2 * math.ceil(math.log2(count + 1)) + MOST_GIVEN_BACK
    assert len(set(network.measured)) == len(network.measured)


def test_no_choice_of_layers_may_be_enough() -> None:
    network = Network({"a": 0.5, "b": 0.4})
    stuck = search(
        ["a", "b"],
        Budget(drop=20.0),
        model=MODEL,
        sqnr=network.sqnr,
        measure=network.measure,
        known=Measured(None),
    )
    assert stuck.floats == ()
    with pytest.raises(
        BudgetExceeded, match=r"every layer in float the model reaches top-1 90.00 %, 300.0 dB"
    ) as caught:
        network.search(Budget(sqnr_db=301.0))
    assert "--min-sqnr" in caught.value.hint


def test_progress_is_told_in_order() -> None:
    told: list[float] = []
    network = Network({f"layer{index}": 1.0 for index in range(20)})
    search(
        list(network.noise),
        Budget(sqnr_db=-5.0),
        model=MODEL,
        sqnr=network.sqnr,
        measure=network.measure,
        known=Measured(None),
        progress=lambda _what, share: told.append(share),
    )
    assert told == sorted(told)
    assert told[-1] < 1.0


# ---- cut short


@settings(max_examples=20, deadline=None)
@given(noise=networks, drop=st.floats(0.0, 30.0), stops=st.lists(st.integers(0, 12), max_size=3))
def test_a_search_that_was_cut_short_measures_nothing_twice(
    noise: dict[str, float], drop: float, stops: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("search") / "new" / "search.json"
    expected = Network(noise)
    whole = expected.search(Budget(drop=drop))
    done = Network(noise)
    for stop in stops:
        done.stop = len(done.measured) + len(done.ranked) + stop
        try:
            done.search(Budget(drop=drop), path)
        except KeyboardInterrupt:
            continue
    done.stop = None
    assert done.search(Budget(drop=drop), path) == whole
    assert done.measured == expected.measured
    assert done.ranked == expected.ranked


def test_the_file_is_removed_when_it_is_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    known = Measured(path)
    assert known.of("sqnr", ["a"], 1, lambda: [1.5]) == [1.5]
    assert path.is_file()
    known.forget()
    known.forget()
    assert list(tmp_path.iterdir()) == []
    Measured(None).forget()


def test_a_set_of_layers_is_known_in_any_order_and_by_its_kind(tmp_path: Path) -> None:
    known = Measured(tmp_path / "search.json")
    known.of("sqnr", ["a", "b"], 1, lambda: [1.0])
    again = Measured(tmp_path / "search.json")
    assert again.of("sqnr", ["b", "a"], 1, lambda: [2.0]) == [1.0]
    assert again.of("accuracy", ["a", "b"], 1, lambda: [3.0]) == [3.0]
    assert again.of("sqnr", ["a"], 1, lambda: [4.0]) == [4.0]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"[1, 2]",
        b"5",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
    ],
)
def test_a_damaged_file_is_measured_again(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_bytes(damage)
    assert Network({"a": 0.3, "b": 0.2}).search(Budget(drop=2.5), path).floats == ("a",)
    assert json.loads(path.read_bytes())


@pytest.mark.parametrize("value", [None, [], "x", [1.0], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [None] * 3, {}, 3.0])
def test_a_measurement_of_another_form_is_made_again(value: object, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    Network({"a": 0.3, "b": 0.2}).search(Budget(drop=2.5), path)
    entries = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: value if key.startswith("accuracy") else [] for key in entries}))
    network = Network({"a": 0.3, "b": 0.2})
    assert network.search(Budget(drop=2.5), path).floats == ("a",)
    assert frozenset() in network.measured
    assert frozenset() in network.ranked


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed):
        Network({"a": 0.3}).search(Budget(drop=1.0), tmp_path / "file" / "search.json")
