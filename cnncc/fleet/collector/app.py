"""What is asked of the collector over HTTP.

POST /reports       a device's report; ``Authorization: Bearer`` of a device
GET  /              the page; a viewer's token as the password of any name, or as bearer
GET  /status.json   the same as JSON
GET  /healthz       whether it answers
"""

from __future__ import annotations

import base64
import binascii
import time
from datetime import datetime, timezone
from pathlib import Path

import click
import jinja2
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cnncc.fleet.collector.store import DEVICE, VIEWER, Device, Progress, Store
from cnncc_runtime.agent.reports import FAILED, INSTALLED, WENT_BACK, Report
from cnncc_runtime.errors import EnvironmentMissing

_LARGEST = 64 << 10
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TEXTS = {
    "device": 253, "name": 255, "channel": 64, "outcome": 16, "version": 64, "slot": 64, "error": 64, "message": 500,
    "machine": 32, "agent": 32,
}  # fmt: skip
"""Field of a report → the most characters that it may have."""


def make_app(store: Store) -> Starlette:
    """Return the application.

    Args:
        store: Where reports are kept.
    """
    collector = _Collector(store)
    return Starlette(
        routes=[
            Route("/reports", collector.take, methods=["POST"]),
            Route("/", collector.show),
            Route("/status.json", collector.tell),
            Route("/healthz", _healthy),
        ],
        exception_handlers={EnvironmentMissing: _away},
    )


class _Collector:
    """Answers; the database is asked in threads."""

    def __init__(self, store: Store) -> None:
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        environment.filters["ago"] = _ago
        self._store = store
        self._page = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))

    async def take(self, request: Request) -> Response:
        """Take a report."""
        token = _bearer(request)
        holder = await run_in_threadpool(self._store.holder, DEVICE, token) if token else None
        if holder is None:
            return PlainTextResponse("no token of a device", 401, {"WWW-Authenticate": "Bearer"})
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > _LARGEST:
                return PlainTextResponse("too large", 413)
        try:
            report = msgspec.json.decode(bytes(body), type=Report)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            return PlainTextResponse(f"no report: {exc}", 400)
        if problem := _problem(report):
            return PlainTextResponse(f"no report: {problem}", 422)
        if holder not in ("*", report.device):
            return PlainTextResponse(f"the token is of {holder}", 403)
        await run_in_threadpool(self._store.add, report)
        return Response(status_code=204)

    async def show(self, request: Request) -> Response:
        """Show the page."""
        if not await self._may_look(request):
            return _ask()
        progress, devices = await self._state()
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
        html = self._page.render(progress=progress, devices=devices, now=now)
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})

    async def tell(self, request: Request) -> Response:
        """Say the same as JSON."""
        if not await self._may_look(request):
            return _ask()
        progress, devices = await self._state()
        releases = [
            {**msgspec.to_builtins(each), "reports": each.reports, "failing": each.failing} for each in progress
        ]
        document = {"releases": releases, "devices": msgspec.to_builtins(devices)}
        return JSONResponse(document, headers={"Cache-Control": "no-store"})

    async def _state(self) -> tuple[tuple[Progress, ...], tuple[Device, ...]]:
        return await run_in_threadpool(self._store.progress), await run_in_threadpool(self._store.devices)

    async def _may_look(self, request: Request) -> bool:
        token = _bearer(request) or _password(request)
        return bool(token) and await run_in_threadpool(self._store.holder, VIEWER, token) is not None


async def _away(_: Request, exc: Exception) -> Response:
    """Say that the database is away: devices keep their reports."""
    click.echo(f"! {exc}", err=True)
    return PlainTextResponse("the database is away", 503)


async def _healthy(_: Request) -> Response:
    return PlainTextResponse("ok")


def _ask() -> Response:
    return PlainTextResponse("no token of a viewer", 401, {"WWW-Authenticate": 'Basic realm="fleet"'})


def _bearer(request: Request) -> str:
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _password(request: Request) -> str:
    kind, _, said = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(said, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _problem(report: Report) -> str:
    """Return what is wrong with a report, or an empty text."""
    for name, most in _TEXTS.items():
        text = getattr(report, name)
        if len(text) > most or not text.isprintable():
            return f"{name} is too long, or no text"
    if report.outcome not in (INSTALLED, FAILED, WENT_BACK):
        return f"outcome is '{report.outcome}'"
    if not report.device or not report.name or not 0 <= report.sequence < 1 << 31:
        return "device, name or sequence"
    if not (0 <= report.latency < 1e6 and 0 <= report.time < 1e12):
        return "latency or time"
    if not (0 <= report.fetched < 1 << 62 and 0 <= report.deltas < 1 << 31):
        return "fetched or deltas"
    return ""


def _ago(seconds: float) -> str:
    """Return how long ago something was."""
    passed = max(0.0, time.time() - seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed / length:.0f} {unit} ago"
    return "just now"
