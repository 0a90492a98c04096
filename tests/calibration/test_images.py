"""Images as DATA: folders, classes, damage, changes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnncc.calibration.data import open_data
from cnncc.calibration.stream import DataStream
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.preprocess import Preprocessing, open_image
from cnncc_runtime.specs import TensorSpec

SPEC = (TensorSpec("image", ("N", 3, 8, 8)),)
CONTRACT = Preprocessing(size=(8, 8))


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 10), (value, 0, 0)).save(path)
    return path


def opened(path: Path, **options: object) -> DataStream:
    return open_data(str(path), SPEC, CONTRACT, **{"limit": None, **options})


def test_a_class_is_a_folder_right_below_the_root(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/more/b.PNG", "dog/c.jpeg", "own.png"):
        picture(tmp_path / name)
    (tmp_path / "bird").mkdir()  # of which the user has no images
    assert {sample.name: sample.label for sample in opened(tmp_path)} == {
        "cat/a.png": 1,
        "cat/more/b.PNG": 1,
        "dog/c.jpeg": 2,
        "own.png": None,
    }


def test_an_image_is_what_the_contract_makes_of_it(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 77)
    [sample] = opened(path)
    np.testing.assert_array_equal(sample.feeds["image"], CONTRACT.apply(open_image(path)))
    assert (sample.name, sample.label) == ("a.png", None)


def test_hidden_files_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".cache/b.png"):
        picture(tmp_path / name)
    (tmp_path / "readme.txt").write_text("not an image")
    assert [sample.name for sample in opened(tmp_path)] == ["a.png"]


def test_links_are_followed_and_end(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    assert [(sample.name, sample.label) for sample in opened(tmp_path / "data")] == [("cat/a.png", 0)]


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    path.rename(tmp_path / os.fsdecode(b"\xff.png"))
    stream = opened(tmp_path)
    assert [sample.name for sample in stream] == ["\\xff.png"]
    assert stream.digest


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    stream = opened(tmp_path, skip_bad=True)
    assert len(list(stream)) == 1
    assert sorted(bad.name for bad in stream.skipped) == ["b.png", "c.png"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "dog" / "a.png")
    scandir = os.scandir

    def denied(path: str) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataRefused, match="dog cannot be read: Permission denied"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        (Preprocessing(size=(9, 8)), r"\[1, 3, 9, 8\]"),
        (Preprocessing(size=(8, 8), layout="NHWC"), r"\[1, 8, 8, 3\]"),
        (Preprocessing(size=(8, 8), channels="L", mean=(0.0,), std=(1.0,)), r"\[1, 1, 8, 8\]"),
        (Preprocessing(size=(8, 8), dtype="uint8"), "uint8"),
    ],
    ids=["another size", "another layout", "another channel count", "another dtype"],
)
def test_a_contract_that_does_not_fit_the_model_is_refused_before_reading(
    tmp_path: Path, contract: Preprocessing, words: str
) -> None:
    with pytest.raises(DataRefused, match=words) as error:
        open_data(str(picture(tmp_path / "a.png").parent), SPEC, contract, limit=None)
    assert "--preprocess" in error.value.hint


def test_images_do_not_feed_several_inputs(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataRefused, match="takes 2 inputs") as error:
        open_data(str(tmp_path), (*SPEC, TensorSpec("mask", ("N", 1, 8, 8))), CONTRACT, limit=None)
    assert ".npz" in error.value.hint


@pytest.mark.parametrize(("mode", "words"), [("F", "mode 'F'"), ("LAB", "conversion from LAB")])
def test_an_image_that_the_contract_cannot_be_applied_to_is_named(tmp_path: Path, mode: str, words: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "odd.tif")
    grey = Preprocessing(size=(8, 8), channels="L", mean=(0.0,), std=(1.0,))
    with pytest.raises(DataRefused, match=rf"odd\.tif.*{words}"):
        list(open_data(str(tmp_path), (TensorSpec("image", ("N", 1, 8, 8)),), grey, limit=None))


@pytest.mark.parametrize("skip_bad", [True, False])
@pytest.mark.parametrize("change", ["written to", "grown", "gone", "broken"])
def test_an_image_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str, skip_bad: bool) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    stream = opened(tmp_path, skip_bad=skip_bad).samples()
    [other] = {"a.png", "b.png"} - {next(stream).name}
    path = tmp_path / other
    if change == "written to":
        os.utime(path, ns=(0, 1))
    elif change == "grown":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(b"half")
    with pytest.raises(DataRefused, match=rf"{other} changed while the data was read"):
        next(stream)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_damage_to_an_image_is_refused_by_name_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = picture(tmp_path / "good" / f"a.{data.draw(st.sampled_from(['png', 'jpg', 'bmp', 'webp']))}")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / f"damaged{path.suffix}"
    damaged.write_bytes(content)
    try:
        [sample] = opened(damaged)
    except DataRefused as error:
        assert damaged.name in error.message
    else:
        assert sample.feeds["image"].shape == (1, 3, 8, 8)
    stream = opened(damaged, skip_bad=True)
    try:
        list(stream)
    except DataRefused as error:
        assert "all 1 samples are bad" in error.message
