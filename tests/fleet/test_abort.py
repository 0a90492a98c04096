"""Rollouts that are ended for good: who goes back, who stays, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnncc.fleet.rollout import Pointer, abort, go_back, pause, pointer
from cnncc_runtime.agent.trial import Verdict
from cnncc_runtime.agent.update import Agent
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.errors import UsageError
from cnncc_runtime.oci.formats import INDEX
from tests.agent.test_update import Fleet, engine, fleet, own

__all__ = ["engine", "fleet", "own"]


@pytest.fixture
def devices(fleet: Fleet) -> list[Agent]:
    """Eight devices, whose engines are always right."""
    made = [fleet.device(f"device-{number}") for number in range(8)]
    for agent in made:
        agent.try_engine = lambda bundle: Verdict((), 0.01, 5)
    return made


def end(fleet: Fleet) -> Pointer:
    fleet.signing.load()
    made = abort(fleet.signing, fleet.registry.repository(fleet.name), "stable", fleet.name)
    fleet.signing.publish()
    return made


def status(fleet: Fleet) -> Pointer:
    fleet.signing.load()
    return pointer(fleet.signing, "stable", fleet.name)


def version(agent: Agent) -> str:
    bundle = agent.root / "state/current/bundle.cnncc"
    return read_bundle(bundle).manifest.toolchain["version"] if bundle.exists() else ""


def poll(devices: list[Agent]) -> list[str]:
    for agent in devices:
        agent.once()
    return [version(agent) for agent in devices]


def test_those_who_took_it_go_back_and_nothing_changes_for_the_others(fleet: Fleet, devices: list[Agent]) -> None:
    fleet.release("1.0.0", percent=60.0)
    before = poll(devices)
    assert {"", "1.0.0"} == set(before)
    fleet.release("1.1.0", percent=40.0)
    during = poll(devices)
    took = [number for number, each in enumerate(during) if each == "1.1.0"]
    assert 0 < len(took) < 8
    assert any(before[number] == "" for number in took), "some had none before: they cannot go back to none"
    made = end(fleet)
    assert (made.signed.version, made.signed.sequence, made.signed.undoes, made.aborted) == ("1.0.0", 3, 2, "1.1.0")
    after = poll(devices)
    assert [after[number] for number in took] == ["1.0.0"] * len(took)
    assert [each for number, each in enumerate(after) if number not in took] == [
        each for number, each in enumerate(before) if number not in took
    ]
    assert status(fleet).aborted == "1.1.0"
    late = fleet.device("device-late")
    late.try_engine = devices[0].try_engine
    assert late.once().version == "1.0.0"
    assert version(late) in ("", "1.0.0")


def test_a_pause_lasts_until_an_abort(fleet: Fleet, devices: list[Agent]) -> None:
    fleet.release("1.0.0")
    first = devices[0]
    first.once()
    fleet.release("1.1.0")
    first.once()
    repository = fleet.registry.repository(fleet.name)
    fleet.signing.load()
    pause(fleet.signing, repository, "stable", fleet.name, paused=True)
    fleet.signing.publish()
    assert devices[1].once().why == "its rollout is paused"
    assert first.once().why == "the device has had it"
    end(fleet)
    assert poll(devices[:2]) == ["1.0.0", "1.0.0"]


def test_an_abort_points_to_what_was_signed_before_whatever_the_tag_says_now(
    fleet: Fleet, devices: list[Agent]
) -> None:
    fleet.release("1.0.0")
    signed = status(fleet).digest
    fleet.release("1.1.0")
    devices[0].once()
    repository = fleet.registry.repository(fleet.name)
    repository.put_manifest(repository.manifest("1.1.0"), INDEX, tag="1.0.0")
    assert end(fleet).digest == signed
    assert poll(devices[:1]) == ["1.0.0"]


def test_an_abort_is_remembered_until_the_channel_points_elsewhere(fleet: Fleet, devices: list[Agent]) -> None:
    fleet.release("1.0.0", percent=0.0)
    fleet.release("1.1.0", percent=100.0)
    first = devices[0]
    first.once()
    end(fleet)
    fleet.point("1.0.0", percent=1.0)
    assert (status(fleet).aborted, status(fleet).signed.undoes) == ("1.1.0", 2)
    assert poll(devices[:1]) == ["1.0.0"], "it goes back although it is not among the 1 %"
    fleet.signing.load()
    with pytest.raises(UsageError, match=r"nothing else than 1\.0\.0 to go back to"):
        go_back(fleet.signing, fleet.registry.repository(fleet.name), "stable", fleet.name)
    fleet.point("1.1.0")
    found = status(fleet)
    assert (found.aborted, found.signed.undoes, found.before) == ("", 0, "1.0.0")
    assert poll(devices[:1]) == ["1.1.0"], "promoted again, it is a new rollout"


def test_without_a_release_before_nothing_is_aborted(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no release of vision"):
        end(fleet)
    fleet.release("1.0.0")
    with pytest.raises(UsageError, match=r"no release before 1\.0\.0") as caught:
        end(fleet)
    assert "fleet pause" in caught.value.hint
    fleet.release("1.1.0")
    end(fleet)
    with pytest.raises(UsageError, match=r"no release before 1\.0\.0"):
        end(fleet)
