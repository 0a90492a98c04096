"""An engine in a process of its own that imports only `cnncc_runtime`, as on a device.

An engine that crashes (a wild store, an illegal instruction) must end in a typed error, and the thread pools of
torch and ONNX Runtime must not mix with the engine's. Feeds and outputs cross pipes as ``.npz`` with a length
before them.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from cnncc.compiler.child import die_with, how_it_ended
from cnncc_runtime import errors
from cnncc_runtime.errors import CnnccError, RunFailed
from cnncc_runtime.specs import Feeds, Tensors

_LENGTH = struct.Struct("<cQ")
_ARRAYS, _ERROR = b"A", b"E"
_CHUNK = 1 << 16


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
            _send(self._child.stdin, _ARRAYS, _pack(feeds))
        except BrokenPipeError:
            raise self._crash() from None
        return self._receive()

    def _receive(self) -> Tensors:
        assert self._child.stdout is not None
        kind, body = _receive(self._child.stdout)
        if kind == _ARRAYS:
            return _unpack(body)
        if kind == _ERROR:
            raise _error_from(body)
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


def _pack(arrays: Feeds) -> bytes:
    """Return names and arrays; the names travel as data, since `numpy.savez` has keywords of its own."""
    buffer = io.BytesIO()
    np.savez(buffer, np.array(list(arrays), dtype=np.str_), *arrays.values())
    return buffer.getvalue()


def _unpack(body: bytes) -> Tensors:
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        names = archive["arr_0"].tolist()
        return {name: archive[f"arr_{number}"] for number, name in enumerate(names, 1)}


def _send(pipe: IO[bytes], kind: bytes, body: bytes) -> None:
    pipe.write(_LENGTH.pack(kind, len(body)))
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[bytes, bytes]:
    """Return a message, or an empty kind where the pipe ended."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return b"", b""
    kind, length = _LENGTH.unpack(head)
    body = pipe.read(length)
    return (kind, body) if len(body) == length else (b"", b"")


def _error_from(body: bytes) -> CnnccError:
    kind, message, hint, *where = body.decode().split("\0")
    return getattr(errors, kind, RunFailed)(message, where=where, hint=hint)


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
                _send(replies, _ARRAYS, _pack({}))
                while (message := _receive(requests))[0]:
                    _send(replies, _ARRAYS, _pack(session.run(_unpack(message[1]))))
        except CnnccError as exc:
            _send(replies, _ERROR, "\0".join([type(exc).__name__, exc.message, exc.hint, *exc.where]).encode())


if __name__ == "__main__":
    main()
