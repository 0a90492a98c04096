"""The threads of an engine: every engine brings the native code of its own pool, and here it is put to work.

TVM's pool, which its code would use otherwise, divides each loop into equal parts and waits for the slowest: where
another pool of the process spins on one of the cores, every loop waits until the system gives that core back. It is
also one pool per calling thread, of a width that cannot grow. An engine's own (cnncc/targets/llvm/threads/pool.c)
hands out iterations one by one, belongs to a session, and serves whichever thread calls it. TVM's is never started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from types import TracebackType
from typing import Any

from cnncc_runtime.errors import RunFailed

VERSION = "1"
"""Of the functions that this module calls; a part of the engines' ABI."""

_ALIGNMENT = 128
_LAUNCH = "__TVMBackendParallelLaunch"
"""The variable through which TVM's code launches a loop; absent where an engine has no parallel loop."""


class Launcher:
    """The native functions of a loaded engine, which launches its loops through them from now on.

    Args:
        path: The library; already loaded, by this very path.
        module: What keeps the library mapped.

    Raises:
        OSError: The library cannot be loaded.
        AttributeError: It brings no threads.
    """

    def __init__(self, path: str, module: Any) -> None:
        self._module = module
        library = ctypes.CDLL(path)
        try:
            self.bytes_of = library.cnncc_pool_bytes
            self.open = library.cnncc_pool_open
            self.close = library.cnncc_pool_close
            self.enter = library.cnncc_pool_enter
            launch = ctypes.cast(library.cnncc_parallel_launch, ctypes.c_void_p)
            with contextlib.suppress(ValueError):
                ctypes.c_void_p.in_dll(library, _LAUNCH).value = launch.value
        finally:
            # ctypes would keep the library for ever; `module` keeps it as long as it is needed
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
        self.bytes_of.argtypes, self.bytes_of.restype = (ctypes.c_int32,), ctypes.c_int64
        self.open.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        self.close.argtypes, self.close.restype = (ctypes.c_void_p,), None
        self.enter.argtypes, self.enter.restype = (ctypes.c_void_p,), None


class Pool:
    """Threads for one run at a time, on whichever thread it is called: ``with pool: engine(...)``.

    They are started by the first use and sleep between uses. Whoever forgets to close a pool loses nothing: its
    threads end with it, or with the interpreter. A forked child starts threads of its own.

    Args:
        launcher: The engine whose loops they share.
        threads: How many, the calling one included.
    """

    def __init__(self, launcher: Launcher, threads: int) -> None:
        self._launcher = launcher
        self._threads = threads
        self._workers: _Workers | None = None

    def __enter__(self) -> None:
        """Let the calling thread share its loops.

        Raises:
            RunFailed: The system has no more threads to give.
        """
        if self._threads == 1:
            return
        workers = self._workers
        if workers is None or workers.process != os.getpid():
            workers = self._workers = _Workers(self._launcher, self._threads)
        self._launcher.enter(workers.address)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the calling thread run loops alone again."""
        if self._threads > 1:
            self._launcher.enter(None)

    def close(self) -> None:
        """End the threads; nobody may be using them. The next use would start others."""
        if self._workers is not None:
            self._workers.end()
            self._workers = None


class _Workers:
    """Running threads, and the memory that they share. They end when this goes, before their code can be unmapped."""

    def __init__(self, launcher: Launcher, threads: int) -> None:
        self._memory = ctypes.create_string_buffer(launcher.bytes_of(threads) + _ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % _ALIGNMENT
        self.process = os.getpid()
        if code := launcher.open(self.address, threads):
            raise RunFailed(
                f"{threads} threads cannot be started: {os.strerror(code)}", hint="open the session with fewer threads"
            )
        # holds the launcher, thus the library, and the memory
        self.end = weakref.finalize(self, _end, launcher, self._memory, self.address, self.process)


def _end(launcher: Launcher, _memory: Any, address: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has none of the threads
        launcher.close(address)
