"""Which registry, and which repository in it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from cnncc_runtime.errors import UsageError

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
"""Of repositories (OCI distribution specification 1.1, "Pulling manifests")."""
_LONGEST = 255


@dataclass(frozen=True)
class Place:
    """A repository.

    Attributes:
        scheme: ``https``, or ``http`` on this machine.
        host: The registry, with its port where it has one of its own.
        name: The repository: lower case, parts joined by ``/``.
    """

    scheme: str
    host: str
    name: str

    def __str__(self) -> str:
        """Return it as tools for registries write it."""
        return f"{self.host}/{self.name}"

    @property
    def url(self) -> str:
        """What the repository's addresses begin with."""
        return f"{self.scheme}://{self.host}/v2/{self.name}"

    def beside(self, name: str) -> Place:
        """Return the repository ``NAME-name`` beside this one; some registries know no folders of repositories."""
        return Place(self.scheme, self.host, _checked(f"{self.name}-{name}"))


def place_of(registry: str, name: str) -> Place:
    """Return the repository ``name`` of a registry.

    Args:
        registry: ``https://HOST[:PORT][/PREFIX]``, or the same without ``https://``; ``http://`` is for this machine
            alone, where nobody listens in between.
        name: A repository below the prefix.

    Raises:
        UsageError: Not such an address, or not such a name.
    """
    address = urlsplit(registry if "://" in registry else f"https://{registry}")
    try:
        host, port = address.hostname, address.port
    except ValueError as exc:
        raise UsageError(f"'{registry}' is no address of a registry: {exc}", hint=_HINT) from exc
    if address.scheme not in ("http", "https") or not host or address.query or address.fragment:
        raise UsageError(f"'{registry}' is no address of a registry", hint=_HINT)
    if address.username is not None or address.password is not None:
        raise UsageError(
            f"the address of {host} holds a name and a password",
            hint=f"`docker login {host}`, or `skopeo login {host}`, stores them where cnncc finds them",
        )
    if address.scheme == "http" and not is_loopback(host):
        raise UsageError(
            f"{host} is another machine, and http:// is neither private nor authentic",
            hint="use https://; a certificate authority of your own is named by --ca",
        )
    shown = f"[{host}]" if ":" in host else host
    prefix = address.path.strip("/")
    return Place(
        address.scheme,
        shown if port is None else f"{shown}:{port}",
        _checked(f"{prefix}/{name}" if prefix else name),
    )


_HINT = "as in https://registry.example.com/team"


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, by its address or as ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked(name: str) -> str:
    if len(name) > _LONGEST or not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no name of a repository",
            hint="lower-case letters and digits, with . _ or - between them; / between parts",
        )
    return name
