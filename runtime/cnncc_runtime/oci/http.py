"""Requests to a registry: each ends in bounded time, is tried again where that may help, and says who asks.

Authentication is the registry's choice (OCI distribution specification; Docker's "Token Authentication Specification"):
none, a name and password with each request, or a token that its token server gives for them and that expires.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import msgspec
import requests
import requests.auth
from urllib3.exceptions import HTTPError

from cnncc_runtime import __version__
from cnncc_runtime.errors import (
    CnnccError,
    NetworkFailed,
    NotInRegistry,
    RegistryRefused,
    UsageError,
    VerificationFailed,
)
from cnncc_runtime.oci.credentials import Credentials, find_credentials
from cnncc_runtime.oci.place import is_loopback

_CONNECT = 5.0
_SILENCE = 10.0
"""Seconds without a byte."""
_WHOLE = 30.0
"""Seconds that an answer of a few kilobytes may take as a whole: one that drips is no answer."""
_LARGEST_ANSWER = 1 << 20
_PIECE = 1 << 16
_REDIRECTS = 5

ATTEMPTS = 5
"""Of a request, the first included."""
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0

_CHALLENGE = re.compile(r'([a-zA-Z_]+)="((?:[^"\\]|\\.)*)"')

Sleep = Callable[[float], None]


@dataclass
class Connection:
    """Requests to one registry.

    Attributes:
        host: With its port.
        ca: Certificates that the registry's is checked against, instead of the system's.
        credentials: Asked for where the registry wants a login; called again after a token was refused.
        sleep: Waits between attempts.
        attempts: Of each request.
    """

    host: str
    ca: Path | None = None
    credentials: Callable[[str], Credentials | None] = find_credentials
    sleep: Sleep = time.sleep
    attempts: int = ATTEMPTS
    _session: requests.Session = field(init=False, repr=False)
    _said: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Open nothing yet."""
        if self.ca is not None and not self.ca.is_file():
            raise UsageError(f"no certificates at {self.ca}", hint="--ca names a file of PEM certificates")
        self._session = _Session(self.host)
        self._session.headers["User-Agent"] = f"cnncc/{__version__}"
        self._session.headers["Accept-Encoding"] = "identity"  # digests are of bytes as they are stored
        self._session.max_redirects = _REDIRECTS

    def close(self) -> None:
        """Close what is open."""
        self._session.close()

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        url: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Any] | None = None,
        good: frozenset[int] = frozenset({200}),
        again: bool = True,
    ) -> Iterator[requests.Response]:
        """Yield the answer to a request; its body is read by `whole` or `pieces`.

        Args:
            method: GET, HEAD, PUT, POST, PATCH or DELETE.
            url: Of the registry.
            scope: What a token is asked for: ``repository:NAME:pull``.
            headers: Beside our own.
            body: Makes the body, once for each attempt.
            good: Statuses that are answers.
            again: Whether the request may be sent twice.

        Raises:
            NotInRegistry: Status 404.
            RegistryRefused: Another refusal.
            NetworkFailed: No answer, however often it was asked.
        """
        response = self._answer(method, url, scope, dict(headers or {}), body, good, again)
        try:
            yield response
        finally:
            response.close()

    def read(
        self,
        url: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        most: int = _LARGEST_ANSWER,
    ) -> tuple[bytes, Mapping[str, str]]:
        """Return a small answer's body and headers; one that breaks off is asked for again.

        Args:
            url: Of the registry.
            scope: See `request`.
            headers: Beside our own.
            most: Bytes that the answer may have.

        Raises:
            NotInRegistry: Status 404.
            RegistryRefused: Another refusal.
            VerificationFailed: The answer is larger.
            NetworkFailed: No answer, however often it was asked.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                with self.request("GET", url, scope=scope, headers=headers) as response:
                    return whole(response, most=most), response.headers
            except RegistryRefused:
                raise
            except NetworkFailed:
                if attempt == self.attempts:
                    raise
                self.sleep(_backoff(attempt))
        raise AssertionError

    def _answer(
        self,
        method: str,
        url: str,
        scope: str,
        headers: dict[str, str],
        body: Callable[[], Any] | None,
        good: frozenset[int],
        again: bool,
    ) -> requests.Response:
        logins = 0
        attempt = 0
        while True:
            attempt += 1
            try:
                response = self._send(method, url, scope, headers, body)
            except NetworkFailed:
                if not again or attempt >= self.attempts:
                    raise
                self.sleep(_backoff(attempt))
                continue
            if response.status_code in good:
                return response
            if response.status_code == 401 and logins < 2:
                # the second time a token that is new was refused: a helper's password may have expired
                logins += 1
                attempt -= 1
                self._log_in(response, scope)
                continue
            if response.status_code == 403 and not logins and self._log_in_anew(scope):
                logins += 1
                attempt -= 1
                response.close()
                continue
            error = _refusal(response, method, url)
            retry_after = _retry_after(response)
            response.close()
            if response.status_code not in _BUSY or not again or attempt >= self.attempts:
                raise error
            self.sleep(max(retry_after, _backoff(attempt)))

    def _send(
        self, method: str, url: str, scope: str, headers: dict[str, str], body: Callable[[], Any] | None
    ) -> requests.Response:
        with network_errors(self.host):
            return self._session.request(
                method,
                url,
                headers=headers,
                data=body() if body else None,
                auth=_Said(self._said.get(scope, "")),
                **self._how,
            )

    @property
    def _how(self) -> dict[str, Any]:
        """What every request is told. A session's certificates would give way to those of ``$REQUESTS_CA_BUNDLE``."""
        ca = {"verify": str(self.ca)} if self.ca is not None else {}
        return {"stream": True, "timeout": (_CONNECT, _SILENCE), **ca}

    def _log_in(self, response: requests.Response, scope: str) -> None:
        """Make what the next request of a scope says of us."""
        challenge = response.headers.get("WWW-Authenticate", "")
        response.close()
        kind, _, rest = challenge.partition(" ")
        login = self.credentials(self.host)
        before = self._said.get(scope, "")
        if kind.lower() == "basic":
            said = _basic(login) if login is not None and login.name else ""
        elif kind.lower() == "bearer":
            said = f"Bearer {self._token(dict(_CHALLENGE.findall(rest)), scope, login)}"
        else:
            raise RegistryRefused(f"{self.host} wants a login of a kind that is unknown here: {challenge[:80]!r}")
        if said in ("", before):
            raise self._no_login(login)
        self._said[scope] = said

    def _log_in_anew(self, scope: str) -> bool:
        """Tell whether there is a newer password than the refused one: Amazon's registry says 403 of what expired."""
        before = self._said.get(scope, "")
        if not before.startswith("Basic "):
            return False
        login = self.credentials(self.host)
        if login is None or not login.name or _basic(login) == before:
            return False
        self._said[scope] = _basic(login)
        return True

    def _no_login(self, login: Credentials | None) -> RegistryRefused:
        why = "wants a login" if login is None else "does not take the login that is stored for it"
        return RegistryRefused(f"{self.host} {why}", hint=f"docker login {self.host}, or skopeo login {self.host}")

    def _token(self, asked: Mapping[str, str], scope: str, login: Credentials | None) -> str:
        realm = urljoin(f"https://{self.host}", asked.get("realm", ""))
        parts = urlsplit(realm)
        if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise RegistryRefused(f"{self.host} sends logins to {realm[:80]}, where everybody could read them")
        # what the registry asks for may be narrower than the request needs; what is needed was told by the caller
        fields = {"service": asked.get("service", ""), "scope": scope}
        with network_errors(parts.netloc):
            if login is not None and login.token:
                form = {**fields, "grant_type": "refresh_token", "refresh_token": login.token, "client_id": "cnncc"}
                answer = self._session.post(realm, data=form, auth=_Said(""), **self._how)
            else:
                said = _basic(login) if login else ""
                answer = self._session.get(realm, params=fields, auth=_Said(said), **self._how)
        with answer:
            if answer.status_code in (400, 401, 403):
                raise self._no_login(login)
            if answer.status_code != 200:
                raise _refusal(answer, "GET", realm)
            try:
                told = msgspec.json.decode(whole(answer), type=_Token)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise RegistryRefused(f"{parts.netloc} gave no token") from exc
        if not (told.token or told.access_token):
            raise RegistryRefused(f"{parts.netloc} gave no token")
        return told.token or told.access_token


def _basic(login: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{login.name}:{login.password}".encode()).decode()


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class _Session(requests.Session):
    """Follows redirects, to stores of blobs, but never from a private connection to an open one."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self._host = host

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and urlsplit(resp.url).scheme == "https" and urlsplit(urljoin(resp.url, target)).scheme != "https":
            raise RegistryRefused(f"{self._host} redirects to an address that is not https: {target[:80]}")
        return target


class _Said(requests.auth.AuthBase):
    """Says what we know of ourselves, and nothing of ``.netrc``, which `requests` would put in its place."""

    def __init__(self, said: str) -> None:
        self._said = said

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._said:
            r.headers["Authorization"] = self._said
        return r


def pieces(response: requests.Response, *, size: int = _PIECE) -> Iterator[bytes]:
    """Yield an answer's body as it comes.

    Raises:
        NetworkFailed: It broke off, or nothing came for `_SILENCE` seconds.
    """
    host = urlsplit(response.url).netloc
    with network_errors(host):
        yield from response.iter_content(size)


def whole(response: requests.Response, *, most: int = _LARGEST_ANSWER) -> bytes:
    """Return an answer's body, which is small.

    Raises:
        NetworkFailed: It broke off, or took too long.
        VerificationFailed: It is larger than ``most`` bytes.
    """
    host = urlsplit(response.url).netloc
    end = time.monotonic() + _WHOLE
    parts = []
    left = most
    for part in pieces(response):
        left -= len(part)
        if left < 0:
            raise VerificationFailed(f"{host} answered with more than {most} bytes, where a few belong")
        if time.monotonic() > end:
            raise NetworkFailed(f"{host} took more than {_WHOLE:.0f} s for a short answer")
        parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def network_errors(host: str) -> Iterator[None]:
    """Turn what goes wrong on the way into `NetworkFailed`.

    Raises:
        NetworkFailed: No connection, no name, no certificate, silence, a break.
    """
    try:
        yield
    except CnnccError:
        raise
    except requests.exceptions.SSLError as exc:
        raise NetworkFailed(
            f"{host} cannot be trusted to be {host}: {_cause(exc)}",
            hint="a certificate authority of your own is named by --ca",
        ) from exc
    except requests.exceptions.TooManyRedirects as exc:
        raise RegistryRefused(f"{host} redirects more than {_REDIRECTS} times") from exc
    except (requests.exceptions.RequestException, HTTPError, OSError) as exc:
        raise NetworkFailed(f"{host} could not be reached, or broke off: {_cause(exc)}", hint=_OFFLINE) from exc


_OFFLINE = "is the network up, and the address right? Proxies are taken from $HTTPS_PROXY and $NO_PROXY"


def _cause(exc: BaseException) -> str:
    """Return the innermost reason, in a line."""
    inner: object = exc
    while isinstance(inner, BaseException):
        exc = inner
        reason = getattr(exc, "reason", None)  # of urllib3; the operating system's is a text
        first = next((argument for argument in exc.args if isinstance(argument, BaseException)), None)
        inner = exc.__cause__ or (reason if isinstance(reason, BaseException) else first)
    return str(exc).partition("\n")[0] or type(exc).__name__


def _refusal(response: requests.Response, method: str, url: str) -> NetworkFailed:
    host = urlsplit(url).netloc
    said = _errors(response)
    told = f"{host} answered {response.status_code} to {method} {urlsplit(url).path}" + (f": {said}" if said else "")
    if response.status_code == 404:
        return NotInRegistry(told)
    if response.status_code in (401, 403):
        return RegistryRefused(told, hint=f"does your login have the right? docker login {host}")
    return (NetworkFailed if response.status_code in _BUSY else RegistryRefused)(told)


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


def _errors(response: requests.Response) -> str:
    """Return what a registry says went wrong, in its own words."""
    try:
        told = msgspec.json.decode(whole(response), type=_Errors)
    except (CnnccError, msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return "; ".join(f"{one.code} {one.message}".strip() for one in told.errors[:3])[:200]


def _backoff(attempt: int) -> float:
    """Return seconds to wait: twice as long each time, and never the same for two clients."""
    return min(_LONGEST_WAIT, 0.5 * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.5)


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return min(_LONGEST_WAIT, float(text))
    with contextlib.suppress(TypeError, ValueError):
        return min(_LONGEST_WAIT, max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()))
    return 0.0
