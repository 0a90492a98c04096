"""A command that tells an application that the device loads another engine.

It runs after the new engine is trusted, or the one before is loaded again, and can undo neither. Which engine it
ran for last is kept in a file of the agent's, so that a power cut in between does not swallow it:

told   the slot
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from cnncc_runtime.agent.slots import BUNDLE
from cnncc_runtime.errors import RunFailed
from cnncc_runtime.files import atomic_file, storage_errors

PATIENCE = 60.0
"""Seconds that the command may take."""
_TOLD = "told"
_STDERR = 2


def tell(root: Path, slot: str, command: str, *, patience: float = PATIENCE) -> bool:
    """Run a command once for each engine that the device comes to load; return whether it ran now.

    Args:
        root: The agent's folder.
        slot: What the device loads; empty for nothing.
        command: For ``/bin/sh``; it finds the engine's bundle in ``$CNNCC_BUNDLE``. What it says goes to stderr.
        patience: Seconds that it may take.

    Raises:
        RunFailed: It failed, or did not end; it is not run again for this engine.
        StorageFailed: The disk is full or broken: it will run again.
    """
    path = root / _TOLD
    with storage_errors(path):
        told = path.read_text("utf-8", "replace") if path.exists() else ""
    if not slot or told == slot:
        return False
    problem = _run(command, root / "slots" / slot / BUNDLE, patience)
    with atomic_file(path) as partial:
        partial.write_text(slot, "utf-8")
    if problem:
        raise RunFailed(
            f"--on-change {problem}",
            where=[command],
            hint="the new engine is loaded all the same; tell the application",
        )
    return True


def _run(command: str, bundle: Path, patience: float) -> str:
    """Return what went wrong, or an empty text."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=_STDERR,
        start_new_session=True,
        env={**os.environ, "CNNCC_BUNDLE": str(bundle)},
    )
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"did not end within {patience:.0f} s"
    return f"ended with exit code {code}" if code else ""
