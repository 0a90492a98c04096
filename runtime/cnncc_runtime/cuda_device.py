"""A GPU as a session uses it: its context, one stream, memory, events and graphs, by the driver's own interface.

No CUDA runtime library and no framework is needed: ``cuda-bindings`` calls the driver. The context is the device's
primary one, which every library of the process shares; it is made current around each use and the caller's is put
back, so that a session does not disturb a framework beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import math
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cnncc_runtime.errors import RunFailed, TargetUnavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

BINDINGS = "cuda-bindings"
INSTALL_BINDINGS = f"pip install {BINDINGS}"

_NON_BLOCKING = 1  # cuda.h: CU_STREAM_NON_BLOCKING: does not wait for the default stream, which others may use


def has_bindings() -> bool:
    """Whether ``cuda-bindings`` is installed; imports nothing of it but its empty parents."""
    try:
        return importlib.util.find_spec("cuda.bindings.driver") is not None
    except ModuleNotFoundError:
        return False


class CudaDevice:
    """A GPU, in use; ``with device:`` makes it the thread's current one.

    Args:
        index: In CUDA's order.

    Raises:
        TargetUnavailable: ``cuda-bindings`` or the driver is missing, or no context can be made.
    """

    def __init__(self, index: int) -> None:
        self._driver = _driver()
        self._success = self._driver.CUresult.CUDA_SUCCESS
        self._held = ExitStack()  # undone in reverse order
        try:
            self._call(self._driver.cuInit, 0)
            device = self._call(self._driver.cuDeviceGet, index)
            self._context = self._call(self._driver.cuDevicePrimaryCtxRetain, device)
        except RunFailed as exc:
            raise TargetUnavailable(f"GPU {index} cannot be used: {exc.message}", hint=exc.hint) from exc
        self._device: Any = device
        with self:
            self._stream = self._call(self._driver.cuStreamCreate, _NON_BLOCKING)
        self._held.callback(self._driver.cuStreamDestroy, self._stream)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def __enter__(self) -> Self:
        """Make the GPU current."""
        self._call(self._driver.cuCtxPushCurrent, self._context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make current what was before."""
        self._driver.cuCtxPopCurrent()

    def allocate(self, size: int) -> int:
        """Return the address of memory of the GPU, freed with the device.

        Args:
            size: Bytes.

        Raises:
            RunFailed: There is not enough.
        """
        address = int(self._call(self._driver.cuMemAlloc, max(size, 1)))
        self._held.callback(self._driver.cuMemFree, address)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Return an array in pinned memory of the host, which the GPU copies from and to without help; freed with it.

        Raises:
            RunFailed: There is not enough.
        """
        import numpy as np

        count = math.prod(shape)
        size = max(count * np.dtype(dtype).itemsize, 1)
        address = int(self._call(self._driver.cuMemHostAlloc, size, 0))
        self._held.callback(self._driver.cuMemFreeHost, address)
        raw = memoryview((ctypes.c_uint8 * size).from_address(address))
        return np.frombuffer(raw, np.dtype(dtype), count).reshape(shape)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a pinned array to the GPU.

        Raises:
            RunFailed: The driver refuses.
        """
        self._call(self._driver.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Enqueue a copy from the GPU to a pinned array.

        Raises:
            RunFailed: The driver refuses.
        """
        self._call(self._driver.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """Wait for all that was enqueued.

        Raises:
            RunFailed: Some of it failed.
        """
        self._call(self._driver.cuStreamSynchronize, self._stream)

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the seconds between two events on the stream around what is enqueued; waits for it.

        Args:
            work: Enqueues it.

        Raises:
            RunFailed: Some of it failed.
        """
        with ExitStack() as events:
            first, last = (self._event(events) for _ in range(2))
            self._call(self._driver.cuEventRecord, first, self._stream)
            work()
            self._call(self._driver.cuEventRecord, last, self._stream)
            self._call(self._driver.cuEventSynchronize, last)
            return float(self._call(self._driver.cuEventElapsedTime, first, last)) / 1e3

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that launches what is enqueued as one CUDA graph; it is freed with the device.

        Args:
            work: Enqueues it; nothing of it runs now.

        Raises:
            RunFailed: Something in it cannot be captured.
        """
        driver = self._driver
        # thread-local: what other threads do to the GPU meanwhile is none of this capture's business
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(driver.cuStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            status, graph = driver.cuStreamEndCapture(self._stream)  # the stream would stay in capture
            if status == self._success:
                driver.cuGraphDestroy(graph)
            raise
        graph = self._call(driver.cuStreamEndCapture, self._stream)
        try:
            executable = self._call(driver.cuGraphInstantiate, graph, 0)
        finally:
            driver.cuGraphDestroy(graph)
        self._held.callback(driver.cuGraphExecDestroy, executable)
        return lambda: self._call(driver.cuGraphLaunch, executable, self._stream)

    def close(self) -> None:
        """Free everything; arrays of `pinned` must not be used any more. Closing twice is harmless."""
        if self._device is None:
            return
        device, self._device = self._device, None
        with contextlib.suppress(RunFailed), self:  # a context that died of a kernel took all that was in it along
            self._held.close()
        self._driver.cuDevicePrimaryCtxRelease(device)

    def _event(self, held: ExitStack) -> Any:
        event = self._call(self._driver.cuEventCreate, 0)
        held.callback(self._driver.cuEventDestroy, event)
        return event

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != self._success:
            raise self._failure(function.__name__, status)
        return values[0] if values else None

    def _failure(self, function: str, status: Any) -> RunFailed:
        _, name = self._driver.cuGetErrorName(status)
        _, text = self._driver.cuGetErrorString(status)
        said = f"{(name or b'an unknown error').decode()}: {(text or b'the driver does not know it').decode()}"
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            _, free, total = self._driver.cuMemGetInfo()
            return RunFailed(
                f"the GPU is out of memory ({free >> 20} of {total >> 20} MiB are free)",
                hint="close other programs on it, or compile for smaller batches",
            )
        return RunFailed(f"{function} failed: {said}", hint="open the bundle again; if that fails too, see nvidia-smi")


def _driver() -> Any:
    """Return the bindings of the driver.

    Raises:
        TargetUnavailable: They or the driver are not installed.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as exc:
        raise TargetUnavailable(f"{BINDINGS} does not load: {exc}", hint=INSTALL_BINDINGS) from exc
    try:
        driver.cuDriverGetVersion()
    except Exception as exc:  # its finder of libraries has errors of its own
        raise TargetUnavailable("this machine has no NVIDIA driver", hint="install the driver of its GPU") from exc
    return driver
