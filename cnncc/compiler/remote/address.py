"""Where a board is: ``--remote HOST:PORT``, which must lie on this machine's loopback."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from cnncc_runtime.errors import UsageError

DEFAULT_TIMEOUT = 60.0
"""Seconds that one step of a board may take: reaching it, sending it the engine, a run, a round."""

_TUNNEL = "tunnel by SSH (ssh -L {port}:127.0.0.1:{port} BOARD) and give --remote 127.0.0.1:{port}"


@dataclass(frozen=True)
class BoardAddress:
    """Where a board is.

    Attributes:
        host: A loopback address.
        port: Of a tracker where there is a key, else of a server.
        key: By which the tracker knows the board; empty to speak to a server.
        timeout: Seconds that one step may take.
    """

    host: str
    port: int
    key: str = ""
    timeout: float = DEFAULT_TIMEOUT

    def __str__(self) -> str:
        """Return it as people write it."""
        where = format_address(self.host, self.port)
        return f"'{self.key}' of the tracker at {where}" if self.key else f"the server at {where}"


def parse_address(text: str, key: str = "", timeout: float = DEFAULT_TIMEOUT) -> BoardAddress:
    """Read ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        UsageError: Not an address, or not one of this machine's loopback.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]\s]+)):(\d{1,5})", text)
    port = int(found[3]) if found else 0
    if found is None or not 0 < port < 1 << 16:
        raise UsageError(f"'{text}' is not an address", hint="give HOST:PORT, as in --remote 127.0.0.1:9190")
    host = found[1] or found[2]
    if not is_loopback(host):
        raise UsageError(
            f"'{host}' is not this machine's loopback: TVM's RPC has neither encryption nor a password",
            hint=_TUNNEL.format(port=port),
        )
    if re.search(r"[\s:]", key):
        raise UsageError(f"'{key}' is not a tracker's key: it holds a blank or a colon")
    return BoardAddress(host, port, key, timeout)


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine's loopback; names other than ``localhost`` are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def format_address(host: str, port: int) -> str:
    """Return ``HOST:PORT``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
