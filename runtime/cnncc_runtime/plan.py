"""A plan that is open on a GPU: its engine, its buffers, and what TensorRT or TensorRT-RTX says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.bundle import Bundle, Manifest
from cnncc_runtime.cuda_device import CudaDevice
from cnncc_runtime.errors import BundleRefused, RunFailed
from cnncc_runtime.gpu import HostGpu
from cnncc_runtime.jit_cache import JitCache
from cnncc_runtime.plan_library import COMPATIBLE, RTX, Installed, logger_of
from cnncc_runtime.plan_weights import refit
from cnncc_runtime.specs import Feeds, Tensors, TensorSpec

_CUDA_FAILED = re.compile(r"Error Code \d+: Cuda")
"""How the libraries begin what CUDA told them, as opposed to what they found wrong themselves."""


@dataclass(frozen=True)
class _Tensor:
    """An input or output: its buffers, made for the largest batch.

    Attributes:
        spec: Its spec.
        address: On the GPU.
        hosts: Batch size → array in pinned memory; all begin at the same address.
    """

    spec: TensorSpec
    address: int
    hosts: Mapping[int, NDArray[Any]]


@dataclass
class _Execution:
    """What executes an engine.

    Attributes:
        context: The library's.
        batch: The batch size that it was told; None before.
        graph: Launches all of a run at once; None until it was captured.
    """

    context: Any
    batch: int | None = None
    graph: Callable[[], None] | None = None


class Plan:
    """A plan, opened; the GPU must be current whenever it is used.

    Args:
        bundle: Its bundle.
        file: The plan's.
        library: What opens it.
        gpu: The GPU.
        device: The same, in use; it owns the buffers.
        cuda_graph: Whether runs are launched as one CUDA graph.

    Raises:
        BundleRefused: The library does not take the plan, or it is not what the manifest says.
        RunFailed: The GPU has not enough memory.
        TargetUnavailable: The library does not load.
    """

    def __init__(
        self,
        bundle: Bundle,
        file: BinaryIO,
        library: Installed,
        gpu: HostGpu,
        device: CudaDevice,
        *,
        cuda_graph: bool,
    ) -> None:
        manifest = bundle.manifest
        self._trt = library.library.load()
        self._device = device
        self._logger = logger_of(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        if manifest.engine.abi.endswith(COMPATIBLE):
            self._runtime.engine_host_code_allowed = True  # such a plan brings the runtime of its version with it
        if manifest.engine.dla is not None:
            self._runtime.DLA_core = manifest.engine.dla
        self._engine = self._runtime.deserialize_cuda_engine(file.read())
        if self._engine is None:
            raise self._refused(library, str(bundle.path / manifest.engine.file))
        self._check(manifest)
        if manifest.engine.refit:
            with bundle.open(manifest.engine.refit) as weights:
                refit(self._trt, self._engine, self._logger, weights)
        self._jit: JitCache | None = None
        self._compiled: Any = None
        self._config: Any = None
        if library.library.format == RTX:
            digest = manifest.files[manifest.engine.file].sha256
            self._jit = JitCache(digest, gpu.name, str(library))
            self._config = self._runtime_config(self._jit, cuda_graph=cuda_graph)
        # TensorRT-RTX captures graphs by itself
        self._captures = cuda_graph and self._jit is None
        self._inputs = [self._tensor(spec, manifest.batches) for spec in manifest.inputs]
        self._outputs = [self._tensor(spec, manifest.batches) for spec in manifest.outputs]
        self._executions: dict[int, _Execution] = {}
        self._execution(min(manifest.batches, default=0))  # says now what it lacks
        self._ran: set[int] = set()

    def run(self, batch: int, feeds: Feeds) -> Tensors:
        """Run once.

        Raises:
            RunFailed: The engine failed.
        """
        for tensor in self._inputs:
            np.copyto(tensor.hosts[batch], feeds[tensor.spec.name])
        execution = self._execution(batch)
        if execution.graph is not None:
            execution.graph()
        else:
            self._shape(execution, batch)
            self._enqueue_all(execution, batch)
        self._device.synchronize()
        if batch not in self._ran:
            self._ran.add(batch)
            self._keep_compiled()
            if self._captures:  # only now: the first run after a change of shapes sets up what cannot be captured
                execution.graph = self._captured(execution, batch)
        return {tensor.spec.name: tensor.hosts[batch].copy() for tensor in self._outputs}

    def seconds(self, batch: int, feeds: Feeds, runs: int) -> tuple[float, ...]:
        """Return the GPU's time of each run, on inputs that are on it; the first run is not counted.

        Raises:
            RunFailed: The engine failed.
        """
        self._load(batch, feeds)
        execution = _Execution(self._new_context()) if self._captures else self._execution(batch)
        self._shape(execution, batch)
        return tuple(self._device.seconds(lambda: self._enqueue(execution)) for _ in range(runs + 1))[1:]

    def profile(self, batch: int, feeds: Feeds, runs: int) -> tuple[tuple[str, float], ...]:
        """Return the kernels' times; by a context of its own, since a profiler cannot be taken off again.

        Raises:
            RunFailed: The engine failed.
        """
        self._load(batch, feeds)
        execution = _Execution(self._new_context())
        execution.context.profiler = profiler = _profiler_of(self._trt)
        self._shape(execution, batch)
        for run in range(runs + 1):
            self._enqueue(execution)
            self._device.synchronize()
            if run == 0:
                profiler.times.clear()
        return tuple((name, median(times)) for name, times in profiler.times.items())

    def close(self) -> None:
        """Keep what was compiled, and let go of the engine before the memory it uses goes."""
        self._keep_compiled()
        self._executions.clear()
        self._config = self._compiled = self._engine = self._runtime = None

    def _execution(self, batch: int) -> _Execution:
        """Return what runs a batch size: one for all, or one for each graph, which holds its context's state."""
        key = batch if self._captures else 0
        if key not in self._executions:
            self._executions[key] = _Execution(self._new_context())
        return self._executions[key]

    def _load(self, batch: int, feeds: Feeds) -> None:
        for tensor in self._inputs:
            np.copyto(tensor.hosts[batch], feeds[tensor.spec.name])
            self._device.upload(tensor.address, tensor.hosts[batch])
        self._device.synchronize()

    def _enqueue(self, execution: _Execution) -> None:
        if not execution.context.execute_async_v3(self._device.stream):
            raise self._failed("the engine failed")

    def _enqueue_all(self, execution: _Execution, batch: int) -> None:
        for tensor in self._inputs:
            self._device.upload(tensor.address, tensor.hosts[batch])
        self._enqueue(execution)
        for tensor in self._outputs:
            self._device.download(tensor.hosts[batch], tensor.address)

    def _captured(self, execution: _Execution, batch: int) -> Callable[[], None]:
        try:
            return self._device.capture(lambda: self._enqueue_all(execution, batch))
        except RunFailed as exc:
            said = f"the engine cannot be launched as a CUDA graph: {exc.message}"
            raise RunFailed(said, hint="open it without cuda_graph") from exc

    def _shape(self, execution: _Execution, batch: int) -> None:
        """Tell the engine the batch size, where it is not the last run's."""
        if batch == execution.batch:
            return
        context, execution.batch = execution.context, None
        for tensor in self._inputs:
            if not context.set_input_shape(tensor.spec.name, tensor.hosts[batch].shape):
                raise self._failed(f"the engine does not take batch size {batch}")
        for tensor in self._outputs:
            found, wanted = tuple(context.get_tensor_shape(tensor.spec.name)), tensor.hosts[batch].shape
            if found != wanted:  # it would write beyond the buffer
                raise RunFailed(
                    f"the engine's output '{tensor.spec.name}' is {list(found)}, the manifest says {list(wanted)}",
                    hint="build the bundle again",
                )
        execution.batch = batch

    def _runtime_config(self, jit: JitCache, *, cuda_graph: bool) -> Any:
        """Return what TensorRT-RTX compiles and launches kernels by."""
        trt = self._trt
        config = self._engine.create_runtime_config()
        self._compiled = config.create_runtime_cache()
        if kept := jit.read():
            self._compiled.deserialize(kept)  # False where it is another driver's or GPU's: then it is made anew
        config.set_runtime_cache(self._compiled)
        # LAZY would run slower kernels until others are compiled, and nobody could say when
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if cuda_graph:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context(*([] if self._config is None else [self._config]))
        if context is None:
            raise self._failed("the engine cannot be started")
        for tensor in (*self._inputs, *self._outputs):
            context.set_tensor_address(tensor.spec.name, tensor.address)
        return context

    def _keep_compiled(self) -> None:
        if self._jit is not None and self._compiled is not None:
            self._jit.keep(bytes(self._compiled.serialize()))

    def _tensor(self, spec: TensorSpec, batches: tuple[int, ...]) -> _Tensor:
        sizes = sorted(batches) or [0]
        shapes = {size: _shape_of(spec, size) for size in sizes}
        whole = self._device.pinned(shapes[sizes[-1]], spec.dtype)
        flat = whole.reshape(-1)
        hosts = {size: flat[: int(np.prod(shape))].reshape(shape) for size, shape in shapes.items()}
        return _Tensor(spec, self._device.allocate(whole.nbytes), hosts)

    def _check(self, manifest: Manifest) -> None:
        """Refuse a plan whose inputs and outputs are not those of the manifest.

        Raises:
            BundleRefused: Names both.
        """
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {name: (engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT, _dtype(trt, engine, name))
                 for name in names}  # fmt: skip
        wanted = {spec.name: (True, spec.dtype) for spec in manifest.inputs}
        wanted |= {spec.name: (False, spec.dtype) for spec in manifest.outputs}
        if found != wanted or any(engine.get_tensor_location(name) != trt.TensorLocation.DEVICE for name in names):
            raise BundleRefused(
                f"the plan has {_listed(found)}, the manifest says {_listed(wanted)}", hint="build the bundle again"
            )

    def _refused(self, library: Installed, path: str) -> BundleRefused | RunFailed:
        said = self._said()
        if _CUDA_FAILED.search(said):
            return RunFailed(f"{library} does not work on this GPU: {said}", hint="see nvidia-smi; update the driver")
        return BundleRefused(
            f"{library} does not take the plan: {said}", where=[path], hint="build the bundle again, or copy it again"
        )

    def _failed(self, what: str) -> RunFailed:
        return RunFailed(f"{what}: {self._said()}", hint="run `cnncc verify` on the bundle")

    def _said(self) -> str:
        """Return the library's last error, or that it said none."""
        said = str((self._logger.errors[-1:] or ["it does not say why"])[0])
        return said.strip().partition("\n")[0]


def _profiler_of(trt: Any) -> Any:
    """Return a profiler; its ``times`` are seconds by kernel, in the order in which they are first told."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms / 1e3)

    return Profiler()


def _shape_of(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """Return a spec's shape at a batch size.

    Raises:
        BundleRefused: Another size of it depends on the data.
    """
    bound = spec.bind(dict.fromkeys(spec.symbols[:1], batch) if batch else {})
    sizes = tuple(size for size in bound.shape if isinstance(size, int))
    if len(sizes) < len(bound.shape):
        raise BundleRefused(f"the size of {spec} depends on the data: plans are run with sizes that are known")
    return sizes


def _dtype(trt: Any, engine: Any, name: str) -> str:
    try:
        return str(np.dtype(trt.nptype(engine.get_tensor_dtype(name))))
    except TypeError:  # bfloat16 and smaller types are none of NumPy's
        return str(engine.get_tensor_dtype(name))


def _listed(tensors: Mapping[str, tuple[bool, str]]) -> str:
    return ", ".join(f"{'input' if given else 'output'} {name}: {dtype}" for name, (given, dtype) in tensors.items())
