"""A fleet's metadata (The Update Framework, version 1.0.34): made, changed, signed, published.

    root       2 of 3 keys, offline       who may sign what
    targets    1 key, offline             which channels there are, and who may release to each
    CHANNEL    1 key each                 the release of every name in the channel
    provenance 1 key                      no metadata of weight: how engines came to be (`cnncc.fleet.provenance`)
    snapshot   1 key, online              which versions of all these belong together
    timestamp  1 key, online              that this is the newest, signed again every day

Metadata in the registry is verified before it is changed, against the root that this machine knows, as a device does;
but for expiry, since what has expired is here to be signed anew. What is changed appears by its last file: a publisher
that dies before leaves devices where they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
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

from cnncc.fleet.ceremony import Proposal, sign_metadata
from cnncc.fleet.keys import Keys
from cnncc.fleet.lock import TIMESTAMP, Turn, store_changes, timestamp_of
from cnncc.fleet.provenance import PROVENANCE, Attester
from cnncc.fleet.signers import read_public
from cnncc_runtime.errors import NotInRegistry, UsageError, VerificationFailed
from cnncc_runtime.metadata import fetch_metadata
from cnncc_runtime.oci.registry import Repository

CHANNELS = ("stable", "canary")
_TOP = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
_ROOT_KEYS, _ROOT_THRESHOLD = 3, 2
_MOST_ROOTS = 256

LIFETIMES = {Root.type: 365, Targets.type: 90, Snapshot.type: 7, Timestamp.type: 1, PROVENANCE: 365}
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
    _published: tuple[Metadata[Root], ...] = field(default=(), repr=False)
    _agreed: bool = field(default=False, repr=False)
    _first: bool = field(default=False, repr=False)
    _before: bytes | None = field(default=None, repr=False)

    def begin(self, channels: tuple[str, ...] = CHANNELS) -> bytes:
        """Make a new fleet's keys and metadata; return the root that devices are enrolled with. `publish` comes next.

        Raises:
            UsageError: There is metadata already, or a channel has the name of another role.
            NetworkFailed: The registry does not answer.
        """
        if reserved := sorted({*channels} & {*_TOP, PROVENANCE}):
            raise UsageError(f"{', '.join(reserved)} cannot be a channel: a role has that name")
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
        for role in (*channels, PROVENANCE):
            [known] = self.keys.create(role)
            keys[known.keyid] = known.key
            delegated[role] = DelegatedRole(role, [known.keyid], 1, terminating=True, paths=[f"{role}/*"])
            self._roles[role] = Metadata(Targets(expires=self._expiry(role)))
        targets.delegations = Delegations(keys, delegated)
        self._roles[Root.type] = Metadata(root)
        self._roles[Targets.type] = Metadata(targets)
        self._roles[Snapshot.type] = Metadata(Snapshot(expires=self._expiry(Snapshot.type)))
        self._roles[Timestamp.type] = Metadata(Timestamp(expires=self._expiry(Timestamp.type)))
        self._changed = dict.fromkeys((Root.type, Targets.type, *delegated))
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
        self._agreed = False
        with self._believed():
            self._load(self._roots())

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
        return tuple(role for role in self._delegations().roles or {} if role != PROVENANCE)

    def attester(self) -> Attester:
        """Return whose statements about engines are believed, after `load`.

        Raises:
            UsageError: The fleet's metadata names nobody.
        """
        above = self._delegations()
        role = (above.roles or {}).get(PROVENANCE)
        if role is None:
            raise UsageError(
                f"the fleet's metadata names no keys for {PROVENANCE}",
                where=[str(self.repository.place)],
                hint="it was begun by an older cnncc; cnncc fleet trust init begins one under another --name",
            )
        keys = {keyid: above.keys[keyid] for keyid in role.keyids}
        return Attester(keys, role.threshold, lambda: self.keys.signers(PROVENANCE, keys))

    def check_dates(self) -> None:
        """See that what says whose keys count has not expired, as a device does, after `load`.

        Raises:
            VerificationFailed: It has, or somebody shows an old state of the registry.
        """
        now = self.now()
        expired = [role for role in _TOP if self._roles[role].signed.is_expired(now)]
        if expired:
            raise VerificationFailed(
                f"the fleet's metadata has expired, so that keys which it names may have been taken back since: "
                f"{', '.join(expired)}",
                where=[str(self.repository.place)],
                hint=f"cnncc fleet trust refresh NAME {' '.join(expired)}; if that was done, the registry is held back",
            )

    def overview(self) -> tuple[Role, ...]:
        """Return all roles, after `load`."""
        found = []
        for name, metadata in self._roles.items():
            above: Mapping[str, Any] = self._above(name).roles or {}
            keyids = tuple(above[name].keyids)
            here = sum(key.keyid in keyids for key in self.keys.here(name))
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
        old = self._keyids(role)
        self._exchange(role, old, [known.key for known in self.keys.create(role, len(old))])

    def adopt(self, role: str, where: str, old: str = "") -> str:
        """Give a role a key that was made elsewhere, in the place of one of its own; `publish` does it.

        Args:
            role: The role.
            where: A file with the public half of a key that signs on another machine (`propose`), or the address of a
                key that signs from here (`cnncc.fleet.signers.import_key`).
            old: The name of the key that it replaces, or its first digits; may be left out where a role has one key.

        Returns:
            The new key's name.

        Raises:
            UsageError: There is no such role, not one such key, or the role has the new one already.
            DependencyMissing: What speaks to the key is not installed.
            EnvironmentMissing: It cannot be reached.
        """
        having = self._keyids(role)
        leaving = [keyid for keyid in having if keyid.startswith(old)]
        if len(leaving) != 1:
            raise UsageError(
                f"{role} has {len(leaving)} keys whose name begins with '{old}'" if old else f"{role} has several keys",
                where=having,
                hint="--instead-of says which of them the new one replaces",
            )
        key = read_public(Path(where)) if Path(where).is_file() else self.keys.adopt(role, where).key
        if key.keyid in having:
            raise UsageError(f"{role} has the key {key.keyid} already")
        self._exchange(role, leaving, [key])
        return key.keyid

    def _keyids(self, role: str) -> list[str]:
        if role not in self._roles:
            raise UsageError(f"the fleet has no role '{role}'", hint=f"one of {', '.join(self._roles)}")
        return list((self._above(role).roles or {})[role].keyids)

    def _exchange(self, role: str, old: list[str], new: list[Key]) -> None:
        above = self._above(role)
        roles: Mapping[str, Any] = above.roles or {}
        for keyid in old:
            roles[role].keyids.remove(keyid)
            if not any(keyid in other.keyids for other in roles.values()):
                del above.keys[keyid]
        for key in new:
            above.keys[key.keyid] = key
            roles[role].keyids.append(key.keyid)
        self._changed[Root.type if role in _TOP else Targets.type] = None
        self._changed[role] = None

    def propose(self) -> Proposal:
        """Return the changed root, signed by those of its keys that are here, for others to sign; instead of `publish`.

        Raises:
            UsageError: Something else was changed, which only `publish` can sign.
        """
        before = self._published[-1].signed
        new = self._roles[Root.type]
        other = [role for role in self._changed if role != Root.type and role not in _differing(before, new.signed)]
        if Root.type not in self._changed or other:
            raise UsageError(
                f"{' and '.join(other) or 'nothing'} would change without the root",
                hint="others sign a root alone; leave the file out to sign the rest here",
            )
        self._next(Root.type, 0, first=False)
        new.signatures.clear()
        for root in (before, new.signed):
            for signer in self.keys.signers(Root.type, _keys(root, Root.type)):
                sign_metadata(new, signer)
        self._changed.clear()
        return Proposal(self._published, new)

    def agree(self, proposal: Proposal) -> None:
        """Take a new root that others signed, instead of `load`; `publish` signs what its new keys must, and publishes.

        A publisher that died while it published such a root can do it again.

        Raises:
            UsageError: Too few signed it, it has expired, or it is published already.
            VerificationFailed: It does not follow from this fleet's newest root.
            NetworkFailed: No answer.
        """
        self._load_below(proposal.new)
        proposal.check(self.anchor)
        if self._published[-1].signed_bytes != proposal.roots[-1].signed_bytes:
            raise UsageError(
                f"the fleet's root is version {self.root.version}, and the new one follows {proposal.before.version}",
                hint="propose it again: another one was published meanwhile",
            )
        for of in proposal.signatures():
            if not of.enough:
                raise UsageError(
                    f"the new root needs {of.threshold} keys of root {of.version} to sign, {len(of.signed)} did",
                    where=of.unsigned,
                    hint="`cnncc fleet trust sign FILE`, where these keys are",
                )
        if proposal.expires <= self.now():
            raise UsageError(f"the new root was good until {proposal.expires:%Y-%m-%d}", hint="propose it again")
        differing = _differing(self.root, proposal.new.signed)
        self._roles[Root.type] = proposal.new
        self._changed = dict.fromkeys((Root.type, *differing))
        self._agreed = True

    def _load_below(self, new: Metadata[Root]) -> None:
        """Fetch the metadata; where a publisher died after the new root, what was there before it."""
        with self._believed():
            roots = self._roots()
            if len(roots) > 1 and roots[-1].signed_bytes == new.signed_bytes:
                try:
                    self._load(roots)
                except (RepositoryError, ValueError):
                    roots = roots[:-1]
                else:
                    raise UsageError(f"root {new.signed.version} is published already")
            self._load(roots)

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
        before = self._published[-1].signed if self._published else None
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
        ready = first or self._agreed  # devices are enrolled with the first one, and holders signed what they agreed to
        if Root.type in changed and not ready:
            self._next(Root.type, 0, first=False)
        self._next(Timestamp.type, number, first=first)
        files: dict[str, bytes] = {}
        for role in listed:
            files[f"{self._roles[role].signed.version}.{role}.json"] = self._sign(role)
        if listed or first or Snapshot.type in changed:
            files[f"{snapshot.version}.snapshot.json"] = self._sign(Snapshot.type)
        if Root.type in changed:  # late: between it and the timestamp, devices may believe neither
            files[f"{self.root.version}.root.json"] = self.root_bytes if ready else self._sign(Root.type, before)
        files[TIMESTAMP] = self._sign(Timestamp.type)
        store_changes(self.repository, files, self._before, turn)
        self._before = files[TIMESTAMP]
        if Root.type in changed:
            self._published = (*self._published, Metadata.from_bytes(self.root_bytes))
        self._first = self._agreed = False
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
            keys = _keys(above, role)
            signers = self.keys.signers(role, keys)
            if len(signers) < roles[role].threshold:
                raise UsageError(
                    f"{role} needs {roles[role].threshold} keys to sign, {len(signers)} of its {len(keys)} are here",
                    where=[str(self.keys.folder)],
                    hint="-o FILE writes it for the holders of the others to sign: `cnncc fleet trust sign FILE`"
                    if role == Root.type
                    else "bring the folder of keys to this machine, or sign on the one that has it",
                )
            for signer in signers:
                sign_metadata(metadata, signer)
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

    @contextlib.contextmanager
    def _believed(self) -> Iterator[None]:
        try:
            yield
        except (RepositoryError, ValueError) as exc:
            raise VerificationFailed(
                f"the fleet's metadata cannot be believed: {exc}",
                where=[str(self.repository.place)],
                hint="nothing was changed. Was the registry tampered with, or restored from a backup?",
            ) from exc

    def _roots(self) -> tuple[Metadata[Root], ...]:
        """Return the registry's roots, from the one that is known here."""
        if not self.anchor:
            raise UsageError("no root of this fleet is known here", hint="--root names the root.json of its beginning")
        root: Metadata[Root] = Metadata.from_bytes(self.anchor)
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
        roots = [root]
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
            roots.append(successor)
            root = successor
        return tuple(roots)

    def _load(self, roots: tuple[Metadata[Root], ...]) -> None:
        self._published = roots
        root = Metadata[Root].from_bytes(roots[-1].to_bytes())  # which is changed; what is published stays
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


def _keys(above: Any, role: str) -> dict[str, Key]:
    """Return the keys that may sign for a role, by what is above it."""
    return {keyid: above.keys[keyid] for keyid in (above.roles or {})[role].keyids}


def _differing(before: Root, after: Root) -> list[str]:
    """Return the roles but root whose metadata a new root wants signed by others than before."""
    return [role for role in _TOP if role != Root.type and before.roles[role] != after.roles[role]]
