"""A token server as registries of clouds have (Docker's "Token Authentication Specification"), on the loopback."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cnncc_runtime.oci.credentials import Credentials


@dataclass
class TokenServer:
    """Gives tokens to one login, or to whoever brings its identity token.

    Attributes:
        login: Whom it knows.
        port: On 127.0.0.1, where it speaks HTTP.
        bundle: The certificates that a registry checks its tokens by.
        lifetime: Of its tokens, in seconds; negative ones have expired already.
        asked: What it was asked, as pairs of method and fields.
        answer: Its answer, where it is to be another one.
        word: What it calls a token in its answer; OAuth 2 says ``access_token``.
    """

    login: Credentials
    bundle: Path
    lifetime: float = 300.0
    port: int = 0
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    answer: bytes | None = None
    word: str = "token"

    @property
    def words(self) -> str:
        """What a registry's configuration says of it."""
        realm = f"http://127.0.0.1:{self.port}/token"
        return f"realm: {realm}, service: registry.test, issuer: tests, rootcertbundle: {self.bundle}"


@contextlib.contextmanager
def token_server(folder: Path, login: Credentials) -> Iterator[TokenServer]:
    authority = trustme.CA()
    leaf = authority.issue_cert("tokens.test", key_type=trustme.KeyType.RSA)
    folder.mkdir(exist_ok=True)
    bundle = folder / "tokens.pem"
    authority.cert_pem.write_to_path(bundle)
    key = leaf.private_key_pem.bytes()
    chain = [base64.b64encode(_der(pem.bytes())).decode() for pem in leaf.cert_chain_pems]
    server = TokenServer(login, bundle)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fields = _flat(urlsplit(self.path).query)
            server.asked.append(("GET", fields))
            said = base64.b64encode(f"{login.name}:{login.password}".encode()).decode()
            self._reply(fields, known=self.headers.get("Authorization") == f"Basic {said}")

        def do_POST(self) -> None:
            fields = _flat(self.rfile.read(int(self.headers["Content-Length"])).decode())
            server.asked.append(("POST", fields))
            self._reply(fields, known=bool(login.token) and fields.get("refresh_token") == login.token)

        def _reply(self, fields: dict[str, str], *, known: bool) -> None:
            body = server.answer or json.dumps({server.word: _token(fields, server.lifetime, key, chain)}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@dataclass
class PasswordRegistry:
    """A registry that wants a password with each request and says 403 of one that has expired, as Amazon's does.

    Attributes:
        good: Passwords of ``AWS`` that it takes.
        expired: Those that it took before.
        port: On 127.0.0.1.
        said: Passwords that it was told, in order; empty for none.
    """

    good: set[str]
    expired: set[str] = field(default_factory=set)
    port: int = 0
    said: list[str] = field(default_factory=list)


@contextlib.contextmanager
def password_registry(*good: str) -> Iterator[PasswordRegistry]:
    server = PasswordRegistry(set(good))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, _, encoded = self.headers.get("Authorization", "").partition(" ")
            name, _, password = base64.b64decode(encoded).decode().partition(":")
            server.said.append(password)
            if name == "AWS" and password in server.good:
                self._reply(200, b'{"name": "vision", "tags": ["1.0.0"]}')
            elif password in server.expired:
                self._reply(403, b"Your Authorization Token has expired. Please run 'aws ecr get-login'")
            else:
                self._reply(401, b"Not Authorized")

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="https://localhost/",service="ecr.amazonaws.com"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def _flat(query: str) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(query).items()}


def _token(fields: dict[str, str], lifetime: float, key: bytes, chain: list[str]) -> str:
    kind, name, actions = fields["scope"].split(":")
    now = time.time()
    claims = {
        "iss": "tests",
        "sub": "engineer",
        "aud": "registry.test",
        "exp": int(now + lifetime),
        "nbf": int(now - 600),
        "iat": int(now - 600),
        "jti": str(now),
        "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
    }
    return jwt.encode(claims, key, algorithm="RS256", headers={"x5c": chain})


def _der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
