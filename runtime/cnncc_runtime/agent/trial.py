"""A new engine's trial: its golden outputs and its latency, in a process of its own, which may crash or hang.

python -m cnncc_runtime.agent.trial BUNDLE SECONDS
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

PATIENCE = 120.0
"""Seconds that a trial may take: opening, the first run, the golden outputs, and the timed runs."""
_TIMED = 2.0
_FEWEST, _MOST = 5, 1000
_LARGEST = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """What came of a trial.

    Attributes:
        problems: Why the engine is not to be trusted; empty where it is.
        latency: Median of its runs, in seconds; 0 where it did not run.
        runs: How many were timed.
    """

    problems: tuple[str, ...] = ()
    latency: float = 0.0
    runs: int = 0


def try_engine(bundle: Path, *, patience: float = PATIENCE) -> Verdict:
    """Try a bundle's engine; whatever it does, there is a verdict.

    Args:
        bundle: The bundle.
        patience: Seconds.
    """
    command = [sys.executable, "-m", "cnncc_runtime.agent.trial", str(bundle), str(_TIMED)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return Verdict((f"the engine did not end within {patience:.0f} s",))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode < 0:
        return Verdict((f"the engine crashed: {signal.Signals(-process.returncode).name}",))
    try:
        return msgspec.json.decode(out[:_LARGEST], type=Verdict)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = err.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
        return Verdict((f"the engine ended with exit code {process.returncode}: {said}",))


def slower(new: Verdict, old: Verdict, most: float) -> str:
    """Return why a new engine is too slow beside the old one, or an empty text.

    Args:
        new: The new one's verdict.
        old: The old one's, on the same machine; without a latency nothing is compared.
        most: How many times as long as the old one it may take.
    """
    if not old.latency or new.latency <= most * old.latency:
        return ""
    took = f"{new.latency * 1e3:.2f} ms, the engine before {old.latency * 1e3:.2f} ms"
    return f"it takes {took}: more than {most:g} times as long"


def main(bundle: str, timed: str) -> None:
    """Try an engine in this process, and write the verdict to stdout."""
    import cnncc_runtime
    from cnncc_runtime.bundle import GOLDEN, read_bundle
    from cnncc_runtime.errors import CnnccError
    from cnncc_runtime.golden import check_golden, read_golden

    try:
        opened = read_bundle(Path(bundle))
        golden = read_golden(opened.file(GOLDEN))
        # whether its publisher proved it is in what he signed; what it computes here is what this is about
        with cnncc_runtime.open(opened, allow_unverified=True) as session:
            problems = check_golden(session, golden)
            times: list[float] = []
            end = time.perf_counter() + float(timed)
            while not problems and len(times) < _MOST and (len(times) < _FEWEST or time.perf_counter() < end):
                start = time.perf_counter()
                session.run(golden.feeds)
                times.append(time.perf_counter() - start)
    except CnnccError as exc:
        problems, times = (exc.message,), []
    verdict = Verdict(problems, sorted(times)[len(times) // 2] if times else 0.0, len(times))
    sys.stdout.write(json.dumps(msgspec.to_builtins(verdict)))


if __name__ == "__main__":
    main(*sys.argv[1:])
