"""Keys that are kept elsewhere: in a token (SoftHSM, by PKCS #11), in clouds; what is said where they do not sign."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import AWSSigner, AzureSigner, GCPSigner, HSMSigner, SSlibKey, VaultSigner

from cnncc.fleet.keys import Keys
from cnncc.fleet.signers import TOKEN, holders, import_key
from cnncc_runtime.errors import DependencyMissing, EnvironmentMissing, UsageError
from tests.fleet.test_trust import World
from tests.oci import registries
from tests.oci.registries import Registry

PIN = "1234"
LIBRARIES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm.so")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def world(registry: Registry, tmp_path: Path) -> World:
    return World(registry, tmp_path)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A token with two keys, 02 and 03; yields its label. The library reads its configuration once in a process."""
    library = next((path for path in LIBRARIES if Path(path).exists()), "")
    lacking = [
        name
        for name, there in {
            "softhsm2: apt-get install softhsm2": library and shutil.which("softhsm2-util"),
            "python-pkcs11: pip install python-pkcs11": importlib.util.find_spec("pkcs11"),
        }.items()
        if not there
    ]
    if lacking:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not found: {lacking[0]}")
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        patch.setenv("PYKCS11LIB", library)
        util("--init-token", "--free", "--label", "cnncc", "--pin", PIN, "--so-pin", "0000")
        for number in ("02", "03"):
            key = ec.generate_private_key(ec.SECP256R1())
            pem = folder / f"{number}.pem"
            pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            util("--import", str(pem), "--token", "cnncc", "--label", number, "--id", number, "--pin", PIN)
        yield "cnncc"


def util(*arguments: str) -> None:
    subprocess.run(["softhsm2-util", *arguments], check=True, capture_output=True)


def use_pin(world: World, pin: str) -> None:
    """Have a PIN be said for the token, and passphrases as before."""
    world.publisher.keys = Keys(world.folder / "keys", lambda role: pin if role == TOKEN else f"of {role}")


def test_a_token_signs_for_a_channel_and_devices_follow(world: World, token: str) -> None:
    world.release("1")
    device = world.device()
    assert device.version() == "1"
    use_pin(world, PIN)
    world.publisher.load()
    made = world.publisher.adopt("stable", f"hsm:2?label={token}")
    world.publisher.publish()
    assert device.version() == "1"
    world.release("2")
    assert device.version() == "2"
    roles = {role.name: role for role in world.publisher.overview()}
    assert (roles["stable"].keyids, roles["stable"].here) == ((made,), 1)
    use_pin(world, "4321")
    with pytest.raises(EnvironmentMissing, match="did not sign: PinIncorrect"):
        world.release("3")
    assert device.version() == "2"


def test_root_keys_in_files_and_in_a_token_sign_together(world: World, token: str) -> None:
    address = f"hsm:3?label={token}"
    use_pin(world, PIN)
    world.publisher.load()
    leaving = world.publisher.keys.roles()["root"][0].keyid
    made = world.publisher.adopt("root", address, leaving)
    world.publisher.publish()
    for path in (world.folder / "keys").glob("root-*.pem"):
        path.unlink()
    world.publisher.keys = Keys(world.folder / "elsewhere", str)
    world.publisher.load()
    world.publisher.renew("root")
    proposal = world.publisher.propose()
    assert not proposal.new.signatures
    [signer] = holders([address], {TOKEN: PIN}.__getitem__)
    assert [each.signed for each in proposal.sign([signer]).signatures()] == [(made,), (made,)]
    assert world.device().poll() is None


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("hsm:9?label={}", EnvironmentMissing, "could not find ECDSA key"),
        ("hsm:2?label=other", EnvironmentMissing, "No PKCS#11 token found for label other"),
        ("hsm:two", UsageError, "is no address of a key"),
        ("hsm:2?label", UsageError, "is no address of a key"),
    ],
)
def test_a_token_without_that_key_is_named(token: str, address: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        import_key(address.format(token), lambda: PIN)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("file:secret.pem", "neither a file nor an address"),
        ("nothing", "neither a file nor an address"),
        ("awskms:", "names no key"),
        ("azurekms:vault", "azurekms:VAULT/KEY"),
        ("azurekms:vault/key/1", "azurekms:VAULT/KEY"),
    ],
)
def test_what_is_no_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        import_key(address, str)


@pytest.mark.parametrize(
    ("kind", "module", "address", "extra"),
    [
        (AWSSigner, "_aws_signer.AWS", "awskms:alias/fleet", "awskms"),
        (AzureSigner, "_azure_signer.AZURE", "azurekms:vault/fleet", "azurekms"),
        (GCPSigner, "_gcp_signer.GCP", "gcpkms:projects/p/cryptoKeyVersions/1", "gcpkms"),
        (VaultSigner, "_vault_signer.VAULT", "hv:fleet", "vault"),
        (HSMSigner, "_hsm_signer.PKCS11", "hsm:", "hsm"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_package(
    kind: Any, module: str, address: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"securesystemslib.signer.{module}_IMPORT_ERROR", "its library is not there")
    with pytest.raises(DependencyMissing, match="its library is not there") as caught:
        import_key(address, str)
    assert f"securesystemslib[{extra}]" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "address", "asked"),
    [
        (AWSSigner, "awskms:alias/fleet", ("alias/fleet",)),
        (AzureSigner, "azurekms:vault/fleet", ("vault", "fleet")),
        (GCPSigner, "gcpkms:projects/p/cryptoKeyVersions/1", ("projects/p/cryptoKeyVersions/1",)),
        (VaultSigner, "hv:fleet", ("fleet",)),
    ],
)
def test_each_cloud_is_asked_in_its_own_terms_and_its_refusals_are_told(
    kind: Any, address: str, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = SSlibKey.from_crypto(ec.generate_private_key(ec.SECP256R1()).public_key())
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(kind, "import_", lambda *given: (told.append(given), (address, key))[1])
    assert import_key(address, str) == (address, key)
    assert told == [asked]

    def refuse(*_: str) -> None:
        raise RuntimeError("AccessDenied: not yours")

    monkeypatch.setattr(kind, "import_", refuse)
    with pytest.raises(EnvironmentMissing, match="AccessDenied: not yours"):
        import_key(address, str)
