"""What a fleet's publisher says of a release, and whether it may be believed (The Update Framework, version 1.0.34).

`python-tuf` checks signatures, versions and dates. Two attacks pass it, and are met by a floor that is kept here: a
clock that was set back (`cnncc_runtime.agent.clock`), and metadata on the device that was wiped, so that an old
repository looks new. A role whose keys were rotated begins anew, since whoever stole the old ones may have signed any
version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from cnncc_runtime.agent.clock import Clock, Moment, as_date
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import CnnccError, NetworkFailed, NotInRegistry, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.metadata import fetch_metadata
from cnncc_runtime.oci.source import Source

_SCHEME = "oci:"
_TOP = (Root.type, Timestamp.type, Snapshot.type, Targets.type)
FLOOR = "floor.json"
ANCHOR = "anchor.json"
"""The root that the device was enrolled with."""
_KNOWN = "known"


@dataclass(frozen=True)
class Seen:
    """The newest metadata of a role that a device has seen.

    Attributes:
        version: Its version.
        keyids: The keys that the role had, sorted.
    """

    version: int
    keyids: tuple[str, ...]


@dataclass(frozen=True)
class Floor:
    """What a device has seen, and will not go below.

    Attributes:
        moment: The latest time at which metadata was fresh.
        roles: Role → its newest metadata.
    """

    moment: Moment = field(default_factory=Moment)
    roles: Mapping[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class Announced:
    """What the publisher says of a release, by a signature that is trusted.

    Attributes:
        digest: Of the release's index.
        size: Of the index, in bytes.
        custom: What else was signed with it.
    """

    digest: str
    size: int
    custom: Mapping[str, Any]


class Trust:
    """Metadata on a device.

    Args:
        folder: Where it is kept; holds `ANCHOR`.
        source: Where newer metadata comes from.
        clock: The machine's.
    """

    def __init__(self, folder: Path, source: Source, clock: Clock | None = None) -> None:
        self._folder = folder
        self._source = source
        self._clock = clock or Clock()

    def announced(self, target: str) -> Announced | None:
        """Fetch what is new, and return what is said of a target; None where nothing is.

        Args:
            target: ``CHANNEL/NAME``.

        Raises:
            VerificationFailed: What is said cannot be believed.
            NetworkFailed: No answer.
            StorageFailed: It cannot be kept.
        """
        floor = self.floor()
        with storage_errors(self._folder):
            anchor = (self._folder / ANCHOR).read_bytes()
            known = self._folder / _KNOWN
            known.mkdir(exist_ok=True)
        with storage_errors(known), _tuf_errors(self._source):
            updater = Updater(
                metadata_dir=str(known),
                metadata_base_url=_SCHEME,
                fetcher=_Fetcher(self._source),
                config=UpdaterConfig(),
                bootstrap=anchor,
            )
            updater.refresh()
            found = updater.get_targetinfo(target)
        self._keep(floor, known, {*_TOP, target.partition("/")[0]})
        return _announced(target, found) if found is not None else None

    def floor(self) -> Floor:
        """Return what the device will not go below.

        Raises:
            VerificationFailed: The file is damaged.
            StorageFailed: It cannot be read.
        """
        path = self._folder / FLOOR
        try:
            with storage_errors(path):
                return msgspec.json.decode(path.read_bytes(), type=Floor) if path.exists() else Floor()
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise VerificationFailed(
                f"{path} is damaged, so an old release could pass for a new one",
                hint="enroll the device again, with the root that its fleet has now",
            ) from exc

    def _keep(self, floor: Floor, known: Path, used: set[str]) -> None:
        """Hold the metadata of the roles that were asked to the floor, and raise it."""
        now = self._clock.now(floor.moment)
        roles = dict(floor.roles)
        for role, (signed, keyids) in _read(known, used).items():
            if signed.is_expired(as_date(now.time)):
                raise VerificationFailed(
                    _expired(role, signed.expires, behind=self._clock.is_behind(floor.moment)),
                    where=[str(self._source.place)],
                    hint=_FROZEN,
                )
            seen = roles.get(role)
            if seen is not None and seen.keyids == keyids and signed.version < seen.version:
                raise VerificationFailed(
                    f"the registry's {role} metadata is version {signed.version}, and this device has seen version "
                    f"{seen.version}",
                    where=[str(self._source.place)],
                    hint=_REPLAYED,
                )
            roles[role] = Seen(signed.version, keyids)
        raised = Floor(now, roles)
        with atomic_file(self._folder / FLOOR) as path:
            path.write_bytes(canonical_json(msgspec.to_builtins(raised)))


def _read(known: Path, used: set[str]) -> dict[str, tuple[Signed, tuple[str, ...]]]:
    """Return what `python-tuf` believed and kept of some roles: role → its metadata, and the keys that the role has.

    Other files there are of another channel, which the device followed once; a power cut may have damaged them.
    """
    found: dict[str, Signed] = {}
    for role in sorted(used):
        path = known / f"{role}.json"
        if path.exists():
            metadata: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
            found[role] = metadata.signed
    root, targets = found[Root.type], found[Targets.type]
    assert isinstance(root, Root)
    assert isinstance(targets, Targets)
    keys: dict[str, list[str]] = {role: [*each.keyids] for role, each in root.roles.items()}
    delegated = targets.delegations.roles if targets.delegations else None
    keys |= {role: [*each.keyids] for role, each in (delegated or {}).items()}
    return {role: (signed, tuple(sorted(keys[role]))) for role, signed in found.items() if role in keys}


def _announced(target: str, found: TargetFile) -> Announced:
    sha = found.hashes.get("sha256", "")
    custom = found.custom
    if not sha or not isinstance(custom, dict):
        raise VerificationFailed(f"what is signed of {target} names no release")
    return Announced(f"sha256:{sha}", found.length, custom)


class _Fetcher(FetcherInterface):
    """Fetches metadata from a registry for `python-tuf`."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        try:
            return iter([fetch_metadata(self._source, name)])
        except NotInRegistry as exc:
            raise DownloadHTTPError(exc.message, 404) from exc


@contextlib.contextmanager
def _tuf_errors(source: Source) -> Iterator[None]:
    """Say in our words what `python-tuf` found.

    Raises:
        VerificationFailed: Metadata that is not to be believed.
        NetworkFailed: No answer.
    """
    place = [str(source.place)]
    try:
        yield
    except ExpiredMetadataError as exc:
        raise VerificationFailed(f"the registry's metadata has expired: {exc}", where=place, hint=_FROZEN) from exc
    except BadVersionNumberError as exc:
        raise VerificationFailed(
            f"the registry's metadata is older than what this device has seen: {exc}",
            where=place,
            hint=_REPLAYED,
        ) from exc
    except DownloadHTTPError as exc:
        raise NetworkFailed(
            f"the registry has no metadata of this name: {exc}",
            where=place,
            hint="is the name right? `cnncc fleet trust init` makes a fleet's metadata",
        ) from exc
    except DownloadLengthMismatchError as exc:
        raise VerificationFailed(f"the registry's metadata cannot be believed: {exc}", where=place) from exc
    except DownloadError as exc:
        cause = exc.__cause__
        raise cause if isinstance(cause, CnnccError) else NetworkFailed(str(exc), where=place) from exc
    except RepositoryError as exc:
        raise VerificationFailed(
            f"the registry's metadata cannot be believed: {exc}",
            where=place,
            hint="it was signed by a key that this fleet does not trust, or was tampered with",
        ) from exc


def _expired(role: str, expires: datetime, *, behind: bool) -> str:
    said = f"the registry's {role} metadata expired on {expires.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return said + ("; this device's clock was set back" if behind else "")


_REPLAYED = "an old state of the registry is being replayed, or was restored from a backup"
_FROZEN = "the publisher signs it anew with `cnncc fleet trust refresh`; if he did, somebody holds the news back"
