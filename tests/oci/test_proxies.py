"""Registries behind a company's proxy (RFC 9110, CONNECT) and a certificate authority of its own."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from cnncc_runtime.errors import NetworkFailed
from cnncc_runtime.oci.registry import Repository
from tests.oci import registries
from tests.oci.registries import LOGIN, Registry
from tests.oci.test_registry import put

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@dataclass
class Proxy:
    """A proxy that makes tunnels, and sees of them what every proxy sees.

    Attributes:
        login: ``NAME:PASSWORD`` that it wants; empty for none.
        detour: A port that it connects to instead of what it is asked for, as one that reads along does.
        port: On 127.0.0.1.
        asked: What it was asked to connect to.
        heads: Requests, with their headers, as they came.
    """

    login: str = ""
    detour: int = 0
    port: int = 0
    asked: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.login + '@' if self.login else ''}127.0.0.1:{self.port}"

    def serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(1 << 16)):
                    return
                head += data
            text = head.decode()
            self.heads.append(text)
            method, target, *_ = text.split()
            wanted = base64.b64encode(self.login.encode()).decode()
            if method != "CONNECT":
                client.sendall(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
                return
            if self.login and f"proxy-authorization: basic {wanted}".lower() not in text.lower():
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            self.asked.append(target)
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, self.detour or int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=copy, args=(server, client), daemon=True)
                back.start()
                copy(client, server)
                back.join()


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def proxy(*, login: str = "", detour: int = 0) -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        made = Proxy(login, detour, listener.getsockname()[1])

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=made.serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield made
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry"), tls=True, login=LOGIN) as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        for spelled in (name, name.lower()):
            if spelled in os.environ:
                monkeypatch.delenv(spelled)


def repository(registry: Registry, name: str = "behind") -> Repository:
    made = registry.repository(name, login=LOGIN)
    made.connection.attempts = 1
    return made


@pytest.mark.parametrize("login", ["", "me:s3cret"])
def test_a_registry_is_reached_through_a_proxy_which_sees_no_login(
    secure: Registry, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    with proxy(login=login) as between:
        monkeypatch.setenv("HTTPS_PROXY", between.url)
        entry = put(repository(secure), "hello", tag="v1")
        assert repository(secure).has(entry.digest)
    assert set(between.asked) == {f"localhost:{secure.port}"}
    assert not any("\r\nauthorization:" in head.lower() for head in between.heads)
    assert not any("behind" in head or "manifests" in head for head in between.heads)


@pytest.mark.parametrize("exempt", ["other.example.com,localhost", "localhost:{port}", "*"])
def test_what_is_exempt_is_reached_without_the_proxy(
    secure: Registry, monkeypatch: pytest.MonkeyPatch, exempt: str
) -> None:
    with proxy() as between:
        monkeypatch.setenv("HTTPS_PROXY", between.url)
        monkeypatch.setenv("NO_PROXY", exempt.format(port=secure.port))
        put(repository(secure), "hello", tag="v1")
    assert between.asked == []


def test_a_proxy_that_wants_a_login_is_named(secure: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(login="me:s3cret") as between:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:wr0ng@127.0.0.1:{between.port}")
        with pytest.raises(NetworkFailed, match="407 Proxy Authentication Required") as caught:
            repository(secure).tags()
    assert "$HTTPS_PROXY" in caught.value.hint
    assert "wr0ng" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_said_and_its_password_is_not(
    secure: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:s3cret@127.0.0.1:{port}")
    with pytest.raises(NetworkFailed, match="refused") as caught:
        repository(secure).tags()
    assert "$HTTPS_PROXY" in caught.value.hint
    assert "s3cret" not in str(caught.value)


def test_a_proxy_that_reads_along_is_not_believed(
    secure: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registries.registry(tmp_path / "other", tls=True) as other, proxy(detour=other.port) as between:
        monkeypatch.setenv("HTTPS_PROXY", between.url)
        with pytest.raises(NetworkFailed, match="cannot be trusted to be localhost") as caught:
            repository(secure).tags()
    assert "--ca" in caught.value.hint
    assert between.asked


def test_the_authority_that_is_named_counts_and_no_variable(
    secure: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(stranger))
    repository(secure).tags()
    made = secure.repository(login=LOGIN, ca=stranger)
    made.connection.attempts = 1
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure.ca))
    with pytest.raises(NetworkFailed, match="cannot be trusted"):
        made.tags()
