"""`QdqBuilder`: Q/DQ graphs, node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cnncc.graph.onnx_graph import OnnxGraph

SCALE = 2.0**-6
"""Of activations, where nothing else is said. Scales are powers of two, so that float32 adds products up exactly, in
whatever order: engines can be compared bit by bit."""

_F = np.float32


class QdqBuilder:
    """Builds a graph node by node; each method returns the name of the value it made.

    Attributes:
        opset: Of the graph.
    """

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._rng = np.random.default_rng(0)

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, value: Any, dtype: int | None = None) -> str:
        """Add a constant; ``dtype`` for element types that NumPy lacks."""
        name = f"const{len(self._constants)}"
        array = np.asarray(value)
        if dtype is None:
            self._constants.append(numpy_helper.from_array(array, name))
        else:
            self._constants.append(helper.make_tensor(name, dtype, array.shape, array.ravel().tolist()))
        return name

    def floats(self, *shape: int) -> str:
        return self.constant(self._rng.integers(-64, 65, size=shape).astype(_F) / 1024)

    def integers(self, *shape: int) -> NDArray[np.int8]:
        return self._rng.integers(-127, 128, size=shape).astype(np.int8)

    def op(self, op: str, *inputs: str, name: str = "", outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        name = name or f"{op.lower()}{len(self._nodes)}"
        made = [name + (f".{index}" if outputs > 1 else ".out") for index in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, made, name=name, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def quantize(self, x: str, scale: Any = SCALE, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> str:
        return self.op("QuantizeLinear", x, *self._parameters(scale, zero, dtype), **attributes)

    def dequantize(self, x: str, scale: Any = SCALE, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> str:
        return self.op("DequantizeLinear", x, *self._parameters(scale, zero, dtype), **attributes)

    def qdq(self, x: str, scale: Any = SCALE, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> str:
        return self.shared_qdq(x, *self._parameters(scale, zero, dtype), **attributes)

    def shared_qdq(self, x: str, *parameters: str, **attributes: Any) -> str:
        """Add a pair that reads the same scale and zero-point."""
        quantized = self.op("QuantizeLinear", x, *parameters, **attributes)
        return self.op("DequantizeLinear", quantized, *parameters, **attributes)

    def _parameters(self, scale: Any, zero: Any, dtype: Any) -> tuple[str, str]:
        return self.constant(np.asarray(scale, _F)), self.constant(np.full(np.shape(scale), zero, dtype))

    def weight(self, *shape: int, axis: int | None = 0, scale: Any = None, zero: int = 0) -> str:
        """Add int8 weights and their DequantizeLinear: scales per ``axis``, per tensor where it is None."""
        if scale is None:
            scale = 2.0**-10 if axis is None else 2.0 ** -(9.0 + np.arange(shape[axis]) % 2)
        scale = np.asarray(scale, dtype=_F)
        inputs = [self.constant(self.integers(*shape)), self.constant(scale)]
        inputs.append(self.constant(np.full(scale.shape, zero, dtype=np.int8)))
        return self.op("DequantizeLinear", *inputs, **({} if axis is None else {"axis": axis}))

    def conv(self, x: str, weight: str, channels: int = 0, name: str = "conv", **attributes: Any) -> str:
        """Add a convolution of 3×3, padding 1; with a float bias where ``channels`` are given."""
        bias = [self.floats(channels)] if channels else []
        attributes = {"pads": [1, 1, 1, 1], **attributes}
        return self.op("Conv", x, weight, *bias, name=name, **attributes)

    def rows(self, x: str, count: int = 8) -> str:
        """Keep the first rows of an image."""
        return self.op("Slice", x, *(self.constant(np.array([value])) for value in (0, count, 2)))

    def unread(self) -> list[str]:
        """Return what nodes have made and none reads."""
        read = {name for node in self._nodes for name in node.input}
        return [name for node in self._nodes for name in node.output if name not in read]

    def graph(self, *outputs: str) -> OnnxGraph:
        body = helper.make_graph(
            self._nodes, "pattern", self._inputs, [onnx.ValueInfoProto(name=name) for name in outputs], self._constants
        )
        domains = sorted({node.domain for node in self._nodes} - {""})
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        proto = helper.make_model(body, opset_imports=opsets, ir_version=10)
        return OnnxGraph(shape_inference.infer_shapes(proto, data_prop=True))
