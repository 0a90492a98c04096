"""Demos, started as CI does: each in a folder of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.cli.harness import ROOT


@contextlib.contextmanager
def start(name: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a demo in a folder; it is ended with the context."""
    with subprocess.Popen(
        [sys.executable, ROOT / "examples" / name / "demo.py"], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        yield process
        if process.poll() is None:
            process.terminate()


def processes_in(folder: Path) -> list[list[str]]:
    """Return the command lines of processes that work in a folder."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(folder):
            found.append(process.info["cmdline"])
    return found
