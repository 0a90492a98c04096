"""Releases in an archive, and devices that install them without a network."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnncc.fleet.export import export_release
from cnncc_runtime.errors import CnnccError, NotInRegistry, StorageFailed, VerificationFailed
from cnncc_runtime.oci.formats import INDEX, Descriptor, Index, describe
from cnncc_runtime.oci.layout import REF, Layout, Part, write_layout
from tests.agent.test_update import Fleet, engine, fleet, own, runs

__all__ = ["engine", "fleet", "own"]


def export(fleet: Fleet, path: Path) -> Path:
    registry = fleet.registry
    releases, metadata = registry.repository(fleet.name), registry.repository(f"{fleet.name}-tuf")
    export_release(releases, metadata, fleet.name, path, channel="stable")
    return path


def test_a_device_installs_an_archive_and_then_a_newer_one(fleet: Fleet, tmp_path: Path) -> None:
    fleet.release("1.0.0")
    first = export(fleet, tmp_path / "1.tar")
    fleet.release("1.1.0")
    second = export(fleet, tmp_path / "2.tar")
    agent = fleet.device()
    fleet.registry.process.kill()  # nobody is there
    assert agent.install(first).changed
    assert runs(agent) == "1.0.0"
    assert agent.install(first).why == "the device has had it"
    assert agent.install(second).changed
    assert runs(agent) == "1.1.0"
    with pytest.raises(VerificationFailed, match="older than what this device has seen"):
        agent.install(first)
    assert runs(agent) == "1.1.0"
    assert [path.name for path in tmp_path.iterdir() if ".partial" in path.name] == []


def test_the_same_release_gives_the_same_archive(fleet: Fleet, tmp_path: Path) -> None:
    fleet.release("1.0.0")
    assert export(fleet, tmp_path / "1.tar").read_bytes() == export(fleet, tmp_path / "2.tar").read_bytes()


def test_other_tools_read_an_archive(fleet: Fleet, tmp_path: Path) -> None:
    fleet.release("1.0.0")
    path = export(fleet, tmp_path / "1.tar")
    (tmp_path / "layout").mkdir()
    subprocess.run(["tar", "-xf", path, "-C", tmp_path / "layout"], check=True)
    done = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{tmp_path / 'layout'}:1.0.0"], check=True, capture_output=True
    )
    assert done.stdout == fleet.registry.repository(fleet.name).manifest("1.0.0")


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_damaged_archive_is_refused_and_the_engine_runs_on(fleet: Fleet, tmp_path: Path, where: float) -> None:
    fleet.release("1.0.0")
    agent = fleet.device()
    agent.once()
    fleet.release("1.1.0")
    data = bytearray(export(fleet, tmp_path / "1.tar").read_bytes())
    at = int(len(data) * where)
    (tmp_path / "cut.tar").write_bytes(data[:at])
    for number in range(at, at + 2048):
        data[number] ^= 0x55
    (tmp_path / "flipped.tar").write_bytes(data)
    for name in ("cut.tar", "flipped.tar"):
        with pytest.raises(CnnccError):
            agent.install(tmp_path / name)
        assert runs(agent) == "1.0.0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small layout."""
    path = tmp_path_factory.mktemp("layout") / "a.tar"
    data = b"blob" * 100
    index = Index("", (), annotations={"a": "b"}).to_bytes()
    entry = Descriptor(INDEX, describe(index, INDEX).digest, len(index), annotations={REF: "v1"})
    blobs = {entry.digest: (len(index), [index]), describe(data, "a/b").digest: (len(data), [data])}
    write_layout(path, [entry], blobs)
    return path.read_bytes()


def test_a_layout_holds_what_was_written(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive)
    blob, absent = describe(b"blob" * 100, "a/b"), describe(b"x", "a/b")
    with Layout.open(tmp_path / "a.tar") as layout:
        part = Part(layout)
        index = Index("", (), annotations={"a": "b"}).to_bytes()
        assert part.manifest("v1") == part.manifest(layout.names["v1"]) == index
        assert part.small_blob(blob, most=1000) == b"blob" * 100
        layout.copy(blob, tmp_path / "copied")
        assert (tmp_path / "copied").read_bytes() == b"blob" * 100
        with pytest.raises(VerificationFailed, match="at most belong there"):
            part.small_blob(blob, most=10)
        for ask in (
            lambda: part.manifest("v2"),
            lambda: part.small_blob(absent, most=10),
            lambda: layout.copy(absent, tmp_path / "x"),
        ):
            with pytest.raises(NotInRegistry):
                ask()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_a_layout_or_refused(archive: bytes, tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(archive)
    for _ in range(data.draw(st.integers(1, 20))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.tar").write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    with (
        contextlib.suppress(VerificationFailed, NotInRegistry, StorageFailed),
        Layout.open(tmp_path / "a.tar") as layout,
    ):
        Part(layout).manifest("v1")


def test_links_and_paths_that_lead_elsewhere_are_not_looked_at(archive: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as evil, tarfile.open(fileobj=io.BytesIO(archive)) as good:
        for member in good:
            evil.addfile(member, good.extractfile(member))
        digest = describe(b"secret", "a/b").digest
        link = tarfile.TarInfo(f"blobs/sha256/{digest[7:]}")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        evil.addfile(link)
        evil.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
    with Layout.open(path) as layout, pytest.raises(NotInRegistry):
        layout.copy(Descriptor("a/b", digest, 6), tmp_path / "copied")
    assert not (tmp_path / "copied").exists()
    assert not (tmp_path.parent.parent / "escaped").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("no archive")
    with tarfile.open(tmp_path / "other.tar", "w"):
        pass
    for name in ("empty.tar", "text.tar", "other.tar"):
        with pytest.raises(VerificationFailed, match="is no release in a tar archive"):
            Layout.open(tmp_path / name)
    with pytest.raises(StorageFailed):
        Layout.open(tmp_path / "none.tar")
