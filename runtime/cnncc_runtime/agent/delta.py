"""What of a new engine can be made from the one that a device has, and making it.

A delta is fetched whole, as any blob, resumed where it broke off and verified; then it is applied, piece by piece, into
a file of its own in ``incoming/``. Power that fails meanwhile costs that work, and no byte of the network's.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cnncc_runtime.agent import slots
from cnncc_runtime.agent.disk import RealDisk
from cnncc_runtime.deltas import (
    DELTA,
    FROM,
    LARGEST_CONFIG,
    LEAST,
    FileDelta,
    Piece,
    add_bytes,
    check_ranges,
    read_delta,
    words,
)
from cnncc_runtime.digests import digest_file
from cnncc_runtime.errors import (
    CnnccError,
    DependencyMissing,
    NetworkFailed,
    Paused,
    RegistryRefused,
    StorageFailed,
    VerificationFailed,
)
from cnncc_runtime.files import storage_errors, sync
from cnncc_runtime.oci.formats import Descriptor, read_manifest
from cnncc_runtime.oci.registry import Repository

Fetch = Callable[[Descriptor, Path], None]
"""Puts a blob into a file, which then holds it whole, is flushed to disk, and has its digest."""


@dataclass
class Deltas:
    """What of a new engine can be made from the one that a device has.

    Attributes:
        repository: Where the releases are.
        disk: The agent's.
        base: The slot of the engine that the device has.
        fetch: Fetches deltas.
        note: Told why a file is fetched whole although a delta was looked for.
    """

    repository: Repository
    disk: RealDisk
    base: str
    fetch: Fetch
    note: Callable[[str], None]
    _found: dict[str, FileDelta] = field(default_factory=dict, init=False)

    def look(self, slot: str, lacking: Sequence[Descriptor]) -> None:
        """See what there is; nothing is asked where files are small. What goes wrong is noted.

        Args:
            slot: The new engine's.
            lacking: Files of it that the device does not have.
        """
        if not self.base or not any(layer.size >= LEAST for layer in lacking):
            return
        try:
            require_zstandard()
            self._found = find_deltas(self.repository, f"sha256:{slot}", f"sha256:{self.base}")
        except (DependencyMissing, NetworkFailed, VerificationFailed) as exc:
            self.note(f"no deltas are taken: {exc.message}")

    def make(self, layer: Descriptor) -> bool:
        """Make a file from an old one, in the place where it would be fetched to; False where it must be fetched.

        Args:
            layer: The file.

        Raises:
            Paused: Downloads are not wanted now; what came so far is kept.
            NetworkFailed: The delta broke off after some bytes came; they are kept.
        """
        delta = self._found.get(layer.digest)
        if delta is None or self._left(delta.blob) >= self._left(layer):
            return False
        before = self._left(delta.blob)
        try:
            self._make(delta, layer)
        except Paused:
            raise
        except (NetworkFailed, StorageFailed, VerificationFailed) as exc:
            broke_off = isinstance(exc, NetworkFailed) and not isinstance(exc, RegistryRefused)
            # every poll gets further: by the delta, or without it
            if broke_off and self._left(delta.blob) < before:
                raise
            self._failed(delta, exc, keep=broke_off)
            return False
        return True

    def _make(self, delta: FileDelta, layer: Descriptor) -> None:
        name = slots.file_in(self.disk, self.base, delta.old)
        if name is None or delta.size != layer.size:
            raise VerificationFailed("it is of other files than the engines have")
        old, frames = self.disk.root / name, slots.part_of(delta.blob.digest)
        with storage_errors(old):
            if digest_file(old) != delta.old:
                raise VerificationFailed(f"{old.name}, which it would be applied to, was damaged")
        self.fetch(delta.blob, self.disk.root / frames)
        apply(delta, self.disk.root / frames, old, self.disk.root / slots.made_of(layer.digest))
        self.disk.rename(slots.made_of(layer.digest), slots.part_of(layer.digest))
        self.disk.remove(frames)

    def _failed(self, delta: FileDelta, exc: CnnccError, *, keep: bool) -> None:
        if not keep:
            self.disk.remove(slots.part_of(delta.blob.digest))
        self.note(f"a delta failed, the whole file is fetched: {exc.message}")

    def _left(self, blob: Descriptor) -> int:
        """Return how many bytes of a blob were not fetched yet."""
        part = self.disk.root / slots.part_of(blob.digest)
        with storage_errors(part):
            return blob.size - (part.stat().st_size if part.exists() else 0)


def require_zstandard() -> None:
    """See that deltas can be made and applied here.

    Raises:
        DependencyMissing: They cannot.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise DependencyMissing("deltas need zstandard", hint="pip install 'cnncc-runtime[fleet]'")


def find_deltas(repository: Repository, engine: str, base: str) -> dict[str, FileDelta]:
    """Return which files of an engine can be made from another's: the new file's digest → how.

    Args:
        repository: Where the releases are.
        engine: The digest of the new engine's manifest.
        base: Of the one that the device has.

    Raises:
        NetworkFailed: No answer.
        VerificationFailed: What is listed is no delta, or one out of bounds.
    """
    listed = repository.referrers(engine, DELTA)
    entry = next((entry for entry in listed if entry.annotations.get(FROM) == base), None)
    if entry is None:
        return {}
    manifest = read_manifest(repository.manifest(entry.digest))
    config = repository.small_blob(manifest.config, most=LARGEST_CONFIG)
    return {file.new: file for file in read_delta(manifest, config, engine, base)}


def apply(delta: FileDelta, frames: Path, old: Path, target: Path) -> None:
    """Make a file from an old one; it then is whole, flushed to disk, and has the digest. Memory does not grow with it.

    Args:
        delta: How.
        frames: The file that holds the delta's frames.
        old: The old file, which has the digest.
        target: The file that is made, anew.

    Raises:
        VerificationFailed: The delta gives something else, or more; the file is gone.
        StorageFailed: The disk is full or broken; the file is gone.
    """
    hasher = hashlib.sha256()
    try:
        with storage_errors(target), frames.open("rb") as source, old.open("rb") as base, target.open("wb") as file:
            check_ranges(delta.pieces, old.stat().st_size)
            for data in _pieces(delta.pieces, source, base):
                hasher.update(data)
                file.write(data)
        if f"sha256:{hasher.hexdigest()}" != delta.new:
            raise VerificationFailed(f"a delta gave something else than {delta.new}")
        with storage_errors(target):
            sync(target)
    except BaseException:
        with storage_errors(target):
            target.unlink(missing_ok=True)
        raise


def _pieces(pieces: tuple[Piece, ...], frames: BinaryIO, old: BinaryIO) -> Iterator[bytes]:
    for piece in pieces:
        parts = []
        for start, length in piece.ranges:
            old.seek(start)
            parts.append(old.read(length))
        yield _piece(piece, frames.read(piece.frame), b"".join(parts))


def _piece(piece: Piece, frame: bytes, base: bytes) -> bytes:
    import zstandard  # here: an update without deltas does not need it

    try:
        # the frame says how much memory is taken for what it holds
        said = zstandard.get_frame_parameters(frame).content_size
        if said != piece.size:
            raise VerificationFailed(f"a delta's frame says that it holds {said} bytes, {piece.size} belong there")
        dictionary = None
        if base and not piece.stride:
            dictionary = zstandard.ZstdCompressionDict(base, zstandard.DICT_TYPE_RAWCONTENT)
        data = zstandard.ZstdDecompressor(dict_data=dictionary).decompress(frame, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as exc:
        raise VerificationFailed(f"a delta's frame is damaged: {exc}") from exc
    return add_bytes(words(data, piece.stride), base) if piece.stride else data
