"""The true value of a graph: evaluated in float64, against which float32 noise is measured.

onnx's reference evaluator walks the graph; every float constant, cast and input is float64, and the operators that
its pure Python would crawl through, or narrow to float32, are replaced (cnncc.graph.exact_ops).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cnncc.graph.exact_ops import operators
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.values import all_nodes, reads
from cnncc_runtime.errors import RunFailed
from cnncc_runtime.specs import Feeds, Tensors, check_feeds

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES = {"Cast": "to", "EyeLike": "dtype", "DequantizeLinear": "output_dtype", "QuantizeLinear": "precision"}
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


class Exact:
    """Evaluates one graph in float64.

    Quantized graphs keep their integers: QuantizeLinear rounds float64 values.

    Raises:
        RunFailed: An operator has no float64 evaluation, or its result is random.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self._inputs = graph.inputs
        self._outputs = [spec.name for spec in graph.outputs]
        source = graph.proto.graph
        proto = onnx.ModelProto(ir_version=max(graph.proto.ir_version, 8))
        proto.opset_import.extend(graph.proto.opset_import)
        proto.graph.name = "exact"
        proto.graph.node.extend(source.node)
        constants = {tensor.name for tensor in source.initializer}
        proto.graph.input.extend(value for value in source.input if value.name not in constants)
        proto.graph.output.extend(source.output)
        for node in all_nodes(proto.graph):
            _widen(node)
        try:
            self._evaluator = _Freeing(proto, new_ops=operators())
        except Exception as exc:  # onnx's reference raises anything for operators that it lacks
            raise RunFailed(f"the graph cannot be evaluated in float64: {exc}") from exc
        self._evaluator.rt_inits_ = {t.name: _wide(numpy_helper.to_array(t)) for t in source.initializer}

    def run(self, feeds: Feeds) -> Tensors:
        """Return the outputs by name; float ones are float64, whatever the graph says.

        Raises:
            DataRefused: The feeds do not fit the graph's inputs.
            RunFailed: The evaluation failed.
        """
        check_feeds(self._inputs, feeds)
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run_freeing(
                    self._outputs, {name: _wide(array) for name, array in feeds.items()}
                )
        except Exception as exc:  # as above
            raise RunFailed(f"the graph cannot be evaluated in float64: {exc}") from exc
        return dict(zip(self._outputs, values, strict=True))


class _Freeing(ReferenceEvaluator):
    """onnx's evaluator, letting go of each value after its last reader."""

    def run_freeing(self, output_names: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Run the top graph; nested graphs and functions go the stock way."""
        nodes = list(self.proto_.graph.node)
        left = Counter(name for node in nodes for name in reads(node))
        left.update(output_names)
        results: dict[str, Any] = {"": None, **self.rt_inits_, **feeds}
        for node, kernel in zip(nodes, self.rt_nodes_, strict=True):
            inputs = [results[name] for name in kernel.input]
            context = {"context": results} if kernel.need_context() else {}
            for name, value in zip(kernel.output, kernel.run(*inputs, **context), strict=False):
                if left[name]:
                    results[name] = value
            del inputs
            for name in reads(node):
                left[name] -= 1
                if not left[name]:
                    results.pop(name, None)
        return [results[name] for name in output_names]


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float64) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array


def _widen(node: onnx.NodeProto) -> None:
    """Make a node's own float types float64."""
    if node.op_type in _RANDOM:
        raise RunFailed(f"{node.op_type} '{node.name}' is random: it has no true value")
    for attribute in node.attribute:
        if attribute.name == _TYPE_ATTRIBUTES.get(node.op_type) and attribute.i in _FLOATS:
            attribute.i = onnx.TensorProto.DOUBLE
        if attribute.HasField("t") and attribute.t.data_type in _FLOATS:
            attribute.t.CopyFrom(numpy_helper.from_array(_wide(numpy_helper.to_array(attribute.t)), attribute.t.name))
    if node.op_type == "Constant" and node.attribute and node.attribute[0].name in ("value_float", "value_floats"):
        value = np.array(helper.get_attribute_value(node.attribute[0]), dtype=np.float64)
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(value)))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
