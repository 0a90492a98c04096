"""The compile cache: content-addressed stages.

::

    CACHE/v1/blobs/ab/abcd…          file contents, named by their sha256, read-only
    CACHE/v1/entries/STAGE/KEY.json  a stage's result: plain values, and file name → blob digest

A key is the digest of all that determines a result: inputs, options, toolchain versions. Entries and blobs appear
atomically, so any number of processes may share a cache; a blob that no longer has its digest is dropped, reported
and made again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from cnncc_runtime.digests import canonical_json, digest_file, digest_json
from cnncc_runtime.files import atomic_file, storage_errors

_VERSION = "v1"


def default_cache_folder() -> Path:
    """Return ``$CNNCC_CACHE_DIR``, or the user's cache folder."""
    named = os.environ.get("CNNCC_CACHE_DIR")
    return Path(named) if named else Path(platformdirs.user_cache_dir("cnncc"))


_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A stage's stored result.

    Attributes:
        value: Plain data.
        files: Name → path of the blob, to read and never to write.
        digests: Name → digest.
    """

    value: dict[str, Any]
    files: dict[str, Path]
    digests: dict[str, str]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds.

    Attributes:
        folder: Where it is.
        entries: Stage → entries.
        blobs: Files.
        size: Bytes of all files.
    """

    folder: Path
    entries: dict[str, int]
    blobs: int
    size: int


class Cache:
    """A folder of stage results.

    Args:
        folder: The cache's folder; made when first written.
        notice: Told when something stored was found damaged.
    """

    def __init__(self, folder: Path, notice: Callable[[str], None] = lambda _text: None) -> None:
        self.folder = folder
        self._root = folder / _VERSION
        self._notice = notice

    def key(self, stage: str, **parts: Any) -> str:
        """Return the digest of a stage's name and of all that determines its result."""
        return digest_json([stage, parts])

    def get(self, stage: str, key: str, *, need: Iterable[str] = ()) -> Entry | None:
        """Return a stored result, or None.

        Args:
            stage: The stage.
            key: From `key`.
            need: Files that the caller will read; their digests are checked now.
        """
        path = self._entry_path(stage, key)
        try:
            document = json.loads(path.read_bytes())
            digests = {str(name): _checked_digest(digest) for name, digest in document["files"].items()}
            value = dict(document["value"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._drop(path, f"the cached {stage} entry is damaged; it is made again")
            return None
        entry = Entry(value, {name: self._blob_path(digest) for name, digest in digests.items()}, digests)
        return entry if all(self._intact(stage, entry, name) for name in need) else None

    def put(self, stage: str, key: str, value: Mapping[str, Any], files: Mapping[str, Path]) -> Entry:
        """Store a result and return it.

        Raises:
            StorageFailed: The cache cannot be written.
        """
        digests = {name: self._store(path) for name, path in files.items()}
        path = self._entry_path(stage, key)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_bytes(canonical_json({"value": dict(value), "files": digests}))
        return Entry(dict(value), {name: self._blob_path(digest) for name, digest in digests.items()}, digests)

    def forget(self, stage: str, key: str) -> None:
        """Remove one result.

        Raises:
            StorageFailed: It cannot be removed.
        """
        path = self._entry_path(stage, key)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def blob(self, digest: str) -> Path | None:
        """Return a stored file by its digest, checked, or None."""
        entry = Entry({}, {"blob": self._blob_path(_checked_digest(digest))}, {"blob": digest})
        return entry.files["blob"] if self._intact("file", entry, "blob") else None

    def info(self) -> CacheInfo:
        """Count what is stored."""
        entries = {
            stage.name: sum(1 for _ in stage.glob("*.json"))
            for stage in sorted((self._root / "entries").glob("*"))
            if stage.is_dir()
        }
        blobs = [path for path in (self._root / "blobs").glob("*/*") if path.is_file()]
        return CacheInfo(self.folder, entries, len(blobs), sum(path.stat().st_size for path in blobs))

    def clear(self) -> CacheInfo:
        """Remove everything stored and return what there was; other files in the folder stay.

        Raises:
            StorageFailed: Something cannot be removed.
        """
        info = self.info()
        if self._root.exists():
            with storage_errors(self._root):
                shutil.rmtree(self._root)
        return info

    def _entry_path(self, stage: str, key: str) -> Path:
        return self._root / "entries" / stage / f"{key.removeprefix('sha256:')}.json"

    def _blob_path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._root / "blobs" / name[:2] / name

    def _store(self, source: Path) -> str:
        with storage_errors(source):
            digest = digest_file(source)
        target = self._blob_path(digest)
        if target.exists() and target.stat().st_size == source.stat().st_size:
            return digest
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as partial:
            shutil.copyfile(source, partial)
            partial.chmod(0o444)
        return digest

    def _intact(self, stage: str, entry: Entry, name: str) -> bool:
        path = entry.files.get(name)
        if path is None:
            return False
        try:
            if digest_file(path) == entry.digests[name]:
                return True
        except FileNotFoundError:
            self._notice(f"the cached {name} of {stage} is gone; it is made again")
            return False
        except OSError:
            pass
        self._drop(path, f"the cached {name} of {stage} is damaged; it is made again")
        return False

    def _drop(self, path: Path, text: str) -> None:
        self._notice(text)
        with storage_errors(path):
            path.unlink(missing_ok=True)


def _checked_digest(text: Any) -> str:
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ValueError(f"not a digest: {text!r}")
    return text
