"""A fleet's metadata (The Update Framework, version 1.0.34): made, changed, signed, published.

    root       2 of 3 keys, offline       who may sign what
    targets    1 key, offline             which channels there are, and who may release to each
    CHANNEL    1 key each                 the release of every name in the channel
    snapshot   1 key, online              which versions of all these belong together
    timestamp  1 key, online              that this is the newest, signed again every day

Metadata in the registry is verified before it is changed, against the root that this machine knows, as a device does;
but for expiry, since what has expired is here to be signed anew. What is changed appears by its last file: a publisher
that dies before leaves devices where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from cnncc.fleet.keys import Keys
from cnncc.fleet.lock import TIMESTAMP, Turn, store_changes, timestamp_of
from cnncc_runtime.errors import NotInRegistry, UsageError, VerificationFailed
from cnncc_runtime.metadata import fetch_metadata
from cnncc_runtime.oci.registry import Repository

CHANNELS = ("stable", "canary")
_TOP = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
_ROOT_KEYS, _ROOT_THRESHOLD = 3, 2
_MOST_ROOTS = 256

LIFETIMES = {Root.type: 365, Targets.type: 90, Snapshot.type: 7, Timestamp.type: 1}
"""Role → days that its metadata is good for."""
_CHANNEL_LIFETIME = 30

Now = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


@dataclass(frozen=True)
class Role:
    """A role as the fleet's metadata has it.

    Attributes:
        name: Of the role.
        threshold: Keys that must sign.
        keyids: Keys that may.
        here: How many of them this machine has.
        version: Of its metadata.
        expires: When that is not believed any more.
    """

    name: str
    threshold: int
    keyids: tuple[str, ...]
    here: int
    version: int
    expires: datetime


@dataclass
class Signing:
    """A fleet's metadata, as it is in the registry, and as it will be.

    Attributes:
        repository: Where it lies.
        keys: What signs.
        anchor: The bytes of a root that this machine trusts; empty before there is one.
        now: What time it is.
    """

    repository: Repository
    keys: Keys
    anchor: bytes = b""
    now: Now = _now
    _roles: dict[str, Metadata[Any]] = field(default_factory=dict, repr=False)
    _changed: dict[str, None] = field(default_factory=dict, repr=False)
    _published_root: bytes = field(default=b"", repr=False)
    _first: bool = field(default=False, repr=False)
    _before: bytes | None = field(default=None, repr=False)

    def begin(self, channels: tuple[str, ...] = CHANNELS) -> bytes:
        """Make a new fleet's keys and metadata; return the root that devices are enrolled with. `publish` comes next.

        Raises:
            UsageError: There is metadata already.
            NetworkFailed: The registry does not answer.
        """
        if "timestamp.json" in self.repository.tags():
            raise UsageError(
                f"{self.repository.place} holds a fleet's metadata already",
                hint="a second beginning would lock its devices out; choose another --name",
            )
        root = Root(expires=self._expiry(Root.type), consistent_snapshot=True)
        targets = Targets(expires=self._expiry(Targets.type))
        for role in _TOP:
            for known in self.keys.create(role, _ROOT_KEYS if role == Root.type else 1):
                root.add_key(known.key, role)
        root.roles[Root.type].threshold = _ROOT_THRESHOLD
        delegated: dict[str, DelegatedRole] = {}
        keys: dict[str, Key] = {}
        for channel in channels:
            [known] = self.keys.create(channel)
            keys[known.keyid] = known.key
            delegated[channel] = DelegatedRole(channel, [known.keyid], 1, terminating=True, paths=[f"{channel}/*"])
            self._roles[channel] = Metadata(Targets(expires=self._expiry(channel)))
        targets.delegations = Delegations(keys, delegated)
        self._roles[Root.type] = Metadata(root)
        self._roles[Targets.type] = Metadata(targets)
        self._roles[Snapshot.type] = Metadata(Snapshot(expires=self._expiry(Snapshot.type)))
        self._roles[Timestamp.type] = Metadata(Timestamp(expires=self._expiry(Timestamp.type)))
        self._changed = dict.fromkeys((Root.type, Targets.type, *channels))
        self._first = True
        self._before = None
        self._sign(Root.type)
        self.anchor = self.root_bytes
        return self.anchor

    def load(self) -> None:
        """Fetch the fleet's metadata and verify it against the root that is known here; its age does not matter.

        Raises:
            VerificationFailed: It is not by this fleet's keys, or does not belong together.
            NetworkFailed: No answer.
        """
        self._changed.clear()
        try:
            self._load()
        except (RepositoryError, ValueError) as exc:
            raise VerificationFailed(
                f"the fleet's metadata cannot be believed: {exc}",
                where=[str(self.repository.place)],
                hint="nothing was changed. Was the registry tampered with, or restored from a backup?",
            ) from exc

    @property
    def root(self) -> Root:
        """The newest root."""
        found: Root = self._roles[Root.type].signed
        return found

    @property
    def root_bytes(self) -> bytes:
        """The newest root, signed."""
        return self._roles[Root.type].to_bytes()

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that the fleet has."""
        return tuple(self._delegations().roles or {})

    def overview(self) -> tuple[Role, ...]:
        """Return all roles, after `load`."""
        known = self.keys.roles()
        found = []
        for name, metadata in self._roles.items():
            above: Mapping[str, Any] = self._above(name).roles or {}
            keyids = tuple(above[name].keyids)
            here = sum(key.keyid in keyids for key in known.get(name, ()))
            signed: Signed = metadata.signed
            found.append(Role(name, above[name].threshold, keyids, here, signed.version, signed.expires))
        return tuple(found)

    def released(self, channel: str) -> Mapping[str, TargetFile]:
        """Return what is released to a channel: ``CHANNEL/NAME`` → its target.

        Raises:
            UsageError: There is no such channel.
        """
        return dict(self._channel(channel).targets)

    def release(self, channel: str, name: str, index: bytes, custom: Mapping[str, Any]) -> None:
        """Say that a name's release in a channel is an index; `publish` publishes it.

        Args:
            channel: Where.
            name: Of the model.
            index: The release's index, byte for byte.
            custom: What is signed with it.

        Raises:
            UsageError: There is no such channel.
        """
        target = TargetFile.from_data(f"{channel}/{name}", index, ["sha256"])
        target.unrecognized_fields["custom"] = dict(custom)
        self._channel(channel).targets[target.path] = target
        self._changed[channel] = None

    def renew(self, *roles: str) -> None:
        """Have roles' metadata signed again, with a new date; `publish` does it.

        Raises:
            UsageError: There is no such role.
        """
        for role in roles:
            if role not in self._roles:
                raise UsageError(f"the fleet has no role '{role}'", hint=f"one of {', '.join(self._roles)}")
            self._changed[role] = None

    def rotate(self, role: str) -> None:
        """Give a role new keys in the place of its old ones; `publish` does it.

        A root with new keys is signed by the old ones too, so that devices follow (TUF specification, 6.1).

        Raises:
            UsageError: There is no such role.
        """
        if role not in self._roles:
            raise UsageError(f"the fleet has no role '{role}'", hint=f"one of {', '.join(self._roles)}")
        above = self.root if role in _TOP else self._delegations()
        roles: Mapping[str, Any] = above.roles or {}
        old = list(roles[role].keyids)
        made = self.keys.create(role, len(old))
        for keyid in old:
            roles[role].keyids.remove(keyid)
            if not any(keyid in other.keyids for other in roles.values()):
                del above.keys[keyid]
        for known in made:
            above.keys[known.keyid] = known.key
            roles[role].keyids.append(known.keyid)
        self._changed[Root.type if role in _TOP else Targets.type] = None
        self._changed[role] = None

    def publish(self, turn: Turn | None = None) -> None:
        """Sign what was changed and publish it; the timestamp, which makes it visible, comes last.

        Args:
            turn: The lock on the fleet (`cnncc.fleet.lock`); None where nobody else can be at work.

        Raises:
            UsageError: Keys of a role are missing here.
            FleetBusy: Somebody else changed the fleet meanwhile.
            NetworkFailed: It was not published; devices are where they were.
        """
        first = self._first
        number = turn.number if turn is not None else 0
        before = None if first else Metadata[Root].from_bytes(self._published_root).signed
        changed = [*self._changed]
        snapshot: Snapshot = self._roles[Snapshot.type].signed
        timestamp: Timestamp = self._roles[Timestamp.type].signed
        listed = [role for role in changed if role not in (Root.type, Snapshot.type, Timestamp.type)]
        if listed or first or Snapshot.type in changed:
            for role in listed:
                self._next(role, number, first=first)
                snapshot.meta[f"{role}.json"] = MetaFile(self._roles[role].signed.version)
            self._next(Snapshot.type, number, first=first)
            timestamp.snapshot_meta = MetaFile(snapshot.version)
        if Root.type in changed and not first:  # the first one was signed already: devices are enrolled with it
            self._next(Root.type, 0, first=False)
        self._next(Timestamp.type, number, first=first)
        files: dict[str, bytes] = {}
        if Root.type in changed:
            files[f"{self.root.version}.root.json"] = self._sign(Root.type, before)
        for role in listed:
            files[f"{self._roles[role].signed.version}.{role}.json"] = self._sign(role)
        if listed or first or Snapshot.type in changed:
            files[f"{snapshot.version}.snapshot.json"] = self._sign(Snapshot.type)
        files[TIMESTAMP] = self._sign(Timestamp.type)
        store_changes(self.repository, files, self._before, turn)
        self._before = files[TIMESTAMP]
        self._published_root = self.root_bytes
        self._first = False
        self._changed.clear()

    def _next(self, role: str, turn: int, *, first: bool) -> None:
        signed: Signed = self._roles[role].signed
        if not first:
            signed.version = max(signed.version + 1, turn)
            # what a publisher left that died before its timestamp stays what it is; roots are fetched one by one
            while role not in (Root.type, Timestamp.type) and self.repository.has(f"{signed.version}.{role}.json"):
                signed.version += 1
        signed.expires = self._expiry(role)
        if role == Timestamp.type:
            signed.unrecognized_fields["issued"] = self.now().strftime("%Y-%m-%dT%H:%M:%SZ")

    def _sign(self, role: str, before: Root | None = None) -> bytes:
        """Return a role's metadata, signed by as many keys as it needs.

        Args:
            role: The role.
            before: The root whose keys sign a new root, too.
        """
        metadata = self._roles[role]
        metadata.signatures.clear()
        for above in [*([before] if before else []), self._above(role)]:
            roles: Mapping[str, Any] = above.roles or {}
            keys = {keyid: above.keys[keyid] for keyid in roles[role].keyids}
            signers = self.keys.signers(role, keys)
            if len(signers) < roles[role].threshold:
                raise UsageError(
                    f"{role} needs {roles[role].threshold} keys to sign, {len(signers)} of its {len(keys)} are here",
                    where=[str(self.keys.folder)],
                    hint="bring the folder of keys to this machine, or sign on the one that has it",
                )
            for signer in signers:
                metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def _above(self, role: str) -> Root | Delegations:
        return self.root if role in _TOP else self._delegations()

    def _delegations(self) -> Delegations:
        targets: Targets = self._roles[Targets.type].signed
        if targets.delegations is None:
            raise VerificationFailed("the fleet's metadata names no channels")
        return targets.delegations

    def _channel(self, channel: str) -> Targets:
        if channel not in self.channels:
            raise UsageError(f"the fleet has no channel '{channel}'", hint=f"one of {', '.join(self.channels)}")
        found: Targets = self._roles[channel].signed
        return found

    def _expiry(self, role: str) -> datetime:
        return self.now() + timedelta(days=LIFETIMES.get(role, _CHANNEL_LIFETIME))

    def _load(self) -> None:
        if not self.anchor:
            raise UsageError("no root of this fleet is known here", hint="--root names the root.json of its beginning")
        data = self.anchor
        root = Metadata[Root].from_bytes(data)
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
        for version in range(root.signed.version + 1, root.signed.version + _MOST_ROOTS):
            try:
                newer = fetch_metadata(self.repository, f"{version}.root.json")
            except NotInRegistry:
                break
            successor = Metadata[Root].from_bytes(newer)
            for by in (root, successor):
                by.signed.verify_delegate(Root.type, successor.signed_bytes, successor.signatures)
            if successor.signed.version != version:
                raise RepositoryError(f"{version}.root.json is version {successor.signed.version}")
            root, data = successor, newer
        self._published_root = data
        self._roles = {Root.type: root}
        self._before = timestamp_of(self.repository)
        timestamp = self._fetch(Timestamp, TIMESTAMP, root, Timestamp.type)
        snapshot = self._fetch(Snapshot, f"{timestamp.snapshot_meta.version}.snapshot.json", root, Snapshot.type)
        versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
        targets = self._fetch(Targets, f"{versions[Targets.type]}.targets.json", root, Targets.type)
        for channel in (targets.delegations.roles or {}) if targets.delegations else {}:
            self._fetch(Targets, f"{versions[channel]}.{channel}.json", self._roles[Targets.type], channel)

    def _fetch(self, kind: type[Any], name: str, above: Metadata[Any], role: str) -> Any:
        metadata: Metadata[Any] = Metadata.from_bytes(fetch_metadata(self.repository, name))
        if not isinstance(metadata.signed, kind):
            raise RepositoryError(f"{name} is {metadata.signed.type} metadata")
        above.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        version = name.partition(".")[0]
        if version.isdecimal() and metadata.signed.version != int(version):
            raise RepositoryError(f"{name} is version {metadata.signed.version}")
        self._roles[role] = metadata
        return metadata.signed
