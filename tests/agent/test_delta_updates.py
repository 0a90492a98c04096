"""Updates by deltas: what comes over the wire, and what a device does where a delta is no good."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from click.testing import CliRunner

from cnncc.fleet.delta import add_deltas
from cnncc.fleet.publish import check_bundles, publish
from cnncc_runtime.agent import delta as agent_delta
from cnncc_runtime.agent import slots, update
from cnncc_runtime.agent.cli import cli
from cnncc_runtime.agent.update import Agent, Outcome
from cnncc_runtime.bundle import read_bundle, write_bundle
from cnncc_runtime.deltas import DELTA, FROM, PIECE, FileDelta, Piece, delta_manifest, read_delta
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import NetworkFailed, Paused, StorageFailed
from cnncc_runtime.oci.formats import INDEX, MANIFEST, Descriptor, Index, describe, read_index, read_manifest
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import Pace, upload
from tests.agent.test_update import Fleet, engine, fleet, own, runs
from tests.oci.registries import Fault, FaultProxy

__all__ = ["engine", "fleet", "own"]

WEIGHTS = np.random.default_rng(7).bytes(3_000_000)
RETRAINED = WEIGHTS[:1_000_000] + np.random.default_rng(8).bytes(120_000) + WEIGHTS[1_120_000:]
DELTA_IS = 130_000
"""Bytes, about, of the delta between the two."""
MUCH_RETRAINED = WEIGHTS[:1_000_000] + np.random.default_rng(9).bytes(1_400_000) + WEIGHTS[2_400_000:]


def released(fleet: Fleet, version: str, weights: bytes, *deltas_from: str) -> None:
    """Publish a release, deltas beside it, and announce it."""
    path = fleet.bundle(version)
    made = read_bundle(path).manifest
    files = {name: (record.role, (path / name).read_bytes()) for name, record in made.files.items()}
    for file in path.iterdir():
        file.unlink()
    write_bundle(path, made, {**files, "weights.bin": ("weights", weights)})
    repository = fleet.registry.repository(fleet.name)
    publish(check_bundles([path]), repository, version)
    for base in deltas_from:
        [delta] = add_deltas(repository, version, base)
        assert delta.files
    fleet.point(version)


@pytest.fixture
def begun(fleet: Fleet) -> Fleet:
    """A fleet with a device that runs 1.0.0."""
    released(fleet, "1.0.0", WEIGHTS)
    assert fleet.device().once().changed
    return fleet


def weights(agent: Agent) -> bytes:
    return (agent.root / "state/current/bundle.cnncc/weights.bin").read_bytes()


def left_over(agent: Agent) -> list[str]:
    return sorted(path.name for path in (agent.root / "incoming").iterdir())


def pair(fleet: Fleet) -> tuple[Repository, Descriptor, Descriptor]:
    """Return the repository and the engines of 1.1.0 and of 1.0.0."""
    repository = fleet.registry.repository(fleet.name)
    [new], [old] = (read_index(repository.manifest(version)).manifests for version in ("1.1.0", "1.0.0"))
    return repository, new, old


def delta_blob(fleet: Fleet) -> Path:
    """Return where the frames of the delta lie on the registry's disk."""
    repository, new, _ = pair(fleet)
    [entry] = repository.referrers(new.digest, DELTA)
    return fleet.registry.blob(read_manifest(repository.manifest(entry.digest)).layers[0].digest)


def came_whole(agent: Agent, why: str) -> Outcome:
    """Bring a device to 1.1.0, which must come whole, and say so."""
    said: list[str] = []
    agent.note = said.append
    outcome = agent.once()
    assert outcome.changed
    assert outcome.fetched > len(RETRAINED)
    assert outcome.deltas == 0
    assert len(said) == 1, said
    assert why in said[0]
    assert outcome.notes == tuple(said)
    assert weights(agent) == RETRAINED
    assert runs(agent) == "1.1.0"
    assert left_over(agent) == []
    return outcome


def through(agent: Agent, proxy: FaultProxy) -> Agent:
    """Have a device reach its registry through a proxy."""
    enrolled = agent.enrollment()
    document = {**msgspec.to_builtins(enrolled), "registry": f"http://localhost:{proxy.port}"}
    (agent.root / "agent.json").write_text(json.dumps(document))
    return agent


def test_a_second_release_arrives_by_a_delta(begun: Fleet) -> None:
    agent = begun.device()
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    told: list[int] = []
    agent.progress = told.append
    with FaultProxy(begun.registry.port) as proxy:
        outcome = through(agent, proxy).once()
        assert outcome.changed
        assert proxy.passed < DELTA_IS + 60_000, "metadata, manifests, small files, and both directions of all"
        assert outcome.fetched == sum(told) < DELTA_IS + 20_000
        assert (outcome.deltas, outcome.notes) == (1, ())
        assert weights(agent) == RETRAINED
        assert runs(agent) == "1.1.0"
        assert left_over(agent) == []
        proxy.passed = 0
        assert not agent.once().changed
        assert proxy.passed < 10_000


def test_nothing_is_asked_for_where_there_is_nothing_to_gain(begun: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(agent_delta, "find_deltas", asked)
    assert not begun.device().once().changed
    first = begun.device("another")
    assert first.once().changed, "a device without an engine asks for none"
    released(begun, "1.1.0", WEIGHTS)
    assert first.once().changed, "only small files are others"


def test_a_device_that_skipped_a_release_takes_the_delta_from_its_own(begun: Fleet) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    other = begun.device("another")
    assert other.once().changed
    released(begun, "1.2.0", WEIGHTS[:2_900_000], "1.1.0", "1.0.0")
    for agent in (begun.device(), other):
        outcome = agent.once()
        assert (outcome.version, outcome.deltas, outcome.notes) == ("1.2.0", 1, ())


def test_a_release_without_a_delta_from_what_the_device_has_comes_whole(begun: Fleet) -> None:
    released(begun, "1.1.0", RETRAINED)
    agent = begun.device()
    outcome = agent.once()
    assert (outcome.deltas, outcome.notes) == (0, ())
    assert outcome.fetched > len(RETRAINED)


def frame_swapped(fleet: Fleet) -> None:
    """Have the registry give other bytes for the delta's frames."""
    path = delta_blob(fleet)
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])


def cut_short(fleet: Fleet) -> None:
    path = delta_blob(fleet)
    path.write_bytes(path.read_bytes()[:1000])


def gone(fleet: Fleet) -> None:
    delta_blob(fleet).unlink()


def old_damaged(fleet: Fleet) -> None:
    path = fleet.device().root / "state/current/bundle.cnncc/weights.bin"
    with path.open("r+b") as file:
        file.seek(2_500_000)
        file.write(b"damage")


def hostile(change: Callable[[FileDelta], FileDelta], frames: bytes = b"") -> Callable[[Fleet], None]:
    """Return what puts another delta in the place of the one that the registry lists."""

    def harm(fleet: Fleet) -> None:
        repository, new, old = pair(fleet)
        [entry] = repository.referrers(new.digest, DELTA)
        manifest = read_manifest(repository.manifest(entry.digest))
        [proven] = read_delta(manifest, repository.small_blob(manifest.config, most=1 << 20), new.digest, old.digest)
        if frames:
            proven = replace(proven, blob=describe(frames, "a/b"))
            upload(repository, frames, proven.blob)
        subject = Descriptor(MANIFEST, new.digest, new.size)
        lying, config = delta_manifest(subject, old.digest, [change(proven)])
        upload(repository, config, lying.config)
        data = lying.to_bytes()
        repository.put_manifest(data, MANIFEST, tag="hostile")
        listed = describe(data, MANIFEST, artifact_type=DELTA, annotations={FROM: old.digest})
        repository.put_manifest(Index("", (listed,)).to_bytes(), INDEX, tag=new.digest.replace(":", "-"))

    return harm


def with_first(**changes: object) -> Callable[[FileDelta], FileDelta]:
    def change(made: FileDelta) -> FileDelta:
        first, *rest = made.pieces
        return replace(made, pieces=(msgspec.structs.replace(first, **changes), *rest))

    return change


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 28))


def one_frame(made: FileDelta) -> FileDelta:
    """Say that a file is made of frames of a byte each, but for the first."""
    frames = (made.blob.size - 5, *[1] * 5)
    pieces = tuple(Piece(500_000, frame, 0, ()) for frame in frames)
    return replace(made, pieces=pieces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (frame_swapped, "gave other bytes"),
        (gone, "404"),
        (cut_short, "answered 416"),
        (old_damaged, "was damaged"),
        (hostile(with_first(stride=0, ranges=((1 << 30, 1000),))), "more than the old file has"),
        (hostile(with_first(size=PIECE - 1, stride=0, ranges=())), "it is of other files than the engines have"),
        (hostile(with_first(frame=1)), "not by the rules"),
        (hostile(with_first(stride=9)), "not by the rules"),
        (hostile(lambda made: replace(made, old=made.new)), "of other files"),
        (hostile(one_frame, BOMB), "says that it holds 268435456 bytes"),
    ],
    ids=["bytes", "gone", "short", "old", "beyond", "size", "frame", "stride", "other", "bomb"],
)
def test_where_a_delta_is_no_good_the_file_comes_whole_and_that_is_said(
    begun: Fleet, harm: Callable[[Fleet], None], why: str
) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    harm(begun)
    came_whole(begun.device(), why)


def test_a_delta_that_nobody_can_fetch_does_not_hold_up_an_update(
    begun: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    blob, fetch = f"sha256:{delta_blob(begun).parent.name}", update.download

    def busy(repository: Repository, wanted: Descriptor, part: Path, **more: Any) -> None:
        if wanted.digest == blob:
            raise NetworkFailed("localhost answered 503")
        fetch(repository, wanted, part, **more)

    monkeypatch.setattr(update, "download", busy)
    came_whole(begun.device(), "answered 503")


def test_a_list_of_deltas_that_is_none_does_not_hold_up_an_update(begun: Fleet) -> None:
    released(begun, "1.1.0", RETRAINED)
    repository, new, _ = pair(begun)
    listing = new.digest.replace(":", "-")
    repository.put_manifest(repository.manifest(new.digest), MANIFEST, tag=listing)
    came_whole(begun.device(), "no deltas are taken")


def test_a_device_without_zstandard_says_so_and_fetches_whole_files(
    begun: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else there(name))
    came_whole(begun.device(), "deltas need zstandard")


def test_a_network_that_breaks_is_survived_and_no_byte_comes_twice(begun: Fleet) -> None:
    released(begun, "1.1.0", MUCH_RETRAINED, "1.0.0")
    faults = [Fault("cut", at) for at in (0, 2000, 300_000, 700_000, 100_000, 600_000)] * 2
    told: list[int] = []
    with FaultProxy(begun.registry.port, *faults) as proxy:
        agent = through(begun.device(), proxy)
        agent.progress = told.append
        outcome = agent.once()
        assert proxy.left < 8
    assert (outcome.changed, outcome.deltas, outcome.notes) == (True, 1, ())
    assert sum(told) == outcome.fetched < 1_420_000
    assert weights(agent) == MUCH_RETRAINED


def test_what_a_dead_network_left_of_a_delta_is_continued_by_the_next_poll(begun: Fleet) -> None:
    released(begun, "1.1.0", MUCH_RETRAINED, "1.0.0")
    agent, told = begun.device(), list[int]()
    agent.progress = told.append
    agent.connect = lambda host, ca: Connection(host, ca, sleep=lambda _: None, attempts=1)
    dying = FaultProxy(begun.registry.port, Fault("cut", 600_000), always=Fault("refuse"))
    with dying as proxy, pytest.raises(NetworkFailed):
        through(agent, proxy).once()
    assert 0 < sum(told) < 600_000
    assert runs(agent) == "1.0.0"
    with FaultProxy(begun.registry.port) as proxy:
        outcome = through(agent, proxy).once()
    assert (outcome.changed, outcome.deltas, outcome.notes) == (True, 1, ())
    assert sum(told) < 1_420_000


def test_downloads_that_are_not_wanted_now_stop_deltas_too(begun: Fleet) -> None:
    released(begun, "1.1.0", MUCH_RETRAINED, "1.0.0")
    agent, told = begun.device(), list[int]()
    agent.progress = told.append
    left = [3]

    def wanted() -> bool:
        left[0] -= 1
        return left[0] > 0

    agent.pace = Pace(wanted=wanted)
    with pytest.raises(Paused):
        agent.once()
    assert 0 < sum(told) < 1_000_000
    agent.pace = Pace()
    outcome = agent.once()
    assert (outcome.changed, outcome.deltas, outcome.notes) == (True, 1, ())
    assert sum(told) < 1_420_000


def test_power_that_fails_while_a_delta_is_applied_costs_no_byte(begun: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    agent = begun.device()
    pieces = agent_delta._pieces

    def dying(*given: object) -> Iterator[bytes]:
        yield next(pieces(*given))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(agent_delta, "_pieces", dying)
        with pytest.raises(KeyboardInterrupt):
            agent.once()
    assert runs(agent) == "1.0.0"
    # a process that dies tidies nothing: what it had written of the file is there, and not to be believed
    (agent.root / slots.made_of(digest_bytes(RETRAINED))).write_bytes(bytes(len(RETRAINED)))
    outcome = agent.once()
    assert (outcome.changed, outcome.deltas, outcome.notes) == (True, 1, ())
    assert outcome.fetched < 10_000, "the delta is here already"
    assert weights(agent) == RETRAINED
    assert left_over(agent) == []


def test_what_is_nearly_fetched_whole_is_fetched_whole(begun: Fleet) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")
    agent = begun.device()
    part = agent.root / slots.part_of(digest_bytes(RETRAINED))
    part.write_bytes(RETRAINED[:-1000])
    outcome = agent.once()
    assert (outcome.deltas, outcome.notes) == (0, ())
    assert outcome.fetched < 10_000


def test_a_disk_too_full_for_a_delta_is_said_and_the_file_comes_whole(
    begun: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(begun, "1.1.0", RETRAINED, "1.0.0")

    def full(*_: object) -> None:
        raise StorageFailed("cannot write: no space left on device")

    monkeypatch.setattr(agent_delta, "apply", full)
    came_whole(begun.device(), "no space left")


def test_the_service_says_and_reports_what_came(begun: Fleet) -> None:
    def once(version: str) -> tuple[str, dict[str, Any]]:
        result = CliRunner().invoke(cli, ["--folder", str(begun.folder / "device-1"), "once"])
        assert result.exit_code == 0, result.output
        [*_, last] = sorted((begun.folder / "device-1" / "reports").iterdir())
        report = json.loads(last.read_text())
        assert (report["outcome"], report["version"], report["error"]) == ("installed", version, "")
        return result.output, report

    released(begun, "1.1.0", RETRAINED, "1.0.0")
    said, report = once("1.1.0")
    assert "0.1 MB fetched, with deltas" in said
    assert (report["deltas"], report["message"]) == (1, "")
    assert 0 < report["fetched"] < DELTA_IS + 20_000
    released(begun, "1.2.0", WEIGHTS[1_500_000:] + WEIGHTS[:1_500_000], "1.1.0")
    path = begun.device().root / "state/current/bundle.cnncc/weights.bin"
    with path.open("r+b") as file:
        file.write(b"damage")
    said, report = once("1.2.0")
    assert "! a delta failed, the whole file is fetched: weights.bin" in said
    assert "3.0 MB fetched" in said
    assert "with deltas" not in said
    assert (report["deltas"], report["message"]) == (0, said.splitlines()[0].removeprefix("! "))
    assert report["fetched"] > 3_000_000
