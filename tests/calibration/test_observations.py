"""The file that an interrupted pass leaves: it comes back as it was, or not at all."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cnncc.calibration.histogram import Histogram
from cnncc.calibration.observations import Observations, load_pass, save_pass
from cnncc.calibration.stream import Position, Skipped
from cnncc_runtime.errors import StorageFailed

NAMES = ["a", "b/c:0", "ü"]


def seen() -> Observations:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((1, 3, 5)), np.zeros((1, 2)), np.full((1, 4), 2.0**-140)]
    histograms = {name: Histogram.of(array.astype(np.float32)) for name, array in zip(NAMES, arrays, strict=True)}
    position = Position(6, "sha256:00", (Skipped("image.png", "it is broken"),))
    return Observations(histograms, 5, position, {4: dict.fromkeys(NAMES, 0.1), 5: dict.fromkeys(NAMES, 1 / 3)})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pass") / "pass.npz"
    save_pass(path, seen())
    return path.read_bytes()


def rewritten(stored: bytes, **changes: Any) -> bytes:
    """The file with other members; a change of the note's is made in its JSON."""
    members = dict(np.load(io.BytesIO(stored)))
    note = json.loads(members["note"].tobytes())
    for key, value in changes.items():
        if key in note:
            note[key] = value
        else:
            members[key] = value
    members["note"] = np.frombuffer(json.dumps(note).encode(), np.uint8)
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path, expected = tmp_path / "new" / "pass.npz", seen()
    save_pass(path, expected)
    found = load_pass(path, NAMES)
    assert found is not None
    assert (found.samples, found.position, found.course) == (expected.samples, expected.position, expected.course)
    assert list(found.histograms) == NAMES
    for name, histogram in expected.histograms.items():
        other = found.histograms[name]
        assert (other.exponent, other.largest, other.lowest) == (
            histogram.exponent,
            histogram.largest,
            histogram.lowest,
        )
        np.testing.assert_array_equal(other.counts, histogram.counts)
        np.testing.assert_array_equal(other.channels, histogram.channels)
        assert other.channels.dtype == np.float32
    assert [each.name for each in path.parent.iterdir()] == ["pass.npz"]


def test_a_missing_file_is_no_pass(tmp_path: Path) -> None:
    assert load_pass(tmp_path / "none.npz", NAMES) is None
    assert load_pass(tmp_path, NAMES) is None


@pytest.mark.parametrize("names", [[], NAMES[:2], [*NAMES, "d"]])
def test_a_pass_over_other_tensors_is_none(names: list[str], stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pass.npz"
    path.write_bytes(stored)
    assert load_pass(path, names) is None
    assert load_pass(path, NAMES[::-1]) is not None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
@example(place=0.0, value=0, cut=True)
def test_a_damaged_file_is_none_or_the_pass(place: float, value: int, cut: bool, stored: bytes, tmp_path: Path) -> None:
    data = bytearray(stored)
    index = int(place * len(data))
    data[index:] = b"" if cut else bytes([value]) + data[index + 1 :]
    path = tmp_path / "pass.npz"
    path.write_bytes(data)
    found = load_pass(path, NAMES)
    assert found is None or found.course == seen().course


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(back=st.integers(1, 700), value=st.integers(0, 255))
def test_a_damaged_directory_of_the_zip_is_none_or_the_pass(
    back: int, value: int, stored: bytes, tmp_path: Path
) -> None:
    data = bytearray(stored)
    data[-back] = value
    path = tmp_path / "pass.npz"
    path.write_bytes(data)
    found = load_pass(path, NAMES)
    assert found is None or found.course == seen().course


@pytest.mark.parametrize(
    "changes",
    [
        {"names": "abc"},
        {"names": None},
        {"samples": "many"},
        {"position": []},
        {"position": {"drawn": "x"}},
        {"course": [[1]]},
        {"course": 5},
        {"exponents": [1]},
        {"lowest": []},
        {"counts": np.zeros((3, 7), np.int64)},
        {"counts": np.zeros((2, 4096), np.int64)},
        {"largest": np.zeros(1)},
        {"counts": np.array(["text"])},
    ],
)
def test_a_file_that_holds_something_else_is_none(changes: dict[str, Any], stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pass.npz"
    path.write_bytes(rewritten(stored))
    assert load_pass(path, NAMES) is not None
    path.write_bytes(rewritten(stored, **changes))
    assert load_pass(path, NAMES) is None


def test_an_array_or_a_foreign_zip_is_none(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert load_pass(tmp_path / "array.npy", NAMES) is None
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    assert load_pass(tmp_path / "other.npz", NAMES) is None
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("note.npy", b"text")
    assert load_pass(tmp_path / "foreign.npz", NAMES) is None


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed):
        save_pass(tmp_path / "file" / "pass.npz", seen())
