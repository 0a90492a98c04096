"""Metadata of The Update Framework in a registry: a tag for each file, named as the file is.

Each is an artifact of one layer whose bytes come along in the manifest (OCI image specification 1.1, "data"), so that a
file is one request; what is too large for that is a blob.
"""

from __future__ import annotations

from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.oci.formats import EMPTY, EMPTY_BYTES, MANIFEST, Manifest, describe, read_manifest
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.source import Source
from cnncc_runtime.oci.transfer import upload

METADATA = "application/vnd.tuf.metadata+json"
_INLINE = 1 << 20
"""Bytes that come along; Base64 makes them a third more, and registries take manifests of 4 MiB."""
_LARGEST = 16 << 20


def fetch_metadata(source: Source, name: str) -> bytes:
    """Return a file of metadata, which nothing has checked.

    Args:
        source: Where it is.
        name: ``timestamp.json``, ``3.root.json``, …

    Raises:
        NotInRegistry: There is none.
        VerificationFailed: What has that name is no file of metadata.
        NetworkFailed: No answer.
    """
    manifest = read_manifest(source.manifest(name))
    if manifest.artifact_type != METADATA or len(manifest.layers) != 1:
        raise VerificationFailed(f"{name} is no metadata", where=[f"{source.place}:{name}"])
    [layer] = manifest.layers
    return layer.data if layer.data is not None else source.small_blob(layer, most=_LARGEST)


def store_metadata(repository: Repository, name: str, data: bytes) -> None:
    """Store a file of metadata under its name.

    Args:
        repository: Where.
        name: Its name.
        data: Its bytes.

    Raises:
        NetworkFailed: It was not stored.
    """
    config = describe(EMPTY_BYTES, EMPTY, inline=True)
    layer = describe(data, METADATA, inline=len(data) <= _INLINE)
    for blob, content in ((config, EMPTY_BYTES), (layer, data)):
        upload(repository, content, blob)
    repository.put_manifest(Manifest(METADATA, config, (layer,)).to_bytes(), MANIFEST, tag=name)
