"""Runs ``cnncc`` as a user does: in this process where that is the same and quicker, else in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from cnncc.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits" / "model.py"
COMMAND = (sys.executable, "-m", "cnncc.cli")
STAGES = ("export", "clean", "build", "verify")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind.

    Attributes:
        code: Its exit code; minus the signal's number where one killed it.
        stdout: All of it.
        stderr: All of it.
    """

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout, which must be one JSON document and nothing else."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found


def call(*arguments: str | Path, code: int = 0) -> Outcome:
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    outcome = Outcome(result.exit_code, result.stdout, result.stderr)
    assert outcome.code == code, f"exit code {outcome.code}\n{outcome.stderr}\n{outcome.stdout}"
    return outcome


def start(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start a command in a process of its own, leader of its group as a shell's foreground job is."""
    return subprocess.Popen(
        [*prefix, *COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, code: int | None = 0) -> Outcome:
    """Wait for a command and check its exit code (None: any)."""
    stdout, stderr = process.communicate(timeout=300)
    assert code is None or process.returncode == code, f"exit code {process.returncode}\n{stderr}\n{stdout}"
    return Outcome(process.returncode, stdout, stderr)


def apart(
    *arguments: str | Path, code: int | None = 0, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command in a process of its own and check its exit code (None: any)."""
    return finish(start(*arguments, cwd=cwd, env=env), code=code)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(*folders: Path) -> list[Path]:
    """Return what writers left below folders: partial files and folders, and their locks."""
    return [path for folder in folders for path in sorted(folder.rglob(".*")) if ".partial" in path.name]
