"""Deltas: how a device makes a file of a new engine from a file of the engine that it has.

    manifest  application/vnd.cnncc.delta.zstd.v1   subject: the new engine; an annotation: the old one
    config    …delta.pieces.v1+json                 file's digest → its pieces, in order
    layers    …delta.frames.v1+zstd                 a file's frames, one for each piece, and nothing else

A piece is at most `PIECE` bytes of the new file and needs at most `DICTIONARY` bytes of the old one, so that neither
side needs more memory for larger files. Of what lies in a registry, deltas alone are not signed: whoever applies one
checks the digest of what it gives, and bounds everything else before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.oci.formats import Descriptor, Manifest, describe, is_digest

DELTA = "application/vnd.cnncc.delta.zstd.v1"
PIECES = "application/vnd.cnncc.delta.pieces.v1+json"
FRAMES = "application/vnd.cnncc.delta.frames.v1+zstd"
FROM = "dev.cnncc.delta.from"
"""Annotation: the digest of the old engine's manifest, and of a layer the old file's."""
TO = "dev.cnncc.delta.to"
"""Annotation of a layer: the new file's digest."""

LEAST = 64 << 10
"""Bytes of a file that a delta is made of: what is smaller costs less than the requests for one."""
PIECE = 512 << 10
DICTIONARY = 1 << 20
LARGEST_CONFIG = 4 << 20
STRIDES = (1, 2, 4)
_MOST_RANGES = 64
_LARGEST = 1 << 40


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Some bytes of a new file.

    Attributes:
        size: How many.
        frame: Bytes of the zstd frame that holds them.
        stride: 0: the ranges, one after the other, are the frame's dictionary (raw content, RFC 8878, 5). 1, 2 or 4:
            the frame holds what the bytes of the one range lack of the new ones, modulo 256 (as bsdiff's, Percival
            2003), those of each place in a word of ``stride`` bytes together.
        ranges: Where in the old file, and how many bytes of it.
    """

    size: int
    frame: int
    stride: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FileDelta:
    """How a file is made from another one.

    Attributes:
        old: The digest of the one that a device has.
        new: Of the one that it gets.
        blob: The frames.
        pieces: What they are, in order.
    """

    old: str
    new: str
    blob: Descriptor
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        return sum(piece.size for piece in self.pieces)


class _Config(msgspec.Struct):
    pieces: dict[str, list[Piece]]


def delta_manifest(subject: Descriptor, base: str, files: Sequence[FileDelta]) -> tuple[Manifest, bytes]:
    """Return the manifest of a delta between two engines, and the bytes of its configuration.

    Args:
        subject: The new engine's manifest.
        base: The digest of the old engine's.
        files: What of it has a delta.
    """
    config = canonical_json({"pieces": {file.new: msgspec.to_builtins(file.pieces) for file in files}})
    layers = tuple(
        Descriptor(FRAMES, file.blob.digest, file.blob.size, annotations={FROM: file.old, TO: file.new})
        for file in files
    )
    return Manifest(DELTA, describe(config, PIECES), layers, subject, {FROM: base}), config


def read_delta(manifest: Manifest, config: bytes, subject: str, base: str) -> tuple[FileDelta, ...]:
    """Return what a delta between two engines holds, which nobody has signed.

    Args:
        manifest: The delta's.
        config: The bytes of its configuration.
        subject: The digest of the new engine's manifest.
        base: Of the old one's.

    Raises:
        VerificationFailed: It is none, is of other engines, or its numbers are out of bounds.
    """
    about = manifest.subject.digest if manifest.subject else ""
    if (manifest.artifact_type, about, manifest.annotations.get(FROM)) != (DELTA, subject, base):
        raise VerificationFailed("a delta is not between the engines that it is listed for")
    try:
        told = msgspec.json.decode(config, type=_Config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationFailed(f"a delta's pieces are not by the rules: {exc}") from exc
    found = []
    for layer in manifest.layers:
        old, new = layer.annotations.get(FROM, ""), layer.annotations.get(TO, "")
        pieces = tuple(told.pieces.get(new, ()))
        if not (is_digest(old) and is_digest(new) and pieces):
            raise VerificationFailed("a delta does not say which file it makes of which")
        if problem := _problem(pieces, layer.size):
            raise VerificationFailed(f"a delta's pieces are not by the rules: {problem}")
        found.append(FileDelta(old, new, layer, pieces))
    return tuple(found)


def check_ranges(pieces: Sequence[Piece], size: int) -> None:
    """See that pieces need nothing beyond the end of the old file.

    Raises:
        VerificationFailed: One does.
    """
    for piece in pieces:
        if any(start + length > size for start, length in piece.ranges):
            raise VerificationFailed("a delta's pieces are not by the rules: they need more than the old file has")


def frame_bound(size: int) -> int:
    """Return how many bytes a frame of so many may have (``ZSTD_compressBound``, and a checksum)."""
    return size + (size >> 8) + 128


def planes(data: bytes, stride: int) -> bytes:
    """Return bytes sorted by their place in a word: all first ones, then all second ones, and so on."""
    return b"".join(data[place::stride] for place in range(stride))


def words(data: bytes, stride: int) -> bytes:
    """Return the bytes that `planes` sorted."""
    made = bytearray(len(data))
    start = 0
    for place in range(stride):
        count = len(range(place, len(data), stride))
        made[place::stride] = data[start : start + count]
        start += count
    return bytes(made)


def add_bytes(left: bytes, right: bytes) -> bytes:
    """Return the sums of as many bytes, modulo 256; in few steps, and without numpy, which an agent need not load."""
    low = int.from_bytes(b"\x7f" * len(left), "little")
    a, b = int.from_bytes(left, "little"), int.from_bytes(right, "little")
    # seven bits of each byte cannot carry into the next one; the eighth is a sum without its carry
    return (((a & low) + (b & low)) ^ ((a ^ b) & ~low)).to_bytes(len(left), "little")


def _problem(pieces: Sequence[Piece], frames: int) -> str:
    for piece in pieces:
        if not (0 < piece.size <= PIECE and 0 < piece.frame <= frame_bound(piece.size)):
            return f"one of {piece.size} bytes from {piece.frame}"
        if len(piece.ranges) > _MOST_RANGES or any(
            not (0 <= start < _LARGEST and length > 0) for start, length in piece.ranges
        ):
            return "ranges of the old file"
        needed = sum(length for _, length in piece.ranges)
        if needed > DICTIONARY:
            return f"one that needs {needed} bytes of the old file"
        if piece.stride and (piece.stride not in STRIDES or len(piece.ranges) != 1 or needed != piece.size):
            return f"one of {piece.size} bytes that is mixed with {needed}"
    if sum(piece.frame for piece in pieces) != frames:
        return "their frames are not as long as what holds them"
    return ""
