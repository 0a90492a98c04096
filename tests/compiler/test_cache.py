"""The compile cache: what is put can be got, damage is noticed, neighbours do not collide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnncc.compiler.cache import Cache
from cnncc.compiler.reporting import Silent
from cnncc.compiler.stage import Stage


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, notes: list[str]) -> Cache:
    return Cache(tmp_path / "cache", notes.append)


def put(cache: Cache, tmp_path: Path, content: bytes = b"engine", key: str = "sha256:k") -> None:
    source = tmp_path / "made"
    source.write_bytes(content)
    cache.put("build", key, {"answer": 42}, {"engine.so": source})


def test_what_was_put_can_be_got(cache: Cache, tmp_path: Path) -> None:
    put(cache, tmp_path)
    entry = cache.get("build", "sha256:k", need=["engine.so"])
    assert entry is not None
    assert entry.value == {"answer": 42}
    assert entry.files["engine.so"].read_bytes() == b"engine"
    assert cache.get("build", "sha256:other") is None
    assert cache.get("verify", "sha256:k") is None


def test_keys_differ_with_every_part_and_not_with_their_order(cache: Cache) -> None:
    assert cache.key("build", a=1, b=2) == cache.key("build", b=2, a=1)
    assert len({cache.key("build", a=1), cache.key("build", a=2), cache.key("clean", a=1)}) == 3


@pytest.mark.parametrize("damage", [b"", b"engin", b"Engine", b"engine\0"], ids=["empty", "short", "changed", "long"])
def test_a_damaged_file_is_dropped_and_told(cache: Cache, tmp_path: Path, notes: list[str], damage: bytes) -> None:
    put(cache, tmp_path)
    entry = cache.get("build", "sha256:k")
    assert entry is not None
    blob = entry.files["engine.so"]
    blob.chmod(0o644)
    blob.write_bytes(damage)
    assert cache.get("build", "sha256:k", need=["engine.so"]) is None
    assert "damaged" in notes[0]
    put(cache, tmp_path)
    assert cache.get("build", "sha256:k", need=["engine.so"]) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"value": {}}',
        '{"value": {}, "files": {"a": "../../x"}}',
        '{"value": 1, "files": {}}',
        "[" * 100_000,
    ],
    ids=["empty", "cut", "list", "null", "no files", "no digest", "no value", "deep"],
)
def test_a_damaged_entry_is_a_miss(cache: Cache, tmp_path: Path, notes: list[str], text: str) -> None:
    put(cache, tmp_path)
    [path] = (cache.folder / "v1" / "entries" / "build").iterdir()
    path.write_text(text)
    assert cache.get("build", "sha256:k") is None
    assert notes
    assert not path.exists()


def test_equal_contents_are_stored_once(cache: Cache, tmp_path: Path) -> None:
    put(cache, tmp_path, key="sha256:k1")
    put(cache, tmp_path, key="sha256:k2")
    info = cache.info()
    assert info.entries == {"build": 2}
    assert (info.blobs, info.size) == (1, 6)


def test_clear_removes_what_the_cache_made_and_nothing_else(cache: Cache, tmp_path: Path) -> None:
    put(cache, tmp_path)
    stranger = cache.folder / "mine.txt"
    stranger.write_text("keep me")
    assert cache.clear().blobs == 1
    assert cache.info().blobs == 0
    assert stranger.read_text() == "keep me"
    assert cache.clear().blobs == 0


def test_several_processes_may_fill_one_cache(tmp_path: Path) -> None:
    script = f"""
import pathlib, tempfile
from cnncc.compiler.cache import Cache
cache = Cache(pathlib.Path({str(tmp_path / "cache")!r}))
for number in range(40):
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x" * (1000 + number))
        file.flush()
        cache.put("build", f"sha256:{{number}}", {{"n": number}}, {{"f": pathlib.Path(file.name)}})
        entry = cache.get("build", f"sha256:{{number}}", need=["f"])
        assert entry is not None and len(entry.files["f"].read_bytes()) == 1000 + number
"""
    children = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(3)]
    for child in children:
        _, words = child.communicate(timeout=120)
        assert child.returncode == 0, words.decode()
    assert Cache(tmp_path / "cache").info().blobs == 40


def test_a_stage_is_made_once_and_again_when_its_file_is_damaged(cache: Cache, notes: list[str]) -> None:
    made = []

    def compute(folder: Path) -> tuple[dict[str, object], dict[str, Path], str]:
        made.append(folder)
        (folder / "out").write_bytes(b"result")
        return {"n": len(made)}, {"out": folder / "out"}, "made"

    def stage() -> Stage:
        return Stage("build", "sha256:s", compute, cache, Silent())

    assert stage().file("out").read_bytes() == b"result"
    assert stage().value["n"] == 1
    path = stage().file("out")
    path.chmod(0o644)
    os.truncate(path, 1)
    assert stage().file("out").read_bytes() == b"result"
    assert len(made) == 2
    assert any("damaged" in note for note in notes)
    assert not list(cache.folder.glob(".*")), "no scratch folder is left"


def test_a_stage_that_fails_leaves_nothing(cache: Cache) -> None:
    def compute(folder: Path) -> tuple[dict[str, object], dict[str, Path], str]:
        (folder / "half").write_bytes(b"half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _ = Stage("build", "sha256:s", compute, cache, Silent()).value
    assert cache.info().blobs == 0
    assert not list(cache.folder.glob(".*"))
