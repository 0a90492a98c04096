"""A release and what says that it may be believed, in one file: for devices without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Snapshot, Timestamp

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import VerificationFailed
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
    channel: str,
    name: str,
    path: Path,
    *,
    progress: Progress = lambda _: None,
) -> Exported:
    """Write the release that a channel points to into an archive, whole or not at all.

    Args:
        repository: Where the release is.
        metadata: Where the fleet's metadata is.
        channel: Whose release.
        name: Of the model.
        path: The archive; what was fetched for it lies beside it meanwhile.
        progress: Told of bytes.

    Raises:
        VerificationFailed: The registry's metadata is none, or points to nothing.
        NetworkFailed: No answer.
        StorageFailed: The archive cannot be written.
    """
    files = _metadata(metadata)
    signed: Any = Metadata.from_bytes(files[next(name for name in files if name.endswith(f".{channel}.json"))]).signed
    target = signed.targets.get(f"{channel}/{name}")
    if target is None:
        raise VerificationFailed(f"nothing is announced as {channel}/{name}", where=[str(metadata.place)])
    digest = f"sha256:{target.hashes['sha256']}"
    index = repository.manifest(digest)
    small = {digest: index}
    entries = [replace(describe(index, INDEX), annotations={REF: target.custom["version"]})]
    large: dict[str, Descriptor] = {}
    for entry in read_index(index).manifests:
        small[entry.digest] = repository.manifest(entry.digest)
        engine = read_manifest(small[entry.digest])
        large |= {blob.digest: blob for blob in (engine.config, *engine.layers)}
    for tag, _ in files.items():
        manifest = metadata.manifest(tag)
        small[digest_bytes(manifest)] = manifest
        entries.append(replace(describe(manifest, MANIFEST), annotations={REF: f"tuf/{tag}"}))
        parts = read_manifest(manifest)
        for blob in (parts.config, *parts.layers):
            small[blob.digest] = blob.data if blob.data is not None else metadata.small_blob(blob, most=blob.size)
    with scratch_folder(path.parent) as scratch:
        for number, blob in enumerate(large.values()):
            download(repository, blob, scratch / f"{number}", progress=progress)
        pieces = {each: (len(data), iter([data])) for each, data in small.items()}
        write_layout(
            path,
            entries,
            pieces
            | {blob.digest: (blob.size, _read(scratch / f"{number}")) for number, blob in enumerate(large.values())},
        )
    with storage_errors(path):
        return Exported(digest, len(read_index(index).manifests), path.stat().st_size)


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
