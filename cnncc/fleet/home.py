"""What a publisher's machine keeps of a fleet: where it is, the root that it trusts, and keys.

NAME/fleet.json   the registry, and the model's name
NAME/root.json    the root of its beginning: what devices are enrolled with
NAME/keys.json, NAME/ROLE-KEYID.pem   see `cnncc.fleet.keys`
NAME/uploads/     how far uploads are that broke off
NAME/lock         held by whoever changes the fleet's metadata from this machine; names the change (`cnncc.fleet.lock`)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import platformdirs

from cnncc.fleet.ceremony import Proposal
from cnncc.fleet.keys import Keys
from cnncc.fleet.lock import Lock, Turn
from cnncc.fleet.signers import Passphrase
from cnncc.fleet.signing import CHANNELS, Signing
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import FleetBusy, UsageError, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository

METADATA = "tuf"
"""What the repository of a fleet's metadata is called, after the name of that of its releases and ``-``."""
_FLEET, ROOT, _LOCK, UPLOADS = "fleet.json", "root.json", "lock", "uploads"

Note = Callable[[str], None]


@dataclass(frozen=True)
class _Record:
    registry: str
    name: str
    ca: str = ""


@dataclass(frozen=True)
class Fleet:
    """A fleet, as this machine knows it.

    Attributes:
        folder: Holds what is kept.
        name: Of the model.
        releases: Where its releases are.
        metadata: Where what is signed of them is.
        signing: That.
        lock: Held by whoever changes it, on whichever machine.
    """

    folder: Path
    name: str
    releases: Repository
    metadata: Repository
    signing: Signing
    lock: Lock

    @property
    def uploads(self) -> Path:
        """What says how far uploads are that broke off."""
        return self.folder / UPLOADS

    @contextlib.contextmanager
    def changing(self, proposal: Path | None = None) -> Iterator[Signing]:
        """Yield the fleet's metadata, newly fetched and verified, for a change that is published at the end.

        Args:
            proposal: A file into which the new root is written instead, for others to sign (`cnncc.fleet.ceremony`).

        Raises:
            FleetBusy: Somebody else changes it now.
            VerificationFailed: The registry's metadata is not to be believed.
            NetworkFailed: No answer; devices are where they were.
        """
        with self.locked() as turn:
            self.signing.load()
            yield self.signing
            if proposal is None:
                self.signing.publish(turn)
            else:
                self.signing.propose().write(proposal)

    def agree(self, proposal: Proposal) -> None:
        """Publish a new root that enough holders of its keys signed, and sign again what its new keys must.

        Raises:
            UsageError: See `Signing.agree`; or keys are missing here.
            FleetBusy: Somebody else changes the fleet now.
            VerificationFailed: The registry's metadata, or the proposal, is not to be believed.
            NetworkFailed: No answer.
        """
        with self.locked() as turn:
            self.signing.agree(proposal)
            self.signing.publish(turn)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Turn]:
        """Keep every other publisher from changing the fleet, on this machine and on others.

        Raises:
            FleetBusy: Somebody else changes it now.
            NetworkFailed: No answer.
            StorageFailed: The folder cannot be written.
        """
        path = self.folder / _LOCK
        with storage_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

        def begun(change: str) -> None:
            with storage_errors(path):
                os.pwrite(handle, change.encode(), 0)

        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise FleetBusy(f"somebody else on this machine changes {self.name} now") from exc
            with storage_errors(path):
                own = os.pread(handle, 64, 0).decode("ascii", "replace")
            with self.lock.held(own, begun) as turn:
                yield turn
        finally:
            os.close(handle)


def home() -> Path:
    """Return the folder of all fleets: ``$CNNCC_FLEET_HOME``, or the user's configuration."""
    own = os.environ.get("CNNCC_FLEET_HOME")
    return Path(own) if own else platformdirs.user_config_path("cnncc") / "fleets"


def begin_fleet(
    registry: str,
    name: str,
    passphrase: Passphrase,
    *,
    channels: tuple[str, ...] = CHANNELS,
    ca: Path | None = None,
    folder: Path | None = None,
    connect: Callable[[str, Path | None], Connection] = Connection,
    note: Note = lambda _: None,
) -> Fleet:
    """Make a fleet: keys, and metadata in its registry.

    Args:
        registry: Its address.
        name: Of the model.
        passphrase: What keys are encrypted with, role by role.
        channels: Where releases go.
        ca: Certificates instead of the system's.
        folder: Where it is kept; below `home` by default.
        connect: Makes a connection.
        note: Told of what is worth knowing.

    Raises:
        UsageError: There is such a fleet, here or in the registry.
        FleetBusy: Somebody else makes it now.
        NetworkFailed: The registry does not answer.
        StorageFailed: The folder cannot be written.
    """
    folder = folder or home() / name.replace("/", "_")
    if (folder / _FLEET).exists():
        raise UsageError(f"{folder} holds a fleet already", hint="choose another --name")
    if name.endswith(f"-{METADATA}"):
        raise UsageError(f"'{name}' is where the metadata of another fleet would lie", hint="choose another --name")
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = _Record(registry, name, str(ca.resolve()) if ca else "")
    fleet = _fleet(folder, record, b"", passphrase, connect, note)
    with fleet.locked() as turn:
        root = fleet.signing.begin(channels)
        for file, data in ((ROOT, root), (_FLEET, canonical_json(msgspec.to_builtins(record)))):
            with atomic_file(folder / file) as path:
                path.write_bytes(data)
        fleet.signing.publish(turn)
    return fleet


def open_fleet(
    name: str,
    passphrase: Passphrase,
    *,
    folder: Path | None = None,
    connect: Callable[[str, Path | None], Connection] = Connection,
    note: Note = lambda _: None,
) -> Fleet:
    """Return a fleet that this machine knows.

    Args:
        name: Of the model.
        passphrase: What keys are encrypted with, role by role.
        folder: Where it is kept; below `home` by default.
        connect: Makes a connection.
        note: Told of what is worth knowing.

    Raises:
        UsageError: It knows none of that name.
        VerificationFailed: What is kept of it is damaged.
    """
    folder = folder or home() / name.replace("/", "_")
    if not (folder / _FLEET).exists():
        known = ", ".join(sorted(path.parent.name for path in home().glob(f"*/{_FLEET}")))
        raise UsageError(
            f"this machine knows no fleet '{name}'",
            hint=f"one of {known}" if known else "cnncc fleet trust init --registry URL --name NAME",
        )
    try:
        with storage_errors(folder):
            record = msgspec.json.decode((folder / _FLEET).read_bytes(), type=_Record)
            root = (folder / ROOT).read_bytes()
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise VerificationFailed(f"{folder / _FLEET} is damaged: {exc}", hint="restore it from a backup") from exc
    return _fleet(folder, record, root, passphrase, connect, note)


def repositories(
    registry: str, name: str, ca: Path | None, connect: Callable[[str, Path | None], Connection] = Connection
) -> tuple[Repository, Repository]:
    """Return where a fleet's releases are, and its metadata.

    Args:
        registry: Its address.
        name: Of the model.
        ca: Certificates instead of the system's.
        connect: Makes a connection.

    Raises:
        UsageError: Not such an address, or not such a name.
    """
    place = place_of(registry, name)
    connection = connect(place.host, ca)
    return Repository(place, connection), Repository(place.beside(METADATA), connection)


def _fleet(
    folder: Path,
    record: _Record,
    root: bytes,
    passphrase: Passphrase,
    connect: Callable[[str, Path | None], Connection],
    note: Note,
) -> Fleet:
    releases, metadata = repositories(record.registry, record.name, Path(record.ca) if record.ca else None, connect)
    return Fleet(
        folder,
        record.name.rpartition("/")[2],
        releases,
        metadata,
        Signing(metadata, Keys(folder, passphrase), root),
        Lock(metadata, note),
    )
