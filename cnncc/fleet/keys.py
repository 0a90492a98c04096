"""The keys of a fleet: which role has which, and where their private halves are.

A private key is an encrypted file (PKCS #8, by `cryptography`), or is kept elsewhere and never seen here: any address
that `securesystemslib` has a signer for names it (``awskms:``, ``azurekms:``, ``gcpkms:``, ``hsm:``, …).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import DependencyMissing, UsageError, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors

KEYS = "keys.json"
_ENCRYPTED = "encrypted"
_LARGEST = 1 << 20

Passphrase = Callable[[str], str]
"""Role → what its keys' files are encrypted with."""


@dataclass(frozen=True)
class KnownKey:
    """A key of a role.

    Attributes:
        keyid: Names it in metadata.
        public: Its public half, as metadata has it.
        private: ``encrypted:FILE``, a file in the folder of keys, or an address of `securesystemslib`.
    """

    keyid: str
    public: Mapping[str, Any]
    private: str

    @property
    def key(self) -> Key:
        """The public key.

        Raises:
            VerificationFailed: It is damaged.
        """
        try:
            return Key.from_dict(self.keyid, dict(self.public))
        except (KeyError, ValueError, TypeError) as exc:
            raise VerificationFailed(f"the public key {self.keyid[:16]}… is damaged: {exc}") from exc


@dataclass
class Keys:
    """A folder of keys.

    Attributes:
        folder: Holds `KEYS` and the files of private keys.
        passphrase: Asked once for each role that signs.
    """

    folder: Path
    passphrase: Passphrase
    _said: dict[str, str] = field(default_factory=dict, repr=False)

    def roles(self) -> dict[str, tuple[KnownKey, ...]]:
        """Return role → its keys; none where the folder holds none.

        Raises:
            VerificationFailed: The list is damaged.
            StorageFailed: It cannot be read.
        """
        path = self.folder / KEYS
        try:
            with storage_errors(path):
                if not path.exists():
                    return {}
                with path.open("rb") as file:
                    data = file.read(_LARGEST)
            return msgspec.json.decode(data, type=dict[str, tuple[KnownKey, ...]])
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise VerificationFailed(f"{path} is damaged: {exc}", hint="restore it from a backup") from exc

    def create(self, role: str, count: int = 1) -> tuple[KnownKey, ...]:
        """Make keys (Ed25519) for a role, beside those that it has, and return them.

        Raises:
            UsageError: The passphrase is empty.
            StorageFailed: They cannot be written.
        """
        secret = self._secret(role)
        if not secret:
            raise UsageError(f"the keys of {role} are encrypted, and the passphrase is empty")
        made = tuple(self._create(role, secret) for _ in range(count))
        self._add(role, made)
        return made

    def adopt(self, role: str, address: str) -> KnownKey:
        """Take a key for a role that is kept elsewhere.

        Args:
            role: The role.
            address: As `securesystemslib` names it: ``awskms:…``, ``azurekms:…``, ``gcpkms:…``, ``hsm:…``.

        Raises:
            UsageError: There is no signer for such an address.
            DependencyMissing: What speaks to it is not installed.
        """
        scheme = address.partition(":")[0]
        kinds = {kind.SCHEME: kind for kind in _importers()}
        if scheme not in kinds:
            raise UsageError(f"no signer knows keys at {address}", hint=f"one of {', '.join(sorted(kinds))}")
        try:
            private, key = kinds[scheme].import_(address.partition(":")[2])
        except UnsupportedLibraryError as exc:
            raise DependencyMissing(f"keys at {scheme}: need a library: {exc}", hint=str(exc)) from exc
        known = KnownKey(key.keyid, key.to_dict(), private)
        self._add(role, (known,))
        return known

    def signers(self, role: str, keyids: Mapping[str, Key]) -> list[Signer]:
        """Return what signs for a role, of the keys that it has by its metadata; maybe none.

        Args:
            role: The role.
            keyids: Those that count: keyid → key.

        Raises:
            UsageError: The passphrase is wrong.
            StorageFailed: A private key cannot be read.
            DependencyMissing: What keeps a key cannot be spoken to.
        """
        return [self._signer(role, known) for known in self.roles().get(role, ()) if known.keyid in keyids]

    def _signer(self, role: str, known: KnownKey) -> Signer:
        scheme, _, name = known.private.partition(":")
        if scheme == _ENCRYPTED:
            return self._from_file(role, known, name)
        try:
            return Signer.from_priv_key_uri(known.private, known.key)
        except UnsupportedLibraryError as exc:
            raise DependencyMissing(f"keys at {scheme}: need a library: {exc}", hint=str(exc)) from exc
        except (ValueError, OSError) as exc:
            raise UsageError(f"the key of {role} at {known.private} cannot be used: {exc}") from exc

    def _from_file(self, role: str, known: KnownKey, name: str) -> Signer:
        path = self.folder / name
        with storage_errors(path):
            data = path.read_bytes()
        secret = self._secret(role)
        try:
            private = load_pem_private_key(data, secret.encode())
            assert isinstance(private, Ed25519PrivateKey)
            public = known.key
            assert isinstance(public, SSlibKey)
            return CryptoSigner(private, public)
        except (ValueError, TypeError) as exc:
            self._said.pop(role, None)
            raise UsageError(
                f"the passphrase of {role} does not open {path}", hint="or the file is damaged: restore a backup"
            ) from exc

    def _create(self, role: str, secret: str) -> KnownKey:
        signer = CryptoSigner.generate_ed25519()
        private = load_pem_private_key(signer.private_bytes, None)
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret.encode()))
        name = f"{role}-{signer.public_key.keyid[:16]}.pem"
        with storage_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(self.folder / name) as path:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(pem)
        return KnownKey(signer.public_key.keyid, signer.public_key.to_dict(), f"{_ENCRYPTED}:{name}")

    def _add(self, role: str, made: tuple[KnownKey, ...]) -> None:
        roles = self.roles()
        roles[role] = (*(old for old in roles.get(role, ()) if old.keyid not in {new.keyid for new in made}), *made)
        with atomic_file(self.folder / KEYS) as path:
            path.write_bytes(canonical_json(msgspec.to_builtins(roles)))

    def _secret(self, role: str) -> str:
        if role not in self._said:
            self._said[role] = self.passphrase(role)
        return self._said[role]


def _importers() -> list[Any]:
    """Return the signers that can say the public half of a key that they keep."""
    from securesystemslib.signer import AWSSigner, AzureSigner, GCPSigner, HSMSigner

    return [AWSSigner, AzureSigner, GCPSigner, HSMSigner]
