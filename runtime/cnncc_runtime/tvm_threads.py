"""How many cores an engine of TVM's uses, decided per session.

TVM keeps one pool of worker threads per calling thread, and ends it with that thread. A pool's size is fixed when
the thread first needs one; afterwards it can be narrowed, never widened. So a session runs on its caller's thread
where that thread's pool can have the session's width (the normal case: no hand-over, nothing to wait for), and
otherwise on a thread of its own, whose pool is made to measure.

By default TVM also pins: worker i to core i, and *the calling thread* to the first cores of the machine, whatever
`taskset` said. `cnncc_runtime.tvm_runtime` switches that off (``TVM_BIND_THREADS=0``) before any pool exists.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")

_SHARE_ALL_CORES = -3  # tvm::runtime::threading::ThreadGroup::kSpecifyThreadShareAllCore


class _Runtime(Protocol):
    """The two functions of libtvm_runtime that this module needs."""

    @property
    def config_threadpool(self) -> Callable[..., Any]: ...

    @property
    def num_threads(self) -> Callable[[], int]: ...


class _Caller(threading.local):
    """What is known of the calling thread's pool."""

    known = False
    """The pool was made here, or asked for its size: asking a thread without a pool would make one of TVM's size."""
    lost = False
    """The thread came out of a fork: its pool's workers were left behind in the parent."""


_caller = _Caller()


def _after_fork() -> None:
    _caller.lost = True  # the one thread that a forked child has


os.register_at_fork(after_in_child=_after_fork)


def set_width(runtime: _Runtime, threads: int) -> bool:
    """Make the calling thread's pool ``threads`` wide.

    Args:
        runtime: The loaded TVM runtime.
        threads: Threads, the calling one included.

    Returns:
        False when this thread's pool is narrower and cannot grow, or was lost in a fork.
    """
    if _caller.lost and threads > 1:
        return False
    if _caller.known and runtime.num_threads() == threads:
        return True
    # the list's length is the size of a pool that is yet to be made; the numbers would be used for pinning only
    runtime.config_threadpool(_SHARE_ALL_CORES, threads, [str(core) for core in range(threads)])
    _caller.known = True
    return runtime.num_threads() == threads


class PoolThread:
    """A thread that runs one call at a time; its pool ends with it."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        """End the thread of a session that was dropped without being closed."""
        self._calls.put(None)

    def call(self, function: Callable[[], _T]) -> _T:
        """Return what ``function`` returns on this thread, or raise what it raises."""
        results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put((True, function()))
            except BaseException as exc:
                results.put((False, exc))

        self._calls.put(run)
        try:
            good, value = results.get()
        except BaseException:  # Ctrl-C: the engine still reads and writes this call's buffers
            results.get()
            raise
        if not good:
            raise value
        return value  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the thread once it is idle, and its pool."""
        self._calls.put(None)
        self._thread.join()


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # holds the caller's arrays
