"""Large blobs, either way: in pieces, resumed where they broke off, whole only once their digest is theirs."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import requests

from cnncc_runtime.digests import digest_bytes, digest_file
from cnncc_runtime.errors import NetworkFailed, Paused, RegistryRefused, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors, sync
from cnncc_runtime.oci.formats import Descriptor
from cnncc_runtime.oci.http import pieces
from cnncc_runtime.oci.registry import Repository

_PIECE = 1 << 18
_PART = 16 << 20
"""Bytes of a request that uploads; smaller blobs go in one."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")
_SENT = re.compile(r"(?:bytes=)?0-(\d+)")
_LONGEST_WAIT = 60.0
_WINDOW = 60.0
_SLOWEST = 1024
"""Bytes a second, over `_WINDOW`: what is slower will not end."""
_FORGOTTEN = 7 * 86400.0
"""Seconds after which registries have forgotten an upload."""

Progress = Callable[[int], None]
"""Told of bytes that came or went since it was last told."""


@dataclass(frozen=True)
class Pace:
    """How fast a download may go.

    Attributes:
        rate: Bytes a second; 0 for as fast as they come.
        clock: Seconds.
        sleep: Waits.
        wanted: Asked between pieces; once it says no, the download stops and can be resumed.
    """

    rate: float = 0.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    wanted: Callable[[], bool] = lambda: True


def download(
    repository: Repository,
    blob: Descriptor,
    part: Path,
    *,
    pace: Pace | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Fetch a blob into a file, which then holds it whole, is flushed to disk, and has the digest.

    What the file held before, of an attempt that broke off, is kept and continued. Memory does not grow with the blob.

    Args:
        repository: Where it is.
        blob: Which.
        part: The file; not named as the finished one, since it may be half.
        pace: How fast, and until when.
        progress: Told of bytes.

    Raises:
        NotInRegistry: There is none.
        Paused: ``pace`` says so.
        NetworkFailed: It broke off more often than it may without a byte coming.
        VerificationFailed: The bytes are others; the file is gone.
        StorageFailed: The disk is full, or the file cannot be written.
    """
    pace = pace or Pace()
    with storage_errors(part):
        have = _begun(part, blob.size)
    failures = 0
    while have < blob.size:  # a request for what begins at the end is answered wrongly by some registries
        try:
            for came in _continue(repository, blob, part, have, pace):
                have = came if came < have else have
                progress(came - have)
                failures = 0 if came > have else failures
                have = came
        except (Paused, RegistryRefused):
            raise
        except NetworkFailed:
            failures += 1
            if failures >= repository.connection.attempts:
                raise
            pace.sleep(min(_LONGEST_WAIT, 2.0**failures))
            with storage_errors(part):
                have = part.stat().st_size if part.exists() else 0
    with storage_errors(part):
        if not blob.size:
            part.touch()
        sync(part)
        right = part.stat().st_size == blob.size and digest_file(part) == blob.digest
        if not right:
            part.unlink()
    if not right:
        raise VerificationFailed(
            f"{repository.place.host} gave other bytes for {blob.digest}",
            where=[str(repository.place)],
            hint="the registry's copy is damaged, or was tampered with: publish it again",
        )


def _begun(part: Path, size: int) -> int:
    """Return how many bytes of a blob a file holds; what is too large, or a link, is removed and not followed."""
    try:
        found = part.lstat()
    except FileNotFoundError:
        return 0
    if stat.S_ISREG(found.st_mode) and found.st_size <= size:
        return found.st_size
    part.unlink()
    return 0


def _continue(repository: Repository, blob: Descriptor, part: Path, have: int, pace: Pace) -> Iterator[int]:
    """Ask for the rest of a blob; yield how many bytes the file holds, again and again."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    with repository.connection.request(
        "GET", repository.blob_url(blob.digest), scope=repository.pull, headers=headers, good=frozenset({200, 206})
    ) as response:
        if response.status_code == 206:
            said = _RANGE.match(response.headers.get("Content-Range", ""))
            if said is None or int(said[1]) != have:
                raise RegistryRefused(f"{repository.place.host} continues a blob elsewhere than asked")
        else:
            have = 0  # it knows no ranges
        limit = _Limit(pace)
        with storage_errors(part), part.open("r+b" if have else "wb") as file:
            file.seek(have)
            for piece in pieces(response, size=_PIECE):
                wanted = piece[: blob.size - have]
                file.write(wanted)
                have += len(wanted)
                yield have
                if have == blob.size:
                    break
                limit.after(len(piece), repository.place.host)
    if have < blob.size:
        raise NetworkFailed(f"{repository.place.host} ended a blob after {have} of {blob.size} bytes")


class _Limit:
    """Holds a download to its pace, and ends one that is too slow ever to end."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._start = self._since = pace.clock()
        self._came = self._lately = 0

    def after(self, came: int, host: str) -> None:
        """Account for bytes that came."""
        pace = self._pace
        self._came += came
        self._lately += came
        now = pace.clock()
        if now - self._since > _WINDOW:
            if self._lately < _SLOWEST * (now - self._since):
                raise NetworkFailed(f"{host} gives less than {_SLOWEST} bytes a second")
            self._since, self._lately = now, 0
        if not pace.wanted():
            raise Paused("downloads are not wanted now", hint="what came so far is kept")
        if pace.rate and (early := self._start + self._came / pace.rate - now) > 0:
            pace.sleep(early)
            self._since += early


def upload(
    repository: Repository,
    source: Path | bytes,
    blob: Descriptor,
    *,
    sessions: Path | None = None,
    progress: Progress = lambda _: None,
) -> bool:
    """Store a blob, unless it is there.

    With ``sessions``, what a process sent that died is not sent again, up to the last part that the registry confirmed,
    where the registry still knows of it.

    Args:
        repository: Where.
        source: Its bytes, or the file that holds them.
        blob: What it is.
        sessions: A folder that says how far uploads of large blobs are.
        progress: Told of bytes.

    Returns:
        Whether anything was sent.

    Raises:
        VerificationFailed: The source holds other bytes than it is said to.
        NetworkFailed: It was not stored.
        StorageFailed: The folder cannot be written.
    """
    if repository.has_blob(blob.digest):
        return False
    _check(source, blob)
    connection = repository.connection
    for attempt in range(1, connection.attempts + 1):
        try:
            _Upload(repository, source, blob, progress, _Session(sessions, repository, blob)).run()
        except RegistryRefused:
            raise
        except NetworkFailed:
            if attempt == connection.attempts:
                raise
            connection.sleep(min(_LONGEST_WAIT, 2.0**attempt))
        else:
            break
    return True


def _check(source: Path | bytes, blob: Descriptor) -> None:
    """See that a source is what it is said to be, before the registry refuses it after the last byte."""
    if isinstance(source, bytes):
        found, size = digest_bytes(source), len(source)
    else:
        found, size = digest_file(source), source.stat().st_size
    if (found, size) != (blob.digest, blob.size):
        raise VerificationFailed(f"{source if isinstance(source, Path) else 'a blob'} was changed: it is {found}")


class _Kept(msgspec.Struct):
    """An upload session that a registry may still know.

    Attributes:
        location: Where it goes on.
        sent: Bytes that the registry confirmed.
        part: Bytes of a request, as many as the registry wants at least.
    """

    location: str
    sent: int
    part: int


class _Session:
    """What is kept of the upload of a blob to a repository; nothing without a folder."""

    def __init__(self, folder: Path | None, repository: Repository, blob: Descriptor) -> None:
        name = digest_bytes(f"{repository.place.url}@{blob.digest}".encode())[7:]
        self._path = folder / f"{name}.json" if folder is not None else None

    def read(self) -> _Kept | None:
        """Return what is kept; what is damaged counts as nothing."""
        if self._path is None:
            return None
        with storage_errors(self._path):
            if not self._path.exists():
                return None
            data = self._path.read_bytes()
        try:
            return msgspec.json.decode(data, type=_Kept)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def keep(self, kept: _Kept) -> None:
        """Keep how far it is, and sweep what registries have forgotten by now."""
        if self._path is None:
            return
        with storage_errors(self._path):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in self._path.parent.glob("*.json"):
                if time.time() - old.stat().st_mtime > _FORGOTTEN:
                    old.unlink(missing_ok=True)
        with atomic_file(self._path) as path:
            path.write_bytes(msgspec.json.encode(kept))

    def forget(self) -> None:
        """Keep nothing."""
        if self._path is not None:
            with storage_errors(self._path):
                self._path.unlink(missing_ok=True)


class _Upload:
    """One upload session: begun or found again, continued part by part, finished by the digest."""

    def __init__(
        self,
        repository: Repository,
        source: Path | bytes,
        blob: Descriptor,
        progress: Progress,
        session: _Session,
    ) -> None:
        self._repository = repository
        self._source = source
        self._blob = blob
        self._progress = progress
        self._session = session
        self._location = ""
        self._part = _PART

    def run(self) -> None:
        """Send all of it, or what is left of it."""
        if have := self._resume():
            try:
                self._parts(have)
                return
            except RegistryRefused:  # it promised more than it keeps
                self._session.forget()
        self._all()

    def _all(self) -> None:
        self._part = max(_PART, self._begin())
        if self._blob.size <= self._part:
            self._whole()
            return
        piece = self._piece(0)
        try:
            reached = self._patch(0, piece)
        except RegistryRefused:
            self._begin()  # some take a blob in one request only
            self._whole()
            return
        self._progress(reached)
        self._parts(reached)

    def _parts(self, sent: int) -> None:
        """Send what is left, and finish."""
        while sent < self._blob.size:
            reached = self._patch(sent, self._piece(sent))
            self._progress(reached - sent)
            sent = reached
        self._finish(b"")
        self._session.forget()

    def _resume(self) -> int:
        """Find a session of a process that died; return how many bytes the registry has, 0 where it knows of none."""
        kept = self._session.read()
        if kept is None:
            return 0
        try:
            self._location = self._repository.on_registry(kept.location)
            reached = self._ask_reached()
        except RegistryRefused:
            reached = 0
        if 0 < reached == kept.sent <= self._blob.size and kept.part >= _PART:
            self._part = kept.part
            return reached
        self._session.forget()
        return 0

    def _begin(self) -> int:
        """Open a session; return the fewest bytes that a part must have."""
        url = f"{self._repository.place.url}/blobs/uploads/"
        with self._ask("POST", url, good=202, again=True) as answer:
            smallest = answer.headers.get("OCI-Chunk-Min-Length", "")
            self._follow(answer)
        return int(smallest) if smallest.isdecimal() else 0

    def _patch(self, sent: int, piece: bytes) -> int:
        """Send a part; return how many bytes the registry holds then."""
        end = sent + len(piece)
        headers = {"Content-Range": f"{sent}-{end - 1}", "Content-Type": "application/octet-stream"}
        try:
            with self._ask("PATCH", self._location, good=202, headers=headers, body=lambda: piece) as answer:
                self._follow(answer)
            self._session.keep(_Kept(self._location, end, self._part))
            return end
        except RegistryRefused:
            raise
        except NetworkFailed:
            reached = self._reached()
            if reached not in (sent, end):
                raise  # inside a part: registries do not let that session end well, a new one must begin
            return reached

    def _reached(self) -> int:
        """Ask how much of it the registry has; −1 where it does not know."""
        try:
            return self._ask_reached()
        except NetworkFailed:
            return -1

    def _ask_reached(self) -> int:
        with self._ask("GET", self._location, good=204, again=True) as answer:
            said = _SENT.fullmatch(answer.headers.get("Range", ""))
            self._follow(answer)
        # a session without a byte says 0-0, as one with a byte does; parts are larger than a byte
        return int(said[1]) + 1 if said and said[1] != "0" else 0

    def _whole(self) -> None:
        if isinstance(self._source, bytes):
            self._finish(self._source)
        else:
            with self._source.open("rb") as file:
                self._finish(file)
        self._progress(self._blob.size)

    def _finish(self, body: bytes | BinaryIO) -> None:
        joint = "&" if "?" in self._location else "?"
        url = f"{self._location}{joint}digest={self._blob.digest}"
        headers = {"Content-Type": "application/octet-stream"}
        with self._ask("PUT", url, good=201, headers=headers, body=lambda: body):
            pass

    def _piece(self, start: int) -> bytes:
        if isinstance(self._source, bytes):
            return self._source[start : start + self._part]
        with self._source.open("rb") as file:
            file.seek(start)
            return file.read(self._part)

    def _follow(self, answer: requests.Response) -> None:
        if location := answer.headers.get("Location", ""):
            self._location = self._repository.on_registry(location)

    def _ask(
        self,
        method: str,
        url: str,
        *,
        good: int,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Any] | None = None,
        again: bool = False,
    ) -> AbstractContextManager[requests.Response]:
        return self._repository.connection.request(
            method,
            url,
            scope=self._repository.push,
            headers=headers,
            body=body,
            good=frozenset({good}),
            again=again,
        )
