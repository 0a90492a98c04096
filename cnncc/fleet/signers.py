"""What signs: a file of a private key, or a key that is kept elsewhere and that `securesystemslib` speaks to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    AWSSigner,
    AzureSigner,
    CryptoSigner,
    GCPSigner,
    HSMSigner,
    Key,
    Signer,
    SSlibKey,
    VaultSigner,
)
from tuf.api.metadata import Root

from cnncc_runtime.errors import CnnccError, DependencyMissing, EnvironmentMissing, UsageError
from cnncc_runtime.files import storage_errors

_LARGEST = 1 << 16

Secret = Callable[[], str]
"""Says what a file is encrypted with, or a token's PIN."""
Passphrase = Callable[[str], str]
"""Role → what its keys' files are encrypted with; `TOKEN` → a token's PIN."""
TOKEN = f"{HSMSigner.SCHEME}:"
"""What is asked for a PIN, which no passphrase stands in for: a few wrong ones lock a token."""


def from_file(path: Path, role: str, secret: Secret) -> CryptoSigner:
    """Return what signs with the private key in a file (PEM, PKCS #8, encrypted).

    Args:
        path: The file.
        role: Whose key it is.
        secret: What it is encrypted with.

    Raises:
        UsageError: The passphrase is wrong, or the file holds no key of a kind that signs metadata.
        StorageFailed: It cannot be read.
    """
    data = _read(path)
    try:
        return CryptoSigner(load_pem_private_key(data, secret().encode()))
    except (ValueError, TypeError) as exc:
        raise UsageError(
            f"the passphrase of {role} does not open {path}", hint="or the file is damaged: restore a backup"
        ) from exc


def read_public(path: Path) -> Key:
    """Return the public key in a file (PEM), whose private half somebody else keeps.

    Raises:
        UsageError: It holds none, or one of a kind that signs no metadata.
        StorageFailed: It cannot be read.
    """
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"{path} is a private key, which stays with its holder",
            hint=f"openssl pkey -in {path.name} -pubout -out {path.stem}.pub.pem makes its public half",
        )
    try:
        return SSlibKey.from_crypto(load_pem_public_key(data))
    except (ValueError, TypeError) as exc:
        raise UsageError(f"{path} holds no public key that can sign metadata: {exc}") from exc


def from_address(address: str, key: Key, pin: Secret) -> Signer:
    """Return what signs with a key that is kept elsewhere.

    Args:
        address: As `import_key` returned it.
        key: Its public half.
        pin: Of a token.

    Raises:
        DependencyMissing: What speaks to it is not installed.
        EnvironmentMissing: It cannot be reached.
    """
    with _elsewhere(address):
        return Signer.from_priv_key_uri(address, key, lambda _: pin())


def import_key(address: str, pin: Secret) -> tuple[str, Key]:
    """Return a key's address as it is kept, and its public half, which is asked for there.

    Args:
        address: ``awskms:KEY``, ``azurekms:VAULT/KEY``, ``gcpkms:projects/…/cryptoKeyVersions/N``,
            ``hsm:[ID][?label=TOKEN]`` (PKCS #11, the library in ``$PYKCS11LIB``) or ``hv:KEY`` (HashiCorp Vault).
        pin: Of a token that wants it before it shows public keys.

    Raises:
        UsageError: There is no signer for such an address.
        DependencyMissing: What speaks to it is not installed.
        EnvironmentMissing: It cannot be reached, or has no such key.
    """
    scheme, _, rest = address.partition(":")
    if scheme not in SCHEMES:
        raise UsageError(
            f"'{address}' is neither a file nor an address of a key",
            hint=f"addresses begin with {', '.join(f'{scheme}:' for scheme in SCHEMES)}",
        )
    kind, arguments = SCHEMES[scheme]
    try:
        positional, named = arguments(rest, lambda _: pin())
    except ValueError as exc:
        raise UsageError(f"'{address}' is no address of a key: {exc}") from exc
    with _elsewhere(address):
        kept, key = kind.import_(*positional, **named)
        return kept, key


def holders(keys: Sequence[str], passphrase: Passphrase) -> list[Signer]:
    """Return what signs with the keys of root that somebody holds.

    Args:
        keys: Files, or addresses.
        passphrase: Of root, and of a token.

    Raises:
        UsageError: The passphrase is wrong, or a key is neither.
        StorageFailed: A file cannot be read.
        DependencyMissing: What speaks to a key is not installed.
        EnvironmentMissing: It cannot be reached.
    """
    found: list[Signer] = []
    for key in keys:
        if Path(key).is_file():
            found.append(from_file(Path(key), Root.type, lambda: passphrase(Root.type)))
        else:
            kept, public = import_key(key, lambda: passphrase(TOKEN))
            found.append(from_address(kept, public, lambda: passphrase(TOKEN)))
    return found


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _whole(rest: str, _: Any) -> _Arguments:
    if not rest:
        raise ValueError("it names no key")
    return (rest,), {}


def _azure(rest: str, _: Any) -> _Arguments:
    vault, slash, name = rest.partition("/")
    if not (vault and slash and name) or "/" in name:
        raise ValueError("it is of the form azurekms:VAULT/KEY")
    return (vault, name), {}


def _hsm(rest: str, pin: Any) -> _Arguments:
    number, _, query = rest.partition("?")
    labels = parse_qs(query, strict_parsing=True).get("label") if query else None
    return (int(number) if number else None, labels[0] if labels else None), {"secrets_handler": pin}


SCHEMES: dict[str, tuple[Any, Callable[[str, Any], _Arguments]]] = {
    AWSSigner.SCHEME: (AWSSigner, _whole),
    AzureSigner.SCHEME: (AzureSigner, _azure),
    GCPSigner.SCHEME: (GCPSigner, _whole),
    HSMSigner.SCHEME: (HSMSigner, _hsm),
    VaultSigner.SCHEME: (VaultSigner, _whole),
}
"""What an address begins with → its signer, and what that is told of the rest."""


@contextlib.contextmanager
def _elsewhere(address: str) -> Iterator[None]:
    try:
        yield
    except CnnccError:
        raise
    except UnsupportedLibraryError as exc:
        scheme = address.partition(":")[0]
        raise DependencyMissing(
            f"keys at {address} need a library that is not installed: {exc}",
            hint=f"pip install 'securesystemslib[{'vault' if scheme == VaultSigner.SCHEME else scheme}]'",
        ) from exc
    except Exception as exc:  # every vendor's library has errors of its own
        raise EnvironmentMissing(
            f"the key at {address} cannot be used: {exc or type(exc).__name__}",
            hint="is this machine logged in there, and is the address right?",
        ) from exc


def _read(path: Path) -> bytes:
    with storage_errors(path), path.open("rb") as file:
        return file.read(_LARGEST)
