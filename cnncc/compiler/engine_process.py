"""An engine in a process of its own that imports only `cnncc_runtime`, as on a device.

An engine that crashes (a wild store, an illegal instruction) must end in a typed error, and the thread pools of
torch and ONNX Runtime must not mix with the engine's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from cnncc.compiler.child import die_with, how_it_ended
from cnncc.compiler.pipe import ARRAYS, ERROR, pack, pack_error, receive, send, unpack, unpack_error
from cnncc_runtime.errors import CnnccError, RunFailed
from cnncc_runtime.specs import Feeds, Tensors


class EngineProcess:
    """Runs a bundle's engine in a child process.

    Args:
        bundle: The bundle's folder; its parity may still be pending.
        threads: Of the engine; all usable cores by default.

    Raises:
        CnnccError: The bundle cannot be opened here, as `cnncc_runtime.open` says it.
    """

    def __init__(self, bundle: Path, *, threads: int | None = None) -> None:
        arguments = [str(os.getpid()), str(bundle.resolve()), str(threads or 0)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cnncc.compiler.engine_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # `python -m` imports from the working folder first, and that is the user's
            start_new_session=True,  # a Ctrl-C at the terminal goes to the parent alone, which ends the child
        )
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Feeds) -> Tensors:
        """Return the outputs by name.

        Raises:
            DataRefused: The feeds do not fit.
            RunFailed: The engine failed or crashed.
        """
        assert self._child.stdin is not None
        try:
            send(self._child.stdin, ARRAYS, pack(feeds))
        except BrokenPipeError:
            raise self._crash() from None
        return self._receive()

    def _receive(self) -> Tensors:
        assert self._child.stdout is not None
        kind, body = receive(self._child.stdout)
        if kind == ARRAYS:
            return unpack(body)
        if kind == ERROR:
            raise unpack_error(body)
        raise self._crash()

    def _crash(self) -> RunFailed:
        code = self._child.wait()
        hint = "this engine is broken: compile again, and report it"
        return RunFailed(f"the engine's process {how_it_ended(code)}", hint=hint)

    def close(self) -> None:
        """End the process."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was left in the buffer for the dead process
                    pipe.close()

    def __enter__(self) -> EngineProcess:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()


def main() -> None:
    """Serve one bundle: ``engine_process PARENT BUNDLE THREADS`` (0: the default)."""
    die_with(int(sys.argv[1]))
    import cnncc_runtime

    requests = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)
        try:
            with cnncc_runtime.open(
                Path(sys.argv[2]), threads=int(sys.argv[3]) or None, allow_unverified=True
            ) as session:
                send(replies, ARRAYS, pack({}))
                while (message := receive(requests))[0]:
                    send(replies, ARRAYS, pack(session.run(unpack(message[1]))))
        except CnnccError as exc:
            send(replies, ERROR, pack_error(exc))


if __name__ == "__main__":
    main()
