"""``.npz`` as DATA: rows out of the zip, damage, hostile headers, changes, memory."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from cnncc.calibration import npy_rows
from cnncc.calibration.data import open_data
from cnncc.calibration.stream import DataStream
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.specs import DTYPES, TensorSpec

SPEC = (TensorSpec("image", ("N", 3, 8, 8)),)
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def opened(path: Path, specs: tuple[TensorSpec, ...] = SPEC, **options: Any) -> DataStream:
    return open_data(str(path), specs, None, **{"limit": None, **options})


def images(count: int = 6) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


def member(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", content)
    return path


def header(text: str, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    raw = text.encode() + b"\n"
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + raw


# ---- rows


@FIXTURE
@given(
    x=st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays_of.arrays(
            dtype,
            arrays_of.array_shapes(min_dims=1, max_dims=4, max_side=5),
            elements={"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else None,
        )
    ),
    maps=st.booleans(),
    compressed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_rows_are_those_that_numpy_reads(
    tmp_path: Path, x: NDArray[Any], maps: bool, compressed: bool, seed: int
) -> None:
    y = np.arange(len(x) * 6, dtype=np.uint8).reshape(len(x), 2, 3) if maps else np.arange(len(x))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", x=x, y=y)
    stream = opened(tmp_path / "d.npz", (TensorSpec("in", ("N", *x.shape[1:]), x.dtype.name),), seed=seed)
    samples = list(stream)
    assert stream.count == len(samples) == len(x)
    for sample in samples:
        index = int(sample.name[2:-1])
        assert sample.feeds["in"].dtype == x.dtype
        np.testing.assert_array_equal(sample.feeds["in"], x[index : index + 1])
        np.testing.assert_array_equal(sample.label, y[index])
        sample.feeds["in"][...] = 0  # the reader's own, and writable


def test_a_deflated_row_is_found_from_the_nearest_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy_rows, "_MIN_SPACING", 1000)
    monkeypatch.setattr(npy_rows, "_PIECE", 700)
    monkeypatch.setattr(npy_rows, "_PACKED_PIECE", 300)
    x = np.repeat(np.arange(64 * 192, dtype=np.float32) % 37, 2)[: 64 * 192].reshape(64, 3, 8, 8)
    np.savez_compressed(tmp_path / "d.npz", x=x)
    for sample in opened(tmp_path / "d.npz"):
        np.testing.assert_array_equal(sample.feeds["image"][0], x[int(sample.name[2:-1])])


def test_several_inputs_are_arrays_of_their_names(tmp_path: Path) -> None:
    a, b = images(4), np.arange(8, dtype=np.int64).reshape(4, 2)
    specs = (*SPEC, TensorSpec("y", ("N", 2), "int64"))
    np.savez(tmp_path / "d.npz", image=a, y=b)  # 'y' is an input here, not the labels
    samples = list(opened(tmp_path / "d.npz", specs, seed=2))
    for sample in samples:
        index = int(sample.name[4:-1])
        np.testing.assert_array_equal(sample.feeds["image"][0], a[index])
        np.testing.assert_array_equal(sample.feeds["y"][0], b[index])
        assert sample.label is None
    np.savez(tmp_path / "d.npz", image=a)
    with pytest.raises(DataRefused, match="input y is missing"):
        opened(tmp_path / "d.npz", specs)
    np.savez(tmp_path / "d.npz", image=a, y=b[:3])
    with pytest.raises(DataRefused, match="4 of image, 3 of y"):
        opened(tmp_path / "d.npz", specs)


def test_an_only_input_may_go_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=images(2), y=np.array([4, 5]))
    assert {sample.name: sample.label for sample in opened(tmp_path / "d.npz")} == {"image[0]": 4, "image[1]": 5}


def test_labels_may_be_whole_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=images(2), y=np.array([1.0, 2.0]))
    assert sorted(sample.label for sample in opened(tmp_path / "d.npz")) == [1, 2]
    np.savez(tmp_path / "d.npz", x=images(1), y=np.array([np.nan]))
    with pytest.raises(DataRefused, match=r"x\[0\]: its label nan is not a class index"):
        list(opened(tmp_path / "d.npz"))


# ---- what is refused

REFUSED: dict[str, tuple[bytes, str]] = {
    "a huge shape": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000000, 3, 8, 8)}"),
        "not as large as its header says",
    ),
    "a shape beyond all numbers": (
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**40}, 3, 8, 8)}}"),
        "not as large",
    ),
    "many empty rows": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000000, 0)}"),
        "rows of 'x' are empty",
    ),
    "a negative size": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 8, 8)}"), "negative"),
    "a row too many": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 8, 8)}") + bytes(768),
        "not as large",
    ),
    "sizes that are no numbers": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': ('3', 8)}"),
        "shape is not valid",
    ),
    "a header beyond the file": (header("{", b"\x02\x00", 2**32 - 1), "EOF"),
    "a header that is code": (header("__import__('os').abort()"), "not a .npz file that can be read"),
    "a header of brackets": (header("(" * 9000), "not a .npz file that can be read"),
    "an unknown version": (header("{}", b"\x09\x00"), "no .npy of version 1 or 2"),
    "no array at all": (b"text", "not a .npz file that can be read"),
    "nothing": (b"", "not a .npz file that can be read"),
    "too many dimensions": (
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(1,) * 100}}}") + bytes(4),
        "impossible shape",
    ),
    "records": (
        header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 3, 8, 8)}") + bytes(768),
        "has dtype",
    ),
    "the other byte order": (
        header("{'descr': '>f4', 'fortran_order': False, 'shape': (1, 3, 8, 8)}") + bytes(768),
        "has dtype >f4",
    ),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_hostile_array_is_refused_at_once(tmp_path: Path, content: bytes, words: str, compression: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataRefused, match=words):
            opened(member(tmp_path / "d.npz", content, compression))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", [True, False], ids=["its packed size too", "its size"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_an_archive_that_claims_more_than_it_can_hold_is_refused_at_once(
    tmp_path: Path, compression: int, packed: bool
) -> None:
    text = header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 24}, 1)}}")
    with zipfile.ZipFile(tmp_path / "d.npz", "w", compression) as archive:
        archive.writestr("x.npy", text)
        [info] = archive.infolist()
        info.file_size = len(text) + (1 << 24)  # what the archive's directory, written at the end, will say
        info.compress_size = info.file_size if packed else info.compress_size
    with pytest.raises(DataRefused, match="not as large as the archive says"):
        opened(tmp_path / "d.npz", (TensorSpec("image", ("N", 1), "uint8"),))


def test_an_array_that_ends_early_is_found_before_its_first_row(tmp_path: Path) -> None:
    text = header("{'descr': '<f4', 'fortran_order': False, 'shape': (200, 3, 8, 8)}")
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", text + bytes(199 * 768))
        archive.infolist()[0].file_size += 768
    with pytest.raises(DataRefused, match="damaged"):
        next(iter(opened(tmp_path / "d.npz", limit=1)))


@FIXTURE
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.tuples(st.text("0123456789-,() 'fiO<>|", max_size=12), st.text("0123456789-,()' eL_", max_size=20)).map(
            lambda parts: f"{{'descr': '{parts[0]}', 'fortran_order': False, 'shape': ({parts[1]})}}"
        ),
    ),
    rest=st.binary(max_size=40),
)
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_no_header_gets_past(tmp_path: Path, text: str, rest: bytes) -> None:
    with pytest.raises(DataRefused, match=r"d\.npz"):
        list(opened(member(tmp_path / "d.npz", header(text) + rest), (TensorSpec("image", ("N", 3, 8, 8)),)))


def test_a_header_that_inflates_without_end_takes_no_memory(tmp_path: Path) -> None:
    content = header("", b"\x02\x00", 2**31) + bytes(64 << 20)
    path = member(tmp_path / "d.npz", content, zipfile.ZIP_DEFLATED)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(DataRefused, match="EOF"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_pickles_columns_and_other_packings_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.array([{}], dtype=object))
    with pytest.raises(DataRefused, match="pickled") as error:
        opened(path)
    assert "astype" in error.value.hint
    np.savez(path, x=np.asfortranarray(images()))
    with pytest.raises(DataRefused, match="by columns") as error:
        opened(path)
    assert "ascontiguousarray" in error.value.hint
    content = io.BytesIO()
    np.save(content, images())
    member(path, content.getvalue(), zipfile.ZIP_BZIP2)
    with pytest.raises(DataRefused, match="compressed in a way") as error:
        opened(path)
    assert "savez" in error.value.hint


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (np.zeros((6, 10), np.int64), "not a class index per input"),
        (np.zeros((6, 2, 2), np.float32), "not a class index per input"),
        (np.array(["cat"] * 6), "not a class index per input"),
        (np.zeros((5, 2, 2), np.uint8), "6 inputs and 5 labels"),
        (np.float32(1), "not a class index per input"),
    ],
    ids=["one-hot", "maps of floats", "names", "a map too few", "a single label"],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, y: NDArray[Any], words: str) -> None:
    np.savez(tmp_path / "d.npz", x=images(), y=y)
    with pytest.raises(DataRefused, match=words):
        opened(tmp_path / "d.npz")


# ---- damage


@FIXTURE
@given(data=st.data(), compressed=st.booleans())
def test_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject, compressed: bool) -> None:
    path = tmp_path / "d.npz"
    x = np.arange(4 * 192, dtype=np.float32).reshape(4, 3, 8, 8)
    (np.savez_compressed if compressed else np.savez)(path, x=x, y=np.arange(4))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        samples = list(opened(path))
    except DataRefused as error:
        assert str(path) in error.message
    else:
        for sample in samples:
            index = int(sample.name[2:-1])
            np.testing.assert_array_equal(sample.feeds["image"][0], x[index])
            assert sample.label in (index, None)  # None: the directory's entry of the labels lost its name


@FIXTURE
@given(keep=st.floats(0, 1, exclude_max=True), compressed=st.booleans())
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float, compressed: bool) -> None:
    path = tmp_path / "d.npz"
    (np.savez_compressed if compressed else np.savez)(path, x=images())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataRefused, match=r"d\.npz"):
        list(opened(path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_one_wrong_bit_in_a_large_array_is_found_before_its_first_row(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "d.npz"
    content = io.BytesIO()
    np.save(content, np.random.default_rng(0).integers(0, 3, (600, 3, 8, 8)).astype(np.float32))
    member(path, content.getvalue(), compression)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) * 3 // 4] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataRefused, match=r"d\.npz is not a \.npz file that can be read"):
        next(iter(opened(path, limit=1)))


# ---- changes


@pytest.mark.parametrize("change", ["written to", "grown", "gone", "replaced", "emptied"])
def test_an_archive_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=images())
    stream = opened(path).samples()
    next(stream)
    if change == "written to":
        os.utime(path, ns=(0, 1))
    elif change == "grown":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "gone":
        path.unlink()
    elif change == "replaced":
        np.savez_compressed(tmp_path / "new.npz", x=images(7))
        (tmp_path / "new.npz").replace(path)
    else:
        path.write_bytes(b"")
    with pytest.raises(DataRefused, match=r"d\.npz changed while the data was read"):
        next(stream)


def test_an_archive_that_changes_before_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=images())
    stream = opened(path)
    path.unlink()
    with pytest.raises(DataRefused, match=r"d\.npz changed"):
        list(stream)


# ---- memory


def large(path: Path, rows: int, compression: int) -> None:
    """Write rows of 588 KiB, one at a time, that deflate to about a third."""
    numbers = np.random.default_rng(0)
    with (
        zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as stream,
    ):
        described = {"descr": "<f4", "fortran_order": False, "shape": (rows, 3, 224, 224)}
        np.lib.format.write_array_header_1_0(stream, described)
        noise = numbers.integers(0, 256, 3 * 224 * 224).astype(np.float32)
        for row in range(rows):
            noise[0] = row
            stream.write(noise.tobytes())


def peak_of(samples: Iterator[Any]) -> int:
    """Return the bytes held at most while samples are read and dropped."""
    tracemalloc.start()
    try:
        for sample in samples:
            assert sample.feeds["image"][0, 0, 0, 0] == int(sample.name[2:-1])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("rows", [80, pytest.param(700, marks=pytest.mark.slow)], ids=["47 MB", "420 MB"])
def test_memory_does_not_grow_with_the_array(tmp_path: Path, rows: int, compression: int) -> None:
    large(tmp_path / "d.npz", rows, compression)
    stream = opened(tmp_path / "d.npz", (TensorSpec("image", ("N", 3, 224, 224)),), limit=64)
    assert peak_of(stream.samples()) < 16 << 20
