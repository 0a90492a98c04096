"""The runner's side of a worker: starts it, asks it, stops and wakes it, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

import cnncc
import cnncc_runtime
from cnncc.compiler.bench.protocol import Command, Failed, Reply, Stop, Stopped
from cnncc.compiler.child import how_it_ended
from cnncc_runtime import errors
from cnncc_runtime.errors import CnnccError, RunFailed

_R = TypeVar("_R", bound=Reply)

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TVM_NUM_THREADS",
)

_TAIL = 5  # lines of a dead worker's stderr that its error shows


class WorkerProcess:
    """A worker in a process group of its own; use as a context manager.

    While it is not asked anything it is stopped (SIGSTOP): thread pools spin after a run, and a spinning pool would
    steal the core that another engine is being measured on.

    Args:
        name: The subject, as errors name it.
        folder: An existing folder that nothing else writes to; the worker's working directory.
        threads: Threads that every library is told to use.
        timeout: Seconds that one command may take.
        python: The Python to run it with; one that is not ours needs numpy and msgspec besides the library.
    """

    def __init__(self, name: str, folder: Path, *, threads: int, timeout: float, python: str = sys.executable) -> None:
        self._name = name
        self._timeout = timeout
        environment = _environment(os.environ, threads)
        if python != sys.executable:
            environment["PYTHONPATH"] = str(_own_packages(folder))
        self._stderr = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._buffer = b""
        # the working directory comes first on the worker's module path: an empty one shadows no library
        self._process = subprocess.Popen(
            [python, "-m", "cnncc.compiler.bench.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> WorkerProcess:
        """Return the worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the worker and everything it started."""
        self.end()

    def end(self) -> None:
        """Kill the worker and everything it started; does nothing the second time."""
        if self._stderr.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._stderr.close()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def ask(self, command: Command, wanted: type[_R]) -> _R:
        """Wake the worker, have it carry out a command, and stop it again.

        Args:
            command: What to do.
            wanted: The reply that it must give.

        Raises:
            RunFailed: It crashed, hung, or broke the protocol.
            CnnccError: What the worker itself raised.
        """
        self._signal(signal.SIGCONT)
        self._send(command)
        reply = self._receive()
        if isinstance(reply, Failed):
            raise self._error(reply)
        if not isinstance(reply, wanted):
            raise RunFailed(f"{self._name}: the worker answered out of turn", where=[type(reply).__name__])
        if not isinstance(reply, Stopped):
            self._signal(signal.SIGSTOP)
        return reply

    def finish(self) -> int:
        """End the worker and return its largest resident set, bytes.

        Raises:
            RunFailed: It crashed or hung.
        """
        return self.ask(Stop(), Stopped).peak_resident

    def _send(self, command: Command) -> None:
        assert self._process.stdin is not None  # a pipe was asked for
        try:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise self._died() from exc

    def _receive(self) -> Reply:
        deadline = time.monotonic() + self._timeout
        assert self._process.stdout is not None  # a pipe was asked for
        handle = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RunFailed(
                        f"{self._name} did not answer within {self._timeout:g} s and was stopped",
                        hint="give it more time, or leave it out",
                    )
                piece = os.read(handle, 1 << 16)
                if not piece:
                    raise self._died()
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return msgspec.json.decode(line, type=Reply)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, msgspec.ValidationError) as exc:
            raise RunFailed(f"{self._name}: the worker's answer cannot be read: {exc}") from exc

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _died(self) -> RunFailed:
        """Say how the worker ended."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return RunFailed(f"{self._name} closed its pipe and did not end", where=self._tail())
        hint = "leave it out, or run it alone to see more"
        if code == -signal.SIGKILL:
            return RunFailed(
                f"{self._name} was killed, most likely because memory ran out",
                where=self._tail(),
                hint="measure a smaller model, fewer peers, or on a machine with more memory",
            )
        return RunFailed(f"{self._name} {how_it_ended(code)} while it was measured", where=self._tail(), hint=hint)

    def _error(self, reply: Failed) -> CnnccError:
        kind = getattr(errors, reply.error, RunFailed)
        if not (isinstance(kind, type) and issubclass(kind, CnnccError)):
            kind = RunFailed
        return kind(f"{self._name}: {reply.message}", where=reply.where, hint=reply.hint)

    def _tail(self) -> list[str]:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").splitlines()[-_TAIL:]


def _own_packages(folder: Path) -> Path:
    """Return a folder from which another Python imports our packages, and nothing else of our environment."""
    home = folder / "packages"
    home.mkdir()
    for package in (cnncc, cnncc_runtime):
        found = Path(str(package.__file__)).parent
        (home / found.name).symlink_to(found)
    return home


def _environment(base: Mapping[str, str], threads: int) -> dict[str, str]:
    return {**base, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
