"""One publisher at a time, of however many machines, though registries cannot compare and swap.

Whoever changes a fleet's metadata holds a lock, an artifact under the tag ``lock`` beside it: read, write if it is
free, wait, read again (Fischer's algorithm, in Lamport, "A Fast Mutual Exclusion Algorithm", 1987). Whoever reads and
writes more slowly than the others wait begins again, so that no two have the same turn. A lock can still be lost, to
somebody who thinks its holder dead. So turns are numbered, and files of metadata are named by them: what is on its way
when a lock is lost overwrites nothing. The timestamp alone has a fixed name, and makes a change visible: right before
it is stored and right after, `store_changes` looks at the lock and at what is stored. What remains is a timestamp that
is on its way while another publisher takes the lock and is done; the one whose it is is told.

Times are the registry's: publishers' clocks do not matter.
"""

from __future__ import annotations

import contextlib
import email.utils
import getpass
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import msgspec

from cnncc_runtime.errors import CnnccError, FleetBusy, NetworkFailed, NotInRegistry, VerificationFailed
from cnncc_runtime.metadata import fetch_metadata, store_metadata
from cnncc_runtime.oci.formats import EMPTY, EMPTY_BYTES, MANIFEST, Manifest, describe, read_manifest
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import upload

TAG = "lock"
LOCK = "application/vnd.cnncc.lock.v1"
TIMESTAMP = "timestamp.json"
_NOTE = "dev.cnncc.lock"
_LIFETIME = timedelta(minutes=10)
_LAST = timedelta(minutes=2)
"""What must be left when a timestamp is stored: longer than a request is tried."""
_SETTLE = 2.0
"""Seconds between writing the lock and reading it again."""
_TRIES = 5

_LARGEST = 1 << 53
_CONFIG = describe(EMPTY_BYTES, EMPTY, inline=True)


class Holder(msgspec.Struct, frozen=True):
    """Who holds the lock.

    Attributes:
        id: Of this one change; empty where nobody holds it.
        who: User and machine.
        since: When it began, in seconds since 1970.
        until: When it ends, if the holder is not done before.
        turn: How many held it before, and one: the version of what this one publishes.
    """

    id: str
    who: str
    since: int
    until: int
    turn: int

    def __str__(self) -> str:
        """Return who it is, since when and until when."""
        return f"{self.who}, since {_date(self.since)}, until {_date(self.until)} at the latest"


def _date(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


@dataclass(frozen=True)
class Turn:
    """A lock that is held.

    Attributes:
        number: See `Holder.turn`.
        check: Raises `FleetBusy` where the lock is not held any more.
    """

    number: int
    check: Callable[[], None]


@dataclass(frozen=True)
class Lock:
    """The lock of a fleet's metadata.

    Attributes:
        repository: Where the metadata is.
        note: Told of what is worth knowing.
        lifetime: How long a change may take.
        clock: Seconds.
    """

    repository: Repository
    note: Callable[[str], None]
    lifetime: timedelta = _LIFETIME
    clock: Callable[[], float] = time.monotonic

    def holder(self) -> Holder | None:
        """Return who holds it, dead ones too, or None.

        Raises:
            VerificationFailed: What has the lock's tag is none.
            NetworkFailed: No answer.
        """
        found = self._read()
        return found if found.id else None

    @contextlib.contextmanager
    def held(self, own: str, begun: Callable[[str], None]) -> Iterator[Turn]:
        """Hold the lock.

        Args:
            own: The id of a change of this machine that died, if any: its lock is taken over before it has expired.
            begun: Told the id of this change before the lock is written.

        Raises:
            FleetBusy: Somebody holds it.
            VerificationFailed: What has the lock's tag is none.
            NetworkFailed: No answer.
        """
        mine = self._take(own, begun)
        try:
            self.repository.connection.sleep(_SETTLE)
            self._check(mine)
            yield Turn(mine.turn, lambda: self._check(mine))
        finally:
            self._let_go(mine)

    def unlock(self) -> Holder | None:
        """Take the lock from whoever holds it, who then publishes nothing; return who that was.

        Raises:
            NetworkFailed: No answer.
        """
        try:
            found = self._read()
        except VerificationFailed:
            found = _NOBODY
        upload(self.repository, EMPTY_BYTES, _CONFIG)
        self._write(msgspec.structs.replace(_NOBODY, turn=found.turn))
        return found if found.id else None

    def _take(self, own: str, begun: Callable[[str], None]) -> Holder:
        """Write the lock as ours, soon after it was seen to be free."""
        identity = secrets.token_hex(16)
        begun(identity)
        upload(self.repository, EMPTY_BYTES, _CONFIG)  # beforehand: what is between reading and writing must be short
        for _ in range(_TRIES):
            now = self._now()
            start = self.clock()
            before = self._read()
            if before.id not in ("", own, identity) and before.until > now:
                raise self._busy(f"the fleet is being changed by {before}")
            mine = Holder(identity, _me(), now, now + int(self.lifetime.total_seconds()), before.turn + 1)
            self._write(mine)
            if self.clock() - start < _SETTLE:
                if before.id not in ("", identity):
                    self.note(f"took over the lock of {before}: whoever held it died without letting go")
                return mine
        self._let_go(mine)
        raise NetworkFailed(f"{self.repository.place.host} is too slow to be locked: more than {_SETTLE:g} s a request")

    def _read(self) -> Holder:
        try:
            manifest = read_manifest(self.repository.manifest(TAG))
            if manifest.artifact_type != LOCK:
                raise VerificationFailed("another kind of artifact")
            found = msgspec.json.decode(manifest.annotations.get(_NOTE, ""), type=Holder)
            if not 0 <= found.turn < _LARGEST:
                raise VerificationFailed(f"turn {found.turn}")
            str(found)
        except NotInRegistry:
            return _NOBODY
        except (VerificationFailed, msgspec.DecodeError, ValueError, OverflowError) as exc:
            raise VerificationFailed(
                f"what is tagged '{TAG}' in the fleet's metadata is no lock: {exc}",
                where=[f"{self.repository.place}:{TAG}"],
                hint="cnncc fleet trust unlock NAME",
            ) from exc
        return found

    def _check(self, mine: Holder) -> None:
        found = self._read()
        if found != mine:
            by = f" by {found}" if found.id else ""
            raise self._busy(f"the lock on the fleet was taken away{by}, while this change was being made")
        if self._now() > mine.until - min(_LAST, self.lifetime / 5).total_seconds():
            raise self._busy(f"the change took longer than its lock is good for, {self.lifetime}")

    def _busy(self, message: str) -> FleetBusy:
        return FleetBusy(
            message,
            where=[f"{self.repository.place}:{TAG}"],
            hint="nothing was published. Try again; if nobody is at work there, `cnncc fleet trust unlock NAME`",
        )

    def _let_go(self, mine: Holder) -> None:
        try:
            if self._read() == mine:
                self._write(msgspec.structs.replace(_NOBODY, turn=mine.turn))
        except CnnccError as exc:  # the change itself is done, or has its own error
            self.note(f"the lock on the fleet stays until {_date(mine.until)}: {exc.message}")

    def _write(self, holder: Holder) -> None:
        said = {_NOTE: msgspec.json.encode(holder).decode()}
        manifest = Manifest(LOCK, _CONFIG, (_CONFIG,), annotations=said)
        self.repository.put_manifest(manifest.to_bytes(), MANIFEST, tag=TAG)

    def _now(self) -> int:
        """Return the time by the registry's clock, in seconds since 1970."""
        place, connection = self.repository.place, self.repository.connection
        with connection.request("GET", f"{place.scheme}://{place.host}/v2/", scope=self.repository.pull) as answer:
            try:
                return int(email.utils.parsedate_to_datetime(answer.headers.get("Date", "")).timestamp())
            except (TypeError, ValueError) as exc:
                raise VerificationFailed(
                    f"{place.host} does not say what time it is", hint="is there a proxy in between that strips `Date`?"
                ) from exc


_NOBODY = Holder("", "", 0, 0, 0)


def _me() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}, process {os.getpid()}"


def timestamp_of(repository: Repository) -> bytes | None:
    """Return a fleet's timestamp, which nothing has checked; None where there is no fleet.

    Raises:
        VerificationFailed: What has its name is no metadata.
        NetworkFailed: No answer.
    """
    try:
        return fetch_metadata(repository, TIMESTAMP)
    except NotInRegistry:
        return None


def store_changes(
    repository: Repository, files: Mapping[str, bytes], before: bytes | None, turn: Turn | None = None
) -> None:
    """Store files of metadata whose names are new, and the timestamp, which makes them visible, last.

    Args:
        repository: Where.
        files: Name → bytes; one of them is the timestamp.
        before: The timestamp that the change was made upon; None where there was no fleet.
        turn: The lock; None where nobody else can be at work.

    Raises:
        FleetBusy: Somebody else changed the fleet meanwhile; the message says whether this change was published.
        NetworkFailed: No answer.
    """
    versioned = {name: data for name, data in files.items() if name != TIMESTAMP}
    for name, data in versioned.items():
        # before there is a timestamp nobody has believed anything: what is there is of a beginning that died
        if before is not None and not _is_free(repository, name, data):
            raise _overtaken(repository, name)
        store_metadata(repository, name, data)
    for name, data in versioned.items():
        if fetch_metadata(repository, name) != data:
            raise _overtaken(repository, name)
    if turn is not None:
        turn.check()
    if timestamp_of(repository) != before:
        raise _overtaken(repository, TIMESTAMP)
    store_metadata(repository, TIMESTAMP, files[TIMESTAMP])
    try:
        if turn is not None:
            turn.check()
    except FleetBusy as exc:
        raise FleetBusy(
            f"another publisher was at work while this change was published: {exc.message}",
            where=exc.where,
            hint="one of the two changes is lost: see `cnncc fleet status NAME`, and make the missing one again",
        ) from exc
    if timestamp_of(repository) != files[TIMESTAMP]:
        raise FleetBusy(
            "another publisher published at the same moment, and this change is not what devices see",
            where=[f"{repository.place}:{TIMESTAMP}"],
            hint="see `cnncc fleet status NAME`, and make the change again if it is missing",
        )


def _overtaken(repository: Repository, name: str) -> FleetBusy:
    return FleetBusy(
        f"somebody else changed the fleet meanwhile: {name} is not what it was",
        where=[f"{repository.place}:{name}"],
        hint="nothing of this change is visible to devices; try again",
    )


def _is_free(repository: Repository, name: str, data: bytes) -> bool:
    try:
        return fetch_metadata(repository, name) == data
    except NotInRegistry:
        return True
