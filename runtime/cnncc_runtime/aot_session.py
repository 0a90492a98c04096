"""The ``aot-static`` session: runs an engine that is an executable, in a process of its own.

Inputs go through its stdin and outputs come through its stdout, raw and one after the other. It ends when its stdin
does, so that it never outlives whoever opened the session. A run therefore takes longer than the network does, by the
time of two copies through pipes; the executable's own ``--bench`` leaves them out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.bundle import Bundle
from cnncc_runtime.elf import parse_elf
from cnncc_runtime.errors import BundleRefused, EngineMismatch, RunFailed, TargetUnavailable
from cnncc_runtime.opened import OpenedEngine
from cnncc_runtime.session import engine_mismatch
from cnncc_runtime.specs import Feeds, Tensors, TensorSpec

ABI = "aot-static 1"
"""What is said through the pipes."""

_GRACE = 5.0
"""Seconds that the process may take to end after its stdin has."""


class AotSession(OpenedEngine):
    """A `cnncc_runtime.session.Session` over an executable.

    Args:
        bundle: Its bundle.
        engine: The engine file, already verified; what this handle shows is what is executed.
        threads: Cores that a run may use; it uses one.
        emulator: The command line of what executes the engine where this machine is another one; whether it is of the
            engine's kind, the caller knows.

    Raises:
        EngineMismatch: Built for another machine, other ISA features, or speaks another version.
        TargetUnavailable: This machine executes no file that lies in memory.
        BundleRefused: The engine is damaged.

    Attributes:
        apart: It runs in a process of its own.
    """

    apart = True

    def __init__(self, bundle: Bundle, engine: BinaryIO, *, threads: int, emulator: Sequence[str] = ()) -> None:
        manifest = bundle.manifest
        mismatch = None if emulator else engine_mismatch(manifest.target)
        if mismatch:
            raise mismatch
        if parse_elf(engine, manifest.engine.file).kind != "executable":
            raise BundleRefused(f"'{manifest.engine.file}' is no executable", hint="build the bundle again")
        if manifest.engine.abi != ABI:
            raise EngineMismatch(
                f"built for: {manifest.engine.abi}, found: {ABI}",
                hint="build the bundle again, or update cnncc-runtime",
            )
        super().__init__(manifest)
        size = next(iter(manifest.batches), 0)
        self._made = [spec.bind(dict.fromkeys(spec.symbols, size)) for spec in manifest.outputs]
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = _started(engine, manifest.engine.file, emulator)

    @property
    def threads(self) -> int:
        """Cores that a run uses at most."""
        return 1

    def run(self, feeds: Feeds) -> Tensors:
        """Run the engine once; see `cnncc_runtime.session.Session.run`.

        Raises:
            DataRefused: An input is missing, unknown, or of another dtype or shape.
            RunFailed: The batch size was not built, the session is closed, or the engine failed.
        """
        self._admission.batch(feeds)
        with self._lock:
            if self._child is None:
                raise RunFailed("the session is closed", hint="open the bundle again")
            try:
                return self._call(self._child, feeds)
            except (BrokenPipeError, EOFError):
                raise _died(self._child) from None

    def _call(self, child: subprocess.Popen[bytes], feeds: Feeds) -> Tensors:
        assert child.stdin is not None and child.stdout is not None
        for spec in self._inputs:
            child.stdin.write(np.ascontiguousarray(feeds[spec.name]).data.cast("B"))
        child.stdin.flush()
        return {spec.name: _received(child.stdout, spec) for spec in self._made}

    def close(self) -> None:
        """End the process; arrays that it returned stay valid. Closing twice is harmless."""
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what was left in the buffer for a dead process
            child.stdin.close()
        try:
            child.wait(_GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _started(engine: BinaryIO, name: str, emulator: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the very file that was verified: a copy in memory, which cannot change and needs no right to run."""
    try:
        with os.fdopen(os.memfd_create(name), "wb") as copy:
            engine.seek(0)
            shutil.copyfileobj(engine, copy)
            copy.flush()
            with os.fdopen(os.open(f"/proc/self/fd/{copy.fileno()}", os.O_RDONLY), "rb") as readable:
                copy.close()  # a file that is open for writing is not executed
                return _popen(readable.fileno(), name, emulator)
    except (OSError, AttributeError) as exc:  # AttributeError: Linux alone has memfd_create
        raise TargetUnavailable(
            f"'{name}' cannot be executed here: {getattr(exc, 'strerror', None) or exc}",
            hint="run it by hand: it is an executable that needs no library",
        ) from exc


def _popen(number: int, name: str, emulator: Sequence[str]) -> subprocess.Popen[bytes]:
    path = f"/proc/self/fd/{number}"
    return subprocess.Popen(
        [*emulator, path, "--serve"] if emulator else [name, "--serve"],
        executable=None if emulator else path,
        pass_fds=(number,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C at the terminal goes to whoever opened the session
    )


def _received(pipe: IO[bytes], spec: TensorSpec) -> NDArray[Any]:
    """Return an array of the process's.

    Raises:
        EOFError: It has ended.
    """
    found = np.empty(tuple(int(size) for size in spec.shape), np.dtype(spec.dtype))
    data = pipe.read(found.nbytes)
    if len(data) != found.nbytes:
        raise EOFError
    found.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
    return found


def _died(child: subprocess.Popen[bytes]) -> RunFailed:
    code = child.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RunFailed(f"the engine's process {how}", hint="open the bundle again; run `cnncc verify` on it")
