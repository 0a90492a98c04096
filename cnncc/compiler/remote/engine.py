"""A bundle's engine on a board, as `cnncc.compiler.engine_process` has it on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from cnncc.compiler.child import how_it_ended
from cnncc.compiler.pipe import ARRAYS, ERROR, RECORD, pack, receive, send, unpack, unpack_error
from cnncc.compiler.remote.address import BoardAddress
from cnncc.compiler.remote.board_process import BoardReport
from cnncc.compiler.remote.tracker import find_server
from cnncc_runtime.bundle import Manifest, read_bundle
from cnncc_runtime.errors import BoardUnavailable, CnnccError, EngineMismatch, RunFailed
from cnncc_runtime.specs import Feeds, Tensors

_FORMAT = "tvm-vm"

_FAREWELL_S = 5.0
"""Seconds for the end of a session."""


class RemoteEngine:
    """Sends a bundle's engine to a board and runs it there. Nothing stays on the board when the session is over.

    Args:
        bundle: The bundle's folder; its parity may still be pending.
        board: Where the board is.
        threads: Of TVM's pool on the board; all it has by default.

    Attributes:
        report: What the board is.

    Raises:
        BoardUnavailable: The board cannot be reached, or is in use.
        EngineMismatch: The engine was built for another machine, or the board's TVM is another one.
        BundleRefused: The bundle is damaged.
        RunFailed: The board went away, or cannot load the engine.
    """

    def __init__(self, bundle: Path, board: BoardAddress, *, threads: int | None = None) -> None:
        check_format(read_bundle(bundle).manifest)
        server = find_server(board)
        self._board = board
        place = [server.host, str(server.port), server.match]
        arguments = [str(os.getpid()), str(bundle.resolve()), *place, str(threads or 0)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cnncc.compiler.remote.board_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # `python -m` imports from the working folder first, and that is the user's
            start_new_session=True,  # a Ctrl-C at the terminal goes to the parent alone, which ends the child
        )
        late = BoardUnavailable(
            f"{board} did not take the engine within {board.timeout:g} s",
            hint="is it in use by somebody else? A longer --timeout waits, and suits slow networks",
        )
        try:
            self.report = msgspec.convert(self._receive(late), BoardReport)
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Feeds) -> Tensors:
        """Return the outputs by name.

        Raises:
            DataRefused: The feeds do not fit.
            RunFailed: The engine failed, or the board went away or did not answer in time.
        """
        found: Tensors = self._ask(ARRAYS, pack(feeds))
        return found

    def time(self, runs: int) -> tuple[float, ...]:
        """Return the seconds of each of ``runs`` runs of the engine alone, on the feeds of the last `run`.

        Raises:
            RunFailed: As `run`.
        """
        return tuple(self._ask(RECORD, json.dumps(runs).encode()))

    def _ask(self, kind: bytes, body: bytes) -> Any:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is an end to receive
            send(self._child.stdin, kind, body)
        seconds = self._board.timeout
        hint = "the board hangs, or a longer --timeout is needed; its server may have to be started again"
        return self._receive(RunFailed(f"the board did not answer within {seconds:g} s", hint=hint))

    def _receive(self, late: CnnccError) -> Any:
        assert self._child.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._kill()

        timer = threading.Timer(self._board.timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            kind, body = receive(self._child.stdout)
        finally:
            timer.cancel()
        if kind == ARRAYS:
            return unpack(body)
        if kind == RECORD:
            return json.loads(body)
        if kind == ERROR:
            raise unpack_error(body)
        if expired.is_set():
            raise late
        raise RunFailed(f"the process that speaks to the board {how_it_ended(self._child.wait())}", hint="try again")

    def _kill(self) -> None:
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the session; the process has time to say so, since TVM's server does not outlive one that is torn."""
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        try:
            self._child.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:  # the board hangs
            self._kill()
            self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was left in the buffer for the dead process
                    pipe.close()

    def __enter__(self) -> RemoteEngine:
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the session."""
        self.close()


def check_format(manifest: Manifest) -> None:
    """Refuse an engine that TVM's RPC does not run.

    Raises:
        EngineMismatch: It is for a GPU.
    """
    if manifest.engine.format != _FORMAT:
        raise EngineMismatch(
            f"boards run engines for CPUs over RPC, and this one is of format '{manifest.engine.format}'",
            hint="leave --remote out, on the machine that it was built for",
        )
