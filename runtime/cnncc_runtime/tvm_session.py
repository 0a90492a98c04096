"""The ``tvm-vm`` session: runs an engine that TVM linked, with libtvm_runtime and no compiler.

Forking is safe between runs: a session opened before ``os.fork`` works in the child, which starts threads of its own,
unless another thread was in the middle of a run. The engine's weights are shared by all sessions of the same engine
in a process; its threads are not, so that sessions run side by side.

The engine file and the file of weights, which is mapped into memory, must not be rewritten in place while they are
loaded (no shared library may); `cnncc` replaces bundles whole, so that a loaded engine keeps the files it had.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime import tvm_runtime
from cnncc_runtime.bundle import Bundle, EngineRecord
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.elf import Elf, parse_elf
from cnncc_runtime.engine_threads import Launcher, Pool
from cnncc_runtime.errors import BundleRefused, EngineMismatch, RunFailed
from cnncc_runtime.opened import OpenedEngine
from cnncc_runtime.session import engine_mismatch
from cnncc_runtime.specs import Feeds, Tensors
from cnncc_runtime.weights import ALIGNMENT, MappedWeights, aligned_empty

_CPU, _POOLED = 1, 2  # DLDeviceType kDLCPU, tvm::runtime::memory::AllocatorType kPooled
_COPIED = 64 << 10
"""Bytes up to which an input is copied anyhow: that takes less time than to find out whether it must be."""


class TvmSession(OpenedEngine):
    """A `cnncc_runtime.session.Session` over TVM's virtual machine.

    Args:
        bundle: Its bundle.
        engine: The engine file, already verified; what this handle shows is what gets loaded.
        threads: Cores that a run may use.

    Raises:
        EngineMismatch: Built for another machine, other ISA features or another TVM.
        TargetUnavailable: libtvm_runtime is missing.
        BundleRefused: The engine is damaged, or holds not what the manifest says.
    """

    def __init__(self, bundle: Bundle, engine: BinaryIO, *, threads: int) -> None:
        manifest = bundle.manifest
        elf = parse_elf(engine, manifest.engine.file)
        check_elf(elf, host_machine(), manifest.engine.file)
        if mismatch := engine_mismatch(manifest.target):
            raise mismatch
        check_abi(manifest.engine.abi)
        self._runtime = tvm_runtime.load()
        super().__init__(manifest)
        self._threads = threads
        self._names = [spec.name for spec in manifest.inputs]
        self._lock = threading.Lock()
        self._closed = False
        self._record = manifest.engine
        self._engine: _Engine | None = _shared_engine(self._runtime, bundle, engine)
        self._entries = self._start(self._engine, manifest.engine)
        self._pool = Pool(self._engine.launcher, threads)
        _sessions.add(self)

    def _start(self, engine: _Engine, record: EngineRecord) -> dict[int, _Entry]:
        taken = record.weights.entries if record.weights else {}
        try:
            machine = engine.machine()
            arity = machine["get_function_arity"]
            entries = {
                batch: _Entry(machine[name], engine, taken.get(batch, ())) for batch, name in record.entries.items()
            }
            wanted = {batch: int(arity(name)) for batch, name in record.entries.items()}
        except Exception as exc:  # whatever TVM raises: there is no other boundary
            raise BundleRefused(
                f"the engine cannot be started: {first_line(exc)}", hint="build the bundle again"
            ) from exc
        for batch, entry in entries.items():
            given = len(self._inputs) + len(entry.taken)
            if given != wanted[batch]:
                raise BundleRefused(
                    f"the engine's '{record.entries[batch]}' takes {wanted[batch]} inputs and weights, the manifest "
                    f"lists {given}",
                    hint="build the bundle again",
                )
        return entries

    @property
    def threads(self) -> int:
        """Cores that a run uses at most."""
        return self._threads

    def run(self, feeds: Feeds) -> Tensors:
        """Run the engine once; see `cnncc_runtime.session.Session.run`.

        Raises:
            DataRefused: An input is missing, unknown, or of another dtype or shape.
            RunFailed: The batch size was not built, the session is closed, or the engine failed.
        """
        self._check_open()
        batch = self._admission.batch(feeds)
        with self._lock:
            self._check_open()
            with self._pool:
                return self._call(batch, [feeds[name] for name in self._names])

    def profile(self, feeds: Feeds, runs: int) -> tuple[tuple[str, float], ...]:
        """Run the engine with a clock around each kernel.

        Args:
            feeds: As `run` takes them.
            runs: How often; the first one warms up and is not counted.

        Returns:
            Kernel calls in order of execution: the kernel's name, and the median of its seconds. The clock itself adds
            a microsecond or two to each.

        Raises:
            DataRefused: As `run`.
            RunFailed: As `run`.
        """
        self._check_open()
        batch = self._admission.batch(feeds)
        with self._lock:
            self._check_open()
            assert self._engine is not None  # it is open
            with self._pool:
                return _profile(self._runtime, self._engine, self._record.entries[batch], self._entries[batch],
                                [feeds[name] for name in self._names], runs)  # fmt: skip

    def _check_open(self) -> None:
        if self._closed:
            raise RunFailed("the session is closed", hint="open the bundle again")

    def _call(self, batch: int, feeds: Sequence[NDArray[Any]]) -> Tensors:
        entry = self._entries[batch]
        try:
            weights = entry.weights(self._runtime)
        except MemoryError as exc:
            raise RunFailed(
                f"no memory is left for the engine's weights: {exc}",
                hint="close other sessions, or compile with a smaller --winograd-growth",
            ) from exc
        try:
            inputs = entry.tensors(self._runtime, feeds)
            result = entry.function(*inputs, *weights)
            found = (result,) if hasattr(result, "__dlpack__") else tuple(result)
            # copies: an engine may return a weight, an input, or memory that the next run reuses
            arrays = [np.array(np.from_dlpack(tensor)) for tensor in found]
        except Exception as exc:  # whatever TVM raises: there is no other boundary
            raise RunFailed(f"the engine failed: {first_line(exc)}", hint="run `cnncc verify` on the bundle") from exc
        if len(arrays) != len(self._outputs):
            raise RunFailed(f"the engine returned {len(arrays)} outputs, the manifest lists {len(self._outputs)}")
        return {spec.name: array for spec, array in zip(self._outputs, arrays, strict=True)}

    def close(self) -> None:
        """Free the engine; arrays that it returned stay valid. Closing twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._pool.close()
            self._entries, self._engine = {}, None
        _sessions.discard(self)
        self._runtime.clear_pools()
        _trim()

    def _after_fork(self) -> None:
        if self._lock.locked():  # by a thread that does not exist here: the virtual machine is mid-run for ever
            self._closed = True  # its memory stays
        self._lock = threading.Lock()


_sessions: weakref.WeakSet[TvmSession] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_sessions):
        session._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def check_elf(elf: Elf, machine: str, name: str) -> None:
    """Refuse an engine file of another machine.

    Raises:
        EngineMismatch: Names both machines.
        BundleRefused: Not a shared library.
    """
    if elf.machine != machine:
        raise EngineMismatch(
            f"built for: {elf.machine}, found: {machine}", where=[name], hint="compile for this device: --device host"
        )
    if elf.kind != "shared":
        raise BundleRefused(f"'{name}' is an ELF {elf.kind} file, not a shared library", hint="build the bundle again")


def check_abi(abi: str) -> None:
    """Refuse an engine of another TVM.

    Raises:
        EngineMismatch: Names both.
    """
    if abi != tvm_runtime.ABI:
        raise EngineMismatch(
            f"built for: {abi or '(unknown)'}, found: {tvm_runtime.ABI}",
            hint="compile again with the cnncc that matches this cnncc-runtime",
        )


def first_line(error: BaseException) -> str:
    """Return the line of an error's text that says something; TVM puts traces and blank lines around it."""
    lines = (line.strip() for line in str(error).splitlines())
    skip = ("Traceback", "File ", "Stack trace", "[bt]", "-----", "0:", "1:")
    return next((line for line in lines if line and not line.startswith(skip)), type(error).__name__)


class _Entry:
    """A function of the engine, its weights, and buffers for inputs that cannot be handed over as they are.

    Weights that are expanded take their memory when the function first runs: of several batch sizes, few may be used.
    """

    def __init__(self, function: Any, engine: _Engine, taken: Sequence[int]) -> None:
        self.function = function
        self.taken = taken
        self._engine = engine
        self._weights: list[Any] | None = None
        self._buffers: dict[int, tuple[NDArray[Any], Any]] = {}

    def weights(self, runtime: tvm_runtime.TvmRuntime) -> list[Any]:
        """Return what the function takes after its inputs."""
        if self._weights is None:
            self._weights = [self._engine.tensor(runtime, position) for position in self.taken]
        return self._weights

    def tensors(self, runtime: tvm_runtime.TvmRuntime, arrays: Sequence[NDArray[Any]]) -> list[Any]:
        """Return the engine's view of the inputs, copying what is small or not aligned, contiguous and writable."""
        return [self._tensor(runtime, position, array) for position, array in enumerate(arrays)]

    def _tensor(self, runtime: tvm_runtime.TvmRuntime, position: int, array: NDArray[Any]) -> Any:
        if array.nbytes > _COPIED:
            flags = array.flags
            # DLPack cannot carry read-only arrays
            if flags.c_contiguous and flags.writeable and array.ctypes.data % ALIGNMENT == 0:
                return runtime.from_dlpack(array)
        buffer = self._buffers.get(position)
        if buffer is None:
            empty = aligned_empty(array.shape, array.dtype)
            buffer = self._buffers[position] = (empty, runtime.from_dlpack(empty))
        np.copyto(buffer[0], array)
        return buffer[1]


@dataclass(eq=False)
class _Engine:
    """A loaded engine file and its mapped weights; sessions of the same engine share them."""

    module: Any
    launcher: Launcher
    weights: MappedWeights | None
    _tensors: dict[int, Any] = field(default_factory=dict)

    def machine(self) -> Any:
        """Return a virtual machine of its own for the engine's functions."""
        machine = self.module["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        return machine

    def tensor(self, runtime: tvm_runtime.TvmRuntime, position: int) -> Any:
        """Return the engine's view of one of the weights."""
        found = self._tensors.get(position)
        if found is None:
            assert self.weights is not None  # the manifest's positions were checked against them
            found = self._tensors.setdefault(position, runtime.from_dlpack(self.weights[position]))
        return found


def _profile(
    runtime: tvm_runtime.TvmRuntime,
    engine: _Engine,
    name: str,
    entry: _Entry,
    feeds: Sequence[NDArray[Any]],
    runs: int,
) -> tuple[tuple[str, float], ...]:
    """Return the kernel calls of an entry and the median of their seconds; see `TvmSession.profile`."""
    calls: list[tuple[str, float]] = []
    started = 0.0

    def note(_function: Any, kernel: str, before: bool, *_rest: Any) -> int:
        nonlocal started
        if before:
            started = time.perf_counter()
        else:
            calls.append((str(kernel), time.perf_counter() - started))
        return 0  # go on

    try:
        machine = engine.machine()
        machine["set_instrument"](runtime.function(note))
        arguments = [*entry.tensors(runtime, feeds), *entry.weights(runtime)]
        measured = []
        for _ in range(runs + 1):
            calls.clear()
            machine[name](*arguments)
            measured.append(list(calls))
    except Exception as exc:  # whatever TVM raises: there is no other boundary
        raise RunFailed(f"the engine failed: {first_line(exc)}", hint="run `cnncc verify` on the bundle") from exc
    names = [kernel for kernel, _ in measured[0] if not kernel.startswith("vm.")]
    times = np.median([[seconds for kernel, seconds in one if not kernel.startswith("vm.")] for one in measured[1:]], 0)
    return tuple(zip(names, times.tolist(), strict=True))


_engines: weakref.WeakValueDictionary[tuple[Any, ...], _Engine] = weakref.WeakValueDictionary()
_engines_lock = threading.Lock()
_serial = itertools.count(1)


def _shared_engine(runtime: tvm_runtime.TvmRuntime, bundle: Bundle, file: BinaryIO) -> _Engine:
    manifest = bundle.manifest
    record = manifest.engine.weights
    key = (*(manifest.files[name].sha256 for name in manifest.engine.roles), record.tensors if record else ())
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(bundle.open(record.file)) if record else None
        with _engines_lock:
            engine = _engines.get(key)
            if engine is None:
                mapped = MappedWeights(weights, record) if weights and record else None
                engine = _engines[key] = _Engine(*_module(runtime, file), mapped)
            return engine


def _module(runtime: tvm_runtime.TvmRuntime, file: BinaryIO) -> tuple[Any, Launcher]:
    path = _loadable(file)
    try:
        module = runtime.load_library(path, "so")
        return module, Launcher(path, module)
    except AttributeError as exc:
        raise BundleRefused(
            f"the engine brings no threads: {exc}", where=[file.name], hint="build the bundle again"
        ) from exc
    except Exception as exc:  # whatever TVM raises: there is no other boundary
        raise BundleRefused(
            f"the engine cannot be loaded: {first_line(exc)}", where=[file.name], hint="build the bundle again"
        ) from exc


def _loadable(file: BinaryIO) -> str:
    """Return a path by which the loader opens the very file that was verified, whatever its name shows by now.

    The loader takes equal paths for equal libraries, and file numbers are reused: so every path is spelled apart.
    """
    number = file.fileno()
    folder = "/proc/self/fd"
    if not Path(folder, str(number)).exists():
        return str(file.name)
    spelling = "".join("./" if digit == "1" else "/" for digit in f"{next(_serial):b}")
    return f"{folder}/{spelling}{number}"


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # musl has none, and gives memory back by itself
        ctypes.CDLL(None).malloc_trim(0)
