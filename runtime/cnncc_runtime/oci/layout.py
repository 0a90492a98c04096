"""A repository in one file: an OCI image layout in a tar archive (OCI image specification 1.1, "Image Layout").

Nothing is ever unpacked: entries are found by the names that the specification gives them, and read where they are.
So an archive can hold links, devices and paths that lead elsewhere, and none of them is looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import NotInRegistry, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors, sync
from cnncc_runtime.oci.formats import LARGEST_MANIFEST, Descriptor, Index, is_digest, read_index

REF = "org.opencontainers.image.ref.name"
_MARK, _INDEX = "oci-layout", "index.json"
_VERSION = b'{"imageLayoutVersion":"1.0.0"}\n'
_MOST_ENTRIES = 100_000
_PIECE = 1 << 18


@dataclass(frozen=True)
class Layout:
    """An archive that is open.

    Attributes:
        path: The archive.
        entries: Of its index.
        names: Tag → digest.
    """

    path: Path
    entries: tuple[Descriptor, ...]
    names: Mapping[str, str]
    _archive: tarfile.TarFile
    _blobs: Mapping[str, tarfile.TarInfo]

    @classmethod
    def open(cls, path: Path) -> Layout:
        """Open an archive; only its list of entries and its index are read.

        Raises:
            VerificationFailed: It is none, or is damaged.
            StorageFailed: It cannot be read.
        """
        with contextlib.ExitStack() as stack:
            try:
                with storage_errors(path):
                    archive = stack.enter_context(tarfile.open(path, "r:", tarinfo=_Entry))
                index, blobs = _entries(archive)
                entries = read_index(index).manifests
            except (tarfile.TarError, EOFError, ValueError) as exc:
                raise VerificationFailed(f"{path} is no release in a tar archive: {exc}", hint=_HINT) from exc
            stack.pop_all()
        names = {entry.annotations[REF]: entry.digest for entry in entries if REF in entry.annotations}
        return cls(path, entries, names, archive, blobs)

    def __enter__(self) -> Layout:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the archive."""
        self._archive.close()

    def manifest(self, reference: str) -> bytes:
        """Return a manifest's or an index's bytes, by digest or tag; see `cnncc_runtime.oci.registry.Repository`."""
        digest = self.names.get(reference, reference)
        member = self._blobs.get(digest)
        if member is None:
            raise NotInRegistry(f"{self.path} holds no {reference}")
        return self._checked(digest, member, LARGEST_MANIFEST)

    def small_blob(self, blob: Descriptor, *, most: int) -> bytes:
        """Return a blob's bytes; see `cnncc_runtime.oci.registry.Repository`."""
        member = self._blobs.get(blob.digest)
        if member is None:
            raise NotInRegistry(f"{self.path} holds no {blob.digest}")
        return self._checked(blob.digest, member, min(most, blob.size))

    def copy(self, blob: Descriptor, target: Path) -> None:
        """Copy a blob into a file, which is flushed to disk.

        Raises:
            NotInRegistry: There is none.
            VerificationFailed: Its bytes are others; the file is gone.
            StorageFailed: The file cannot be written.
        """
        with storage_errors(target):
            try:
                with target.open("wb") as file:
                    for piece in self._pieces(blob):
                        file.write(piece)
                sync(target)
            except (NotInRegistry, VerificationFailed):
                target.unlink()
                raise

    def check(self, blob: Descriptor) -> None:
        """See that a blob is there, whole.

        Raises:
            NotInRegistry: There is none.
            VerificationFailed: Its bytes are others.
        """
        with storage_errors(self.path):
            for _ in self._pieces(blob):
                pass

    def _pieces(self, blob: Descriptor) -> Iterator[bytes]:
        """Yield a blob's bytes; it ends well only where they are its own."""
        member = self._blobs.get(blob.digest)
        if member is None:
            raise NotInRegistry(f"{self.path} holds no {blob.digest}")
        source = self._archive.extractfile(member)
        assert source is not None
        hasher = hashlib.sha256()
        left = blob.size
        while left:
            try:
                piece = source.read(min(_PIECE, left))
            except tarfile.ReadError:
                piece = b""
            if not piece:
                break
            hasher.update(piece)
            yield piece
            left -= len(piece)
        if left or f"sha256:{hasher.hexdigest()}" != blob.digest:
            raise VerificationFailed(f"{self.path} holds other bytes for {blob.digest}", hint="copy it again")

    def _checked(self, digest: str, member: tarfile.TarInfo, most: int) -> bytes:
        if member.size > most:
            raise VerificationFailed(f"{self.path} holds {member.size} bytes for {digest}, {most} at most belong there")
        data = _bytes(self._archive, member)
        if digest_bytes(data) != digest:
            raise VerificationFailed(f"{self.path} holds other bytes for {digest}", hint="copy it again")
        return data


@dataclass(frozen=True)
class Part:
    """Manifests of an archive whose names begin alike, as a repository has them (`cnncc_runtime.oci.source.Source`).

    Attributes:
        layout: The archive.
        prefix: What names begin with: ``tuf/``; empty for all.
    """

    layout: Layout
    prefix: str = ""

    @property
    def place(self) -> Path:
        """The archive."""
        return self.layout.path

    def manifest(self, reference: str) -> bytes:
        """See `Layout.manifest`."""
        return self.layout.manifest(reference if is_digest(reference) else self.prefix + reference)

    def small_blob(self, blob: Descriptor, *, most: int) -> bytes:
        """See `Layout.small_blob`."""
        return self.layout.small_blob(blob, most=most)


class _Entry(tarfile.TarInfo):
    """An entry whose own description is small: `tarfile` reads that into memory, however long it says it is."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type in _DESCRIPTIONS and self.size > LARGEST_MANIFEST:
            raise ValueError(f"a description of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # which is meant to be extended, as its source says


_DESCRIPTIONS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


_HINT = "`cnncc fleet export` makes one"


def _entries(archive: tarfile.TarFile) -> tuple[bytes, dict[str, tarfile.TarInfo]]:
    """Return an archive's index, and digest → the entry that is named so.

    Raises:
        ValueError: It has no index, or too many entries.
    """
    blobs: dict[str, tarfile.TarInfo] = {}
    index = None
    for count, member in enumerate(archive):
        if count >= _MOST_ENTRIES:
            raise ValueError(f"more than {_MOST_ENTRIES} entries")
        if not member.isreg():
            continue
        if member.name == _INDEX:
            index = member
        elif is_digest(digest := member.name.replace("blobs/sha256/", "sha256:", 1)):
            blobs[digest] = member
    if index is None or index.size > LARGEST_MANIFEST:
        raise ValueError(f"it holds no {_INDEX}")
    return _bytes(archive, index), blobs


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = archive.extractfile(member)
    assert source is not None
    return source.read()


def write_layout(path: Path, entries: Iterable[Descriptor], blobs: Mapping[str, tuple[int, Iterable[bytes]]]) -> None:
    """Write an archive, whole or not at all; the same blobs give the same bytes.

    Args:
        path: The archive.
        entries: Of its index; `REF` among their annotations names them.
        blobs: Digest → size, and pieces.

    Raises:
        StorageFailed: It cannot be written.
    """
    index = Index("", tuple(sorted(entries, key=lambda entry: (entry.annotations.get(REF, ""), entry.digest))))
    with atomic_file(path) as partial, tarfile.open(partial, "w:", format=tarfile.USTAR_FORMAT) as archive:
        _add(archive, _MARK, len(_VERSION), [_VERSION])
        data = index.to_bytes()
        _add(archive, _INDEX, len(data), [data])
        for digest, (size, pieces) in sorted(blobs.items()):
            _add(archive, f"blobs/sha256/{digest.removeprefix('sha256:')}", size, pieces)


def _add(archive: tarfile.TarFile, name: str, size: int, pieces: Iterable[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o644
    archive.addfile(entry, _Pieces(pieces))


class _Pieces(io.RawIOBase):
    """Pieces, read as a file; `tarfile` asks for no more than the entry has."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._left = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while len(self._left) < size and (piece := next(self._pieces, b"")):
            self._left += piece
        found, self._left = self._left[:size], self._left[size:]
        return found
