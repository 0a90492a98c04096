"""A data stream: its order, its digests, resuming, bad samples, batches, whatever the data is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cnncc.calibration.data import load_data, open_data
from cnncc.calibration.source import draw
from cnncc.calibration.stream import DataStream, Position, Sample, batches
from cnncc_runtime.errors import DataRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import TensorSpec

SPEC = (TensorSpec("image", ("N", 3, 8, 8)),)
CONTRACT = Preprocessing(size=(8, 8))
BAD = (2, 5)


def folder(path: Path) -> str:
    """Eight images, two of them broken."""
    for number in range(8):
        path.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(path / f"{number}.png")
    for number in BAD:
        (path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return str(path)


def archive(path: Path) -> str:
    """Eight rows, two of them with NaN or Inf."""
    x = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    x[BAD[0], 0, 0, 0], x[BAD[1], 2, 7, 7] = np.nan, np.inf
    np.savez_compressed(path.with_suffix(".npz"), x=x, y=np.arange(8))
    return str(path.with_suffix(".npz"))


def module(path: Path) -> str:
    """The rows of `archive`, in batches of three."""
    source = archive(path)
    path.with_suffix(".py").write_text(
        f"import numpy as np\ndef rows():\n    d = np.load({source!r})\n    x, y = d['x'], d['y']\n"
        "    for i in range(0, 8, 3):\n        yield x[i:i+3], y[i:i+3]\n"
    )
    return f"{path.with_suffix('.py')}:rows"


SOURCES = pytest.mark.parametrize("make", [folder, archive, module])
Make = Callable[[Path], str]


def opened(source: str, limit: int | None = None, seed: int = 3, skip_bad: bool = True) -> DataStream:
    return open_data(source, SPEC, CONTRACT, limit=limit, seed=seed, skip_bad=skip_bad)


def same(a: Sample, b: Sample) -> bool:
    return a.name == b.name and a.label == b.label and np.array_equal(a.feeds["image"], b.feeds["image"])


# ---- order


@given(st.integers(0, 200), st.integers(0, 250), st.integers(0, 250), st.integers())
def test_a_draw_repeats_nothing_and_begins_with_the_draw_of_a_smaller_limit(
    total: int, limit: int, more: int, seed: int
) -> None:
    drawn = draw(total, limit, seed)
    assert len(drawn) == len(set(drawn)) == min(total, limit)
    assert set(drawn) <= set(range(total))
    assert draw(total, limit + more, seed)[: len(drawn)] == drawn
    assert draw(total, None, seed)[: len(drawn)] == drawn


def test_a_draw_is_fair() -> None:
    counts = np.zeros(10)
    for seed in range(2000):
        counts[list(draw(10, 3, seed))] += 1
    assert np.all(np.abs(counts - 600) < 5 * np.sqrt(600))


def test_a_draw_is_the_same_on_every_machine() -> None:
    assert draw(10, 5, 0) == (8, 7, 5, 4, 1)


@pytest.mark.parametrize("make", [folder, archive])
def test_samples_come_in_the_order_of_the_draw(make: Make, tmp_path: Path) -> None:
    names = [sample.name for sample in opened(make(tmp_path / "d"))]
    digits = [int("".join(filter(str.isdigit, name))) for name in names]
    assert digits == [number for number in draw(8, None, 3) if number not in BAD]
    other = [sample.name for sample in opened(make(tmp_path / "d"), seed=4)]
    assert sorted(other) == sorted(names)
    assert other != names


# ---- iterating again, digests


@SOURCES
def test_a_stream_may_be_read_again(make: Make, tmp_path: Path) -> None:
    stream = opened(make(tmp_path / "d"))
    first, digest = list(stream), stream.digest
    second = list(stream)
    assert all(map(same, first, second))
    assert len(first) == len(second) == 6
    assert stream.digest == digest
    assert len(stream.skipped) == 2


@SOURCES
def test_the_digest_is_known_at_the_end(make: Make, tmp_path: Path) -> None:
    stream = opened(make(tmp_path / "d"))
    with pytest.raises(RuntimeError, match="once all its samples were read"):
        _ = stream.digest
    reading = iter(stream)
    for _ in range(6):
        last = next(reading)
    with pytest.raises(RuntimeError):
        _ = stream.digest
    assert next(reading, None) is None
    assert stream.digest == last.position.digest


def test_the_digest_follows_names_labels_content_and_order(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    changed = x.copy()
    changed[1, 1, 1, 1] += 1
    maps = np.zeros((4, 2, 2), np.uint8)
    digests = set()
    for arrays in ({"x": x}, {"x": changed}, {"x": x, "y": np.arange(4)}, {"x": x, "y": maps}, {"x": x, "y": maps + 1}):
        np.savez(tmp_path / "d.npz", **arrays)
        for seed in (1, 2):
            digests.add(load_data(str(tmp_path / "d.npz"), SPEC, None, limit=4, seed=seed).digest)
    np.savez(tmp_path / "d.npz", image=x)
    digests.add(load_data(str(tmp_path / "d.npz"), SPEC, None, limit=4, seed=1).digest)
    assert len(digests) == 11


@pytest.mark.parametrize("compressed", [True, False])
def test_the_digest_does_not_depend_on_how_the_data_is_packed(tmp_path: Path, compressed: bool) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", x=x)
    assert load_data(str(tmp_path / "d.npz"), SPEC, None, limit=4).digest.startswith("sha256:78991b")


def test_the_identity_is_known_before_anything_is_read(tmp_path: Path) -> None:
    source = folder(tmp_path / "d")
    stream = opened(source)
    before = stream.identity
    list(stream)
    assert stream.identity == before == opened(source).identity
    others = {
        opened(source, seed=9).identity,
        opened(source, limit=4).identity,
        opened(source, skip_bad=False).identity,
        open_data(source, SPEC, Preprocessing(size=(8, 8), scale=1.0), limit=None, seed=3, skip_bad=True).identity,
    }
    (tmp_path / "d" / "0.png").touch()
    others.add(opened(source).identity)
    (tmp_path / "d" / "0.png").rename(tmp_path / "d" / "00.png")
    others.add(opened(source).identity)
    assert len(others | {before}) == 7


@pytest.mark.parametrize("make", [archive, module])
def test_the_identity_follows_the_file(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "d")
    before = opened(source).identity
    assert opened(source).identity == before
    Path(source.partition(":")[0]).touch()
    assert opened(source).identity != before


# ---- resuming


@SOURCES
def test_a_stream_goes_on_from_any_position(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "d")
    whole = opened(source)
    samples = list(whole)
    for number, sample in enumerate(samples, 1):
        stored = json.loads(json.dumps(dataclasses.asdict(sample.position)))
        later = opened(source)
        assert later.identity == whole.identity
        rest = list(later.samples(msgspec.convert(stored, Position)))
        assert len(rest) == len(samples) - number
        assert all(map(same, rest, samples[number:]))
        assert later.digest == whole.digest
        assert later.skipped == whole.skipped


@SOURCES
def test_a_stream_may_start_after_a_number_of_samples(make: Make, tmp_path: Path) -> None:
    stream = opened(make(tmp_path / "d"))
    samples = list(stream)
    for start in range(10):
        rest = [sample for sample in samples if sample.position.drawn > start]
        assert all(map(same, stream.samples(start=start), rest))
    other = opened(make(tmp_path / "e"))
    list(other.samples(start=1))
    with pytest.raises(RuntimeError):
        _ = other.digest


def test_images_before_the_start_are_not_opened(tmp_path: Path) -> None:
    source = folder(tmp_path / "d")
    stream = opened(source)
    first, *rest = list(stream)
    (Path(source) / first.name).unlink()
    assert [sample.name for sample in stream.samples(first.position)] == [sample.name for sample in rest]
    with pytest.raises(DataRefused, match="changed"):
        list(stream)


# ---- bad samples


@SOURCES
def test_a_bad_sample_is_refused_by_name_or_skipped_and_counted(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "d")
    with pytest.raises(DataRefused, match=r"5\.png|2\.png|x\[2\]|x\[5\]"):
        list(opened(source, skip_bad=False))
    stream = opened(source)
    assert len(list(stream)) == 6
    assert len({bad.name for bad in stream.skipped}) == 2
    assert all(bad.reason for bad in stream.skipped)
    assert stream.count in (8, None)


def test_where_all_are_bad_nothing_is_left(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(DataRefused, match="all 12 samples are bad") as error:
        list(opened(str(tmp_path)))
    assert len(error.value.where) == 11
    assert "is not an image" in error.value.where[0]


def test_a_sample_that_no_model_of_this_kind_takes_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("import numpy as np\ndef rows():\n    yield np.zeros((1, 1, 8, 8), 'f')\n")
    with pytest.raises(DataRefused, match=r"batch 0 x\[0\].*has shape \[1, 1, 8, 8\]"):
        list(opened(f"{tmp_path / 'm.py'}:rows"))


def test_a_callable_that_never_yields_the_same_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "import numpy as np\nn = 0\ndef rows():\n    global n\n    n += 1\n    yield np.full((1, 3, 8, 8), n, 'f')\n"
    )
    stream = opened(f"{tmp_path / 'm.py'}:rows")
    list(stream)
    with pytest.raises(DataRefused, match="other samples") as error:
        list(stream)
    assert "seed" in error.value.hint


# ---- random data, forms


def test_random_data_is_seeded_and_says_what_it_is() -> None:
    specs = (TensorSpec("a", ("N", 3, 4, 4)), TensorSpec("b", (2, 5), "int64"))
    stream = open_data("random", specs, None, limit=5, seed=1)
    samples = list(stream)
    assert stream.random
    assert stream.count == len(samples) == 5
    assert {key: (array.shape, array.dtype.name) for key, array in samples[0].feeds.items()} == {
        "a": ((1, 3, 4, 4), "float32"),
        "b": ((1, 5), "int64"),
    }
    drawn = {
        sample.feeds["a"].tobytes()
        for seed in range(4)
        for sample in open_data("random", specs, None, limit=5, seed=seed)
    }
    assert len(drawn) == 20
    again = open_data("random", specs, None, limit=5, seed=1)
    assert [s.feeds["a"].tobytes() for s in again.samples(2)] == [s.feeds["a"].tobytes() for s in samples[2:]]
    with pytest.raises(UsageError, match="no end"):
        open_data("random", specs, None, limit=None)


def test_data_of_a_user_is_not_random(tmp_path: Path) -> None:
    assert not opened(archive(tmp_path / "d")).random


@pytest.mark.parametrize("source", ["", "gone", "gone.npz", "gone.png", "a" * 5000, "\0", "gone.py:rows"])
def test_what_is_not_there_is_a_slip_of_the_user(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        opened(source)


def test_a_file_of_another_form_is_refused_with_the_forms(tmp_path: Path) -> None:
    (tmp_path / "d.npy").write_bytes(b"")
    with pytest.raises(UsageError) as error:
        opened(str(tmp_path / "d.npy"))
    assert ".npz" in error.value.hint


def test_no_samples_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        opened(archive(tmp_path / "d"), limit=0)


def test_a_fixed_batch_takes_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 3, 8, 8), np.float32))
    stream = open_data(str(tmp_path / "d.npz"), (TensorSpec("image", (4, 3, 8, 8)),), None, limit=None)
    assert [sample.feeds["image"].shape for sample in stream] == [(1, 3, 8, 8)] * 3


# ---- batches


@given(st.integers(1, 9), st.integers(1, 9))
def test_batches_hold_every_sample_once(count: int, size: int) -> None:
    samples = [Sample(str(n), {"a": np.full((1, 2), n), "b": np.full((1,), -n)}, n) for n in range(count)]
    found = list(batches(samples, size))
    assert [len(group) for _, group in found[:-1]] == [size] * (len(found) - 1)
    assert [sample for _, group in found for sample in group] == samples
    np.testing.assert_array_equal(np.concatenate([feeds["a"] for feeds, _ in found])[:, 0], np.arange(count))
    np.testing.assert_array_equal(np.concatenate([feeds["b"] for feeds, _ in found]), -np.arange(count))


def test_batches_read_no_further_than_they_must(tmp_path: Path) -> None:
    stream = opened(archive(tmp_path / "d"))
    feeds, group = next(batches(stream, 2))
    assert feeds["image"].shape == (2, 3, 8, 8)
    assert [sample.position.drawn for sample in group] == [1, 2]


def test_samples_of_different_sizes_make_no_batch() -> None:
    samples = [Sample(str(n), {"a": np.zeros((1, n))}, None) for n in (2, 3)]
    with pytest.raises(DataRefused, match="different sizes"):
        list(batches(samples, 2))
