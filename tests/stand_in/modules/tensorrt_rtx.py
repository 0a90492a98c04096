"""A TensorRT-RTX without a GPU: as the stand-in for TensorRT, with kernels that are compiled when a context is made."""

from __future__ import annotations

import enum
from typing import Any

import tensorrt
from tensorrt import *  # noqa: F403
from tensorrt import nptype

__all__ = ["nptype"]
__version__ = "1.7.1.116"

compilations = 0


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class ComputeCapability(enum.Enum):
    NONE, CURRENT, SM75, SM80, SM86, SM89, SM120, SM121 = range(8)


class IBuilderConfig(tensorrt.IBuilderConfig):
    num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        return index < self.num_compute_capabilities


class Builder(tensorrt.Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()


class Runtime(tensorrt.Runtime):
    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        engine = super().deserialize_cuda_engine(plan)
        return engine and ICudaEngine(engine.model, engine.logger)


class ICudaEngine(tensorrt.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, *config: Any) -> Any:
        config[0].cache.compile()
        return super().create_execution_context(*config)


class IRuntimeConfig:
    cache: IRuntimeCache
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob == b"compiled":
            self._kernels = blob
        return bool(self._kernels)

    def serialize(self) -> bytes:
        return self._kernels

    def compile(self) -> None:
        global compilations
        compilations += not self._kernels
        self._kernels = b"compiled"
