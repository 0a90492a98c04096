"""What a device tells of its updates: written to disk first, sent when there is somebody to hear it.

reports/NUMBER.json   one report each; sent oldest first, gone when it was taken
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import requests

from cnncc_runtime import __version__
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import CnnccError, NetworkFailed, UsageError
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.oci.http import network_errors
from cnncc_runtime.oci.place import is_loopback

_MOST = 500
"""Reports that wait; the oldest give way."""
_TIMEOUT = (5.0, 10.0)
_SUFFIX = ".json"

INSTALLED, FAILED, WENT_BACK = "installed", "failed", "went back"


class Report(msgspec.Struct, frozen=True):
    """What came of an update.

    Attributes:
        device: The device's name.
        name: Of the model.
        channel: Which it follows.
        outcome: ``installed``, ``failed``, or ``went back``.
        version: The release that it was about.
        sequence: Its place in the channel.
        slot: The engine that the device runs now; empty for none.
        time: Seconds since 1970, UTC, by the device's clock.
        latency: Of the new engine, in seconds; 0 where it was not timed.
        error: The class of what went wrong; empty for nothing.
        message: What went wrong, in a sentence; of a new engine that runs, why it came by no delta where it could have.
        machine: ELF machine.
        agent: The agent's version.
        fetched: Bytes of the engine that came over the network.
        deltas: Files of it that were made by deltas.
    """

    device: str
    name: str
    channel: str
    outcome: str
    version: str
    sequence: int
    slot: str
    time: float
    latency: float = 0.0
    error: str = ""
    message: str = ""
    machine: str = ""
    agent: str = __version__
    fetched: int = 0
    deltas: int = 0


@dataclass(frozen=True)
class Spool:
    """Reports that wait.

    Attributes:
        folder: Where they wait.
    """

    folder: Path

    def add(self, report: Report) -> None:
        """Write a report to disk.

        Raises:
            StorageFailed: The disk is full or broken.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            waiting = self._waiting()
            number = int(waiting[-1].stem) + 1 if waiting else 1
            for path in waiting[: len(waiting) + 1 - _MOST]:
                path.unlink()
        with atomic_file(self.folder / f"{number:010}{_SUFFIX}") as path:
            path.write_bytes(canonical_json(msgspec.to_builtins(report)))

    def send(self, url: str, token: str, ca: Path | None = None) -> int:
        """Send what waits, the oldest first, and return how many reports were taken.

        Args:
            url: Where reports are posted.
            token: Says who the device is: ``Authorization: Bearer``.
            ca: Certificates instead of the system's.

        Raises:
            NetworkFailed: Nobody took them; they wait on.
            UsageError: The address is none.
        """
        host = check_address(url)
        taken = 0
        for path in self._waiting():
            with network_errors(host):
                answer = requests.post(
                    url,
                    data=path.read_bytes(),
                    headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                    timeout=_TIMEOUT,
                    allow_redirects=False,
                    **({"verify": str(ca)} if ca else {}),  # type: ignore[arg-type]
                )
            # what nobody will ever take must not keep back what comes after it
            if answer.status_code not in (400, 413, 422) and not 200 <= answer.status_code < 300:
                raise NetworkFailed(f"{host} did not take a report: it answered {answer.status_code}")
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            taken += 200 <= answer.status_code < 300
        return taken

    def _waiting(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in self.folder.iterdir() if path.suffix == _SUFFIX and path.stem.isdecimal())
        return []


def check_address(url: str) -> str:
    """Return the host of an address that reports may be posted to.

    Raises:
        UsageError: It is none, or one where everybody could read the token.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"'{url}' is no address for reports", hint="as in https://fleet.example.com/reports")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UsageError(
            f"{parts.hostname} is another machine, and http:// shows everybody the token", hint="use https://"
        )
    return parts.netloc


def of_error(exc: CnnccError) -> tuple[str, str]:
    """Return what a report says of an error: its class, and its message."""
    return type(exc).__name__, exc.message[:500]
