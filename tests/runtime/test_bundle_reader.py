"""The bundle reader takes what `write_bundle` wrote and refuses everything else, always by the same error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnncc_runtime.bundle import MANIFEST, Bundle, EngineRecord, Manifest, TargetRecord, read_bundle, write_bundle
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import BundleRefused
from cnncc_runtime.preprocess import IMAGENET, Preprocessing
from tests.runtime.engine_files import ENGINE, make_bundle, manifest

HEAD = b'{"schema":"cnncc.bundle/5"'

ANY_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    described = manifest(preprocessing=IMAGENET, labels=("cat", "dög"), batches=())
    made = make_bundle(tmp_path / "b.cnncc", described, b"\x7fELF engine")
    (tmp_path / "secret").write_text("outside")
    return made


def data_of(folder: Path) -> bytes:
    return (folder / MANIFEST).read_bytes()


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest as one who knows its canonical form would."""
    plain = json.loads(data_of(folder))
    change(plain)
    (folder / MANIFEST).write_bytes(canonical_json(plain))


def refused(folder: Path) -> BundleRefused:
    """Read all of a bundle; return how it was refused."""
    with pytest.raises(BundleRefused) as caught:
        opened = read_bundle(folder)
        for name in opened.manifest.files:
            opened.file(name)
    assert caught.value.exit_code == 4
    return caught.value


def test_a_stripped_engine_travels_with_its_weights(tmp_path: Path) -> None:
    target = TargetRecord("cuda", "a100", "", "", "x86_64", (), "8.0+")
    record = EngineRecord(ENGINE, "tensorrt", "tensorrt 10.16.1.11+", {0: "profile 0"}, refit="weights.npz", dla=0)
    (tmp_path / "b").mkdir()
    files = {ENGINE: ("engine", b"plan"), "weights.npz": ("weights", b"npz"), "golden.npz": ("golden", b"")}
    found = write_bundle(tmp_path / "b", manifest(target=target, engine=record), files).manifest
    assert (found.target, found.engine) == (target, record)
    assert found.target.processor == "sm80+"
    assert found.engine.roles == {ENGINE: "engine", "weights.npz": "weights"}
    assert found.engine_bytes == 7


def test_what_was_written_is_read(folder: Path) -> None:
    opened = read_bundle(folder)
    assert opened.manifest.labels == ("cat", "dög")
    assert opened.manifest.preprocessing == IMAGENET
    assert opened.file(ENGINE).read_bytes() == b"\x7fELF engine"
    assert opened.manifest.to_bytes() == data_of(folder)


def test_the_same_content_gives_the_same_digest_and_other_content_another(tmp_path: Path) -> None:
    digests = [
        read_bundle(make_bundle(tmp_path / str(number), manifest(), content)).digest
        for number, content in enumerate([b"a", b"a", b"b"])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_whole_numbers_in_fractional_fields_are_read_back(tmp_path: Path) -> None:
    contract = Preprocessing(size=(8, 8), scale=1, mean=(0, 0, 0), std=(1, 1, 1))
    made = make_bundle(tmp_path / "b.cnncc", manifest(preprocessing=contract), b"engine")
    assert read_bundle(made).manifest.preprocessing == contract


def test_an_open_file_is_the_one_that_was_checked(folder: Path) -> None:
    with read_bundle(folder).open(ENGINE) as file:
        (folder / "other").write_bytes(b"swapped!!!!!")
        (folder / "other").replace(folder / ENGINE)
        assert file.read() == b"\x7fELF engine"


@ANY_FOLDER
@given(st.data())
def test_a_truncated_manifest_is_refused(folder: Path, data: st.DataObject) -> None:
    whole = manifest_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    (folder / MANIFEST).write_bytes(whole[:cut])
    refused(folder)


def manifest_bytes() -> bytes:
    return replace(manifest(), files={}).to_bytes()


@ANY_FOLDER
@given(st.data())
def test_a_flipped_bit_is_refused_or_changes_the_digest(folder: Path, data: st.DataObject) -> None:
    whole = bytearray(data_of(folder))
    before = read_bundle(folder).digest
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    whole[position] ^= 1 << bit
    try:
        found = Bundle(folder, Manifest.from_bytes(bytes(whole)), "")
    except BundleRefused:
        return
    assert found.manifest.to_bytes() == bytes(whole)
    (folder / "flipped").mkdir(exist_ok=True)
    (folder / "flipped" / MANIFEST).write_bytes(bytes(whole))
    assert read_bundle(folder / "flipped").digest != before


@ANY_FOLDER
@given(st.integers(0, 10), st.integers(0, 7))
def test_a_flipped_bit_of_the_engine_is_refused(tmp_path: Path, position: int, bit: int) -> None:
    made = tmp_path / f"{position}-{bit}"
    if not made.exists():
        make_bundle(made, manifest(), b"\x7fELF engine")
    content = bytearray(b"\x7fELF engine")
    content[position] ^= 1 << bit
    (made / ENGINE).write_bytes(content)
    assert "changed after it was built" in refused(made).message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [at, *(path for key in keys for path in paths(value[key], (*at, key)))]


@settings(ANY_FOLDER, max_examples=300)
@given(st.data())
def test_any_change_of_the_json_is_refused_or_says_what_it_says(folder: Path, data: st.DataObject) -> None:
    plain = json.loads(data_of(folder))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(paths(plain)))
        value = data.draw(JSON)
        if not at:
            plain = value
            break
        place = plain
        for key in at[:-1]:
            place = place[key]
        if data.draw(st.booleans()) and isinstance(place, dict):
            del place[at[-1]]
        else:
            place[at[-1]] = value
    try:
        text = canonical_json(plain)
    except ValueError:  # lone surrogates are not JSON
        return
    try:
        found = Manifest.from_bytes(text)
    except BundleRefused:
        return
    assert found.to_bytes() == text


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleRefused):
        Manifest.from_bytes(data)


def other_engine(name: str) -> Callable[[Any], None]:
    """Make the manifest list its engine under another name."""

    def change(plain: Any) -> None:
        plain["files"] = {name: next(iter(plain["files"].values()))}
        plain["engine"]["file"] = name

    return change


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/passwd", "a/../../secret", "./engine.so", "engine.so/", "a//b", ".", "..", "", "a\\b"),
        *("manifest.json", "nul\0", "line\nbreak", "\x1b[31mred", "n" * 5000, "/".join("d" * 2000)),
    ],
)
def test_a_name_that_leaves_the_folder_or_cannot_be_one_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, other_engine(name))
    refused(folder)


@pytest.mark.parametrize(
    ("title", "change"),
    [
        ("surplus field", lambda plain: plain.update(surplus=1)),
        ("surplus field inside", lambda plain: plain["target"].update(surplus=1)),
        ("missing field", lambda plain: plain.pop("labels")),
        ("other schema", lambda plain: plain.update(schema="cnncc.bundle/9")),
        ("engine not listed", lambda plain: plain["engine"].update(file="other.so")),
        ("weights not listed", lambda plain: plain["engine"].update(refit="weights.npz")),
        ("weights that are the engine", lambda plain: plain["engine"].update(refit=ENGINE)),
        ("no compute capability", lambda plain: plain["target"].update(gpu="8.0+x")),
        ("negative size", lambda plain: plain["files"][ENGINE].update(size=-1)),
        ("huge size", lambda plain: plain["files"][ENGINE].update(size=1 << 62)),
        ("size beyond 64 bits", lambda plain: plain["files"][ENGINE].update(size=1 << 70)),
        ("no digest", lambda plain: plain["files"][ENGINE].update(sha256="md5:0")),
        ("unknown dtype", lambda plain: plain["inputs"][0].update(dtype="object")),
        ("negative dimension", lambda plain: plain["inputs"][0].update(shape=[-1])),
        ("absurd rank", lambda plain: plain["inputs"][0].update(shape=[1] * 99)),
        ("two inputs of a name", lambda plain: plain["inputs"].append(plain["inputs"][0])),
        ("batch without entry", lambda plain: plain.update(batches=[1])),
        ("entry without batch", lambda plain: plain["engine"].update(entries={"0": "main", "4": "main_4"})),
        ("unknown parity", lambda plain: plain.update(parity="sure")),
        ("impossible preprocessing", lambda plain: plain["preprocessing"].update(std=[0.0, 0.0, 0.0])),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder: Path, title: str, change: Callable[[Any], None]) -> None:
    rewrite(folder, change)
    assert refused(folder).hint, title


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"schema":' * 100_000,
        HEAD + b',"name":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        HEAD + b',"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b"\xff\xfe" + HEAD + b"}",
        b'{"schema":"\\ud800"}',
        b'{"schema":NaN}',
    ],
    ids=["empty", "null", "open lists", "open objects", "deep value", "deep surplus", "utf-16", "surrogate", "nan"],
)
def test_json_that_hurts_parsers_is_refused(folder: Path, data: bytes) -> None:
    (folder / MANIFEST).write_bytes(data)
    refused(folder)


def test_a_repeated_key_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(data_of(folder).replace(b'"parity":', b'"parity":"failed","parity":'))
    assert "repeated" in refused(folder).message


def test_a_manifest_of_absurd_size_is_refused_unread(folder: Path) -> None:
    with (folder / MANIFEST).open("ab") as file:
        file.truncate(1 << 40)  # sparse
    assert "larger than" in refused(folder).message


def test_links_pipes_and_folders_in_a_files_place_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    (folder / ENGINE).rename(copy)
    (folder / ENGINE).symlink_to(copy)
    assert "plain file" in refused(folder).message
    (folder / ENGINE).unlink()
    (folder / ENGINE).mkdir()
    refused(folder)
    (folder / ENGINE).rmdir()
    os.mkfifo(folder / ENGINE)
    assert "plain file" in refused(folder).message
    (folder / MANIFEST).rename(tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    assert "plain file" in refused(folder).message


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (folder / ENGINE).rename(tmp_path / "outside" / "e.so")
    (folder / "sub").symlink_to(tmp_path / "outside")
    rewrite(folder, other_engine("sub/e.so"))
    assert "plain file" in refused(folder).message
    (folder / "sub").unlink()
    (folder / "sub").symlink_to("sub")  # a loop
    refused(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / "empty", Path("nul\0"), Path("n" * 300)):
        with pytest.raises(BundleRefused):
            read_bundle(path)


def test_an_unlisted_file_is_not_given_out(folder: Path) -> None:
    (folder / "unlisted").touch()
    assert not read_bundle(folder).has("unlisted")
    with pytest.raises(BundleRefused, match="is not in the bundle"):
        read_bundle(folder).file("unlisted")


def test_a_writer_cannot_write_what_no_reader_takes(tmp_path: Path) -> None:
    with pytest.raises(BundleRefused, match="the parity 'sure'"):
        write_bundle(tmp_path, manifest(parity="sure"), {ENGINE: ("engine", b"engine")})
