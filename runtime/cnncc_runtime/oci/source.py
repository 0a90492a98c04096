"""What manifests and blobs are read from: a registry's repository, or an archive of one."""

from __future__ import annotations

from typing import Protocol

from cnncc_runtime.oci.formats import Descriptor


class Source(Protocol):
    """See `cnncc_runtime.oci.registry.Repository` and `cnncc_runtime.oci.layout.Part`."""

    @property
    def place(self) -> object:
        """Where it is, for people to read."""
        ...

    def manifest(self, reference: str) -> bytes:
        """Return a manifest's or an index's bytes, by digest, which they then have, or by tag."""
        ...

    def small_blob(self, blob: Descriptor, *, most: int) -> bytes:
        """Return a blob's bytes, which have its digest."""
        ...
