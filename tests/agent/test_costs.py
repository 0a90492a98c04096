"""What an agent costs a device; `benchmarks/fleet.py` prints it at full size."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.fleet import many, memory, polls_without_news
from tests.agent.test_update import Fleet, engine, fleet, own

__all__ = ["engine", "fleet", "own"]


def test_an_agent_that_fetches_a_large_engine_stays_small(fleet: Fleet) -> None:
    took = memory(fleet, 64)
    assert took["peak"] < 60 << 10, "KiB"
    assert took["trial"] < 200 << 10, "KiB, of a trial that maps an engine's weights"


def test_a_poll_without_news_costs_next_to_nothing(fleet: Fleet) -> None:
    fleet.release("1.0.0")
    asked, sent, came, times = polls_without_news(fleet, 20)
    assert [line.rpartition("/")[2] for line in asked] == ["2.root.json", "timestamp.json"]
    assert sent < 2000, "bytes"
    assert came < 8000, "bytes"
    assert statistics.median(times) < 0.1, "CPU seconds, not the clock's"


@pytest.mark.slow
def test_a_fleet_takes_a_release_and_every_device_is_counted(fleet: Fleet) -> None:
    _, problems, good, counted = many(fleet, 20)
    assert problems == []
    assert good == counted == 20
