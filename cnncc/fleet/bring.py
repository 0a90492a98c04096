"""A release from an archive into a registry that no publisher reaches: that of a site without internet.

What is in the archive is believed as a device believes it, from a root that is given, to the last byte, before
anything is sent. Blobs go first, then manifests, then metadata, its timestamp last; a registry never goes back to older
metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from cnncc.fleet.home import UPLOADS
from cnncc.fleet.keys import Keys
from cnncc.fleet.lock import TIMESTAMP, Lock, store_changes, timestamp_of
from cnncc.fleet.publish import check_free
from cnncc.fleet.signing import Signing
from cnncc_runtime.agent.trust import ANCHOR, Announced, Floor, Trust
from cnncc_runtime.errors import NotInRegistry, VerificationFailed
from cnncc_runtime.files import scratch_folder, storage_errors
from cnncc_runtime.metadata import fetch_metadata
from cnncc_runtime.oci.formats import INDEX, MANIFEST, Descriptor, describe, read_index, read_manifest
from cnncc_runtime.oci.layout import REF, Layout, Part
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import Progress, upload
from cnncc_runtime.releases import offers_of

METADATA = "tuf/"
"""What the names of metadata begin with in an archive."""


@dataclass(frozen=True)
class Imported:
    """What was brought into a registry.

    Attributes:
        versions: Of the releases.
        channels: That point to them.
        sent: Bytes of blobs: what was there was not sent.
        missing: Channels whose releases the registry does not have.
    """

    versions: tuple[str, ...]
    channels: tuple[str, ...]
    sent: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Believed:
    """What an archive says, verified.

    Attributes:
        releases: Channel → what it points to.
        floor: Versions and keys of all roles.
        files: Files of metadata: name → bytes.
    """

    releases: Mapping[str, Announced]
    floor: Floor
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class _Plan:
    """What is stored, in this order: blobs, manifests, what refers to them, the index."""

    version: str
    index: bytes
    engines: Mapping[str, bytes]
    referrers: Mapping[str, bytes]
    blobs: Mapping[str, Descriptor]


def name_in(archive: Path) -> str:
    """Return the name of the model whose releases are in an archive; nothing has checked it.

    Raises:
        VerificationFailed: It is no archive, or is not of one model.
    """
    with Layout.open(archive) as layout:
        found = set()
        for role, file in _channels(layout).items():
            try:
                signed: Any = Metadata.from_bytes(fetch_metadata(Part(layout, METADATA), file)).signed
            except RepositoryError as exc:
                raise VerificationFailed(f"{archive}: {file} is no metadata: {exc}") from exc
            if isinstance(signed, Targets):
                found |= {path.partition("/")[2] for path in signed.targets if path.startswith(f"{role}/")}
    if len(found) != 1:
        raise VerificationFailed(f"{archive} holds releases of {len(found)} models", hint="--name says which is meant")
    return found.pop()


def import_release(
    archive: Path,
    root: bytes,
    releases: Repository,
    metadata: Repository,
    *,
    scratch: Path,
    note: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> Imported:
    """Bring what an archive holds into a registry; what is there is not sent again.

    Args:
        archive: From `cnncc.fleet.export`.
        root: The fleet's root metadata, from somebody who is trusted.
        releases: Where releases go.
        metadata: Where the fleet's metadata goes.
        scratch: A folder in which a blob lies at a time; what broke off goes on by what is kept in its ``uploads``.
        note: Told of what is worth knowing.
        progress: Told of bytes.

    Raises:
        VerificationFailed: The archive is not to be believed, or is older than what the registry has.
        UsageError: The registry has another release of that version.
        FleetBusy: Somebody else changes the registry's metadata now.
        NetworkFailed: No answer; beginning again sends what is missing.
    """
    name = releases.place.name.rpartition("/")[2]
    with Layout.open(archive) as layout, scratch_folder(scratch) as folder:
        believed = _believe(layout, root, name, folder)
        plans = [_plan(layout, each) for each in _held(layout, believed)]
        _check_newer(metadata, root, believed, folder)
        for plan in plans:
            check_free(releases, plan.version, plan.index)
        sent = sum(_store(layout, plan, releases, folder, scratch / UPLOADS, progress) for plan in plans)
        with Lock(metadata, note).held("", lambda _: None) as turn:
            _check_newer(metadata, root, believed, folder)
            before = timestamp_of(metadata)
            if before != believed.files[TIMESTAMP]:
                store_changes(metadata, believed.files, before, turn)
    here = {plan.version for plan in plans}
    return Imported(
        tuple(sorted(here)),
        tuple(sorted(role for role, each in believed.releases.items() if each.custom.get("version") in here)),
        sent,
        tuple(sorted(role for role, each in believed.releases.items() if not releases.has(each.digest))),
    )


def _channels(layout: Layout) -> dict[str, str]:
    """Return the channels of an archive: role → the file of its metadata."""
    top = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
    files = [name.removeprefix(METADATA) for name in layout.names if name.startswith(METADATA)]
    parted = {file: file.removesuffix(".json").partition(".")[2] for file in files}
    return {role: file for file, role in parted.items() if role and role not in top}


def _believe(layout: Layout, root: bytes, name: str, folder: Path) -> _Believed:
    """Verify an archive's metadata as a device does."""
    source = Part(layout, METADATA)
    trusted = folder / "trust"
    with storage_errors(trusted):
        trusted.mkdir()
        (trusted / ANCHOR).write_bytes(root)
    trust = Trust(trusted, source)
    found = {role: trust.announced(f"{role}/{name}") for role in _channels(layout)}
    releases = {role: announced for role, announced in found.items() if announced is not None}
    if not releases:
        raise VerificationFailed(f"{layout.path} announces no release of {name}", hint="is --name right?")

    def known(role: str) -> bytes:
        return (trusted / "known" / f"{role}.json").read_bytes()

    first = Metadata[Root].from_bytes(root).signed.version
    last = Metadata[Root].from_bytes(known(Root.type)).signed.version
    files = {f"{first}.root.json": root}
    for number in range(first + 1, last + 1):
        files[f"{number}.root.json"] = fetch_metadata(source, f"{number}.root.json")
    snapshot: Snapshot = Metadata[Snapshot].from_bytes(known(Snapshot.type)).signed
    for file, meta in snapshot.meta.items():
        role = file.removesuffix(".json")
        if role != Targets.type and role not in found:
            raise VerificationFailed(f"{layout.path} lacks {meta.version}.{file}", hint="export it again")
        files[f"{meta.version}.{file}"] = known(role)
    files |= {f"{snapshot.version}.snapshot.json": known(Snapshot.type), TIMESTAMP: known(Timestamp.type)}
    return _Believed(releases, trust.floor(), files)


def _held(layout: Layout, believed: _Believed) -> list[Announced]:
    """Return the releases that an archive holds."""
    found = {}
    for announced in believed.releases.values():
        try:
            layout.manifest(announced.digest)
        except NotInRegistry:
            continue  # of a channel that was not exported
        found[announced.digest] = announced
    if not found:
        raise VerificationFailed(f"{layout.path} holds none of the releases that it announces", hint="export it again")
    return list(found.values())


def _plan(layout: Layout, announced: Announced) -> _Plan:
    """Read a release to its last byte."""
    data = layout.manifest(announced.digest)
    index = read_index(data)
    offers_of(index)
    blobs: dict[str, Descriptor] = {}

    def take(manifest: bytes) -> bytes:
        found = read_manifest(manifest)
        blobs.update({blob.digest: blob for blob in (found.config, *found.layers)})
        return manifest

    engines = {entry.digest: take(layout.manifest(entry.digest)) for entry in index.manifests}
    referrers = {}
    for entry in layout.entries:
        if REF not in entry.annotations:
            manifest = layout.manifest(entry.digest)
            subject = read_manifest(manifest).subject
            if subject is not None and subject.digest in (announced.digest, *engines):
                referrers[entry.digest] = take(manifest)
    for blob in blobs.values():
        layout.check(blob)
    return _Plan(str(announced.custom.get("version", "")), data, engines, referrers, blobs)


def _check_newer(metadata: Repository, root: bytes, believed: _Believed, folder: Path) -> None:
    """See that a registry's metadata is of the same fleet, and not newer."""
    if timestamp_of(metadata) is None:
        return
    there = Signing(metadata, Keys(folder, lambda _: ""), root)
    there.load()
    for role in there.overview():
        seen = believed.floor.roles.get(role.name)
        same = seen is not None and (role.name == Root.type or seen.keyids == tuple(sorted(role.keyids)))
        if seen is not None and same and seen.version < role.version:
            raise VerificationFailed(
                f"the registry has {role.name} metadata of version {role.version}, the archive {seen.version}",
                where=[str(metadata.place)],
                hint="a registry does not go back: export the release again",
            )


def _store(layout: Layout, plan: _Plan, releases: Repository, folder: Path, sessions: Path, progress: Progress) -> int:
    """Store a release; return how many bytes of blobs were sent."""
    sent = 0

    def told(went: int) -> None:
        nonlocal sent
        sent += went
        progress(went)

    for blob in plan.blobs.values():
        if not releases.has_blob(blob.digest):
            layout.copy(blob, folder / "blob")
            upload(releases, folder / "blob", blob, sessions=sessions, progress=told)
    for digest, manifest in {**plan.engines, **plan.referrers}.items():
        releases.put_manifest(manifest, MANIFEST, tag=f"{plan.version}-{digest[7:19]}")
    releases.put_manifest(plan.index, INDEX, tag=plan.version)
    for manifest in plan.referrers.values():
        found = read_manifest(manifest)
        assert found.subject is not None
        entry = describe(manifest, MANIFEST, artifact_type=found.artifact_type)
        releases.refer(manifest, entry, found.subject.digest)
    return sent
