"""Real registries on this machine's loopback (Debian's docker-registry), and a proxy that breaks what passes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import trustme

from cnncc_runtime.oci.credentials import Credentials
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository

_PATIENCE = 30.0
PROGRAM = "docker-registry"
LOGIN = Credentials("engineer", "p:ss wörd")


def require() -> None:
    """Skip the test where there is no registry, but in CI fail it."""
    if shutil.which(PROGRAM) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{PROGRAM} not found: apt-get install {PROGRAM}")


@dataclass
class Registry:
    """A registry.

    Attributes:
        folder: Its disk.
        port: On 127.0.0.1.
        ca: What its certificate is checked against; None without TLS.
    """

    folder: Path
    port: int
    ca: Path | None
    process: subprocess.Popen[bytes] = field(repr=False)
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    def blob(self, digest: str) -> Path:
        """Return where a blob lies on its disk."""
        return self.folder / "docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"

    def repository(
        self,
        name: str = "vision",
        *,
        port: int = 0,
        login: Credentials | None = None,
        ca: Path | None = None,
        sleep: Callable[[float], None] = lambda _: None,
    ) -> Repository:
        """Return one of its repositories; ``port`` is a proxy's. Waits between attempts are not waited for."""
        url = f"{self.url.rpartition(':')[0]}:{port or self.port}"
        place = place_of(url, name)
        return Repository(place, Connection(place.host, ca or self.ca, credentials=lambda _: login, sleep=sleep))


@contextlib.contextmanager
def registry(
    folder: Path, *, login: Credentials | None = None, tls: bool = False, port: int = 0, tokens: str = ""
) -> Iterator[Registry]:
    """Run a registry on a disk; with TLS, by a certificate authority of its own.

    Args:
        folder: The disk.
        login: Whom it lets in; None for everybody.
        tls: Whether it speaks TLS.
        port: Of its own choice where 0.
        tokens: What it says of its token server, whose tokens it then wants.
    """
    require()
    folder.mkdir(exist_ok=True)
    port = port or _free_port()
    lines = ["version: 0.1", "log: {level: warn}", f"storage: {{filesystem: {{rootdirectory: {folder}}}}}"]
    http = [f"addr: 127.0.0.1:{port}", "secret: of-this-test"]
    ca = None
    if tls:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", "127.0.0.1")
        ca, chain, key = (folder / name for name in ("ca.pem", "chain.pem", "key.pem"))
        authority.cert_pem.write_to_path(ca)
        certificate.private_key_pem.write_to_path(key)
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(chain, append=True)
        http.append(f"tls: {{certificate: {chain}, key: {key}}}")
    lines.append(f"http: {{{', '.join(http)}}}")
    if login is not None:
        users = folder / "htpasswd"
        users.write_bytes(login.name.encode() + b":" + bcrypt.hashpw(login.password.encode(), bcrypt.gensalt(4)))
        lines.append(f"auth: {{htpasswd: {{realm: cnncc, path: {users}}}}}")
    if tokens:
        lines.append(f"auth: {{token: {{{tokens}}}}}")
    config = folder / "config.yml"
    config.write_text("\n".join(lines) + "\n")
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait(port, process, folder / "log")
        yield Registry(folder, port, ca, process, "https" if tls else "http")
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(log.read_text())


@dataclass(frozen=True)
class Fault:
    """What happens to the answers of a connection.

    Attributes:
        at: After so many bytes.
        kind: ``cut`` ends the connection, ``reset`` tears it, ``flip`` changes a byte, ``stall`` says no more,
            ``refuse`` takes no connection, ``drip`` sends a byte at a time.
    """

    kind: str
    at: int = 0


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have connections wait for nothing: between attempts, and as publishers' lock does; its own tests hold that."""
    begin = Connection.__init__

    def quick(self: Connection, *args: Any, **given: Any) -> None:
        begin(self, *args, **{"sleep": lambda _: None, **given})

    monkeypatch.setattr(Connection, "__init__", quick)


class FaultProxy:
    """A proxy before a port; faults are for the next connections, one each, and then all is well.

    Args:
        upstream: The port.
        faults: In order.
        always: What every further connection gets; None for nothing.

    Attributes:
        went: Bytes that came from clients.
        passed: Bytes, both ways.
    """

    def __init__(self, upstream: int, *faults: Fault, always: Fault | None = None) -> None:
        self._upstream = upstream
        self._faults = list(faults)
        self._always = always
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.went = 0
        self.passed = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def left(self) -> int:
        """Faults that nobody met."""
        return len(self._faults)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self._faults.pop(0) if self._faults else self._always
            if fault is not None and fault.kind == "refuse":
                _tear(client)
                continue
            server = socket.create_connection(("127.0.0.1", self._upstream))
            threading.Thread(target=self._pass, args=(client, server, None, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, fault), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, fault: Fault | None, up: bool = False) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._count(data, source)
                self.passed += len(data)
                if fault is not None and passed + len(data) > fault.at:
                    at = max(0, fault.at - passed)
                    if fault.kind == "flip":
                        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                        fault = None
                    else:
                        sink.sendall(data[:at])
                        self._break(sink, fault, data[at:])
                        break
                sink.sendall(data)
                passed += len(data)
                self.went += len(data) if up else 0
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _count(self, data: bytes, source: socket.socket) -> None:
        """Told of all that passes."""

    def _break(self, sink: socket.socket, fault: Fault, rest: bytes) -> None:
        if fault.kind == "stall":
            self._stop.wait(60)
        elif fault.kind == "reset":
            _tear(sink)
        elif fault.kind == "drip":
            for byte in rest:
                sink.sendall(bytes([byte]))
                if self._stop.wait(0.2):
                    return


class CountingProxy(FaultProxy):
    """A proxy that counts what passes it.

    Attributes:
        requests: What was asked for, as lines of HTTP: ``GET /v2/…``.
        sent: Bytes to the port.
        came: Bytes from it.
    """

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream)
        self.requests: list[str] = []
        self.sent = self.came = 0

    def reset(self) -> None:
        """Begin anew."""
        self.requests.clear()
        self.sent = self.came = 0

    def _count(self, data: bytes, source: socket.socket) -> None:
        if source.getpeername()[1] == self._upstream:
            self.came += len(data)
        else:
            self.sent += len(data)
            lines = data.split(b"\r\n")
            self.requests += [line.rpartition(b" ")[0].decode() for line in lines if line.endswith(b" HTTP/1.1")]


def _tear(sink: socket.socket) -> None:
    """End a connection by a reset."""
    sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it and keeps it open
    sink.close()
