"""Deltas between two releases, for each kind of device that both have an engine for; applied before they are published.

Where a piece of a new file lies in the old one is found by anchors: places whose 32 bytes before them have a hash that
ends in zeros (of Gear, as in FastCDC, Xia et al. 2016, but with two bits a byte), about one in a thousand, so that what
was inserted before them changes nothing. Anchors that moved alike vote. What they point to is the piece's dictionary
for zstd. Where training moved all weights a little there are no anchors, and no matches either; there the piece is the
difference of both files, byte by byte, where most bytes are alike: that of the high bytes of weights is mostly 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.agent.delta import apply, require_zstandard
from cnncc_runtime.deltas import (
    DELTA,
    DICTIONARY,
    FRAMES,
    FROM,
    LEAST,
    PIECE,
    STRIDES,
    FileDelta,
    Piece,
    delta_manifest,
    planes,
)
from cnncc_runtime.digests import digest_file
from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import scratch_folder, storage_errors
from cnncc_runtime.oci.formats import MANIFEST, TITLE, Descriptor, Index, describe, read_index, read_manifest
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import download, upload
from cnncc_runtime.releases import Offer, offers_of

WORTH = 0.6
"""Of a file's bytes, how many its delta may have."""
_LEVEL = 12
"""Higher levels take ten times as long; dictionaries gain nothing by it, differences a fifth at most."""
_CLOSE = 0.01
"""Of a piece's bytes: a frame that is smaller is not worth another try."""

_WINDOW = 32
_RARE = 10
"""Bits of a hash that are 0 at an anchor."""
_BLOCK = 1 << 20
_MARGIN = 16 << 10
"""Bytes before the first and after the last anchor that are taken along."""
_MOST_WAYS = 30
_GEAR: NDArray[np.uint64] = np.random.default_rng(0).integers(0, 1 << 64, 256, np.uint64)

Progress = Callable[[str, int, int], None]
"""Told of a file, the bytes of it that were done since it was last told, and how many it has."""


@dataclass(frozen=True)
class EngineDelta:
    """A delta between two engines for the same kind of device.

    Attributes:
        device: Which.
        files: What is made from what; none where no file's delta is worth it.
        size: Bytes of the deltas.
        whole: Bytes of those files.
        there: Whether the registry had it already.
    """

    device: str
    files: tuple[FileDelta, ...]
    there: bool = False

    @property
    def size(self) -> int:
        """Bytes that a device fetches instead of ``whole``."""
        return sum(file.blob.size for file in self.files)

    @property
    def whole(self) -> int:
        """Bytes of the files that are made of them."""
        return sum(file.size for file in self.files)


def add_deltas(
    repository: Repository,
    version: str,
    base: str,
    *,
    local: Mapping[str, Path] | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[EngineDelta, ...]:
    """Make and store the deltas from an older release's engines to a release's.

    Args:
        repository: Where both are.
        version: Of the release.
        base: The older one's version or digest.
        local: Digest → a file that has it, so that it is not fetched.
        progress: Told of what was done.

    Returns:
        One for each kind of device that both have an engine for, unless it is the same engine.

    Raises:
        NotInRegistry: There is no such release.
        UsageError: They have no kind of device in common.
        DependencyMissing: zstandard is not installed.
        NetworkFailed: No answer, or a delta was not stored.
        VerificationFailed: The registry's files are damaged.
        StorageFailed: The disk for temporary files is full.
    """
    require_zstandard()
    new, old = (_kinds(read_index(repository.manifest(each))) for each in (version, base))
    both = new.keys() & old.keys()
    if not both:
        raise UsageError(f"{version} and {base} have engines for no device in common, so that there are no deltas")
    folder = Path(tempfile.gettempdir())
    made = []
    for kind in sorted(both):
        if new[kind].entry.digest == old[kind].entry.digest:
            continue
        with scratch_folder(folder) as scratch:
            made.append(_Pair(repository, new[kind], old[kind], scratch, local or {}, progress).store(version))
    return tuple(made)


def make_delta(
    old: Path, new: Path, target: Path, *, piece: int = PIECE, progress: Callable[[int], None] = lambda _: None
) -> tuple[Piece, ...]:
    """Write a delta's frames, and return what they are. Memory hardly grows with the files: 16 bytes for each 1024.

    Args:
        old: The old file.
        new: The new one.
        target: The frames.
        piece: Bytes of a piece.
        progress: Told of bytes of the new file.

    Raises:
        StorageFailed: A file cannot be read or written.
    """
    pieces = []
    with storage_errors(target), old.open("rb") as base, new.open("rb") as source, target.open("wb") as frames:
        found = _Old(base, old.stat().st_size)
        shift = found.size - new.stat().st_size
        start = 0
        while data := source.read(piece):
            made, frame = found.best(data, start, shift)
            frames.write(frame)
            pieces.append(made)
            start += len(data)
            progress(len(data))
    return tuple(pieces)


Kind = tuple[str, str, str]


def _kinds(index: Index) -> dict[Kind, Offer]:
    return {(offer.machine, offer.gpu, offer.device): offer for offer in offers_of(index)}


@dataclass(frozen=True)
class _Pair:
    """Two engines for the same kind of device."""

    repository: Repository
    new: Offer
    old: Offer
    scratch: Path
    local: Mapping[str, Path]
    progress: Progress

    def store(self, version: str) -> EngineDelta:
        """Make the delta and store it, unless it is there."""
        repository, subject, base = self.repository, self.new.entry, self.old.entry.digest
        if any(entry.annotations.get(FROM) == base for entry in repository.referrers(subject.digest, DELTA)):
            return EngineDelta(self.new.device, (), there=True)
        files = tuple(self._files())
        if files:
            manifest, config = delta_manifest(Descriptor(MANIFEST, subject.digest, subject.size), base, files)
            upload(repository, config, manifest.config)
            data = manifest.to_bytes()
            repository.put_manifest(data, MANIFEST, tag=f"{version}-{subject.digest[7:19]}-from-{base[7:19]}")
            entry = describe(data, MANIFEST, artifact_type=DELTA, annotations={FROM: base})
            repository.refer(data, entry, subject.digest)
        return EngineDelta(self.new.device, files)

    def _files(self) -> Iterator[FileDelta]:
        old = {layer.annotations.get(TITLE, ""): layer for layer in self._layers(self.old)}
        for layer in self._layers(self.new):
            before = old.get(name := layer.annotations.get(TITLE, ""))
            if before is None or before.digest == layer.digest or layer.size < LEAST:
                continue
            if made := self._file(name, before, layer):
                yield made

    def _file(self, name: str, old: Descriptor, new: Descriptor) -> FileDelta | None:
        frames = self.scratch / "frames"
        before, after = self._fetched(old), self._fetched(new)
        told = f"{self.new.device} {name}"
        pieces = make_delta(before, after, frames, progress=lambda done: self.progress(told, done, new.size))
        blob = Descriptor(FRAMES, digest_file(frames), frames.stat().st_size)
        if blob.size > WORTH * new.size:
            return None
        made = FileDelta(old.digest, new.digest, blob, pieces)
        apply(made, frames, before, self.scratch / "applied")
        upload(self.repository, frames, blob)
        return made

    def _layers(self, offer: Offer) -> Sequence[Descriptor]:
        return read_manifest(self.repository.manifest(offer.entry.digest)).layers

    def _fetched(self, blob: Descriptor) -> Path:
        path = self.local.get(blob.digest)
        if path is None:
            path = self.scratch / blob.digest.removeprefix("sha256:")
            download(self.repository, blob, path)
        return path


class _Old:
    """A file that pieces of another one are looked for in."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self.size = size
        hashes, places = [], []
        for start in range(0, size, _BLOCK):
            before = min(start, _WINDOW - 1)
            found, at = _anchors(self._read(start - before, min(_BLOCK, size - start) + before))
            hashes.append(found)
            places.append(at + (start - before))
        listed = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._hashes, first = np.unique(listed, return_index=True)
        self._places = np.concatenate(places)[first] if places else np.empty(0, np.int64)

    def best(self, data: bytes, start: int, shift: int) -> tuple[Piece, bytes]:
        """Return a piece and its frame, the smallest of those that were tried.

        Args:
            data: The piece's bytes.
            start: Where they are in the new file.
            shift: How far its end is from the old one's.
        """
        ways = self._ways(data, start)
        ranges = self._ranges(ways, start, len(data), shift)
        parts = [self._read(at, length) for at, length in ranges]
        frame = _compress(data, b"".join(parts))
        best = Piece(len(data), len(frame), 0, ranges), frame
        if len(frame) <= _CLOSE * len(data):
            return best
        same = self._most_alike(data, start, [*(way for way, _, _ in ways[:1]), 0, shift])
        if same is None:
            return best
        at, base = same
        lacking = (np.frombuffer(data, np.uint8) - np.frombuffer(base, np.uint8)).tobytes()
        for stride in STRIDES:
            frame = _compress(planes(lacking, stride), b"")
            if len(frame) < best[0].frame:
                best = Piece(len(data), len(frame), stride, ((at, len(data)),)), frame
        return best

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        read: bytes = self._file.read(length)
        return read

    def _ways(self, data: bytes, start: int) -> list[tuple[int, int, int]]:
        """Return how far parts of a piece moved, the largest part first, and each part's first and last anchor."""
        hashes, places = _anchors(data)
        if not len(self._hashes) or not len(hashes):
            return []
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        known = self._hashes[at] == hashes
        places = places[known]
        moved = self._places[at[known]] - places - start
        ways, counts = np.unique(moved, return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:_MOST_WAYS]
        spans = ((way, places[moved == way]) for way in ways[largest])
        return [(int(way), int(span[0]), int(span[-1])) for way, span in spans]

    def _ranges(
        self, ways: list[tuple[int, int, int]], start: int, size: int, shift: int
    ) -> tuple[tuple[int, int], ...]:
        """Return which parts of the file to have as a dictionary: where anchors point, and the same place."""
        wanted = [(way, max(0, first - _MARGIN), min(size, last + _MARGIN)) for way, first, last in ways]
        taken: list[tuple[int, int]] = []
        for way, first, last in [*wanted, (0, 0, size), (shift, 0, size)]:
            begin, end = max(0, start + way + first), min(self.size, start + way + last)
            more = _merged([*taken, (begin, end)]) if begin < end else taken
            if sum(last - first for first, last in more) <= DICTIONARY:
                taken = more
        return tuple((begin, end - begin) for begin, end in taken)

    def _most_alike(self, data: bytes, start: int, ways: Sequence[int]) -> tuple[int, bytes] | None:
        """Return where as many bytes lie of which the most are the same, and these bytes."""
        fitting = sorted({start + way for way in ways if 0 <= start + way <= self.size - len(data)})
        bases = [(at, self._read(at, len(data))) for at in fitting]
        own = np.frombuffer(data, np.uint8)
        return max(bases, key=lambda base: int((np.frombuffer(base[1], np.uint8) == own).sum()), default=None)


def _anchors(data: bytes) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the anchors of some bytes: hashes, and where they end."""
    if len(data) < _WINDOW:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = _GEAR[np.frombuffer(data, np.uint8)]
    width = 1
    while width < _WINDOW:  # of twice as many bytes each time
        hashes[width:] += hashes[:-width] << np.uint64(2 * width)
        width *= 2
    places = np.flatnonzero(hashes >> np.uint64(64 - _RARE) == 0)
    places = places[places >= _WINDOW - 1]
    return hashes[places], places


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if made and begin <= made[-1][1]:
            made[-1] = made[-1][0], max(end, made[-1][1])
        else:
            made.append((begin, end))
    return made


def _compress(data: bytes, base: bytes) -> bytes:
    import zstandard

    dictionary = zstandard.ZstdCompressionDict(base, zstandard.DICT_TYPE_RAWCONTENT) if base else None
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=len(data), dict_size=len(base), write_checksum=True, write_dict_id=False
    )
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)
