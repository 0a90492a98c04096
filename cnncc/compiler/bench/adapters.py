"""How a worker runs each kind of engine; nothing heavy is imported until an adapter is told to.

An adapter is told four things in order: ``load`` the library, ``open`` an engine, ``bind`` the inputs, then ``run``
any number of times. What a user would do once is done in ``bind``; ``run`` is what is timed. A library that reads a
form of its own has an adapter that makes it, too: ``convert``, once per model, in a process that ends afterwards.

Everybody computes in float32, or in int8 where a model or its name says so (`Subject.precision`), with as many threads
as they are told, and reports to nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.errors import ModelRefused, RunFailed

Array = NDArray[Any]


class Adapter(Protocol):
    """One way to run an engine. Made with its options."""

    def load(self) -> str:
        """Import the library and return its version."""
        ...

    def open(self, path: Path, threads: int) -> None:
        """Open an engine that computes with so many threads."""
        ...

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Take the inputs, in the model's order."""
        ...

    def run(self) -> Any:
        """Compute once; wait for the result."""
        ...

    def outputs(self) -> list[Array]:
        """Compute once and return the outputs, in the model's order."""
        ...


class Converter(Protocol):
    """What an adapter has besides if its library reads a form of its own."""

    def convert(self, source: Path, folder: Path) -> Path:
        """Make that form from a model; write into ``folder`` alone and return what `Adapter.open` takes."""
        ...


class Profiler(Protocol):
    """What an adapter has besides if its engines can be timed kernel by kernel."""

    def profile(self, runs: int) -> tuple[tuple[str, float], ...]:
        """Return kernel calls in order of execution: the kernel's name, and the median of its seconds."""
        ...


class DeviceTimer(Protocol):
    """What an adapter has besides if its engine computes on a GPU: the time of the engine alone."""

    @property
    def clock(self) -> str:
        """By what it is timed; empty where it is not."""
        ...

    def device_times(self, runs: int) -> tuple[float, ...]:
        """Return seconds of each of ``runs`` runs on inputs that lie on the GPU, the outputs staying there."""
        ...


class SelfTimer(DeviceTimer, Protocol):
    """What an adapter has besides if its engine runs in a program of its own, which times itself."""

    def times(self, runs: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return seconds of each of ``runs`` runs, with copies to and from the GPU, and without."""
        ...


class CnnccAdapter:
    """A bundle, through the runtime alone, as on a device.

    Args:
        options: ``unverified``, if anything, opens a bundle whose parity is pending; ``gpu`` is the device that an
            engine for GPUs must run on, in CUDA's order; ``cuda_graph``, if anything, launches it as one graph.
    """

    def __init__(self, options: dict[str, str]) -> None:
        self._unverified = bool(options.get("unverified"))
        self._gpu = options.get("gpu", "")
        self._cuda_graph = bool(options.get("cuda_graph"))
        self.note = "launched as a CUDA graph; the engine alone is not" if self._cuda_graph else ""
        self._session: Any = None
        self._feeds: dict[str, Array] = {}

    def load(self) -> str:
        """Import the runtime and return its version."""
        import cnncc_runtime.session

        return cnncc_runtime.__version__

    def open(self, path: Path, threads: int) -> None:
        """Open the bundle."""
        import cnncc_runtime.session

        session = cnncc_runtime.session.open(
            path, threads=threads, allow_unverified=self._unverified, cuda_graph=self._cuda_graph
        )
        self._session = session.__enter__()
        if getattr(session, "apart", False):
            self.note = "through pipes; its process is not in the peak RSS"
        gpu = getattr(session, "gpu", None)
        if self._gpu and gpu is not None and str(gpu.index) != self._gpu:
            raise RunFailed(f"the engine runs on GPU {gpu.index}, its peers on GPU {self._gpu}")

    @property
    def clock(self) -> str:
        """CUDA's events, where the engine is for GPUs."""
        return "CUDA events" if hasattr(self._session, "device_times") else ""

    def device_times(self, runs: int) -> tuple[float, ...]:
        """Time the engine alone, on inputs that lie on the GPU."""
        return self._session.device_times(self._feeds, runs)  # type: ignore[no-any-return]

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Name the inputs as the bundle does."""
        self._feeds = named([spec.name for spec in self._session.inputs], names, feeds)

    def run(self) -> Any:
        """Run the engine."""
        return self._session.run(self._feeds)

    def profile(self, runs: int) -> tuple[tuple[str, float], ...]:
        """Time the engine kernel by kernel."""
        return self._session.profile(self._feeds, runs)  # type: ignore[no-any-return]

    def outputs(self) -> list[Array]:
        """Return the outputs in the manifest's order."""
        return list(self.run().values())


class OnnxRuntimeAdapter:
    """ONNX Runtime on the CPU with all its optimizations."""

    def __init__(self, options: dict[str, str]) -> None:
        del options  # it has none
        self._session: Any = None
        self._feeds: dict[str, Array] = {}

    def load(self) -> str:
        """Import ONNX Runtime and return its version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open an ``.onnx`` file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Name the inputs as the graph does."""
        self._feeds = named([value.name for value in self._session.get_inputs()], names, feeds)

    def run(self) -> Any:
        """Run the session."""
        return self._session.run(None, self._feeds)

    def outputs(self) -> list[Array]:
        """Return the outputs in the graph's order."""
        return list(self.run())


class OnnxRuntimeInt8Adapter(OnnxRuntimeAdapter):
    """ONNX Runtime on a model that its own tool quantized."""

    def convert(self, source: Path, folder: Path) -> Path:
        """Make an ``.onnx`` file in int8 of one in float32, or of one with our Q/DQ."""
        from cnncc.compiler.bench.ort_int8 import convert

        return convert(source, folder)


class OpenVinoAdapter:
    """OpenVINO on the CPU, one stream, for latency; a model with Q/DQ it multiplies in int8."""

    def __init__(self, options: dict[str, str]) -> None:
        del options  # it has none
        self._request: Any = None
        self._count = 0
        self._feeds: list[Array] = []

    def load(self) -> str:
        """Import OpenVINO and return its version."""
        # Importing openvino reports to its maker wherever this package is found; openvino goes without where it is not.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino

        return str(openvino.__version__).partition("-")[0]

    def open(self, path: Path, threads: int) -> None:
        """Open an ``.onnx`` file."""
        import openvino

        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # else a CPU with bfloat16 computes in that
        }
        compiled = openvino.Core().compile_model(str(path), "CPU", config)
        self._request = compiled.create_infer_request()
        self._count = len(compiled.outputs)

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Hand the inputs over where they lie."""
        import openvino

        inputs = self._request.model_inputs
        feeds_by_name = named([port.any_name for port in inputs], names, feeds)
        for position, port in enumerate(inputs):
            array = np.ascontiguousarray(feeds_by_name[port.any_name])
            self._feeds.append(array)  # OpenVINO does not keep it alive
            self._request.set_input_tensor(position, openvino.Tensor(array, shared_memory=True))

    def run(self) -> Any:
        """Run the request."""
        return self._request.infer()

    def outputs(self) -> list[Array]:
        """Return the outputs in the graph's order."""
        self.run()
        return [self._request.get_output_tensor(n).data.copy() for n in range(self._count)]


class MnnAdapter:
    """MNN on the CPU, by its `Module` interface, at high precision (float32 throughout)."""

    def __init__(self, options: dict[str, str]) -> None:
        del options  # it has none
        self._runtime: Any = None
        self._module: Any = None
        self._feeds: list[Any] = []

    def convert(self, source: Path, folder: Path) -> Path:
        """Make an ``.mnn`` file of an ``.onnx`` one."""
        # The command mnnconvert installs a package and sends what it converted to its maker; this is what it calls.
        import _tools

        made = folder / "model.mnn"
        _tools.mnnconvert(
            ["mnnconvert", "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(made), "--bizCode", "cnncc"]
        )
        return _converted(made, "MNN")

    def load(self) -> str:
        """Import MNN and return its version."""
        import MNN

        return str(MNN.version())

    def open(self, path: Path, threads: int) -> None:
        """Open an ``.mnn`` file."""
        import MNN

        # numbers of threads given to load_module_from_file itself are ignored
        config = {"backend": "CPU", "precision": "high", "numThread": threads}
        self._runtime = MNN.nn.create_runtime_manager((config,))
        self._module = MNN.nn.load_module_from_file(
            str(path), [], [], runtime_manager=self._runtime, shape_mutable=False
        )

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Turn the inputs into MNN's variables."""
        import MNN

        wanted = self._module.get_info()["inputNames"]
        feeds_by_name = named(wanted, names, feeds)
        kinds = {"float32": MNN.expr.float, "int32": MNN.expr.int}
        for name in wanted:
            array = feeds_by_name[name]
            if str(array.dtype) not in kinds:
                raise ModelRefused(f"inputs of {array.dtype} cannot be given to MNN")
            self._feeds.append(MNN.expr.const(array, list(array.shape), MNN.expr.NCHW, kinds[str(array.dtype)]))

    def run(self) -> Any:
        """Run the module; reading is what waits for the results."""
        return [output.read() for output in self._module.onForward(self._feeds)]

    def outputs(self) -> list[Array]:
        """Return the outputs in the graph's order."""
        return [np.array(output) for output in self.run()]


class NcnnAdapter:
    """ncnn on the CPU, with the allocators of its own benchmark; its models come from pnnx."""

    def __init__(self, options: dict[str, str]) -> None:
        del options  # it has none
        self._net: Any = None
        self._allocators: tuple[Any, ...] = ()
        self._feeds: list[tuple[str, Any]] = []

    def convert(self, source: Path, folder: Path) -> Path:
        """Make ncnn's two files of a ``.pt2`` archive, or of an ``.onnx`` file, in a folder of their own."""
        from cnncc.compiler.bench.ncnn_model import convert

        return convert(source, folder)

    def load(self) -> str:
        """Import ncnn and return its version."""
        import ncnn

        return str(ncnn.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open a folder that `convert` made."""
        import ncnn

        self._net = ncnn.Net()
        self._allocators = (ncnn.UnlockedPoolAllocator(), ncnn.PoolAllocator())
        options = self._net.opt
        options.num_threads = threads
        options.blob_allocator, options.workspace_allocator = self._allocators
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        options.use_bf16_packed = options.use_bf16_storage = False
        if self._net.load_param(str(path / "model.param")) or self._net.load_model(str(path / "model.bin")):
            from cnncc.compiler.bench.ncnn_model import unknown_layers

            raise ModelRefused("ncnn cannot read what pnnx made of the model", where=unknown_layers(path))

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Copy the inputs, one sample each: ncnn knows no batches."""
        import ncnn

        if any(array.ndim < 2 or array.shape[0] != 1 for array in feeds):
            raise ModelRefused("ncnn computes one sample at a time; the batch is larger")
        feeds_by_name = named(self._net.input_names(), names, feeds)
        # a Mat made from an array does not own its data: the clone does
        self._feeds = [(name, ncnn.Mat(array[0]).clone()) for name, array in feeds_by_name.items()]

    def run(self) -> Any:
        """Extract every output."""
        extractor = self._net.create_extractor()
        for name, value in self._feeds:
            extractor.input(name, value)
        results = [extractor.extract(name) for name in self._net.output_names()]
        if any(code for code, _ in results):
            raise RunFailed("ncnn cannot compute the model")
        return [value for _, value in results]

    def outputs(self) -> list[Array]:
        """Return the outputs in the graph's order, as batches of one."""
        return [np.array(value)[None] for value in self.run()]


class ExecuTorchAdapter:
    """ExecuTorch with XNNPACK, from an exported program.

    Args:
        options: ``precision`` (``int8``: quantized by PyTorch's tool for XNNPACK).
    """

    def __init__(self, options: dict[str, str]) -> None:
        self._int8 = options.get("precision") == "int8"
        self._method: Any = None
        self._feeds: list[Any] = []

    def convert(self, source: Path, folder: Path) -> Path:
        """Make a ``.pte`` file of a ``.pt2`` archive; what XNNPACK cannot compute stays with the portable kernels."""
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.load(source)  # cnncc's own, as in `TorchAdapter`
        if self._int8:
            from cnncc.compiler.bench.executorch_int8 import quantize

            program = quantize(program)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        made = folder / "model.pte"
        made.write_bytes(lowered.buffer)
        return made

    def load(self) -> str:
        """Import ExecuTorch and return its version."""
        import importlib.metadata

        import executorch.runtime  # noqa: F401 - the library that is to be loaded

        return importlib.metadata.version("executorch")

    def open(self, path: Path, threads: int) -> None:
        """Open a ``.pte`` file."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(threads)  # safe while nothing runs; there is no other way from Python
        self._method = Runtime.get().load_program(path).load_method("forward")
        if self._method is None:
            raise ModelRefused("ExecuTorch cannot load the program that it made")

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Turn the inputs into tensors."""
        import torch

        del names  # programs take positions
        self._feeds = [torch.from_numpy(array) for array in feeds]

    def run(self) -> Any:
        """Execute the method."""
        return self._method.execute(self._feeds)

    def outputs(self) -> list[Array]:
        """Return the outputs, flattened."""
        return [np.ascontiguousarray(tensor.numpy()) for tensor in self.run()]


class TorchAdapter:
    """PyTorch, from an exported program.

    Args:
        options: ``layout`` (``channels_last``) and ``compile`` (``inductor``: `torch.compile` with freezing).
    """

    def __init__(self, options: dict[str, str]) -> None:
        self._channels_last = options.get("layout") == "channels_last"
        self._compile = options.get("compile") == "inductor"
        self._module: Any = None
        self._structure: Any = None
        self._feeds: tuple[list[Any], dict[str, Any]] = ([], {})

    def load(self) -> str:
        """Import PyTorch and return its version."""
        import torch

        return str(torch.__version__)

    def open(self, path: Path, threads: int) -> None:
        """Open a ``.pt2`` archive."""
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        program = torch.export.load(path)  # cnncc's own, from its cache or this benchmark: nobody else's gets here
        self._structure = program.call_spec.in_spec
        module = program.module()
        if self._channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._compile:
            import torch._inductor.config as inductor

            inductor.freezing = True
            module = torch.compile(module)  # type: ignore[assignment]
        self._module = module

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Turn the inputs into tensors; a user of channels-last would have them in that layout."""
        import torch
        from torch.utils import _pytree as pytree

        del names  # programs take positions
        tensors = [torch.from_numpy(array) for array in feeds]
        if self._channels_last:
            tensors = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
        self._feeds = pytree.tree_unflatten(tensors, self._structure)
        if self._compile:
            self.run()  # torch.compile compiles on the first run: that belongs to opening, not to running

    def run(self) -> Any:
        """Call the module."""
        args, kwargs = self._feeds
        return self._module(*args, **kwargs)

    def outputs(self) -> list[Array]:
        """Return the outputs, flattened."""
        from torch.utils import _pytree as pytree

        leaves = pytree.tree_leaves(self.run())
        return [np.ascontiguousarray(leaf.numpy()) for leaf in leaves]


def _converted(made: Path, library: str) -> Path:
    """Return a file that a converter was to make; converters report failure by making none."""
    if not made.is_file() or not made.stat().st_size:
        raise ModelRefused(f"the converter of {library} made nothing of the model")
    return made


def named(wanted: Sequence[str], names: Sequence[str], feeds: Sequence[Array]) -> dict[str, Array]:
    """Name the inputs as an engine does: by name where the names agree, else by position."""
    if set(wanted) == set(names):
        return dict(zip(names, feeds, strict=True))
    return dict(zip(wanted, feeds, strict=True))
