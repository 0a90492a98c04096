"""A release and what says that it may be believed, in one file: for devices without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import UsageError, VerificationFailed
from cnncc_runtime.files import scratch_folder, storage_errors
from cnncc_runtime.oci.formats import INDEX, MANIFEST, Descriptor, describe, read_index, read_manifest
from cnncc_runtime.oci.layout import REF, write_layout
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import Progress, download

_PIECE = 1 << 20


@dataclass(frozen=True)
class Exported:
    """An archive.

    Attributes:
        digest: Of the release's index.
        engines: How many it holds.
        size: Bytes of the archive.
    """

    digest: str
    engines: int
    size: int


def export_release(
    repository: Repository,
    metadata: Repository,
    name: str,
    path: Path,
    *,
    channel: str = "",
    version: str = "",
    evidence: bool = False,
    progress: Progress = lambda _: None,
) -> Exported:
    """Write a release that a channel points to into an archive, whole or not at all.

    Args:
        repository: Where the release is.
        metadata: Where the fleet's metadata is.
        name: Of the model.
        path: The archive; what was fetched for it lies beside it meanwhile.
        channel: Whose release; empty for any that points to ``version``.
        version: Which release; empty for whichever the channel points to.
        evidence: Whether what refers to its engines comes along (the model, reports).
        progress: Told of bytes.

    Raises:
        UsageError: No channel points to that release: no device would believe it.
        VerificationFailed: The registry's metadata is none, or points to nothing.
        NetworkFailed: No answer.
        StorageFailed: The archive cannot be written.
    """
    files = _metadata(metadata)
    target = _pointed(files, name, channel, version, metadata)
    digest = f"sha256:{target.hashes['sha256']}"
    index = repository.manifest(digest)
    small = {digest: index}
    entries = [replace(describe(index, INDEX), annotations={REF: target.custom["version"]})]
    large: dict[str, Descriptor] = {}

    def take(manifest: str) -> bytes:
        small[manifest] = data = repository.manifest(manifest)
        found = read_manifest(data)
        large.update({blob.digest: blob for blob in (found.config, *found.layers)})
        return data

    engines = [entry.digest for entry in read_index(index).manifests]
    for engine in engines:
        take(engine)
    if evidence:
        beside = {each.digest for subject in (digest, *engines) for each in repository.referrers(subject)}
        entries += [describe(take(each), MANIFEST) for each in sorted(beside)]
    for tag, _ in files.items():
        manifest = metadata.manifest(tag)
        small[digest_bytes(manifest)] = manifest
        entries.append(replace(describe(manifest, MANIFEST), annotations={REF: f"tuf/{tag}"}))
        parts = read_manifest(manifest)
        for blob in (parts.config, *parts.layers):
            small[blob.digest] = blob.data if blob.data is not None else metadata.small_blob(blob, most=blob.size)
    with scratch_folder(path.parent) as scratch:
        fetched = [blob for blob in large.values() if blob.digest not in small]
        for number, blob in enumerate(fetched):
            download(repository, blob, scratch / f"{number}", progress=progress)
        pieces = {each: (len(data), iter([data])) for each, data in small.items()}
        write_layout(
            path,
            entries,
            pieces | {blob.digest: (blob.size, _read(scratch / f"{number}")) for number, blob in enumerate(fetched)},
        )
    with storage_errors(path):
        return Exported(digest, len(engines), path.stat().st_size)


def _pointed(files: dict[str, bytes], name: str, channel: str, version: str, metadata: Repository) -> Any:
    """Return the target of a channel that points to a release."""
    found: dict[str, Any] = {}
    for file, data in files.items():
        signed = Metadata.from_bytes(data).signed
        role = file.removesuffix(".json").partition(".")[2]
        if isinstance(signed, Targets) and (target := signed.targets.get(f"{role}/{name}")) and target.custom:
            found[role] = target
    asked = {role: target for role, target in found.items() if channel in ("", role)}
    if version:
        asked = {role: target for role, target in asked.items() if target.custom["version"] == version}
    if asked:
        return next(iter(asked.values()))
    if version:
        raise UsageError(
            f"{channel} does not point to {name}@{version}" if channel else f"no channel points to {name}@{version}",
            hint=f"devices believe what a channel's key signed: cnncc fleet promote {name}@{version} --to CHANNEL",
        )
    raise VerificationFailed(f"nothing is announced as {channel}/{name}", where=[str(metadata.place)])


def _metadata(repository: Repository) -> dict[str, bytes]:
    """Return what a device reads of a fleet's metadata: name → bytes. The device checks it."""
    from cnncc_runtime.metadata import fetch_metadata

    found = {"timestamp.json": fetch_metadata(repository, "timestamp.json")}
    timestamp: Metadata[Timestamp] = Metadata.from_bytes(found["timestamp.json"])
    name = f"{timestamp.signed.snapshot_meta.version}.snapshot.json"
    found[name] = fetch_metadata(repository, name)
    snapshot: Metadata[Snapshot] = Metadata.from_bytes(found[name])
    wanted = [f"{meta.version}.{role}" for role, meta in snapshot.signed.meta.items()]
    wanted += [tag for tag in repository.tags() if tag.endswith(".root.json")]
    return found | {tag: fetch_metadata(repository, tag) for tag in sorted(wanted)}


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
