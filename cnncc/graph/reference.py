"""ONNX Runtime as the reference executor: the graph as written, nothing fused, nothing reordered."""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime as ort

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import ModelRefused, RunFailed
from cnncc_runtime.specs import Feeds, Tensors, check_feeds


class Reference:
    """Runs one graph in ONNX Runtime on the CPU with every optimization off.

    Optimizations stay off because ONNX Runtime's fused int8 kernels saturate on AVX2, and because a reference
    should compute what the graph says.

    Raises:
        ModelRefused: ONNX Runtime does not load the graph.
    """

    def __init__(self, graph: OnnxGraph, *, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # packed constant weights go through other kernels than computed ones: folding a constant would show
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = ort.InferenceSession(graph.serialized, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's exceptions share no base class below Exception
            raise ModelRefused(f"ONNX Runtime does not load the graph: {exc}") from exc
        self._inputs = graph.inputs
        self._outputs = [spec.name for spec in graph.outputs]

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> Tensors:
        """Return outputs by name; may be called from several threads at once.

        Args:
            feeds: The graph's inputs.
            names: The outputs wanted; all of them by default.

        Raises:
            DataRefused: The feeds do not fit the graph's inputs.
            RunFailed: ONNX Runtime failed.
        """
        check_feeds(self._inputs, feeds)
        wanted = self._outputs if names is None else list(names)
        try:
            values = self._session.run(wanted, dict(feeds))
        except Exception as exc:  # as above
            raise RunFailed(f"ONNX Runtime failed on the graph: {exc}") from exc
        return dict(zip(wanted, values, strict=True))
