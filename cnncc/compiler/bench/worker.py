"""The child process that holds one engine: ``python -m cnncc.compiler.bench.worker PARENT_PID``.

It imports one library only, speaks `cnncc.compiler.bench.protocol` on stdin and stdout, and dies with its parent.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np

from cnncc.compiler.bench.adapters import Adapter, Converter, DeviceTimer, Profiler, SelfTimer
from cnncc.compiler.bench.protocol import (
    Command,
    Convert,
    Converted,
    Failed,
    Measure,
    Open,
    Opened,
    Profile,
    Profiled,
    Reply,
    Save,
    Saved,
    Stopped,
    Timed,
    Warm,
)
from cnncc.compiler.bench.statistics import SETTLE_WINDOW, settled
from cnncc.compiler.child import die_with
from cnncc_runtime.errors import CnnccError

_LEAST_WARM_UP_S = 0.3
"""Clocks take tens of milliseconds to rise under load; a warm-up shorter than this may settle before they do."""

_T = TypeVar("_T")


class Worker:
    """Carries out commands on one engine."""

    def __init__(self) -> None:
        self._adapter: Adapter | None = None

    def carry_out(self, command: Command) -> Reply:
        """Carry out one command."""
        if isinstance(command, Convert):
            converter: Converter = _adapter(command.adapter, command.options)
            return Converted(str(converter.convert(Path(command.source), Path(command.folder))))
        if isinstance(command, Open):
            return self._open(command)
        if self._adapter is None:
            return Failed("RunFailed", "the engine is not open yet")
        if isinstance(command, Warm):
            return self._warm(self._adapter, command.seconds)
        if isinstance(command, Measure):
            return self._measure(self._adapter, command)
        if isinstance(command, Profile):
            profiler: Profiler = self._adapter  # type: ignore[assignment]
            return Profiled(profiler.profile(command.runs))
        if isinstance(command, Save):
            return self._save(self._adapter, command)
        return Stopped(_status_bytes("VmHWM"))

    def _open(self, command: Open) -> Reply:
        before = _status_bytes("VmRSS")
        adapter: Adapter = _adapter(command.adapter, command.options)
        version, import_s = _timed(adapter.load)
        with np.load(command.feeds, allow_pickle=False) as arrays:
            feeds = [arrays[str(number)] for number in range(len(command.names))]

        def open_engine() -> None:
            adapter.open(Path(command.path), command.threads)
            adapter.bind(command.names, feeds)

        _, open_s = _timed(open_engine)
        self._adapter = adapter
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the middle of a run is Python's time, not the engine's
        return Opened(version, import_s, open_s, before, getattr(adapter, "clock", ""), getattr(adapter, "note", ""))

    def _warm(self, adapter: Adapter, seconds: float) -> Reply:
        wall: list[float] = []
        cpu: list[float] = []
        started = time.perf_counter()
        while True:
            elapsed = time.perf_counter() - started
            done = settled(wall)
            if (done and elapsed >= _LEAST_WARM_UP_S) or (elapsed >= seconds and wall):
                return Timed(tuple(wall), tuple(cpu), done, 0)
            if _times_itself(adapter):
                found = _by_itself(adapter, 2 * SETTLE_WINDOW)
                wall += found.wall
                cpu += found.cpu
            else:
                _run(adapter, wall, cpu)

    def _measure(self, adapter: Adapter, command: Measure) -> Reply:
        if _times_itself(adapter):
            return _by_itself(adapter, command.runs)
        for _ in range(command.unmeasured):
            adapter.run()
        wall: list[float] = []
        cpu: list[float] = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        for _ in range(command.runs):
            _run(adapter, wall, cpu)
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        device: tuple[float, ...] = ()
        if getattr(adapter, "clock", ""):
            timer: DeviceTimer = adapter  # type: ignore[assignment]
            device = timer.device_times(command.runs)
        return Timed(tuple(wall), tuple(cpu), True, switches, device)

    def _save(self, adapter: Adapter, command: Save) -> Reply:
        outputs = adapter.outputs()
        np.savez(command.path, **{str(number): array for number, array in enumerate(outputs)})  # type: ignore[arg-type]
        return Saved(len(outputs))


def _adapter(reference: str, options: dict[str, str]) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)(options)


def _times_itself(adapter: Adapter) -> bool:
    return hasattr(adapter, "times")


def _by_itself(adapter: Adapter, runs: int) -> Timed:
    """Have a program of its own time itself; its CPU time includes its start."""
    timer: SelfTimer = adapter  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, device = timer.times(runs)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timed(wall, (spent / runs,) * runs, True, after.ru_nivcsw - before.ru_nivcsw, device)


def _run(adapter: Adapter, wall: list[float], cpu: list[float]) -> None:
    cpu_start = time.process_time_ns()
    start = time.perf_counter_ns()
    adapter.run()
    stop = time.perf_counter_ns()
    cpu.append((time.process_time_ns() - cpu_start) / 1e9)
    wall.append((stop - start) / 1e9)


def _timed(action: Callable[[], _T]) -> tuple[_T, float]:
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def _carry_out(worker: Worker, line: bytes) -> Reply:
    try:
        return worker.carry_out(msgspec.json.decode(line, type=Command))
    except CnnccError as exc:
        return Failed(type(exc).__name__, exc.message, exc.where, exc.hint)
    except MemoryError:
        return Failed("RunFailed", "memory ran out", (), "measure a smaller model, or free some memory")
    except ImportError as exc:
        return Failed("DependencyMissing", f"a library cannot be imported: {exc}")
    except Exception as exc:  # whatever the peer's library raises goes to the parent with its name
        return Failed("RunFailed", f"{type(exc).__name__}: {exc}")


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer commands until told to stop, until one fails, or until the parent closes the pipe."""
    worker = Worker()
    for line in source:
        reply = _carry_out(worker, line)
        sink.write(msgspec.json.encode(reply) + b"\n")
        sink.flush()
        if isinstance(reply, Failed | Stopped):
            return


def main() -> None:
    """Run a worker on stdin and stdout."""
    die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native libraries print goes to stderr, not into the protocol
    serve(sys.stdin.buffer, sink)
    sink.flush()
    os._exit(0)  # thread pools of some libraries crash or hang in their destructors


if __name__ == "__main__":
    main()
