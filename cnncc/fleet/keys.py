"""The keys of a fleet: which role has which, and where their private halves are.

A private key is an encrypted file (PKCS #8, by `cryptography`), or is kept elsewhere and never seen here
(`cnncc.fleet.signers`). A file that was moved to another machine leaves its key known here, where it does not sign.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signer

from cnncc.fleet import signers
from cnncc.fleet.signers import TOKEN, Passphrase
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import UsageError, VerificationFailed
from cnncc_runtime.files import atomic_file, storage_errors

KEYS = "keys.json"
_ENCRYPTED = "encrypted"
_LARGEST = 1 << 20


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
        passphrase: Asked once for each role that signs, and for a token.
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

    def here(self, role: str) -> tuple[KnownKey, ...]:
        """Return the keys of a role that can sign here: those in a file that is there, and those kept elsewhere."""
        return tuple(known for known in self.roles().get(role, ()) if self._is_here(known))

    def adopt(self, role: str, address: str) -> KnownKey:
        """Take a key for a role that is kept elsewhere.

        Args:
            role: The role.
            address: See `cnncc.fleet.signers.import_key`.

        Raises:
            UsageError: There is no signer for such an address.
            DependencyMissing: What speaks to it is not installed.
            EnvironmentMissing: It cannot be reached.
        """
        kept, key = signers.import_key(address, lambda: self._secret(TOKEN))
        known = KnownKey(key.keyid, key.to_dict(), kept)
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
            DependencyMissing: What speaks to a key that is kept elsewhere is not installed.
            EnvironmentMissing: It cannot be reached.
        """
        return [self._signer(role, known) for known in self.here(role) if known.keyid in keyids]

    def _signer(self, role: str, known: KnownKey) -> Signer:
        if (path := self._file(known)) is None:
            return signers.from_address(known.private, known.key, lambda: self._secret(TOKEN))
        try:
            signer = signers.from_file(path, role, lambda: self._secret(role))
        except UsageError:
            self._said.pop(role, None)
            raise
        if signer.public_key.keyid != known.keyid:
            raise VerificationFailed(f"{path} is another key than {KEYS} says", hint="restore it from a backup")
        return signer

    def _file(self, known: KnownKey) -> Path | None:
        scheme, _, name = known.private.partition(":")
        return self.folder / name if scheme == _ENCRYPTED else None

    def _is_here(self, known: KnownKey) -> bool:
        path = self._file(known)
        if path is None:
            return True
        with storage_errors(path):
            return path.exists()

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
