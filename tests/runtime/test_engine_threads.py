"""The native threads of an engine, called directly: who runs what, what is returned, and when they are gone."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc_runtime.engine_threads import Launcher, Pool
from cnncc_runtime.errors import RunFailed

ROOT = Path(__file__).resolve().parents[2]


class Environment(ctypes.Structure):
    """TVMParallelGroupEnv of TVM's c_backend_api.h."""

    _fields_ = [("handle", ctypes.c_void_p), ("tasks", ctypes.c_int32)]


_LAMBDA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Environment), ctypes.c_void_p)

Body = Callable[[int, int], int]
"""Takes the task and how many there are; returns an error code."""


class Native:
    """An engine's native functions, and loops whose bodies are Python's."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cnncc_region.argtypes = (ctypes.c_int64,)
        self.launcher = Launcher(str(path), self.library)

    def loop(self, iterations: int, body: Body, *, announced: bool = True) -> int:
        """Launch a loop on the calling thread's pool; return the error code."""
        if announced:
            self.library.cnncc_region(iterations)
        called = _LAMBDA(lambda task, environment, _data: body(task, environment.contents.tasks))
        return int(self.library.cnncc_parallel_launch(called, None, 0))


@pytest.fixture(scope="module")
def native(engines: Path) -> Native:
    return Native(engines / "identity.so")


@pytest.fixture
def pool(native: Native) -> Iterator[Pool]:
    made = Pool(native.launcher, 3)
    yield made
    made.close()


def tasks() -> set[str]:
    """Threads of this process."""
    return set(os.listdir("/proc/self/task"))  # noqa: PTH208


def settled() -> set[str]:
    """Threads of this process, once those that earlier tests left to the garbage collector are gone."""
    gc.collect()
    time.sleep(0.05)
    return tasks()


def gone(before: set[str]) -> bool:
    """Whether all threads but these end soon: a joined thread is listed for a moment."""
    end = time.monotonic() + 10
    while tasks() - before and time.monotonic() < end:
        time.sleep(0.01)
    return not tasks() - before


# ---- who runs what


@given(iterations=st.integers(0, 60), width=st.sampled_from([1, 2, 3, 8, 64]))
@settings(max_examples=60, deadline=None)
def test_each_task_is_called_once_and_told_how_many_there_are(native: Native, iterations: int, width: int) -> None:
    calls: list[tuple[int, int]] = []
    pool = Pool(native.launcher, width)
    with pool:
        assert native.loop(iterations, lambda *call: calls.append(call) or 0) == 0  # type: ignore[func-returns-value]
    pool.close()
    if width == 1 or iterations <= 1:
        assert calls == [(0, 1)]
    else:
        assert sorted(calls) == [(task, iterations) for task in range(iterations)]


def test_a_loop_runs_alone_where_no_pool_was_entered_or_its_length_is_unknown(native: Native, pool: Pool) -> None:
    calls: list[tuple[int, int, int]] = []

    def body(task: int, count: int) -> int:
        calls.append((task, count, threading.get_native_id()))
        return 0

    native.loop(5, body)
    with pool:
        native.loop(5, body, announced=False)
    native.loop(5, body)
    assert calls == [(0, 1, threading.get_native_id())] * 3


def test_a_pool_serves_whichever_thread_enters_it(native: Native, pool: Pool) -> None:
    found: list[set[int]] = []

    def run() -> None:
        seen: set[int] = set()
        barrier = threading.Barrier(3)  # so that each of the three takes one

        def body(_task: int, _count: int) -> int:
            seen.add(threading.get_native_id())
            barrier.wait(60)
            return 0

        with pool:
            native.loop(3, body)
        assert threading.get_native_id() in seen
        found.append(seen - {threading.get_native_id()})

    for _ in range(3):
        caller = threading.Thread(target=run)
        caller.start()
        caller.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


def test_iterations_that_nobody_began_are_not_waited_for(native: Native, pool: Pool) -> None:
    """A worker that does not come is played by one that is held up in its first iteration."""
    held, go = threading.Event(), threading.Event()
    caller = threading.get_native_id()
    done: Counter[int] = Counter()

    def body(task: int, _count: int) -> int:
        done[task] += 1
        if threading.get_native_id() != caller:
            held.set()
            go.wait(60)
        elif held.wait(60) and sum(done.values()) == 30:
            go.set()  # all others were done by this thread meanwhile
        return 0

    narrow = Pool(native.launcher, 2)
    with narrow:
        native.loop(30, body)
    narrow.close()
    assert done == Counter(range(30))


def test_a_loop_within_a_loop_runs_on_the_thread_that_meets_it(native: Native, pool: Pool) -> None:
    inner: Counter[tuple[int, int]] = Counter()

    def outer(task: int, _count: int) -> int:
        def body(part: int, count: int) -> int:
            inner[task, count] += 1
            return part

        return native.loop(7, body)

    with pool:
        assert native.loop(9, outer) == 0
    assert inner == Counter({(task, 1): 1 for task in range(9)})


def test_the_first_error_is_returned_and_forgotten(native: Native, pool: Pool) -> None:
    done: Counter[int] = Counter()

    def body(task: int, _count: int) -> int:
        done[task] += 1
        return -7 if task == 11 else 0

    with pool:
        assert native.loop(20, body) == -7
        assert done == Counter(range(20))
        assert native.loop(20, lambda _task, _count: 0) == 0
        assert native.loop(20, lambda task, _count: task + 1) in range(1, 21)
    assert native.loop(20, lambda _task, _count: 3) == 3


# ---- many launches


def launches(native: Native, pool: Pool, rounds: int, wrong: list[object]) -> None:
    try:
        for number in range(rounds):
            done = [0] * (2 + number % 5)

            def body(task: int, count: int, done: list[int] = done) -> int:
                # as TVM's code divides a loop: where another thread is launching there is one task, and it does all
                step = -(-len(done) // count)
                for iteration in range(task * step, min((task + 1) * step, len(done))):
                    done[iteration] += 1
                return 0

            with pool:
                code = native.loop(len(done), body)
            if code or done != [1] * len(done):
                wrong.append((code, done))
    except BaseException as exc:
        wrong.append(exc)


@pytest.mark.parametrize("shared", [True, False], ids=["one pool", "a pool each"])
def test_thousands_of_launches_from_several_threads(native: Native, shared: bool) -> None:
    one = Pool(native.launcher, 3)
    with one:
        pass  # started: two threads must not start it twice
    pools = [one if shared else Pool(native.launcher, 3) for _ in range(4)]
    wrong: list[object] = []
    callers = [threading.Thread(target=launches, args=(native, pool, 1000, wrong)) for pool in pools]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_workers_that_fell_asleep_between_launches_come_back(native: Native, pool: Pool) -> None:
    barrier = threading.Barrier(3)  # nobody gets on before all three are there
    with pool:
        for pause in (0.0, 0.0001, 0.0003, 0.001, 0.01) * 40:
            time.sleep(pause)
            native.loop(3, lambda _task, _count: barrier.wait(60) * 0)


def test_the_results_are_right_where_every_core_is_taken(native: Native) -> None:
    spin = "import os, time\nend = time.monotonic() + 60\nwhile time.monotonic() < end and os.getppid() == {}: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin.format(os.getpid())]) for _ in range(4)]
    wrong: list[object] = []
    try:
        pool = Pool(native.launcher, 8)
        launches(native, pool, 500, wrong)
        pool.close()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert wrong == []


# ---- how they end


def test_threads_start_with_the_first_use_and_end_when_the_pool_is_closed_or_dropped(native: Native) -> None:
    before = settled()
    for dropped in (True, False):
        pool = Pool(native.launcher, 5)
        assert tasks() == before
        with pool:
            assert len(tasks()) == len(before) + 4
        if not dropped:
            pool.close()
            assert gone(before)
            with pool:  # and again
                assert native.loop(5, lambda _task, _count: 0) == 0
            assert len(tasks()) == len(before) + 4
            pool.close()
        del pool
        gc.collect()
        assert gone(before)


@pytest.mark.parametrize("pause", [0.0, 0.001])
def test_closing_right_after_a_run_or_later(native: Native, pause: float) -> None:
    before = settled()
    for number in range(200):
        pool = Pool(native.launcher, 2 + number % 3)
        with pool:
            if number % 2:
                native.loop(4, lambda _task, _count: 0)
        time.sleep(pause)
        pool.close()
        pool.close()
    assert gone(before)


def test_idle_threads_use_no_processor(native: Native) -> None:
    pool = Pool(native.launcher, 8)
    with pool:
        native.loop(100, lambda _task, _count: 0)
    time.sleep(0.2)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.02
    pool.close()


def test_the_workers_leave_signals_to_the_program(native: Native, pool: Pool) -> None:
    before = settled()
    barrier = threading.Barrier(3)  # a thread that has not begun blocks everything
    with pool:
        native.loop(3, lambda _task, _count: barrier.wait(60) * 0)
        workers = tasks() - before
    assert len(workers) == 2
    for worker in workers:
        lines = Path(f"/proc/self/task/{worker}/status").read_text().splitlines()
        blocked = int(next(line.split()[1] for line in lines if line.startswith("SigBlk")), 16)
        assert blocked & 1 << 1, "SIGINT"
        assert not blocked & 1 << 10, "SIGSEGV: a crash must be seen"


def test_more_threads_than_there_are_to_have_are_refused(native: Native, engines: Path) -> None:
    with (
        pytest.raises(RunFailed, match="5000 threads cannot be started: Invalid argument"),
        Pool(native.launcher, 5000),
    ):
        pass
    code = f"""
import ctypes, os, resource
from cnncc_runtime.engine_threads import Launcher, Pool
from cnncc_runtime.errors import RunFailed
path = {str(engines / "identity.so")!r}
library = ctypes.CDLL(path)
pool, before = Pool(Launcher(path, library), 500), len(os.listdir("/proc/self/task"))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), -1))
try:
    with pool:
        pass
except RunFailed as exc:
    print(exc.message)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert len(os.listdir("/proc/self/task")) <= before + 1
"""
    done = run_python(code)
    assert "500 threads cannot be started: Resource temporarily unavailable" in done.stdout, done.stdout + done.stderr


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


IN_CHILD = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from tests.runtime.test_engine_threads import Native, launches
from cnncc_runtime.engine_threads import Pool
native = Native(Path({path!r}))
wrong = []
pool = Pool(native.launcher, 3)
launches(native, pool, 50, wrong)
{what}
assert not wrong, wrong
"""


@pytest.mark.parametrize(
    "what",
    [
        "",  # ends without closing
        "threading.Thread(target=launches, args=(native, pool, 10**9, wrong), daemon=True).start(); time.sleep(0.2)",
        "sys.exit(0)",
        """
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert len(os.listdir("/proc/self/task")) == 1
    launches(native, pool, 200, wrong)
    assert len(os.listdir("/proc/self/task")) == 3
    grandchild = os.fork()
    launches(native, pool, 200, wrong)
    if grandchild:
        assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
    sys.exit(len(wrong))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
launches(native, pool, 200, wrong)
""",
    ],
    ids=["end", "end amid a run", "exit", "fork"],
)
def test_a_process_ends_and_forks_as_it_likes(engines: Path, what: str) -> None:
    done = run_python(IN_CHILD.format(path=str(engines / "identity.so"), what=what))
    assert done.returncode == 0, done.stderr
