"""A site without internet: archives into its registry, and devices that follow it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cnncc.fleet.bring import Imported, import_release, name_in
from cnncc.fleet.export import export_release
from cnncc.fleet.lock import Lock
from cnncc_runtime.agent.trial import Verdict
from cnncc_runtime.agent.update import Agent, Enrollment
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.errors import FleetBusy, NetworkFailed, UsageError, VerificationFailed
from cnncc_runtime.metadata import fetch_metadata
from cnncc_runtime.oci.formats import EMPTY, EMPTY_BYTES, MANIFEST, Manifest, describe, read_index
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.layout import Layout
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import upload
from tests.agent.test_update import Fleet, engine, fleet, own
from tests.oci import registries
from tests.oci.registries import Registry

__all__ = ["engine", "fleet", "own"]


@dataclass
class Site:
    """A registry that no publisher reaches.

    Attributes:
        registry: It.
        fleet: Whose releases are brought there.
        folder: For what is made.
    """

    registry: Registry
    fleet: Fleet
    folder: Path

    @property
    def releases(self) -> Repository:
        return self.registry.repository(self.fleet.name)

    @property
    def metadata(self) -> Repository:
        return self.registry.repository(f"{self.fleet.name}-tuf")

    def archive(self, name: str, *, channel: str = "stable", version: str = "", evidence: bool = False) -> Path:
        source, path = self.fleet.registry, self.folder / name
        export_release(
            source.repository(self.fleet.name),
            source.repository(f"{self.fleet.name}-tuf"),
            self.fleet.name,
            path,
            channel=channel,
            version=version,
            evidence=evidence,
        )
        return path

    def bring(self, archive: Path, *, root: bytes = b"", releases: Repository | None = None) -> Imported:
        scratch = self.folder / "scratch"
        where = releases or self.releases
        made = import_release(archive, root or self.fleet.root, where, self.metadata, scratch=scratch)
        assert list(scratch.iterdir()) == []
        return made

    def device(self, name: str = "device") -> Agent:
        agent = Agent(self.folder / name, connect=lambda host, ca: Connection(host, ca, sleep=lambda _: None))
        agent.try_engine = lambda bundle: Verdict((), 0.01, 5)
        agent.enroll(Enrollment(self.registry.url, self.fleet.name, "stable", name), self.fleet.root)
        return agent

    def state(self) -> dict[str, bytes]:
        """Return what devices of the site may see."""
        names = self.metadata.tags() - {"lock"}
        return {name: fetch_metadata(self.metadata, name) for name in names} | {
            name: self.releases.manifest(name) for name in self.releases.tags()
        }


@pytest.fixture
def site(fleet: Fleet, tmp_path: Path) -> Iterator[Site]:
    with registries.registry(tmp_path / "site") as running:
        yield Site(running, fleet, tmp_path)


def runs(agent: Agent) -> str:
    return read_bundle(agent.root / "state/current/bundle.cnncc").manifest.toolchain["version"]


def test_devices_of_a_site_follow_its_registry(site: Site) -> None:
    fleet, agent = site.fleet, site.device()
    fleet.release("1.0.0")
    fleet.release("9.0.0", channel="canary")
    first = site.archive("1.tar")
    assert name_in(first) == "vision"
    made = site.bring(first)
    assert (made.versions, made.channels, made.missing) == (("1.0.0",), ("stable",), ("canary",))
    assert made.sent > 1_000_000
    assert agent.once().changed
    assert runs(agent) == "1.0.0"
    before = site.state()
    again = site.bring(first)
    assert (again.sent, site.state()) == (0, before)
    fleet.signing.load()
    fleet.signing.rotate("timestamp")
    fleet.signing.publish()
    fleet.release("1.1.0")
    second = site.bring(site.archive("2.tar"))
    assert second.sent < 1_300_000, "the engine file, which both have, is not sent again"
    assert agent.once().changed
    assert runs(agent) == "1.1.0"
    new = site.device("new")
    assert new.once().changed
    assert runs(new) == "1.1.0"
    after = site.state()
    with pytest.raises(VerificationFailed, match="the registry has root metadata of version 2, the archive 1"):
        site.bring(first)
    assert site.state() == after


def test_a_registry_does_not_go_back(site: Site) -> None:
    site.fleet.release("1.0.0")
    old = site.archive("old.tar")
    site.fleet.release("1.1.0")
    site.bring(site.archive("new.tar"))
    before = site.state()
    with pytest.raises(VerificationFailed, match="the archive") as caught:
        site.bring(old)
    assert "does not go back" in caught.value.hint
    assert site.state() == before


def test_a_release_is_exported_by_its_version_where_a_channel_points_to_it(site: Site) -> None:
    site.fleet.release("1.0.0", channel="canary")
    site.fleet.release("1.1.0")
    assert site.bring(site.archive("1.tar", channel="", version="1.0.0")).channels == ("canary",)
    for channel, version, said in (("stable", "1.0.0", "stable does not point to"), ("", "2", "no channel points to")):
        with pytest.raises(UsageError, match=said):
            site.archive("2.tar", channel=channel, version=version)
    assert not (site.folder / "2.tar").exists()


def test_what_refers_to_engines_comes_along_where_it_is_wanted(site: Site) -> None:
    site.fleet.release("1.0.0")
    source = site.fleet.registry.repository(site.fleet.name)
    [entry] = read_index(source.manifest("1.0.0")).manifests
    config = describe(EMPTY_BYTES, EMPTY, inline=True)
    report = describe(b"a report", "application/json")
    for data, blob in ((EMPTY_BYTES, config), (b"a report", report)):
        upload(source, data, blob)
    made = Manifest("application/vnd.report", config, (report,), describe(source.manifest(entry.digest), MANIFEST))
    described = describe(made.to_bytes(), MANIFEST, artifact_type="application/vnd.report")
    source.refer(made.to_bytes(), described, entry.digest)
    site.bring(site.archive("1.tar"))
    assert site.releases.referrers(entry.digest) == ()
    site.bring(site.archive("2.tar", evidence=True))
    assert site.releases.referrers(entry.digest) == (described,)
    assert site.releases.small_blob(report, most=100) == b"a report"
    assert f"1.0.0-{described.digest[7:19]}" in site.releases.tags(), "registries collect what has no tag"
    agent = site.fleet.device()
    agent.try_engine = lambda bundle: Verdict((), 0.01, 5)
    assert agent.install(site.folder / "2.tar").changed


def test_a_strangers_archive_and_a_strangers_registry_are_refused(site: Site, engine: Path) -> None:
    site.fleet.release("1.0.0")
    archive = site.archive("1.tar")
    other = Fleet(site.fleet.registry, site.folder / "other", engine, "other")
    with pytest.raises(VerificationFailed, match="cannot be believed"):
        site.bring(archive, root=other.root)
    with pytest.raises(VerificationFailed, match="cannot be believed"):
        site.bring(archive, root=b"{}")
    with pytest.raises(VerificationFailed, match="announces no release of renamed"):
        site.bring(archive, releases=site.registry.repository("team/renamed"))
    assert site.state() == {}
    strange = Fleet(site.registry, site.folder / "strange", engine)  # has the same name
    before = site.state()
    with pytest.raises(VerificationFailed, match="the fleet's metadata cannot be believed"):
        site.bring(archive)
    assert site.state() == before
    assert strange.root != site.fleet.root


def test_another_release_of_that_version_is_not_replaced(site: Site) -> None:
    site.fleet.release("1.0.0")
    archive = site.archive("1.tar")
    foreign = Manifest("a/b", describe(EMPTY_BYTES, EMPTY, inline=True), ())
    upload(site.releases, EMPTY_BYTES, foreign.config)
    site.releases.put_manifest(foreign.to_bytes(), MANIFEST, tag="1.0.0")
    with pytest.raises(UsageError, match=r"has another release 1\.0\.0 already"):
        site.bring(archive)
    assert list(site.state()) == ["1.0.0"]


def rewritten(archive: Path, path: Path, change: Callable[[tarfile.TarInfo, bytes], bytes | None]) -> Path:
    """Write an archive whose entries were changed, or left out."""
    with tarfile.open(archive) as old, tarfile.open(path, "w:") as new:
        for member in old:
            source = old.extractfile(member)
            assert source is not None
            data = change(member, source.read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("how", ["cut", "flipped", "lacking", "unlisted", "hostile", "long"])
def test_a_damaged_archive_sends_nothing(site: Site, how: str) -> None:
    site.fleet.release("1.0.0")
    archive, path = site.archive("1.tar"), site.folder / "bad.tar"
    with Layout.open(archive) as layout:
        names = dict(layout.names)
        [engine] = read_index(layout.manifest("1.0.0")).manifests
    if how == "cut":
        path.write_bytes(archive.read_bytes()[:-700_000])
    elif how == "flipped":  # the largest blob: the engine's weights
        rewritten(archive, path, lambda member, data: data[:-1] + b"!" if member.size == 1_000_000 else data)
    elif how == "lacking":
        gone = names[next(name for name in names if name.endswith(".canary.json"))]
        rewritten(archive, path, lambda member, data: None if gone[7:] in member.name else data)
    elif how == "unlisted":  # what is in the snapshot, and so what devices would ask for

        def unlisted(member: tarfile.TarInfo, data: bytes) -> bytes:
            if member.name != "index.json":
                return data
            plain = json.loads(data)
            plain["manifests"] = [each for each in plain["manifests"] if "canary" not in json.dumps(each)]
            return json.dumps(plain).encode()

        rewritten(archive, path, unlisted)
    elif how == "hostile":
        link = tarfile.TarInfo(f"blobs/sha256/{engine.digest[7:]}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        rewritten(archive, path, lambda member, data: None if engine.digest[7:] in member.name else data)
        with tarfile.open(path, "a:") as more:
            more.addfile(link)
            more.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
    else:
        description = tarfile.TarInfo("long")
        description.type, description.size = tarfile.XHDTYPE, 1 << 40
        path.write_bytes(description.tobuf() + archive.read_bytes())
    with pytest.raises((VerificationFailed, NetworkFailed)):
        site.bring(path)
    assert site.state() == {}
    assert not (site.folder.parent.parent / "escaped").exists()


@pytest.mark.parametrize("step", range(1, 4))
def test_an_import_that_dies_shows_devices_nothing_and_goes_on_where_it_was(site: Site, step: int) -> None:
    site.fleet.release("1.0.0")
    archive, agent = site.archive("1.tar"), site.device()
    dying, left = site.releases, [step]
    put_manifest = dying.put_manifest

    def put(*args: str | bytes, **more: str) -> str:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return put_manifest(*args, **more)  # type: ignore[arg-type]

    dying.put_manifest = put  # type: ignore[method-assign, assignment]
    if step < 3:
        with pytest.raises(KeyboardInterrupt):
            site.bring(archive, releases=dying)
        with pytest.raises(NetworkFailed):
            agent.once()
        assert site.bring(archive).sent == 0
    else:
        site.bring(archive, releases=dying)
    assert agent.once().changed


def test_two_imports_do_not_run_at_once(site: Site) -> None:
    site.fleet.release("1.0.0")
    archive = site.archive("1.tar")
    notes: list[str] = []
    with Lock(site.metadata, notes.append).held("", lambda _: None), pytest.raises(FleetBusy, match="being changed by"):
        site.bring(archive)
    assert notes == []
    assert site.bring(archive).versions == ("1.0.0",)
