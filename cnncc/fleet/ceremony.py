"""A new root whose keys lie apart: proposed on one machine, signed on others without a network, published by the first.

What travels is a proposal, a file: the new root, and the roots before it. Who holds a key has a root of the fleet that
he trusts, the one that devices are enrolled with, say. The proposal's roots must follow from it as a device would
follow them (TUF specification, 5.3); only then is he told what the new root changes, and signs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError

from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import EnvironmentMissing, UsageError, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors

_LARGEST = 16 << 20


@dataclass(frozen=True)
class Change:
    """What a new root changes of a role's keys.

    Attributes:
        role: Which.
        added: Keys that sign from then on.
        removed: Keys that do not any more.
        threshold: How many must sign: before, and from then on.
    """

    role: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    threshold: tuple[int, int]


@dataclass(frozen=True)
class Signatures:
    """Who signed a new root, of the keys of one root.

    Attributes:
        version: Of the root whose keys these are: the one before, or the new one itself.
        threshold: How many must sign.
        signed: Keys that did.
        unsigned: Keys that did not.
    """

    version: int
    threshold: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]

    @property
    def enough(self) -> bool:
        """Whether as many signed as must."""
        return len(self.signed) >= self.threshold


@dataclass(frozen=True)
class Proposal:
    """A new root, signed by nobody yet, by some, or by enough.

    Attributes:
        roots: Those before it, each followed by the next.
        new: The new one.
    """

    roots: tuple[Metadata[Root], ...]
    new: Metadata[Root]

    @property
    def before(self) -> Root:
        """The root that it follows."""
        return self.roots[-1].signed

    @property
    def expires(self) -> datetime:
        """Until when the new root is good."""
        return self.new.signed.expires

    def changes(self) -> tuple[Change, ...]:
        """Return what it changes of who may sign; nothing where it has a new date alone."""
        found = []
        for role, after in self.new.signed.roles.items():
            before = self.before.roles[role]
            if before != after:
                found.append(
                    Change(
                        role,
                        tuple(keyid for keyid in after.keyids if keyid not in before.keyids),
                        tuple(keyid for keyid in before.keyids if keyid not in after.keyids),
                        (before.threshold, after.threshold),
                    )
                )
        return tuple(found)

    def signatures(self) -> tuple[Signatures, ...]:
        """Return who signed it: of the keys of the root before, and of its own. Enough of both must."""
        return tuple(
            Signatures(root.version, found.threshold, tuple(found.signed), tuple(found.unsigned))
            for root in (self.before, self.new.signed)
            for found in [root.get_verification_result(Root.type, self.new.signed_bytes, self.new.signatures)]
        )

    def to_bytes(self) -> bytes:
        """Return what `read_proposal` reads."""
        return canonical_json({"roots": [root.to_dict() for root in self.roots], "new": self.new.to_dict()})

    def write(self, path: Path) -> None:
        """Write it into a file, which appears whole or stays as it was.

        Raises:
            StorageFailed: It cannot be written.
        """
        with atomic_file(path) as partial:
            partial.write_bytes(self.to_bytes())

    def check(self, anchor: bytes) -> None:
        """Check that the root before it follows from a trusted one, and that it changes nothing but keys and dates.

        Args:
            anchor: The bytes of the trusted root.

        Raises:
            VerificationFailed: It does not, or it does.
        """
        try:
            trusted: Metadata[Root] = Metadata.from_bytes(anchor)
            _is_root(trusted)
            trusted.signed.verify_delegate(Root.type, trusted.signed_bytes, trusted.signatures)
            self._follow(trusted)
            self._only_keys_and_dates()
        except (RepositoryError, DeserializationError, ValueError) as exc:
            raise VerificationFailed(
                f"the proposal is not to be signed: {exc}",
                hint="it does not follow from the root that is trusted here; ask whoever sent it, by another way",
            ) from exc

    def _follow(self, trusted: Metadata[Root]) -> None:
        """Follow the roots, as a device does."""
        for root in self.roots:
            if root.signed.version > trusted.signed.version:
                if root.signed.version != trusted.signed.version + 1:
                    raise ValueError(f"root {trusted.signed.version + 1} is missing")
                for by in (trusted, root):
                    by.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
                trusted = root
        if trusted.signed_bytes != self.roots[-1].signed_bytes:
            raise ValueError(f"its root {self.before.version} is not that of this fleet")
        if self.new.signed.version != self.before.version + 1:
            raise ValueError(f"the new root is version {self.new.signed.version}, after {self.before.version}")

    def _only_keys_and_dates(self) -> None:
        """Check that `changes` tells everything: a key that goes by another's name would not be seen there."""
        before, after = (_rest(root) for root in (self.before, self.new.signed))
        if before != after:
            raise ValueError("the new root changes more than keys and dates")
        for keyid, key in self.new.signed.keys.items():
            if _keyid(key) != keyid:
                raise ValueError(f"the key {keyid} goes by a name that is not its own")

    def sign(self, signers: Iterable[Signer]) -> Proposal:
        """Return it with more signatures.

        Raises:
            UsageError: A key is neither of the root before nor of the new one.
            EnvironmentMissing: A key that is kept elsewhere did not sign.
        """
        new: Metadata[Root] = Metadata.from_bytes(self.new.to_bytes())
        counting = {*self.before.roles[Root.type].keyids, *new.signed.roles[Root.type].keyids}
        for signer in signers:
            if signer.public_key.keyid not in counting:
                raise UsageError(
                    f"the key {signer.public_key.keyid} signs no root of this fleet",
                    hint="the keys are those of the role root, of the root before or of the new one",
                )
            sign_metadata(new, signer)
        return Proposal(self.roots, new)


def read_proposal(path: Path) -> Proposal:
    """Return the proposal in a file, which nothing has checked.

    Raises:
        VerificationFailed: It is none.
        StorageFailed: It cannot be read.
    """
    with storage_errors(path), path.open("rb") as file:
        data = file.read(_LARGEST)
    try:
        document = msgspec.json.decode(data, type=dict[str, Any])
        roots = tuple(_root(each) for each in document["roots"])
        if not roots:
            raise ValueError("it holds no root before the new one")
        return Proposal(roots, _root(document["new"]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise VerificationFailed(
            f"{path} is no proposal of a root: {exc}", hint="`cnncc fleet trust rotate NAME ROLE -o FILE` makes one"
        ) from exc


def together(proposals: Sequence[Proposal]) -> Proposal:
    """Return one proposal with the good signatures of several copies, which holders signed at the same time.

    Raises:
        UsageError: They are not of the same root.
    """
    roots = proposals[0].roots
    new: Metadata[Root] = Metadata.from_bytes(proposals[0].new.to_bytes())
    new.signatures.clear()
    for each in proposals:
        if each.new.signed_bytes != new.signed_bytes:
            raise UsageError("the files propose different roots", hint="copies of one file are signed and published")
        for of in Proposal(roots, each.new).signatures():
            new.signatures.update({keyid: each.new.signatures[keyid] for keyid in of.signed})
    return Proposal(roots, new)


def sign_metadata(metadata: Metadata[Any], signer: Signer) -> None:
    """Add a signature.

    Raises:
        EnvironmentMissing: The key is kept elsewhere, and did not sign.
    """
    try:
        metadata.sign(signer, append=True)
    except UnsignedMetadataError as exc:
        cause = exc.__cause__ or exc
        raise EnvironmentMissing(
            f"the key {signer.public_key.keyid} did not sign: {str(cause) or type(cause).__name__}",
            hint="is this machine logged in where the key is kept, is the PIN right, and may it sign there?",
        ) from exc


def _root(document: Any) -> Metadata[Root]:
    metadata: Metadata[Any] = Metadata.from_dict(document)
    _is_root(metadata)
    return metadata


def _is_root(metadata: Metadata[Any]) -> None:
    if not isinstance(metadata.signed, Root):
        raise ValueError(f"it is {metadata.signed.type} metadata where a root belongs")


def _rest(root: Root) -> dict[str, Any]:
    """Return what of a root is neither a key nor a date."""
    document = root.to_dict()
    for field in ("version", "expires", "keys"):
        del document[field]
    document["roles"] = {
        name: {key: value for key, value in role.items() if key not in ("keyids", "threshold")}
        for name, role in document["roles"].items()
    }
    return document


def _keyid(key: Key) -> str:
    """Return the name that a key has by its content (TUF specification, 4.2)."""
    public = {"keytype": key.keytype, "keyval": key.keyval, "scheme": key.scheme}
    return hashlib.sha256(str(encode_canonical(public)).encode()).hexdigest()
