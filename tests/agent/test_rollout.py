"""How far a release goes: percentages that only grow, selectors, and what is signed of both."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc_runtime.agent.rollout import ALL, Signed, matches, place_of_device, read_signed, why_not
from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.gpu import HostGpu
from cnncc_runtime.releases import Hardware

ORIN = Hardware("aarch64", frozenset({"dotprod", "neon"}), (HostGpu("Orin", "8.7"),), "jetson-orin-cpu")
PI = Hardware("aarch64", frozenset({"neon"}), (), "raspberry-pi-4")


@given(st.text(max_size=20), st.integers(0, ALL), st.integers(0, ALL))
def test_a_larger_share_takes_back_no_device(device: str, one: int, other: int) -> None:
    low, high = sorted((one, other))
    taken = [not why_not(Signed("1", 1, share=share, salt="s"), device, PI) for share in (low, high)]
    assert taken in ([False, False], [False, True], [True, True])


@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_about_so_many_devices_take_it_and_others_with_another_salt(percent: int) -> None:
    names = [f"device-{number}" for number in range(20_000)]
    first, second = ({name for name in names if place_of_device(salt, name) < percent * 100} for salt in ("a", "b"))
    for chosen in (first, second):
        # four standard deviations of a fair draw
        assert abs(len(chosen) / 200 - percent) < 4 * (percent * (100 - percent) / 20_000) ** 0.5
    both = len(first & second) / 20_000
    assert abs(both - (percent / 100) ** 2) < 0.02


def test_none_and_all_are_none_and_all() -> None:
    names = [f"{number}" for number in range(2000)]
    assert all(why_not(Signed("1", 1, share=0), name, PI) for name in names)
    assert not any(why_not(Signed("1", 1, share=ALL), name, PI) for name in names)


@pytest.mark.parametrize(
    ("selector", "orin", "pi"),
    [
        ("sm>=87", True, False),
        ("sm>87", False, False),
        ("sm<100", True, False),
        ("machine=aarch64", True, True),
        ("machine=aarch64, cpu.dotprod=yes", True, False),
        ("cpu.dotprod!=yes", False, True),
        ("profile=raspberry-pi-4", False, True),
        ("device=lab-1", True, True),
        ("device!=lab-1", False, False),
        ("unknown=1", False, False),
        ("unknown!=1", True, True),
        ("machine>=3", False, False),
    ],
)
def test_a_selector_takes_who_meets_all_of_it(selector: str, orin: bool, pi: bool) -> None:
    signed = Signed("1", 1, selector=selector)
    assert [not why_not(signed, "lab-1", hardware) for hardware in (ORIN, PI)] == [orin, pi]


@pytest.mark.parametrize("selector", [",", "sm", "sm=>1", "a b=1", "x=1;y=2", "=1", "sm >= ", "ä=1"])
def test_what_is_no_selector_is_refused(selector: str) -> None:
    with pytest.raises(VerificationFailed, match="not by the rules"):
        matches(selector, {})


@given(st.text(max_size=30))
def test_any_text_is_a_selector_or_refused(selector: str) -> None:
    with contextlib.suppress(VerificationFailed):
        assert matches(selector, {"sm": "87"}) in (True, False)


def test_a_paused_release_is_taken_by_nobody() -> None:
    assert why_not(Signed("1", 1, paused=True), "x", PI) == "its rollout is paused"


def test_an_abort_is_for_those_who_had_what_it_undoes_and_else_for_those_it_was_for_before() -> None:
    signed = Signed("1", 5, share=0, selector="machine=none", paused=True, undoes=4)
    assert [why_not(signed, "x", PI, had) for had in (0, 3)] == ["its rollout is paused"] * 2
    assert why_not(signed, "x", PI, 4) == ""
    assert why_not(Signed("1", 5, paused=True), "x", PI, 4) == "its rollout is paused"


@pytest.mark.parametrize(
    "change",
    [
        {"undoes": 1},
        {"undoes": -1},
        {"sequence": 0},
        {"sequence": "1"},
        {"sequence": None},
        {"share": -1},
        {"share": ALL + 1},
        {"share": "all"},
        {"share": 0.5},
        {"slowdown": 0},
        {"selector": 5},
        {"paused": "no"},
        {"version": 1},
    ],
)
def test_what_is_signed_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    good = {"version": "1", "sequence": 1, "share": 10, "more": "of a newer publisher"}
    assert read_signed(good).share == 10
    with pytest.raises(VerificationFailed, match="not by the rules"):
        read_signed({**good, **change})
