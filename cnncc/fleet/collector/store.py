"""Reports and tokens in a database: SQLite by default, PostgreSQL or another by its address (SQLAlchemy)."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    func,
    insert,
    select,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from cnncc_runtime.agent.reports import FAILED, INSTALLED, WENT_BACK, Report
from cnncc_runtime.errors import DependencyMissing, EnvironmentMissing, UsageError

DEVICE, VIEWER = "device", "viewer"
_OUTCOMES = (INSTALLED, FAILED, WENT_BACK)
_LONGEST = 253
"""Characters of a device's name: a host name's."""

_metadata = MetaData()
_reports = Table(
    "reports",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("received", Float, nullable=False),
    Column("device", String(_LONGEST), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("channel", String(64), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("version", String(64), nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("slot", String(64), nullable=False),
    Column("time", Float, nullable=False),
    Column("latency", Float, nullable=False),
    Column("error", String(64), nullable=False),
    Column("message", Text, nullable=False),
    Column("machine", String(32), nullable=False),
    Column("agent", String(32), nullable=False),
    Column("fetched", BigInteger, nullable=False),
    Column("deltas", Integer, nullable=False),
    UniqueConstraint("device", "time", "outcome"),
)
_tokens = Table(
    "tokens",
    _metadata,
    Column("digest", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("holder", String(_LONGEST), nullable=False),
)


@dataclass(frozen=True)
class Progress:
    """How a release goes in a channel: each device by what it reported last of it.

    Attributes:
        name: Of the model.
        channel: Which.
        version: The release's.
        sequence: Its place in the channel.
        installed: Devices that run it.
        failed: Devices on which it failed.
        back: Devices that went back by hand.
        latency: Median over devices, in seconds; 0 where none was timed.
        problems: What went wrong, and on how many devices; the most frequent first.
        last: When the last report came: seconds since 1970, UTC.
    """

    name: str
    channel: str
    version: str
    sequence: int
    installed: int
    failed: int
    back: int
    latency: float
    problems: tuple[tuple[str, int], ...]
    last: float

    @property
    def reports(self) -> int:
        """Devices that reported."""
        return self.installed + self.failed + self.back

    @property
    def failing(self) -> float:
        """Devices that do not run it, in percent of those that reported."""
        return 100 * (self.failed + self.back) / self.reports if self.reports else 0.0


@dataclass(frozen=True)
class Device:
    """A device, by its last report.

    Attributes:
        device: Its name.
        name: Of the model.
        channel: Which it follows.
        outcome: Of its last update.
        version: The release that was about.
        machine: ELF machine.
        latency: Of its engine, in seconds; 0 where it was not timed.
        message: What went wrong.
        received: When it reported: seconds since 1970, UTC.
    """

    device: str
    name: str
    channel: str
    outcome: str
    version: str
    machine: str
    latency: float
    message: str
    received: float


_DRIVERS = {"psycopg": "psycopg[binary]"}
"""Module → what `pip` installs it by, where that is not its name."""


@contextlib.contextmanager
def _database_errors() -> Iterator[None]:
    """Say in our words that a database is away.

    Raises:
        EnvironmentMissing: It cannot be reached, or failed.
    """
    try:
        yield
    except SQLAlchemyError as exc:
        said = str(getattr(exc, "orig", None) or type(exc).__name__).partition("\n")[0]
        raise EnvironmentMissing(
            f"the database failed: {said[:200]}", hint="is it up, and is the address right?"
        ) from exc


class Store:
    """A database of reports.

    Args:
        address: As SQLAlchemy takes it: ``sqlite:///fleet.db``, ``postgresql+psycopg://…``.

    Raises:
        UsageError: It is no address of a database.
        DependencyMissing: The driver that it names is not installed.
        EnvironmentMissing: The database cannot be reached; so do all methods.
    """

    def __init__(self, address: str) -> None:
        shown = re.sub(r"//[^/]*@", "//…@", address)  # passwords are not for logs
        try:
            self._engine: Engine = create_engine(address, pool_pre_ping=True)
        except ModuleNotFoundError as exc:
            hint = f"pip install '{_DRIVERS.get(exc.name or '', exc.name)}'"
            raise DependencyMissing(f"the driver of '{shown}' is not installed: {exc.name}", hint=hint) from exc
        except (ArgumentError, ValueError) as exc:
            raise UsageError(
                f"'{shown}' is no database: {type(exc).__name__}",
                hint="as in sqlite:///fleet.db, postgresql+psycopg://…",
            ) from exc
        with _database_errors():
            _metadata.create_all(self._engine)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def issue(self, kind: str, holder: str) -> str:
        """Return a new token, of which the database keeps the digest alone.

        Args:
            kind: `DEVICE`, which may report as ``holder``, or `VIEWER`, who may look.
            holder: Whose it is; ``*`` of a device token stands for any device.

        Raises:
            UsageError: Nobody has such a name.
        """
        if not 0 < len(holder) <= _LONGEST or not holder.isprintable():
            raise UsageError(f"'{holder[:80]}' is no name", hint=f"names have {_LONGEST} characters at most")
        token = secrets.token_urlsafe(32)
        with _database_errors(), self._engine.begin() as connection:
            connection.execute(insert(_tokens).values(digest=_digest(token), kind=kind, holder=holder))
        return token

    def holder(self, kind: str, token: str) -> str | None:
        """Return whose a token is; None where it is none of that kind."""
        found = select(_tokens.c.holder).where(_tokens.c.digest == _digest(token), _tokens.c.kind == kind)
        with _database_errors(), self._engine.connect() as connection:
            holder: str | None = connection.execute(found).scalar()
        return holder

    def add(self, report: Report, *, received: float | None = None) -> None:
        """Keep a report; one that came already, since its answer was lost, is kept once."""
        values = {name: getattr(report, name) for name in report.__struct_fields__}
        now = time.time() if received is None else received
        with _database_errors(), contextlib.suppress(IntegrityError), self._engine.begin() as connection:
            connection.execute(insert(_reports).values(received=now, **values))

    def progress(self) -> tuple[Progress, ...]:
        """Return how every release goes, the newest of each channel first."""
        groups: dict[tuple[str, str, int, str], list[tuple[str, float, str, float]]] = {}
        with _database_errors(), self._engine.connect() as connection:
            for row in connection.execute(_latest(_reports.c.sequence)):
                key = (row.name, row.channel, row.sequence, row.version)
                groups.setdefault(key, []).append((row.outcome, row.latency, row.message, row.received))
        made = [_progress(key, rows) for key, rows in groups.items()]
        return tuple(sorted(made, key=lambda each: (each.name, each.channel, -each.sequence)))

    def devices(self, *, most: int = 1000) -> tuple[Device, ...]:
        """Return devices by their last report, those that failed first, then the latest."""
        with _database_errors(), self._engine.connect() as connection:
            rows = [
                Device(r.device, r.name, r.channel, r.outcome, r.version, r.machine, r.latency, r.message, r.received)
                for r in connection.execute(_latest())
            ]
        return tuple(sorted(rows, key=lambda each: (each.outcome == INSTALLED, -each.received))[:most])


def _latest(*more: Column[int]) -> Select[Any]:
    """Select the last report of each device and model, and of each of ``more``."""
    keys = [_reports.c.device, _reports.c.name, _reports.c.channel, *more]
    last = select(func.max(_reports.c.id)).group_by(*keys)
    return select(_reports).where(_reports.c.id.in_(last))


def _progress(key: tuple[str, str, int, str], rows: Iterable[tuple[str, float, str, float]]) -> Progress:
    name, channel, sequence, version = key
    listed = list(rows)
    count = {outcome: sum(row[0] == outcome for row in listed) for outcome in _OUTCOMES}
    times = [latency for outcome, latency, _, _ in listed if outcome == INSTALLED and latency]
    said: dict[str, int] = {}
    for outcome, _, message, _ in listed:
        if outcome == FAILED:
            said[message] = said.get(message, 0) + 1
    problems = tuple(sorted(said.items(), key=lambda each: (-each[1], each[0]))[:10])
    last = max(received for *_, received in listed)
    return Progress(
        name, channel, version, sequence, count[INSTALLED], count[FAILED], count[WENT_BACK],
        median(times) if times else 0.0, problems, last,
    )  # fmt: skip


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
