"""Deltas at the command line: made where they are expected, asked for, left out, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cnncc.cli.fleet_options import PASSPHRASE
from cnncc_runtime.deltas import DELTA, FROM
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.oci.formats import Descriptor, read_index
from tests.cli.harness import Outcome, call
from tests.fleet.test_publish import PI4, X86, bundle
from tests.oci import registries
from tests.oci.registries import Registry

FIRST = np.random.default_rng(0).bytes(300_000)
SECOND = FIRST[:100_000] + b"another layer" * 99 + FIRST[100_000:]
THIRD = b"prefix" + SECOND
OTHER = np.random.default_rng(1).bytes(300_000)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("CNNCC_FLEET_HOME", str(tmp_path / "fleets"))
    monkeypatch.setenv(PASSPHRASE, "a long passphrase")
    with registries.registry(tmp_path / "registry") as running:
        call("fleet", "trust", "init", "--registry", running.url, "--name", "vision")
        yield running


def publish(folder: Path, version: str, engine: bytes, *flags: str, code: int = 0) -> Outcome:
    path = bundle(folder / version, X86, engine=engine)
    return call("publish", path, "--name", "vision", "--version", version, *flags, code=code)


def engine(registry: Registry, version: str) -> Descriptor:
    [entry] = read_index(registry.repository("vision").manifest(version)).manifests
    return entry


def deltas_from(registry: Registry, version: str) -> set[str]:
    """Return the engines from which there are deltas to a release's."""
    listed = registry.repository("vision").referrers(engine(registry, version).digest, DELTA)
    return {entry.annotations[FROM] for entry in listed}


def test_deltas_are_made_from_what_the_channels_point_to(registry: Registry, tmp_path: Path) -> None:
    assert "delta" not in publish(tmp_path, "1.0.0", FIRST, "--channel", "stable").stdout
    said = publish(tmp_path, "1.1.0", SECOND, "--channel", "canary").stdout
    assert "delta from 1.0.0 for x86-64-v3: " in said
    assert "instead of 301.3 kB" in said
    made = publish(tmp_path, "1.2.0", THIRD, "--channel", "canary", "--json").document["deltas"]
    assert {each["from"] for each in made} == {"1.0.0", "1.1.0"}
    assert all(0 < each["bytes"] < 3000 for each in made)
    assert deltas_from(registry, "1.2.0") == {engine(registry, version).digest for version in ("1.0.0", "1.1.0")}
    repository = registry.repository("vision")
    tagged = {digest_bytes(repository.manifest(tag)) for tag in repository.tags()}
    assert {each.digest for each in repository.referrers(engine(registry, "1.2.0").digest)} <= tagged


def test_deltas_are_asked_for_added_later_and_left_out(registry: Registry, tmp_path: Path) -> None:
    publish(tmp_path, "1.0.0", FIRST)
    publish(tmp_path, "1.1.0", SECOND, "--channel", "stable")
    assert deltas_from(registry, "1.1.0") == set()
    publish(tmp_path, "1.2.0", THIRD, "--delta-from", "1.0.0")
    assert deltas_from(registry, "1.2.0") == {engine(registry, "1.0.0").digest}
    publish(tmp_path, "1.3.0", OTHER, "--no-delta")
    assert deltas_from(registry, "1.3.0") == set()
    assert "instead of" in call("fleet", "delta", "vision@1.2.0", "--from", "1.1.0").stdout
    assert len(deltas_from(registry, "1.2.0")) == 2
    assert "there already" in call("fleet", "delta", "vision@1.2.0", "--from", "1.1.0").stdout
    assert "no file's is much smaller" in call("fleet", "delta", "vision@1.3.0", "--from", "1.1.0").stdout
    assert deltas_from(registry, "1.3.0") == set()
    assert "its engines are the same" in call("fleet", "delta", "vision@1.2.0", "--from", "1.2.0").stdout


def test_what_cannot_be_is_refused_where_it_was_asked_for_and_noted_where_not(
    registry: Registry, tmp_path: Path
) -> None:
    refused = publish(tmp_path, "1.0.0", FIRST, "--delta-from", "0.9.0", code=2).stderr
    assert "has no release 0.9.0" in refused
    assert not registry.repository("vision").has("1.0.0"), "before anything was sent"
    path = tmp_path / "1.0.0" / f"{X86.device}.cnncc"
    release = ("publish", path, "--name", "vision", "--version", "1.0.0")
    assert "give one of them" in call(*release, "--no-delta", "--delta-from", "1", code=2).stderr
    call(*release, "--channel", "stable")
    assert "has no release 2" in call("fleet", "delta", "vision@2", "--from", "1.0.0", code=2).stderr
    pi = bundle(tmp_path / "pi", PI4, engine=SECOND)
    noted = call("publish", pi, "--name", "vision", "--version", "1.1.0", "--json").document["notes"]
    noted = [note for note in noted if "provenance" not in note]
    assert len(noted) == 1
    assert "no delta from 1.0.0" in noted[0]
    assert "for no device in common" in noted[0]
    wrong = call("fleet", "delta", "vision@1.1.0", "--from", "1.0.0", code=2).stderr
    assert "for no device in common" in wrong
