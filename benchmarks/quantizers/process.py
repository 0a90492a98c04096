"""Runs a quantizer's commands, each in a process of its own, and says what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc_runtime.errors import RunFailed

_LAUNCHER = Path(__file__).with_name("launcher.py")

_LONGEST = 300
"""Characters of a failure's last line that are kept."""


@dataclass(frozen=True)
class Cost:
    """What commands took.

    Attributes:
        seconds: By the wall clock, the start of their processes included.
        cpu_seconds: Of all their threads: what a busy machine does not change much.
        peak_resident: Largest resident set of one process, bytes.
    """

    seconds: float
    cpu_seconds: float
    peak_resident: int


def run(commands: Sequence[Sequence[str]]) -> Cost:
    """Run commands one after the other, with a cache of cnncc's that is empty at first: they shall work, not remember.

    Args:
        commands: Programs and their arguments.

    Returns:
        The sums of their times, and the largest of their resident sets.

    Raises:
        RunFailed: One could not be started or failed; the message is the last line that it wrote about what was wrong.
    """
    with tempfile.TemporaryDirectory(prefix="cnncc-quantizer-") as cache:
        costs = [_run(command, os.environ | {"CNNCC_CACHE_DIR": cache}) for command in commands]
    return Cost(
        sum(cost.seconds for cost in costs),
        sum(cost.cpu_seconds for cost in costs),
        max(cost.peak_resident for cost in costs),
    )


def _run(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    with tempfile.NamedTemporaryFile() as report:
        launched = [sys.executable, "-I", "-S", str(_LAUNCHER), report.name, *command]
        start = time.monotonic()
        ended = subprocess.run(launched, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False)
        seconds = time.monotonic() - start
        if ended.returncode:
            text = (ended.stdout + b"\n" + ended.stderr).decode(errors="replace")
            raise RunFailed(f"{_last_line(text)} (exit {ended.returncode})")
        used = json.load(report)
    return Cost(seconds, used["cpu_seconds"], used["peak_resident"])


def _last_line(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    # cnncc's errors end with where it was and a hint
    lines = [line for line in lines if not line.startswith(("at ", "try: "))]
    return lines[-1][:_LONGEST] if lines else "it wrote nothing"
