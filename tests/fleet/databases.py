"""A PostgreSQL of a test's own: Debian's, on a folder of its own, reached by a socket in that folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_FOLDERS = "/usr/lib/postgresql"
_SERVER = "postgres"


def require() -> Path:
    """Return the folder of PostgreSQL's programs; without one skip the test, but in CI fail it."""
    found = sorted(Path(_FOLDERS).glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    elsewhere = shutil.which("pg_ctl")
    if not found and elsewhere is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("pg_ctl not found: apt-get install postgresql")
    return found[-1].parent if found else Path(str(elsewhere)).resolve().parent


@dataclass(frozen=True)
class Postgres:
    """A database server.

    Attributes:
        programs: Where its programs are.
        folder: Its disk, and its socket.
        user: Whom it runs as; None for who runs the tests. It refuses to be root.
    """

    programs: Path
    folder: Path
    user: str | None

    @property
    def address(self) -> str:
        """As SQLAlchemy takes it."""
        return f"postgresql+psycopg://{_SERVER}@/{_SERVER}?host={self.folder}"

    def call(self, program: str, *arguments: str) -> None:
        """Run one of its programs.

        Raises:
            CalledProcessError: It failed.
        """
        command = [str(self.programs / program), *arguments]
        subprocess.run(
            command, check=True, cwd=self.folder, user=self.user, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            timeout=60,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self.call(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        """Stop it at once: connections break."""
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server with an empty database."""
    programs = require()
    user = _SERVER if os.geteuid() == 0 else None
    # not in the tests' folder, which its user may not enter; sockets' paths are short
    folder = Path(tempfile.mkdtemp(prefix="cnncc-pg-"))
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    server = Postgres(programs, folder, user)
    try:
        data = str(folder / "data")
        server.call("initdb", "-D", data, "-U", _SERVER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        server.start()
        yield server
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            server.stop()
        shutil.rmtree(folder)
