"""One session with a TVM RPC server, by libtvm_runtime alone: TVM's compiler and its Python client are not imported.

Only `cnncc.compiler.remote.board_process` uses this: a call waits as long as the board takes, and only the end of the
process ends it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.compiler.remote.tracker import Server
from cnncc_runtime import tvm_runtime
from cnncc_runtime.errors import BoardUnavailable, CnnccError, EngineMismatch, RunFailed, UsageError
from cnncc_runtime.tvm_session import first_line

_CPU, _POOLED = 1, 2  # DLDeviceType kDLCPU, tvm::runtime::memory::AllocatorType kPooled
_SESSION_MASK = 128  # tvm/rpc/base.py: RPC_SESS_MASK; device types of a session lie beyond it
_BIG_CORES = 1  # tvm::runtime::threading::ThreadGroup::AffinityMode kBig: the fastest cores first

_REFUSALS = (
    ("cannot find server that matches key", "the server wants a key", "give the tracker's address and --key"),
    ("is not TVM RPC server", "what listens there is no TVM RPC server", "give --key if it is a tracker"),
    ("sock.Connect(addr)", "nobody listens there", "is the tunnel open, and the server started?"),
)
"""Part of TVM's text → what it means, what to do."""

_OTHER_TVM = ("protocol", "version ==")
"""Parts of TVM's texts where a server is of another release: its protocol, or its virtual machine's byte code."""

_FROM_THERE = "RPCError: Error caught"
"""What stands above an error that the server caught and sent."""

_GONE = ("RPCCode::", "Socket ")
"""Parts of TVM's texts where a connection ended: another answer than the one that must come, or none at all."""


class Connection:
    """An open session; what TVM raises while it is used, `failure` translates.

    Args:
        server: Where, from `cnncc.compiler.remote.tracker.find_server`.

    Raises:
        BoardUnavailable: Nobody listens there, or no TVM RPC server does.
        EngineMismatch: The server is of another TVM.
        TargetUnavailable: libtvm_runtime is missing here.
    """

    def __init__(self, server: Server) -> None:
        tvm_runtime.load()
        import tvm_ffi

        self._ffi = tvm_ffi
        try:
            self._session = self._here("rpc.Connect")(server.host, server.port, server.match, False)
        except RuntimeError as exc:
            raise _unreached(server, exc) from exc
        table = self._here("rpc.SessTableIndex")(self._session)
        self._device = tvm_ffi.device((table + 1) * _SESSION_MASK + _CPU, 0)

    def _here(self, name: str) -> Any:
        return self._ffi.get_global_func(name)

    def read(self, path: str) -> bytes:
        """Return a file of the board.

        Raises:
            OSError: It cannot be read.
        """
        try:
            return bytes(self._session["tvm.rpc.server.download"](path))
        except RuntimeError as exc:
            raise OSError(f"{path}: {_said(exc)}") from exc

    def threads(self, wanted: int | None) -> int:
        """Set how many threads TVM's pool over there uses, by default all it has; return how many.

        Raises:
            UsageError: It has fewer.
        """
        most = int(self._session["runtime.NumThreads"]())
        used = wanted or most
        if used > most:
            raise UsageError(
                f"the board's server has {most} threads, not {used}", hint=f"start it with TVM_NUM_THREADS={used}"
            )
        self._session["runtime.config_threadpool"](_BIG_CORES, used)
        return used

    def load(self, engine: bytes) -> Any:
        """Send an engine and start a virtual machine for it."""
        name = "engine.so"
        self._session["tvm.rpc.server.upload"](name, engine)
        machine = self._here("rpc.LoadRemoteModule")(self._session, name)["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        return machine

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a tensor on the board."""
        array = np.ascontiguousarray(array)
        shape, dtype = self._ffi.Shape(list(array.shape)), self._ffi.dtype(str(array.dtype))
        tensor = self._here("runtime.TVMTensorAllocWithScope")(shape, dtype, self._device, None)
        self._here("runtime.TVMTensorCopyFromBytes")(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return tensor

    def download(self, tensor: Any) -> NDArray[Any]:
        """Return a tensor of the board."""
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._here("runtime.TVMTensorCopyToBytes")(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def call(self, machine: Any, entry: str, arguments: Sequence[Any]) -> list[NDArray[Any]]:
        """Run an entry once and return its outputs."""
        machine["set_input"](entry, *arguments)
        machine["invoke_stateful"](entry)
        count = machine["get_output_arity"](entry)
        if count < 0:  # one tensor, no tuple
            return [self.download(machine["get_output"](entry))]
        return [self.download(machine["get_output"](entry, number)) for number in range(count)]

    def time(self, machine: Any, entry: str, runs: int) -> tuple[float, ...]:
        """Return the seconds of each of ``runs`` runs, by the board's clock, after one that is not counted.

        The arguments are those of the last `call`.
        """
        number, wait, zeros, cooldown, flush = 1, 0, 100, 0, 0
        evaluate = self._here("runtime.RPCTimeEvaluator")(
            machine, "invoke_stateful", self._device.dlpack_device_type(), 0, number, runs, wait, zeros, cooldown, 1,
            flush, "",
        )  # fmt: skip
        return struct.unpack(f"={runs}d", evaluate(entry))


ERRORS = (RuntimeError, AttributeError)
"""What TVM raises: where a call fails, and where a server has no such function."""


def failure(exc: Exception) -> CnnccError:
    """Return our error for one of TVM's `ERRORS`."""
    if any(part in str(exc) for part in _OTHER_TVM):
        return _other_tvm(exc)
    if _FROM_THERE not in str(exc) and any(part in str(exc) for part in _GONE):
        return RunFailed("the board went away", hint="is the tunnel open, and is the server still there?")
    return RunFailed(f"the engine cannot be run on the board: {_said(exc)}", hint="see what its server says")


def _unreached(server: Server, exc: Exception) -> CnnccError:
    text = str(exc)
    if any(part in text for part in _OTHER_TVM):
        return _other_tvm(exc)
    for part, meaning, hint in _REFUSALS:
        if part in text:
            return BoardUnavailable(f"{meaning} ({server.host}, port {server.port})", hint=hint)
    return BoardUnavailable(
        f"what listens there does not talk as a TVM RPC server: {first_line(exc)}",
        hint="give --key if it is a tracker, or start it again",
    )


def _other_tvm(exc: Exception) -> EngineMismatch:
    return EngineMismatch(
        f"built for: {tvm_runtime.ABI}, found: a server of another TVM ({_said(exc)})",
        hint="install on the board the apache-tvm that cnncc requires",
    )


def _said(exc: Exception) -> str:
    """Return the line that says something; above what came from a server stands that it did."""
    lines = [line.strip() for line in str(exc).splitlines()]
    return next((line for line in lines if line and not line.startswith(_FROM_THERE)), first_line(exc))
