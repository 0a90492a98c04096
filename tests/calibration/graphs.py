"""What tests of calibration share: small networks, data in memory, and a NumPy reference of fake quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cnncc.calibration.histogram import Histogram
from cnncc.calibration.plan import Plan
from cnncc.calibration.shift import Shift
from cnncc.calibration.source import Label, Row
from cnncc.calibration.stream import DataStream
from cnncc.calibration.thresholds import scale_of
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.specs import Feeds, TensorSpec
from tests.graph.graphs import graph_of

Array = NDArray[np.float32]


# ---- networks


class Net:
    """Grows a graph node by node; a node is called after what it makes, and after its module in ``net.*``."""

    def __init__(self, *shape: Any, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.inputs: dict[str, tuple[Any, ...]] = {"x": shape or (1, 3, 8, 8)}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}
        self._sizes = {"x": int(self.inputs["x"][1])}

    def node(self, op: str, reads: Sequence[str], name: str = "", size: int = 0, **attributes: Any) -> str:
        """Add a node; ``size`` is that of axis 1 of what it makes, by default as of what it reads."""
        name = name or f"{op.lower()}_{len(self.nodes)}"
        node = helper.make_node(op, list(reads), [name], name=name, **attributes)
        node.metadata_props.add(key="cnncc.module", value=f"net.{name}")
        self.nodes.append(node)
        self._sizes[name] = size or self._sizes[reads[0]]
        return name

    def weights(self, *shape: int) -> Array:
        """Draw weights that keep signals of one size."""
        fan = max(int(np.prod(shape[1:])), 1)
        return self.random.normal(0, fan**-0.5, shape).astype(np.float32)

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer."""
        self.constants[name] = value
        return name

    def conv(
        self,
        x: str,
        size: int,
        name: str = "",
        *,
        kernel: int = 3,
        group: int = 1,
        bias: bool = True,
        **attributes: Any,
    ) -> str:
        """Add a convolution that keeps height and width, but for its attributes."""
        name = name or f"conv_{len(self.nodes)}"
        weight = self.constant(f"{name}.weight", self.weights(size, self._sizes[x] // group, kernel, kernel))
        extra = [self.constant(f"{name}.bias", self.weights(size))] if bias else []
        return self.node("Conv", [x, weight, *extra], name, size, pads=[kernel // 2] * 4, group=group,
                         **attributes)  # fmt: skip

    def gemm(self, x: str, size: int, name: str = "", *, trans: int = 1, bias: bool = True, **attributes: Any) -> str:
        """Add a fully connected layer."""
        name = name or f"gemm_{len(self.nodes)}"
        shape = (size, self._sizes[x]) if trans else (self._sizes[x], size)
        weight = self.constant(f"{name}.weight", self.weights(*shape))
        extra = [self.constant(f"{name}.bias", self.weights(size))] if bias else []
        return self.node("Gemm", [x, weight, *extra], name, size, transB=trans, **attributes)

    def flat(self, x: str) -> str:
        """Average over height and width, and flatten."""
        return self.node("Flatten", [self.node("GlobalAveragePool", [x])])

    def graph(self, *outputs: str) -> OnnxGraph:
        """Return the graph; by default its output is what the last node makes."""
        return graph_of(self.nodes, self.inputs, self.constants, outputs or (self.nodes[-1].output[0],))


def classifier(batch: Any = 1, *, classes: int = 4, seed: int = 0) -> OnnxGraph:
    """A network of four layers: two convolutions, a depthwise one, a head."""
    net = Net(batch, 3, 8, 8, seed=seed)
    x = net.node("Relu", [net.conv("x", 8, "first")])
    x = net.node("Relu", [net.conv(x, 8, "second", group=8)])
    x = net.node("Relu", [net.conv(x, 6, "third", kernel=1)])
    net.gemm(net.flat(x), classes, "head")
    return net.graph()


# ---- data


@dataclass(frozen=True)
class MemoryRows:
    """Rows in memory, as a reader of DATA gives them; may be cut short, as by Ctrl-C, before one of them.

    Attributes:
        arrays: ``[n, …]``.
        labels: One per row.
        stop: Row before which the reading is interrupted.
    """

    arrays: NDArray[Any]
    labels: Sequence[Label] = ()
    stop: int | None = None

    @property
    def count(self) -> int:
        return len(self.arrays)

    @property
    def identity(self) -> Any:
        return ["memory", self.count]

    def rows(self, start: int) -> Iterator[Row]:
        for index in range(start, self.count):
            if index == self.stop:
                raise KeyboardInterrupt
            label = self.labels[index] if len(self.labels) else None
            yield Row(f"x[{index}]", {"x": self.arrays[index : index + 1]}, label)


def stream_of(
    arrays: NDArray[Any], labels: Sequence[Label] = (), *, stop: int | None = None, random: bool = False
) -> DataStream:
    """Return a stream of rows ``[n, …]`` for the input ``x``."""
    specs = (TensorSpec("x", (1, *arrays.shape[1:]), arrays.dtype.name),)
    return DataStream("memory", MemoryRows(arrays, labels, stop), specs, settings=None, skip_bad=False, random=random)


def images(count: int, *, seed: int = 0, shape: tuple[int, ...] = (3, 8, 8)) -> Array:
    """Draw smooth images, each of another brightness and contrast."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((count, *shape)).cumsum(axis=-1) / 3
    return (x * random.uniform(0.5, 1.5, (count, *[1] * len(shape)))).astype(np.float32)


def feeds_of(arrays: NDArray[Any], batch: int = 1) -> list[dict[str, NDArray[Any]]]:
    """Return feeds of one batch each."""
    return [{"x": arrays[start : start + batch]} for start in range(0, len(arrays), batch)]


# ---- fake quantization


def fake(x: Array, scale: Any) -> Array:
    """Quantize to s8 with zero-point 0, and back."""
    steps = np.clip(np.rint(x / np.float32(scale)), -128, 127)
    return (steps * np.float32(scale)).astype(np.float32)


def fake_weight(weight: Array, axis: int) -> Array:
    """Quantize weights per channel to ±127, and back."""
    moved = np.moveaxis(weight, axis, 0)
    rows = []
    for row in moved:
        largest = float(np.abs(row).max())
        scale = np.float32(max(largest / 127, np.finfo(np.float32).tiny))
        rows.append(np.clip(np.rint(row / scale), -127, 127) * scale)
    return np.moveaxis(np.stack(rows), 0, axis).astype(np.float32)


def fake_quantized(
    graph: OnnxGraph,
    plan: Plan,
    scales: Mapping[str, float],
    feeds: Feeds,
    shifts: Mapping[str, Shift] | None = None,
) -> dict[str, Array]:
    """Compute a float graph in NumPy as if it were quantized: what the Q/DQ writer's graph must compute.

    Layers of the plan read quantized tensors and weights; other layers read floats; whatever else there is reads the
    quantized tensor where there is one. A shift is subtracted before a tensor is quantized, and added to it behind.
    """
    shifted = shifts or {}
    layers = {layer.node: layer for layer in plan.layers}
    values: dict[str, Any] = dict(feeds)
    for node in graph.nodes:
        read: dict[str, Any] = {}
        for index, name in enumerate(node.input):
            if not name:
                continue
            value = values[name] if name in values else graph.constant(name)
            product = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
            if name in scales and (node.name in layers or not product):
                shift = shifted.get(name, Shift(0.0, scales[name]))
                value = fake(value - np.float32(shift.amount), shift.scale) + np.float32(shift.amount)
            if node.name in layers and index == 1:
                value = fake_weight(value, layers[node.name].axis)
            read[name] = value
        values |= _computed(graph, node, read)
    return {spec.name: values[spec.name] for spec in graph.outputs}


def _computed(graph: OnnxGraph, node: onnx.NodeProto, read: Mapping[str, Any]) -> dict[str, Any]:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in read.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, outputs), opset_imports=[helper.make_opsetid("", graph.opset)]
    )
    found = ReferenceEvaluator(model).run(None, dict(read))
    return dict(zip((value.name for value in outputs), found, strict=True))


def scales_for(graph: OnnxGraph, plan: Plan, feeds: Sequence[Feeds]) -> dict[str, float]:
    """Return a scale for each tensor of a plan: from the largest magnitude of what layers read in its group."""
    reference = Reference(graph.with_outputs([n for n in _made(graph, plan)]), threads=1)
    values = [{**each, **reference.run(each)} for each in feeds]
    scales = {}
    for group in plan.groups:
        largest = max(Histogram.of(each[name]).largest for each in values for name in group.read)
        scales |= dict.fromkeys(group.tensors, scale_of(largest))
    return scales


def _made(graph: OnnxGraph, plan: Plan) -> list[str]:
    fed = {spec.name for spec in graph.inputs}
    names = [name for group in plan.groups for name in group.tensors if name not in fed]
    return names or [graph.nodes[-1].output[0]]


# ---- reading graphs


def run(graph: OnnxGraph, feeds: Feeds) -> dict[str, Any]:
    """Run a graph in ONNX Runtime as it is written."""
    return Reference(graph, threads=1).run(feeds)


def node_of(graph: OnnxGraph, name: str) -> onnx.NodeProto:
    """Return the node of a name."""
    [node] = [node for node in graph.nodes if node.name == name]
    return node


def maker_of(graph: OnnxGraph, value: str) -> onnx.NodeProto | None:
    """Return the node that makes a value."""
    return next((node for node in graph.nodes if value in node.output), None)


def scale_read(graph: OnnxGraph, value: str) -> float | None:
    """Return the scale of the per-tensor Q/DQ pair that makes a value, and check the pair; None where none does."""
    dq = maker_of(graph, value)
    if dq is None or dq.op_type != "DequantizeLinear":
        return None
    q = maker_of(graph, dq.input[0])
    assert q is not None
    assert q.op_type == "QuantizeLinear"
    assert q.input[1:] == dq.input[1:]
    scale, zero = graph.constant(q.input[1]), graph.constant(q.input[2])
    assert scale is not None
    assert zero is not None
    assert scale.shape == zero.shape == ()
    assert (scale.dtype, zero.dtype) == (np.float32, np.int8)
    assert zero == 0
    return float(scale)


def quantized_value(graph: OnnxGraph, value: str) -> str:
    """Return the tensor whose Q/DQ pair makes a value."""
    dq = maker_of(graph, value)
    assert dq is not None
    q = maker_of(graph, dq.input[0])
    assert q is not None
    return q.input[0]


def check(graph: OnnxGraph) -> None:
    """Have onnx check a model in full."""
    onnx.checker.check_model(graph.proto, full_check=True)


def array_of(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return an initializer as an array."""
    return np.asarray(numpy_helper.to_array(tensor))
