"""DATA and the preprocessing contract as the user gives them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnncc.calibration.contract import read_labels, read_preprocessing
from cnncc.calibration.data import load_data
from cnncc_runtime.errors import DataRefused, UsageError
from cnncc_runtime.preprocess import IMAGENET, Preprocessing
from cnncc_runtime.specs import TensorSpec

SPEC = (TensorSpec("image", ("N", 3, 8, 8)),)
CONTRACT = Preprocessing(size=(8, 8))


def pictures(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), (number * 20, 0, 0)).save(path)
    return folder


def test_a_folder_per_class_gives_labels(tmp_path: Path) -> None:
    folder = pictures(tmp_path, ["cat/a.png", "cat/b.png", "dog/c.jpg"])
    data = load_data(str(folder), SPEC, CONTRACT, limit=10)
    assert {(sample.name, sample.label) for sample in data.samples} == {
        ("cat/a.png", 0),
        ("cat/b.png", 0),
        ("dog/c.jpg", 1),
    }
    assert all(sample.feeds["image"].shape == (1, 3, 8, 8) for sample in data.samples)


def test_a_flat_folder_has_no_labels_and_the_draw_is_seeded(tmp_path: Path) -> None:
    folder = pictures(tmp_path, [f"{n}.png" for n in range(10)])
    first = load_data(str(folder), SPEC, CONTRACT, limit=4, seed=1)
    again = load_data(str(folder), SPEC, CONTRACT, limit=4, seed=1)
    other = load_data(str(folder), SPEC, CONTRACT, limit=4, seed=2)
    assert [s.name for s in first.samples] == [s.name for s in again.samples]
    assert first.digest == again.digest != other.digest
    assert all(sample.label is None for sample in first.samples)


def test_the_digest_follows_content_and_preprocessing(tmp_path: Path) -> None:
    folder = pictures(tmp_path, ["a.png", "b.png"])
    before = load_data(str(folder), SPEC, CONTRACT, limit=2).digest
    assert load_data(str(folder), SPEC, Preprocessing(size=(8, 8), scale=1.0), limit=2).digest != before
    Image.new("RGB", (10, 10), (200, 200, 200)).save(folder / "a.png")
    assert load_data(str(folder), SPEC, CONTRACT, limit=2).digest != before


def test_an_npz_gives_its_rows(tmp_path: Path) -> None:
    x = np.arange(5 * 3 * 8 * 8, dtype=np.float32).reshape(5, 3, 8, 8)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(5))
    data = load_data(str(tmp_path / "d.npz"), SPEC, None, limit=3)
    assert len(data.samples) == 3
    for sample in data.samples:
        assert sample.label is not None
        np.testing.assert_array_equal(sample.feeds["image"], x[sample.label : sample.label + 1])


def test_a_callable_yields_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mydata.py").write_text(
        "import numpy as np\ndef batches():\n    for n in range(3):\n"
        "        yield np.full((2, 3, 8, 8), n, np.float32), np.array([n, n])\n"
        "def broken():\n    raise OSError('no camera')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        data = load_data("mydata:batches", SPEC, None, limit=5)
        assert [sample.label for sample in data.samples] == [0, 0, 1, 1, 2]
        with pytest.raises(DataRefused, match="no camera"):
            load_data("mydata:broken", SPEC, None, limit=5)
        with pytest.raises(DataRefused, match="absent"):
            load_data("mydata:absent", SPEC, None, limit=5)
    finally:
        sys.modules.pop("mydata", None)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.zeros(3, np.float32)}, "not 'x'"),
        ({"x": np.zeros((2, 3, 8, 8), np.float32), "y": np.zeros(3)}, "2 inputs and 3 labels"),
        ({"x": np.zeros((2, 3, 9, 8), np.float32)}, "has shape"),
        ({"x": np.zeros((2, 3, 8, 8), np.float64)}, "has dtype float64"),
        ({"x": np.full((2, 3, 8, 8), np.nan, np.float32)}, "NaN or Inf"),
        ({"x": np.zeros((0, 3, 8, 8), np.float32)}, "no samples"),
    ],
    ids=["no x", "labels do not match", "wrong shape", "wrong dtype", "NaN", "empty"],
)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataRefused, match=words):
        load_data(str(tmp_path / "d.npz"), SPEC, None, limit=5)


def test_pickles_in_an_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(DataRefused):
        load_data(str(tmp_path / "d.npz"), SPEC, None, limit=5)


def test_an_empty_folder_a_damaged_image_and_a_missing_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataRefused, match="no samples"):
        load_data(str(tmp_path / "empty"), SPEC, CONTRACT, limit=5)
    pictures(tmp_path / "bad", ["a.png"])
    (tmp_path / "bad" / "a.png").write_bytes((tmp_path / "bad" / "a.png").read_bytes()[:40])
    with pytest.raises(DataRefused, match=r"a\.png"):
        load_data(str(tmp_path / "bad"), SPEC, CONTRACT, limit=5)
    with pytest.raises(UsageError, match="not data"):
        load_data(str(tmp_path / "nowhere"), SPEC, CONTRACT, limit=5)


def test_images_need_a_contract(tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match="preprocessing contract"):
        load_data(str(pictures(tmp_path, ["a.png"])), SPEC, None, limit=5)


def test_a_contract_is_a_preset_or_a_file(tmp_path: Path) -> None:
    assert read_preprocessing("imagenet") == IMAGENET
    path = tmp_path / "p.toml"
    path.write_text('size = [32, 48]\nchannels = "L"\nmean = [0.5]\n')
    assert read_preprocessing(str(path)) == Preprocessing(size=(32, 48), channels="L", mean=(0.5,), std=(1.0,))


@pytest.mark.parametrize(
    "text", ["size = [32]", "sizes = [32, 32]", "size = [32, 32]\nstd = [0, 1, 1]", "size = [", 'size = "big"', ""]
)
def test_a_contract_that_is_not_valid_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(DataRefused):
        read_preprocessing(str(path))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        read_preprocessing("imagnet")
    assert "imagenet" in error.value.hint


def test_labels_are_lines(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("cat\ndog\n", encoding="utf-8")
    assert read_labels(tmp_path / "l.txt") == ("cat", "dog")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "none.txt").write_text("")
    for name in ("bad.txt", "none.txt", "missing.txt"):
        with pytest.raises(DataRefused):
            read_labels(tmp_path / name)
