"""Deltas: what is made gives the new file, in bounded memory, and what somebody else made gives nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc.fleet.delta import make_delta
from cnncc_runtime.agent.delta import apply
from cnncc_runtime.deltas import (
    DELTA,
    DICTIONARY,
    FROM,
    PIECE,
    PIECES,
    STRIDES,
    TO,
    FileDelta,
    Piece,
    add_bytes,
    delta_manifest,
    planes,
    read_delta,
    words,
)
from cnncc_runtime.digests import canonical_json, digest_bytes
from cnncc_runtime.errors import StorageFailed, VerificationFailed
from cnncc_runtime.oci.formats import MANIFEST, Descriptor, Manifest, describe, read_manifest

SUBJECT, BASE = describe(b"new engine", MANIFEST), digest_bytes(b"old engine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("delta")


def delta(folder: Path, old: bytes, new: bytes, piece: int = PIECE) -> FileDelta:
    """Write both files, and what makes one of the other."""
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    pieces = make_delta(folder / "old", folder / "new", folder / "frames", piece=piece)
    blob = describe((folder / "frames").read_bytes(), "a/b")
    return FileDelta(digest_bytes(old), digest_bytes(new), blob, pieces)


def applied(folder: Path, made: FileDelta) -> bytes:
    apply(made, folder / "frames", folder / "old", folder / "applied")
    return (folder / "applied").read_bytes()


def size(folder: Path, old: bytes, new: bytes) -> float:
    """Return a delta's bytes for each of the new file's; it was applied."""
    made = delta(folder, old, new)
    assert applied(folder, made) == new
    return made.blob.size / len(new)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Two files: of anything, or one an edit of the other."""
    old = draw(st.binary(max_size=3000)) * draw(st.sampled_from([1, 1, 7]))
    if draw(st.booleans()):
        return old, draw(st.binary(max_size=3000))
    parts = [old[start : start + 500] for start in range(0, len(old), 500)]
    new = b"".join(draw(st.permutations(parts)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(new)))
        new = new[:at] + draw(st.binary(max_size=40)) + new[at + draw(st.integers(0, 200)) :]
    return old, new


@settings(deadline=None, max_examples=200)
@given(pairs(), st.sampled_from([64, 1000, PIECE]))
def test_what_is_made_gives_the_new_file(folder: Path, files: tuple[bytes, bytes], piece: int) -> None:
    old, new = files
    made = delta(folder, old, new, piece)
    assert applied(folder, made) == new
    assert made.size == len(new)
    if new:
        manifest, config = delta_manifest(SUBJECT, BASE, [made])
        assert read_delta(read_manifest(manifest.to_bytes()), config, SUBJECT.digest, BASE)[0].pieces == made.pieces


@given(st.binary(max_size=100), st.sampled_from(STRIDES))
def test_words_undo_planes(data: bytes, stride: int) -> None:
    assert words(planes(data, stride), stride) == data


@given(st.binary(max_size=100), st.binary(min_size=100, max_size=100))
def test_bytes_are_added_without_a_carry_between_them(left: bytes, right: bytes) -> None:
    right = right[: len(left)]
    assert add_bytes(left, right) == bytes((a + b) % 256 for a, b in zip(left, right, strict=True))


def engine(length: int = 5 << 20) -> bytes:
    return np.random.default_rng(0).standard_normal(length // 4).astype("f").tobytes()


def scattered(data: bytes, run: int) -> bytes:
    """Change 4 % of the bytes, in runs."""
    random = np.random.default_rng(1)
    changed = np.frombuffer(data, np.uint8).copy()
    for start in random.integers(0, len(data) - run, len(data) // 25 // run):
        changed[start : start + run] = random.integers(0, 256, run)
    return changed.tobytes()


@pytest.mark.parametrize(
    ("edit", "most"),
    [
        (lambda old: old, 0.001),
        (lambda old: scattered(old, 64), 0.06),
        (lambda old: scattered(old, 4), 0.08),
        (lambda old: old[:500] + b"more" * 99 + old[500:3_000_000] + b"less" + old[3_000_100:], 0.001),
        (lambda old: old[4_000_000:] + old[:4_000_000], 0.001),
        (lambda old: b"".join(old[at : at + 99_999] for at in reversed(range(0, len(old), 99_999))), 0.005),
        (lambda old: old[: len(old) // 2], 0.001),
        (lambda old: old + old[-5000:], 0.001),
    ],
    ids=["same", "scattered", "bytes", "inserted", "swapped", "shuffled", "cut", "longer"],
)
def test_what_both_files_have_costs_next_to_nothing(folder: Path, edit: Callable[[bytes], bytes], most: float) -> None:
    assert size(folder, engine(), edit(engine())) < most


def test_weights_that_all_moved_a_little_cost_what_they_moved(folder: Path) -> None:
    random = np.random.default_rng(2)
    floats = random.standard_normal(1 << 19).astype("f")
    moved = floats * (1 + random.standard_normal(floats.size).astype("f") * 1e-3)
    whole = len(zstandard.ZstdCompressor(level=19).compress(moved.tobytes())) / moved.nbytes
    assert size(folder, floats.tobytes(), moved.tobytes()) < 0.62 < 0.9 < whole
    bytes_ = (random.standard_normal(1 << 21) * 30).astype(np.int8)
    steps = (random.random(bytes_.size) < 0.1) * random.choice([-1, 1], bytes_.size)
    assert size(folder, bytes_.tobytes(), (bytes_ + steps).astype(np.int8).tobytes()) < 0.15


def frame(data: bytes, base: bytes = b"") -> bytes:
    dictionary = zstandard.ZstdCompressionDict(base, zstandard.DICT_TYPE_RAWCONTENT) if base else None
    return zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True).compress(data)


def skippable(size: int) -> bytes:
    return (0x184D2A50).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)


OLD = np.random.default_rng(3).bytes(5000)
NEW = OLD[:2000] + b"something else" + OLD[2000:]
WHOLE = ((0, 5000),)


@pytest.mark.parametrize(
    ("frames", "piece", "message"),
    [
        (frame(NEW, OLD)[:-1], Piece(len(NEW), 0, 0, WHOLE), "is damaged"),
        (frame(NEW, OLD) + b"x", Piece(len(NEW), 0, 0, WHOLE), "is damaged"),
        (frame(NEW, OLD)[:30] + bytes([frame(NEW, OLD)[30] ^ 1]) + frame(NEW, OLD)[31:], Piece(len(NEW), 0, 0, WHOLE),
         "is damaged|gave something else"),
        (frame(NEW, OLD), Piece(len(NEW), 0, 0, ((1, 4999),)), "is damaged"),
        (frame(NEW, OLD), Piece(len(NEW), 0, 0, ((4000, 1001),)), "more than the old file has"),
        (frame(NEW, OLD), Piece(len(NEW), 0, 0, ((1 << 62, 1),)), "more than the old file has"),
        (frame(NEW, OLD), Piece(len(NEW) - 1, 0, 0, WHOLE), "says that it holds"),
        (frame(bytes(1 << 30)), Piece(len(NEW), 0, 0, ()), "says that it holds"),
        (frame(NEW, OLD)[:6] + b"\xff" * 8 + frame(NEW, OLD)[6:], Piece(len(NEW), 0, 0, WHOLE), "holds|damaged"),
        (skippable(len(NEW)), Piece(len(NEW), 0, 0, ()), "is damaged"),
        (b"not zstd at all", Piece(len(NEW), 0, 0, ()), "is damaged"),
        (frame(OLD[:-1] + b"x"), Piece(5000, 0, 0, ()), "gave something else"),
        (frame(bytes(5000)), Piece(5000, 0, 1, WHOLE), "gave something else"),
    ],
)  # fmt: skip
def test_frames_that_are_not_what_they_should_be_give_nothing(
    folder: Path, frames: bytes, piece: Piece, message: str
) -> None:
    (folder / "old").write_bytes(OLD)
    (folder / "frames").write_bytes(frames)
    told = FileDelta(
        digest_bytes(OLD),
        digest_bytes(NEW),
        describe(frames, "a/b"),
        (msgspec.structs.replace(piece, frame=len(frames)),),
    )
    (folder / "applied").write_bytes(b"of an earlier attempt")
    with pytest.raises(VerificationFailed, match=message):
        apply(told, folder / "frames", folder / "old", folder / "applied")
    assert not (folder / "applied").exists()
    assert (folder / "old").read_bytes() == OLD


def test_a_file_that_is_not_there_is_told(folder: Path) -> None:
    made = delta(folder, OLD, NEW)
    with pytest.raises(StorageFailed):
        apply(made, folder / "frames", folder / "away", folder / "applied")
    with pytest.raises(StorageFailed):
        apply(made, folder / "frames", folder / "old", folder / "away" / "applied")


GOOD = Piece(100, 50, 0, ((0, 10),))


@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, 50, 0, ()),
        Piece(-5, 50, 0, ()),
        Piece(PIECE + 1, 50, 0, ()),
        Piece(100, 0, 0, ()),
        Piece(100, 1000, 0, ()),
        Piece(100, 51, 0, ()),
        Piece(100, 50, 0, ((-1, 10),)),
        Piece(100, 50, 0, ((0, 0),)),
        Piece(100, 50, 0, ((0, DICTIONARY + 1),)),
        Piece(100, 50, 0, ((0, DICTIONARY), (0, 1))),
        Piece(100, 50, 0, ((0, 1),) * 65),
        Piece(100, 50, 3, ((0, 100),)),
        Piece(100, 50, 1, ((0, 99),)),
        Piece(100, 50, 1, ((0, 50), (50, 50))),
        Piece(100, 50, -1, ((0, 100),)),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_anything_is_fetched(piece: Piece) -> None:
    blob = Descriptor("a/b", digest_bytes(b"frames"), 50)
    good = FileDelta(digest_bytes(OLD), digest_bytes(NEW), blob, (GOOD,))
    manifest, config = delta_manifest(SUBJECT, BASE, [good])
    assert read_delta(manifest, config, SUBJECT.digest, BASE) == (good_as_read(good),)
    manifest, config = delta_manifest(SUBJECT, BASE, [FileDelta(good.old, good.new, blob, (piece,))])
    with pytest.raises(VerificationFailed, match="not by the rules"):
        read_delta(manifest, config, SUBJECT.digest, BASE)


def good_as_read(made: FileDelta) -> FileDelta:
    manifest, _ = delta_manifest(SUBJECT, BASE, [made])
    return FileDelta(made.old, made.new, manifest.layers[0], made.pieces)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"pieces":[]}',
        canonical_json({"pieces": {digest_bytes(NEW): []}}),
        canonical_json({"pieces": {"other": [[100, 50, 0, []]]}}),
        canonical_json({"pieces": {digest_bytes(NEW): [[100, 50, 0]]}}),
        canonical_json({"pieces": {digest_bytes(NEW): [["100", 50, 0, []]]}}),
        b'{"pieces":{"%s":[[100,50,0,[[1e400,1]]]]}}' % digest_bytes(NEW).encode(),
        b'{"pieces":{"%s":[[100,50,0,[[%s,1]]]]}}' % (digest_bytes(NEW).encode(), b"9" * 1000),
    ],
)
def test_a_configuration_that_is_none_is_refused(config: bytes) -> None:
    layer = Descriptor("a/b", digest_bytes(b"x"), 50, annotations={FROM: digest_bytes(OLD), TO: digest_bytes(NEW)})
    manifest = Manifest(DELTA, describe(config, PIECES), (layer,), SUBJECT, {FROM: BASE})
    with pytest.raises(VerificationFailed, match="delta"):
        read_delta(manifest, config, SUBJECT.digest, BASE)


def test_a_delta_of_other_engines_is_refused() -> None:
    blob = Descriptor("a/b", digest_bytes(b"frames"), 50)
    manifest, config = delta_manifest(SUBJECT, BASE, [FileDelta(digest_bytes(OLD), digest_bytes(NEW), blob, (GOOD,))])
    for subject, base in ((BASE, BASE), (SUBJECT.digest, SUBJECT.digest)):
        with pytest.raises(VerificationFailed, match="between the engines"):
            read_delta(manifest, config, subject, base)


MEASURED = """
import sys
from pathlib import Path
import msgspec
from cnncc_runtime.agent import update
from cnncc_runtime.agent.delta import apply
from cnncc_runtime.deltas import FileDelta, Piece
from cnncc_runtime.oci.formats import Descriptor

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

folder, old, new = Path(sys.argv[1]), *sys.argv[2:]
pieces = tuple(msgspec.json.decode((folder / "pieces").read_bytes(), type=list[Piece]))
before = peak()
apply(FileDelta(old, new, Descriptor("a/b", old, 1), pieces), folder / "frames", folder / "old", folder / "applied")
print(before, peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    block, times = engine(20 << 20), 10
    (tmp_path / "old").write_bytes(block)
    half = len(block) // 2
    moved_a_little = (np.frombuffer(block[half:], "f") * np.float32(1.001)).tobytes()
    (tmp_path / "new").write_bytes(changed := scattered(block[:half], 64) + moved_a_little)
    pieces = make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "frames")
    assert {piece.stride for piece in pieces} == {0, 4}
    frames = (tmp_path / "frames").read_bytes()
    moved = []
    with (tmp_path / "old").open("wb") as old, (tmp_path / "frames").open("wb") as file:
        for start in range(0, times * len(block), len(block)):
            old.write(block)
            file.write(frames)
            ranges = ([(at + start, length) for at, length in piece.ranges] for piece in pieces)
            moved += [[piece.size, piece.frame, piece.stride, each] for piece, each in zip(pieces, ranges, strict=True)]
    (tmp_path / "pieces").write_bytes(msgspec.json.encode(moved))
    digests = [digest_bytes(block * times), digest_bytes(changed * times)]
    command = [sys.executable, "-c", MEASURED, str(tmp_path), *digests]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, peak = map(int, said.split())
    assert peak - before < 24
    assert peak < 120
