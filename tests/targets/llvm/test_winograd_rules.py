"""Where Winograd's convolution is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc.targets.llvm.machine import Machine, machine_of
from cnncc.targets.llvm.rules import ConvShape
from cnncc.targets.llvm.tiling import groups_of
from cnncc.targets.llvm.winograd_rules import (
    NETWORK_LIMIT,
    WinogradPlan,
    candidates,
    choose_winograd,
    network_factor,
    winograd_plan,
    winograd_plans,
)
from tests.targets.llvm.assembly import ISAS, isa_profile


def machine(isa: str = "avx512") -> Machine:
    return replace(machine_of(isa_profile(isa)), cores=1)


def square(channels: int, extent: int) -> ConvShape:
    size = (extent, extent)
    return ConvShape(1, 1, channels, channels, size, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), size)


def plan(size: int, saved: float, added: int) -> WinogradPlan:
    return WinogradPlan(size, False, 1, 1, 1, 1, 1, cycles=100.0, saved=saved, added=added)


def test_knobs_survive_as_numbers() -> None:
    made = WinogradPlan(4, True, 3, 5, 12, 2, 4)
    assert WinogradPlan.of_numbers(made.numbers) == made


@pytest.mark.parametrize(
    "other",
    [
        {"stride": (2, 2)},
        {"dilation": (2, 2)},
        {"kernel": (5, 5)},
        {"padding": (3, 0, 0, 0)},
        {"blocked": False},
        {"groups": 4, "inputs": 6},
    ],
)
def test_other_convolutions_stay_direct(other: dict[str, object]) -> None:
    shape = replace(square(64, 56), **other)
    assert winograd_plan(shape, machine(), 4) is None
    assert winograd_plans(shape, machine()) == ()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("channels", "extent"), [(16, 8), (64, 56), (128, 28), (256, 14), (512, 7), (24, 112)])
def test_register_tiles_fit_the_registers(isa: str, channels: int, extent: int) -> None:
    held = machine(isa)
    for size in (2, 4):
        for found in candidates(square(channels, extent), held, size):
            vectors = found.panel * held.block // held.lanes
            assert found.pixels * vectors + vectors + 1 <= held.registers


def test_large_images_take_large_tiles_and_streams_of_weights_small_ones() -> None:
    def best(channels: int, extent: int) -> int:
        return min(winograd_plans(square(channels, extent), machine()), key=lambda found: found.cycles).size

    assert [best(64, 56), best(128, 28), best(512, 7)] == [4, 4, 2]


def test_saving_grows_with_the_image() -> None:
    factors = []
    for extent in (14, 28, 56):
        found = winograd_plan(square(64, extent), machine(), 4)
        assert found is not None
        factors.append((found.cycles + found.saved) / found.cycles)
    assert factors == sorted(factors)
    assert factors[-1] > 3


def test_what_is_added_is_what_the_weights_grow() -> None:
    found = winograd_plan(square(64, 56), machine(), 4)
    assert found is not None
    assert found.added == (36 - 9) * 64 * 64 * 4


@given(tiles=st.integers(1, 500), most=st.integers(1, 30))
def test_groups_cover_the_tiles_evenly(tiles: int, most: int) -> None:
    sizes = groups_of(tiles, most)
    assert sum(sizes) == tiles
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_the_budget_goes_where_a_byte_saves_most() -> None:
    layers = {"early": [plan(2, 40, 10), plan(4, 100, 40)], "late": [plan(2, 50, 100), plan(4, 60, 400)]}
    assert choose_winograd(layers, 9, 2) == {}
    assert choose_winograd(layers, 10, 2) == {"early": layers["early"][0]}
    assert choose_winograd(layers, 40, 2) == {"early": layers["early"][1]}
    assert choose_winograd(layers, 140, 2) == {"early": layers["early"][1], "late": layers["late"][0]}
    assert choose_winograd(layers, 440, 2) == {"early": layers["early"][1], "late": layers["late"][1]}


@given(
    sizes=st.lists(st.tuples(st.floats(1, 1000), st.floats(1, 1000), st.integers(1, 1000)), max_size=12),
    budget=st.integers(0, 4000),
)
def test_the_budget_is_never_exceeded(sizes: list[tuple[float, float, int]], budget: int) -> None:
    layers = {
        number: [plan(2, small, added), plan(4, large, 4 * added)] for number, (small, large, added) in enumerate(sizes)
    }
    chosen = choose_winograd(layers, budget, len(layers))
    assert sum(found.added for found in chosen.values()) <= budget
    assert all(found in layers[number] for number, found in chosen.items())
    assert network_factor(list(chosen.values()), len(layers)) <= NETWORK_LIMIT


def test_errors_of_layers_add_in_quadrature() -> None:
    large = plan(4, 1, 1)
    assert network_factor([], 10) == 1
    assert network_factor([large], 10) < network_factor([large] * 2, 10) < network_factor([large] * 10, 10)


def test_choice_stops_at_the_error_that_a_network_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnncc.targets.llvm.winograd_rules.NETWORK_LIMIT", 2.0)
    layers = {number: [plan(4, 10, 1)] for number in range(10)}
    chosen = choose_winograd(layers, 1000, 10)
    assert 0 < len(chosen) < 10
    assert network_factor(list(chosen.values()), 10) <= 2.0
