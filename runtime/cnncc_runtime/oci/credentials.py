"""Whom a registry takes us for: the logins that Docker, Podman and the clouds' helpers keep.

``docker login``, ``aws ecr``'s, ``az acr``'s and ``gcloud``'s logins end in Docker's ``config.json``, as a name and a
password or as a helper, a program that is asked each time (Docker's documentation, "docker login").
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cnncc_runtime.errors import DependencyMissing, RegistryRefused, UsageError

_LARGEST = 1 << 20
_PATIENCE = 30.0
"""Seconds that a helper may take: some ask a cloud."""
_TOKEN = "<token>"
"""Helpers say so instead of a name where the secret is an identity token."""
_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEY = "https://index.docker.io/v1/"


@dataclass(frozen=True)
class Credentials:
    """A login.

    Attributes:
        name: Of the user; empty with a token.
        password: Goes with it.
        token: An identity token, which a registry's token server exchanges for others; empty with a name.
    """

    name: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def find_credentials(host: str) -> Credentials | None:
    """Return the login for a registry; None where there is none, and it is asked anonymously.

    Looked for in ``$REGISTRY_AUTH_FILE``, in ``$DOCKER_CONFIG`` or ``~/.docker``, and in Podman's
    ``$XDG_RUNTIME_DIR/containers/auth.json``, in this order. In each, a helper of the host's comes before the helper of
    all, and that before what the file itself holds.

    Args:
        host: With its port, as in the registry's address.

    Raises:
        UsageError: A file is not what it should be.
        DependencyMissing: It names a helper that is not installed.
        RegistryRefused: The helper failed.
    """
    for path in _files():
        config = _read(path)
        if config is not None and (found := _of(config, host, path)) is not None:
            return found
    return None


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _Config(msgspec.Struct):
    auths: dict[str, _Auth] = {}
    credHelpers: dict[str, str] = {}
    credsStore: str = ""


class _Told(msgspec.Struct):
    Username: str
    Secret: str


def _files() -> list[Path]:
    home = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    files = [home / "config.json"]
    if own := os.environ.get("REGISTRY_AUTH_FILE"):
        files.insert(0, Path(own))
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        files.append(Path(runtime, "containers", "auth.json"))
    return files


def _read(path: Path) -> _Config | None:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}", hint="it holds the logins of registries") from exc
    try:
        return msgspec.json.decode(data, type=_Config)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"{path} holds no logins of registries: {exc}", hint="`docker login` writes it anew once it is gone"
        ) from exc


def _of(config: _Config, host: str, path: Path) -> Credentials | None:
    keys = _keys(host)
    helper = next((config.credHelpers[key] for key in keys if key in config.credHelpers), config.credsStore)
    if helper and (told := _ask(helper, keys[0], path)) is not None:
        return told
    auth = next((config.auths[key] for key in keys if key in config.auths), None)
    return _decoded(auth, host, path) if auth is not None else None


def _keys(host: str) -> tuple[str, ...]:
    """Return what files call a registry; what Docker writes comes first."""
    if host in _HUB:
        return (_HUB_KEY, *_HUB)
    return (host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/")


def _decoded(auth: _Auth, host: str, path: Path) -> Credentials | None:
    if auth.identitytoken:
        return Credentials(token=auth.identitytoken)
    if auth.username:
        return Credentials(auth.username, auth.password)
    if not auth.auth:
        return None  # a helper's entry
    try:
        name, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} holds a damaged login of {host}", hint=f"docker login {host}") from exc
    if not colon:
        raise UsageError(f"{path} holds a login of {host} without a password", hint=f"docker login {host}")
    return Credentials(name, password.rstrip("\0"))


def _ask(helper: str, key: str, path: Path) -> Credentials | None:
    program = f"docker-credential-{helper}"
    if "/" in helper or shutil.which(program) is None:
        raise DependencyMissing(f"{path} names the helper {program}, which is not installed", hint=f"install {program}")
    try:
        done = subprocess.run(
            [program, "get"], input=key, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise RegistryRefused(f"{program} did not answer in {_PATIENCE:.0f} s", hint=_by_hand(program, key)) from exc
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip()).partition("\n")[0]
        if "credentials not found" in said:
            return None
        raise RegistryRefused(f"{program} failed: {said}", hint=_by_hand(program, key))
    try:
        told = msgspec.json.decode(done.stdout, type=_Told)
    except msgspec.DecodeError as exc:
        raise RegistryRefused(f"{program} did not say a login", hint=_by_hand(program, key)) from exc
    return Credentials(token=told.Secret) if told.Username == _TOKEN else Credentials(told.Username, told.Secret)


def _by_hand(program: str, key: str) -> str:
    return f"echo {key} | {program} get"
