"""ONNX Runtime as the reference executor: the graph as written, nothing fused, nothing reordered."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.shapes import element_count
from cnncc_runtime.cpu import usable_cores
from cnncc_runtime.errors import ModelRefused, RunFailed
from cnncc_runtime.specs import Feeds, Tensors, check_feeds

_SMALL = 1024
"""Elements of a constant that stays in the model's bytes: ONNX Runtime infers shapes by the values of some."""

_WEIGHTS = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
"""Element types of what networks have most of."""

_cores = functools.cache(usable_cores)  # reads a dozen files, and is asked for every graph

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], *, threads: int = 0) -> list[Result]:
    """Return what a function gives for each item, in their order; as many are computed at once as there are threads.

    Args:
        function: Computes without Python's lock, as `Reference.run` and NumPy on large arrays do.
        items: Any number.
        threads: 0 for one a core.
    """
    with ThreadPoolExecutor(max(min(threads or _cores(), len(items)), 1)) as pool:
        return list(pool.map(function, items))


class Reference:
    """Runs one graph in ONNX Runtime on the CPU with every optimization off.

    Optimizations stay off because ONNX Runtime's fused int8 kernels saturate on AVX2, and because a reference
    should compute what the graph says.

    Args:
        graph: What is run; every value's type known where ``outputs`` names others than its outputs.
        threads: That compute; 0 for one a core.
        beside: Runs that are made at once and share these threads. A thread for each sample beats many for one: none
            waits for the others after every operator.
        outputs: Names of the values given out; None for the graph's outputs.

    Attributes:
        inputs: What it is fed.

    Raises:
        ModelRefused: ONNX Runtime does not load the graph.
    """

    def __init__(
        self, graph: OnnxGraph, *, threads: int = 0, beside: int = 1, outputs: Sequence[str] | None = None
    ) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # each run's own thread computes too: the threads shared are those that are left
        options.intra_op_num_threads = threads if beside == 1 else max((threads or _cores()) - beside + 1, 1)
        options.log_severity_level = 4
        _share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # packed constant weights go through other kernels than computed ones: folding a constant would show
        options.add_session_config_entry("session.disable_prepacking", "1")
        self._outputs = [spec.name for spec in graph.outputs] if outputs is None else list(outputs)
        model, weights = _taken_apart(graph.proto, self._outputs)
        # ONNX Runtime reads them where they are: serialized and parsed they took six times as long, and thrice the room
        self._weights = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        try:
            data = model.SerializeToString()
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's exceptions share no base class below Exception
            raise ModelRefused(f"ONNX Runtime does not load the graph: {exc}") from exc
        self.inputs = graph.inputs

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> Tensors:
        """Return outputs by name; may be called from several threads at once.

        Args:
            feeds: The graph's inputs.
            names: The outputs wanted; all of them by default.

        Raises:
            DataRefused: The feeds do not fit the graph's inputs.
            RunFailed: ONNX Runtime failed.
        """
        check_feeds(self.inputs, feeds)
        wanted = self._outputs if names is None else list(names)
        try:
            values = self._session.run(wanted, dict(feeds))
        except Exception as exc:  # as above
            raise RunFailed(f"ONNX Runtime failed on the graph: {exc}") from exc
        return dict(zip(wanted, values, strict=True))


@functools.cache
def _share_memory() -> None:
    """Let all graphs of the process take memory from one pool: a new one finds the pages of the last.

    Calibration runs dozens of graphs one after the other; each took a sixth longer with pages yet to be cleared.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(Exception):  # there is one already: of the application that cnncc is a part of
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg({}))


def _taken_apart(proto: onnx.ModelProto, outputs: Sequence[str]) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Return a model that gives these outputs, its large weights said to be elsewhere, and these by name."""
    source = proto.graph
    model = onnx.ModelProto(ir_version=proto.ir_version)
    model.opset_import.extend(proto.opset_import)
    model.functions.extend(proto.functions)
    graph = model.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.value_info.extend(source.value_info)
    known = {value.name: value for value in (*source.value_info, *source.output)}
    graph.output.extend(known[name] for name in outputs)
    weights = {}
    for tensor in source.initializer:
        if tensor.data_type not in _WEIGHTS or element_count(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
            continue
        weights[tensor.name] = numpy_helper.to_array(tensor)
        elsewhere = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        elsewhere.data_location = onnx.TensorProto.EXTERNAL
        elsewhere.external_data.add(key="location", value="in memory")
    return model, weights
