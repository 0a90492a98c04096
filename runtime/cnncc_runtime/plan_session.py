"""The session of plans: runs what TensorRT or TensorRT-RTX built, on the GPU that it was built for.

Inputs are copied into pinned memory, from there to the GPU, and the outputs back; buffers are made once, for the
largest batch. As one CUDA graph (``cuda_graph``) all of that is a single launch, captured after a batch size's
first run.

CUDA does not survive a fork: a session works in the process that opened it.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import ExitStack
from typing import BinaryIO

from cnncc_runtime.bundle import Bundle, Manifest
from cnncc_runtime.cuda_device import CudaDevice
from cnncc_runtime.errors import EnvironmentMissing, RunFailed
from cnncc_runtime.gpu import HostGpu, host_gpus
from cnncc_runtime.opened import OpenedEngine
from cnncc_runtime.plan import Plan
from cnncc_runtime.plan_library import Installed, opener
from cnncc_runtime.session import engine_mismatch
from cnncc_runtime.specs import Feeds, Tensors


class PlanSession(OpenedEngine):
    """A `cnncc_runtime.session.Session` on a GPU.

    Args:
        bundle: Its bundle.
        engine: The plan, already verified.
        threads: Not used: one thread enqueues, the GPU computes.
        cuda_graph: Whether runs are launched as one CUDA graph.

    Raises:
        EngineMismatch: Built for another GPU, or by another version of the library.
        TargetUnavailable: The library, the driver or the bindings of the driver are missing, or too old.
        BundleRefused: The library does not take the plan, or it is not what the manifest says.
        RunFailed: The GPU has not enough memory.
    """

    def __init__(self, bundle: Bundle, engine: BinaryIO, *, threads: int, cuda_graph: bool = False) -> None:
        del threads
        manifest = bundle.manifest
        super().__init__(manifest)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._gpu, library = _preflight(manifest)
        held = ExitStack()
        with held:
            self._device = CudaDevice(self._gpu.index)
            held.callback(self._device.close)
            with self._device:
                self._plan = Plan(bundle, engine, library, self._gpu, self._device, cuda_graph=cuda_graph)
            # without a reference to the session, which is to be collected when nobody uses it
            self._close = weakref.finalize(self, _close, self._plan, self._device, self._process)
            held.pop_all()

    @property
    def threads(self) -> int:
        """Cores that a run uses: the one that enqueues."""
        return 1

    @property
    def gpu(self) -> HostGpu:
        """The GPU that runs it."""
        return self._gpu

    def run(self, feeds: Feeds) -> Tensors:
        """Run the engine once; see `cnncc_runtime.session.Session.run`.

        Raises:
            DataRefused: An input is missing, unknown, or of another dtype or shape.
            RunFailed: The batch size was not built, the session is closed, or the engine failed.
        """
        batch = self._admission.batch(feeds)
        with self._lock:
            self._check_open()
            with self._device:
                return self._plan.run(batch, feeds)

    def device_times(self, feeds: Feeds, runs: int) -> tuple[float, ...]:
        """Return the seconds that the GPU computes, between two CUDA events: without copies, and without CUDA graphs.

        Args:
            feeds: As `run` takes them.
            runs: How many are timed, after one that is not.

        Raises:
            DataRefused: As `run`.
            RunFailed: As `run`.
        """
        batch = self._admission.batch(feeds)
        with self._lock:
            self._check_open()
            with self._device:
                return self._plan.seconds(batch, feeds, runs)

    def profile(self, feeds: Feeds, runs: int) -> tuple[tuple[str, float], ...]:
        """Run the engine with a clock around each kernel.

        Args:
            feeds: As `run` takes them.
            runs: How often; the first one warms up and is not counted.

        Returns:
            Kernels in order of execution: the name, and the median of its seconds.

        Raises:
            DataRefused: As `run`.
            RunFailed: As `run`.
        """
        batch = self._admission.batch(feeds)
        with self._lock:
            self._check_open()
            with self._device:
                return self._plan.profile(batch, feeds, runs)

    def close(self) -> None:
        """Free the engine; arrays that it returned stay valid. Closing twice is harmless."""
        with self._lock:
            self._close()

    def _check_open(self) -> None:
        if not self._close.alive:
            raise RunFailed("the session is closed", hint="open the bundle again")
        if os.getpid() != self._process:
            raise RunFailed("the session was opened before a fork, and CUDA does not survive one",
                            hint="open the bundle in the process that runs it")  # fmt: skip


def _close(plan: Plan, device: CudaDevice, process: int) -> None:
    if os.getpid() == process:  # else nothing of it is this process's
        with device:
            plan.close()
        device.close()


def _preflight(manifest: Manifest) -> tuple[HostGpu, Installed]:
    """Return the GPU and the library that run an engine; nothing of the plan was looked at yet.

    Raises:
        EnvironmentMissing: One of them is not here.
    """
    if mismatch := engine_mismatch(manifest.target):
        raise mismatch
    found = opener(manifest.engine)
    if isinstance(found, EnvironmentMissing):
        raise found
    return next(gpu for gpu in host_gpus() if gpu.runs(manifest.target.gpu)), found
