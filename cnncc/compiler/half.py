"""float16 and bfloat16: the graph itself in half the bits, for targets that compute what a graph says.

What overflows or cancels in half the bits stays in float32: operators that sum, exponentiate or normalize, and for
float16 every node that reads or makes values near its largest. Inputs and outputs of the graph stay float32.

Of a Q/DQ graph the float part is narrowed, scales included: QuantizeLinear and DequantizeLinear read and make values of
their scale's type, so nothing comes between them and a layer that is int8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cnncc.calibration.plan import PRODUCTS
from cnncc.graph.draft import Draft
from cnncc.graph.names import MODULE_KEY, module_path, node_label, node_metadata
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import raised
from cnncc.graph.reference import Reference
from cnncc.graph.values import reads, subgraphs
from cnncc_runtime.specs import Feeds

FP16, BF16 = "fp16", "bf16"
TYPES = {FP16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16}

_BFLOAT16_OPSET = 22
"""From which on ONNX's convolutions and pools take bfloat16."""

_SCALES_OPSET = 19
"""From which on scales may be of half precision."""

_QDQ = ("QuantizeLinear", "DequantizeLinear")

LARGEST = 65504.0 / 8
"""Magnitude from which values stay in float32: eight times below float16's largest, since few samples are looked at."""

_MAKERS = frozenset(
    ("Cast", "Constant", "ConstantOfShape", "EyeLike", "NonMaxSuppression", "RandomNormal", "RandomNormalLike",
     "RandomUniform", "RandomUniformLike", "Range")
)  # fmt: skip
"""Operators that name a type of their own, or take float32 alone."""

_PRONE = frozenset(
    ("CumSum", "Exp", "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization", "Log", "LogSoftmax",
     "LpNormalization", "LpPool", "MeanVarianceNormalization", "Pow", "Reciprocal", "ReduceL1", "ReduceL2",
     "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax", "Softplus")
)  # fmt: skip
"""Operators that overflow or cancel where their inputs do not (as ModelOpt's AutoCast leaves most of them)."""

_LACKING: dict[int, frozenset[str]] = {TensorProto.BFLOAT16: frozenset(("ConvTranspose", "HardSwish", "Mish"))}
"""Type → operators that TensorRT-RTX 1.7 does not build in it, of 60 tried.

A ConvTranspose it does build out of float32 between casts, which it takes in.
"""

_FLOAT_INPUTS = {"Resize": (1, 2)}
"""Inputs that are float32 whatever the others are: the region and the scales."""


@dataclass(frozen=True)
class Narrowed:
    """A graph in half the bits.

    Attributes:
        graph: The graph.
        wide: Nodes with float32 results that stay in float32, with the modules that they came from.
        nodes: Nodes with float32 results in all.
    """

    graph: OnnxGraph
    wide: tuple[str, ...]
    nodes: int


def narrow(graph: OnnxGraph, precision: str, prone: Collection[str] = ()) -> Narrowed:
    """Return a float32 graph, or the float part of a quantized one, in float16 or bfloat16.

    Args:
        graph: Every value's type known.
        precision: ``fp16`` or ``bf16``.
        prone: Labels of nodes that stay in float32, beside those that always do.
    """
    if precision == BF16:
        graph = raised(graph, _BFLOAT16_OPSET)
    elif any(node.op_type in _QDQ for node in graph.nodes):
        graph = raised(graph, _SCALES_OPSET)
    change = _Change(Draft.of(graph), TYPES[precision], _joined(graph, prone))
    change.run()
    return Narrowed(change.draft.close(), tuple(change.wide), change.nodes)


def overflowing(graph: OnnxGraph, samples: Sequence[Feeds]) -> tuple[str, ...]:
    """Return the labels of nodes that read or make values too large for float16.

    Args:
        graph: Every value's type known.
        samples: Inputs; magnitudes are looked at while they are computed in float32.
    """
    draft = Draft.of(graph)
    names = [name for node in draft.nodes for name in node.output if name and draft.dtype(name) == TensorProto.FLOAT]
    large = {name for name, tensor in draft.weights.items() if tensor.data_type == TensorProto.FLOAT
             and _magnitude(draft.array(name)) >= LARGEST}  # fmt: skip
    run = Reference(graph, outputs=names)
    for feeds in samples:
        large |= {name for name, array in {**run.run(feeds), **feeds}.items() if _magnitude(array) >= LARGEST}
    return tuple(node_label(node) for node in draft.nodes if large.intersection((*node.input, *node.output)))


def rounding_sqnr(graph: OnnxGraph, rounded: OnnxGraph, samples: Sequence[Feeds]) -> float:
    """Return the ratio of the outputs to what rounding does to them, in dB; −inf where that is not finite.

    Args:
        graph: In float32.
        rounded: What rounding made of it.
        samples: Inputs.
    """
    wide, narrow_ = Reference(graph), Reference(rounded)
    signal = noise = 0.0
    for feeds in samples:
        outputs = narrow_.run(feeds)
        for name, value in wide.run(feeds).items():
            if value.dtype != np.float32:
                continue
            error = outputs[name].astype(np.float64) - value
            if not np.isfinite(error[np.isfinite(value)]).all():
                return -math.inf
            signal += float(np.square(value, dtype=np.float64).sum())
            noise += float(np.square(error).sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _joined(graph: OnnxGraph, prone: Collection[str]) -> frozenset[str]:
    """Add what belongs to nodes that stay in float32: a Cast between a layer and its DequantizeLinear ends its int8."""
    sources = {node.output[0]: node_label(node) for node in graph.nodes if node.op_type == "DequantizeLinear"}
    groups = [
        {node_label(node), *(sources[name] for name in node.input if name in sources)}
        for node in graph.nodes
        if node.op_type in PRODUCTS
    ]
    joined = set(prone)
    while added := {label for group in groups if not joined.isdisjoint(group) for label in group} - joined:
        joined |= added
    return frozenset(joined)


def _magnitude(array: NDArray[np.generic] | None) -> float:
    """Return the largest magnitude; inf where a value is not finite. Infinite constants are bounds, and no values."""
    if array is None or array.dtype != np.float32 or not array.size:
        return 0.0
    return float(np.nan_to_num(np.abs(array), nan=math.inf).max())


@dataclass
class _Change:
    """The walk through a graph that narrows it. A tensor's wide form keeps its name; its narrow form has another."""

    draft: Draft
    kind: int
    prone: frozenset[str]
    wide: list[str] = field(default_factory=list)
    nodes: int = 0
    _narrow: dict[str, str] = field(default_factory=dict)
    _made: list[onnx.NodeProto] = field(default_factory=list)
    _narrow_made: set[str] = field(default_factory=set)
    _scales: set[str] = field(default_factory=set)

    def run(self) -> None:
        self._scales = {node.input[1] for node in self.draft.nodes if node.op_type in _QDQ}
        floats = {name for node in self.draft.nodes for name in (*node.input, *node.output)
                  if name and self.draft.dtype(name) == TensorProto.FLOAT}  # fmt: skip
        for node in self.draft.nodes:
            self._node(node, floats)
        for value in self.draft.outputs:
            self._widen(value.name)
        self.draft.nodes[:] = self._made
        read = {name for node in self._made for name in reads(node)} | self.draft.output_names()
        self.draft.weights = {name: tensor for name, tensor in self.draft.weights.items() if name in read}
        self.draft.values |= {value.name: value for value in self._values()}

    def _values(self) -> Iterator[onnx.ValueInfoProto]:
        """Yield types and shapes of narrow tensors. ONNX does not infer them: most operators got bfloat16 late."""
        for name, made in self._narrow.items():
            if (value := self.draft.value(name)) is not None:
                narrow_ = onnx.ValueInfoProto.FromString(value.SerializeToString())
                narrow_.name = made
                narrow_.type.tensor_type.elem_type = self.kind
                yield narrow_

    def _node(self, node: onnx.NodeProto, floats: set[str]) -> None:
        results = [name for name in node.output if name in floats]
        stays = self._stays_wide(node)
        if results:
            self.nodes += 1
            if stays:
                self.wide.append(f"{module_path(node)} ({node_label(node)})")
        if any(True for _ in subgraphs(node)):  # what is read inside has its own name: its wide form
            for name in reads(node):
                self._widen(name)
        for index, name in enumerate(node.input):
            if name in floats:
                wide = stays or index in _FLOAT_INPUTS.get(node.op_type, ())
                node.input[index] = self._widen(name) if wide else self._narrowed(name, node)
        for index, name in enumerate(node.output):
            if name in floats and not stays:
                self._narrow_made.add(name)
                self._narrow[name] = node.output[index] = self._fresh(name)
        self._made.append(node)

    def _stays_wide(self, node: onnx.NodeProto) -> bool:
        nested = any(True for _ in subgraphs(node))
        wide = _MAKERS | _PRONE | _LACKING.get(self.kind, frozenset())
        return nested or node.op_type in wide or node_label(node) in self.prone

    def _widen(self, name: str) -> str:
        """Return the float32 form of a tensor, made of the narrow one where that is all there is."""
        if name in self._narrow_made:
            self._narrow_made.discard(name)
            made, source = self.draft.fresh(f"{name}_wide"), [self._narrow[name]]
            self._made.append(helper.make_node("Cast", source, [name], made, to=TensorProto.FLOAT))
        return name

    def _narrowed(self, name: str, reader: onnx.NodeProto) -> str:
        """Return the narrow form of a tensor."""
        if name not in self._narrow:
            self._narrow[name] = made = self._fresh(name)
            array = self.draft.array(name)
            if array is not None:
                self._constant(name, made, array)
            else:
                self._made.append(self._cast(name, made, self.kind, reader))
        return self._narrow[name]

    def _constant(self, name: str, result: str, array: NDArray[np.generic]) -> None:
        dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        with np.errstate(over="ignore"):  # an infinite bound stays one; values that large stay in float32
            rounded = array.astype(dtype)
        if name in self._scales:  # that of a channel without weights is next to 0, and no target takes 0
            rounded = np.maximum(rounded, np.nextafter(dtype.type(0), dtype.type(1)))
        self.draft.weights[result] = helper.make_tensor(result, self.kind, array.shape, rounded.tobytes(), raw=True)

    def _cast(self, name: str, result: str, kind: int, near: onnx.NodeProto) -> onnx.NodeProto:
        made = helper.make_node("Cast", [name], [result], result, to=kind)
        path = node_metadata(near, MODULE_KEY)
        if path is not None:
            made.metadata_props.add(key=MODULE_KEY, value=path)
        return made

    def _fresh(self, name: str) -> str:
        return self.draft.fresh(f"{name}_{'fp16' if self.kind == TensorProto.FLOAT16 else 'bf16'}")
