"""How a worker runs peers on a GPU. Each takes its inputs from the host and brings its outputs back: that is a run.

What is copied once and then stays on the GPU, is timed apart (`cnncc.compiler.bench.adapters.DeviceTimer`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnncc.compiler.bench.adapters import Array, named
from cnncc_runtime.errors import ModelRefused, TargetUnavailable

CUDA_EVENTS = "CUDA events"
HOST_CLOCK = "the host's clock"

_CUDA = "CUDAExecutionProvider"
_LAYOUT_RUNS = 10
"""Runs that a layout is chosen by, after as many that are not timed."""


class OnnxRuntimeCudaAdapter:
    """ONNX Runtime on the GPU, and nowhere else: a model of which it would compute a part on the CPU is refused.

    Args:
        options: ``gpu``: the device, in CUDA's order.
    """

    clock = HOST_CLOCK  # from launch to completion: it gives no stream to put events into

    def __init__(self, options: dict[str, str]) -> None:
        self._gpu = int(options.get("gpu", "0"))
        self._session: Any = None
        self._binding: Any = None
        self._feeds: dict[str, Array] = {}

    def load(self) -> str:
        """Import ONNX Runtime and return its version."""
        import onnxruntime

        if _CUDA not in onnxruntime.get_available_providers():
            raise TargetUnavailable(
                f"ONNX Runtime {onnxruntime.__version__} is built without CUDA",
                hint="pip install onnxruntime-gpu into an environment of its own, and name its Python in "
                "CNNCC_BENCH_PYTHON_ORT_CUDA",
            )
        if preload := getattr(onnxruntime, "preload_dlls", None):
            preload()  # CUDA's libraries, where they came as Python packages
        return str(onnxruntime.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open an ``.onnx`` file."""
        self._session = open_without_fallback(path, _CUDA, {"device_id": self._gpu, "use_tf32": 0}, threads)

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Name the inputs as the graph does, and hold copies of them on the GPU."""
        import onnxruntime

        self._feeds = named([value.name for value in self._session.get_inputs()], names, feeds)
        self._binding = self._session.io_binding()
        for name, array in self._feeds.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", self._gpu)
            self._binding.bind_ortvalue_input(name, value)
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name, "cuda", self._gpu)

    def run(self) -> Any:
        """Run the session on host arrays."""
        return self._session.run(None, self._feeds)

    def device_times(self, runs: int) -> tuple[float, ...]:
        """Time it on inputs that are on the GPU, leaving the outputs there."""
        return tuple(_seconds(lambda: self._session.run_with_iobinding(self._binding)) for _ in range(runs))

    def outputs(self) -> list[Array]:
        """Return the outputs in the graph's order."""
        return list(self.run())


def open_without_fallback(path: Path, provider: str, options: dict[str, Any], threads: int) -> Any:
    """Open a session of ONNX Runtime that computes everything with one provider.

    Args:
        path: An ``.onnx`` file.
        provider: Any but the CPU's.
        options: Of the provider.
        threads: For what is done on the host.

    Raises:
        ModelRefused: It would leave a part to the CPU.
        TargetUnavailable: The provider does not start here.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it goes on without a provider: here it does not
            session = onnxruntime.InferenceSession(str(path), settings, providers=[(provider, options)])
    except Exception as exc:  # its own exceptions have no common base
        if "fallback to CPU EP" not in str(exc):
            raise
        raise ModelRefused(
            f"ONNX Runtime would compute a part of the model on the CPU, with {provider} asked for",
            hint="it lacks an operator or a type there, or its libraries do not load; leave it out",
        ) from exc
    if session.get_providers()[:1] != [provider]:
        raise TargetUnavailable(f"ONNX Runtime does not start {provider} here, only {session.get_providers()}")
    return session


class TorchCudaAdapter:
    """PyTorch on the GPU, from an exported program; float32 is float32, not TF32.

    Args:
        options: ``gpu`` (in CUDA's order), ``precision`` (``fp16`` and ``bf16`` are computed in) and ``compile``
            (a mode of `torch.compile`).
    """

    clock = CUDA_EVENTS

    def __init__(self, options: dict[str, str]) -> None:
        self._device = f"cuda:{options.get('gpu', '0')}"
        self._precision = options.get("precision", "")
        self._mode = options.get("compile", "")
        self._module: Any = None
        self._structure: Any = None
        self._host: list[Any] = []
        self._on_gpu: list[Any] = []
        self.note = f"mode {self._mode}" if self._mode else ""

    def load(self) -> str:
        """Import PyTorch and return its version."""
        import torch

        if not torch.cuda.is_available():
            raise TargetUnavailable(
                f"PyTorch {torch.__version__} finds no GPU",
                hint="install a build with CUDA; where it has an environment of its own, name its Python in "
                "CNNCC_BENCH_PYTHON_TORCH_CUDA",
            )
        return str(torch.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open a ``.pt2`` archive and move it to the GPU."""
        import torch
        from torch.export.passes import move_to_device_pass

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        torch.cuda.set_device(self._device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True  # shapes never change here
        program = move_to_device_pass(torch.export.load(path), self._device)  # cnncc's own, as in `TorchAdapter`
        self._structure = program.call_spec.in_spec
        module: Any = program.module()
        self._module = module.to(self._type) if self._type else module

    @property
    def _type(self) -> Any:
        import torch

        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self._precision)

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Hold the inputs on the host, where the GPU can fetch them, and on the GPU; choose the faster layout."""
        import torch

        del names  # programs take positions
        self._host = [torch.from_numpy(np.ascontiguousarray(array)).pin_memory() for array in feeds]
        self._on_gpu = self._upload()
        if self._mode:
            import torch._inductor.config as inductor

            inductor.freezing = True
            self._module = torch.compile(self._module, mode=self._mode)
            self.run()  # torch.compile compiles on the first run: that belongs to opening, not to running
            return
        plain = self._typical()
        self._module = self._module.to(memory_format=torch.channels_last)
        self._on_gpu = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in self._on_gpu]
        if self._typical() < plain:
            self.note = "channels last"
            return
        self._module = self._module.to(memory_format=torch.contiguous_format)
        self._on_gpu = [t.contiguous() for t in self._on_gpu]

    def run(self) -> Any:
        """Copy the inputs, call the module and copy its outputs."""
        return self._leaves(self._call(self._upload()))

    def device_times(self, runs: int) -> tuple[float, ...]:
        """Time the module between two events, its inputs on the GPU."""
        import torch

        event: Any = torch.cuda.Event
        found = []
        for _ in range(runs):
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            self._call(self._on_gpu)
            end.record()
            end.synchronize()
            found.append(float(start.elapsed_time(end)) / 1e3)
        return tuple(found)

    def outputs(self) -> list[Array]:
        """Return the outputs, flattened."""
        return [np.ascontiguousarray(leaf) for leaf in self.run()]

    def _upload(self) -> list[Any]:
        import torch

        moved = [tensor.to(self._device, non_blocking=True) for tensor in self._host]
        if self._type:
            moved = [tensor.to(self._type) if tensor.is_floating_point() else tensor for tensor in moved]
        if self.note == "channels last":
            moved = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in moved]
        return moved

    def _call(self, tensors: list[Any]) -> Any:
        from torch.utils import _pytree as pytree

        args, kwargs = pytree.tree_unflatten(tensors, self._structure)
        return self._module(*args, **kwargs)

    def _leaves(self, outputs: Any) -> list[Array]:
        from torch.utils import _pytree as pytree

        leaves = pytree.tree_leaves(outputs)
        return [(leaf.float() if leaf.dtype == self._type else leaf).cpu().numpy() for leaf in leaves]

    def _typical(self) -> float:
        self.device_times(_LAYOUT_RUNS)
        return float(np.median(self.device_times(_LAYOUT_RUNS)))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start) / 1e9
