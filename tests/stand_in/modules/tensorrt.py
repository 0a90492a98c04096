"""A TensorRT without a GPU: its plans are ONNX models, which ONNX Runtime computes on the stand-in driver's stream.

What the cuda target and the sessions use of it, as TensorRT's Python bindings have it.
"""

from __future__ import annotations

import ctypes
import enum
import json
import time
import types
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort

__version__ = "10.16.1.11"

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProfiler:
    pass


def nptype(kind: np.dtype[Any]) -> np.dtype[Any]:
    return kind


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class BuilderFlag(enum.Enum):
    TF32, REFIT, REFIT_IDENTICAL, STRIP_PLAN, VERSION_COMPATIBLE, SPARSE_WEIGHTS, GPU_FALLBACK = range(7)


class HardwareCompatibilityLevel(enum.Enum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class MemoryPoolType(enum.Enum):
    WORKSPACE, DLA_MANAGED_SRAM = range(2)


class IProgressMonitor:
    pass


class INetworkDefinition:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Any:
        value = self.model.graph.input[index]
        shape = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
        return types.SimpleNamespace(name=value.name, shape=shape)


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        self._network.model = onnx.load_from_string(model)
        return True

    def supports_operator(self, op_name: str) -> bool:
        return True


class ITimingCache:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob


class IBuilderConfig:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.flags: set[BuilderFlag] = {BuilderFlag.TF32}
        self._timings = ITimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return ITimingCache(self._timings.blob or b"timings")

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        pass

    def add_optimization_profile(self, profile: Any) -> int:
        return 0


class IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert list(min) <= list(opt) <= list(max)


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        going = all([monitor.step_complete("Building", step) for step in range(2)])
        monitor.phase_finish("Building")
        if BuilderFlag.STRIP_PLAN in config.flags:
            for tensor in network.model.graph.initializer:
                tensor.raw_data = bytes(np.asarray(onnx.numpy_helper.to_array(tensor)).nbytes)
        return network.model.SerializeToString() if going else None


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(onnx.load_from_string(plan), self._logger)
        except Exception as exc:
            self._logger.log(ILogger.ERROR, f"the plan is no model: {type(exc).__name__}\nmore")
            return None


class ICudaEngine:
    def __init__(self, model: onnx.ModelProto, logger: Any) -> None:
        self.logger = logger
        self.model = model
        self.inputs = [value.name for value in model.graph.input]
        self.values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(self.values[name].type.tensor_type.elem_type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size.dim_value or -1 for size in self.values[name].type.tensor_type.shape.dim)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(abs(size) for size in self.get_tensor_shape(name))] * 3

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self.model)

    def create_execution_context(self, *_config: Any) -> IExecutionContext | None:
        return None if self.model.producer_name == "starts never" else IExecutionContext(self)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class EngineInspector:
    """Describes every node as a layer, in TensorRT 10's words; what reads dequantized tensors reads int8."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self.execution_context: Any = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return json.dumps({"Layers": [self._layer(node) for node in self._graph.node]})

    def _layer(self, node: onnx.NodeProto) -> dict[str, Any]:
        kind = "Convolution" if node.op_type in ("Conv", "Gemm", "MatMul") else node.op_type
        return {
            "Name": node.name,
            "LayerType": kind,
            "Inputs": [{"Format/Datatype": f"Row major {self._type(name)} format"} for name in node.input[:2]],
            "Metadata": f"[ONNX Layer: {node.name}]",
        }

    def _type(self, name: str) -> str:
        if any(node.op_type == "DequantizeLinear" and name in node.output for node in self._graph.node):
            return "Int8"
        values = (*self._graph.value_info, *self._graph.input, *self._graph.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        kinds |= {tensor.name: tensor.data_type for tensor in self._graph.initializer}
        half = {onnx.TensorProto.FLOAT16: "FP16", onnx.TensorProto.BFLOAT16: "BF16"}
        return half.get(kinds.get(name, onnx.TensorProto.FLOAT), "FP32")


class Weights:
    def __init__(self, dtype: Any, address: int, size: int) -> None:
        self.dtype, self.size, self.nbytes = dtype, size, size * dtype.itemsize
        self.address = address


class Refitter:
    """Sets an engine's weights; they are read when it works, as TensorRT's are."""

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self._engine, self._logger = engine, logger
        self._given: dict[str, Weights] = {}
        self._tensors = {tensor.name: tensor for tensor in engine.model.graph.initializer}

    def get_all_weights(self) -> list[str]:
        return list(self._tensors)

    def get_weights_prototype(self, weights_name: str) -> Weights:
        tensor = self._tensors[weights_name]
        return Weights(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), 0, int(np.prod(tensor.dims)))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        self._given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        for name, weights in self._given.items():
            self._tensors[name].raw_data = ctypes.string_at(weights.address, weights.nbytes)
        if missing := self._tensors.keys() - self._given.keys():
            self._logger.log(ILogger.ERROR, f"missing: {missing}")
        return not missing


class IExecutionContext:
    _callbacks: ClassVar[list[Any]] = []  # graphs call them long after

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = engine.model.SerializeToString()
        self._run = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._set_up: dict[str, tuple[int, ...]] = {}
        self.profiler: Any = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if shape[:1] == (3,):
            self._engine.logger.log(ILogger.ERROR, "3 is not in the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self._shapes.values()))[0]
        sizes = self._engine.values[name].type.tensor_type.shape.dim
        return tuple(size.dim_value or batch for size in sizes)

    def execute_async_v3(self, stream: int) -> bool:
        if self._engine.model.producer_name == "runs never":
            self._engine.logger.log(ILogger.ERROR, "no kernel for this GPU")
            return False
        driver, capturing = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        driver.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(capturing))
        if capturing.value and (self._shapes != self._set_up or self._engine.model.producer_name == "captured never"):
            self._engine.logger.log(ILogger.ERROR, "what shapes need is not set up")
            return False
        self._set_up = shapes = dict(self._shapes)

        def work(_data: int | None) -> None:
            start = time.perf_counter()
            feeds = {name: self._array(name, shape) for name, shape in shapes.items()}
            outputs = [name for name in self._engine.values if name not in feeds]
            for name, value in zip(outputs, self._run(outputs, feeds), strict=True):
                self._array(name, value.shape)[...] = value
            if self.profiler is not None:
                for node in self._engine.model.graph.node:
                    self.profiler.report_layer_time(node.name, (time.perf_counter() - start) * 1e3)

        self._callbacks.append(_HOST_FUNCTION(work))
        return not driver.cuLaunchHostFunc(ctypes.c_void_p(stream), self._callbacks[-1], None)

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = self._engine.get_tensor_dtype(name)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = (ctypes.c_uint8 * size).from_address(self._addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)
