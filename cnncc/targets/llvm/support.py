"""Which nodes the llvm target takes, as far as that can be told without a compiler."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import NodeIssue

_CONTROL = frozenset({"If", "Loop", "Scan"})
_SEQUENCES = frozenset(
    {
        "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt",
        "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
        "SplitToSequence",
    }
)  # fmt: skip
_DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
_RANDOM = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
                     "RandomUniformLike"})  # fmt: skip

OPERATORS = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "AveragePool",
        "BatchNormalization",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Cast",
        "CastLike",
        "Ceil",
        "Celu",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "Cos",
        "Cosh",
        "CumSum",
        "DepthToSpace",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "DynamicQuantizeLinear",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "EyeLike",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalLpPool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "GridSample",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "Hardmax",
        "Identity",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LRN",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "LpPool",
        "MatMul",
        "MatMulInteger",
        "Max",
        "MaxPool",
        "Mean",
        "MeanVarianceNormalization",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "OneHot",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "QuantizeLinear",
        "RMSNormalization",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "RoiAlign",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Upsample",
        "Where",
        "Xor",
    ]
)
"""Operators of the default domain that have a converter, TVM's or ours."""


def static_issues(graph: OnnxGraph) -> tuple[NodeIssue, ...]:
    """List the nodes that no converter takes, whatever their inputs are."""
    found = []
    for node in graph.nodes:
        reason = _reason(node)
        if reason:
            found.append(NodeIssue(module_path(node), node_label(node), node.op_type, reason))
    return tuple(found)


def _reason(node: onnx.NodeProto) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"operators of the domain '{node.domain}' are not known"
    for names, reason in _REASONS:
        if node.op_type in names:
            return reason
    if node.op_type not in OPERATORS:
        return "the llvm target has no such operator"
    return ""


_REASONS = (
    (_CONTROL, "control flow is not compiled; make the condition a constant of the model"),
    (_SEQUENCES, "sequences and optionals are not compiled; use tensors"),
    (_DATA_DEPENDENT, "its output's shape depends on data; leave it to the application, after the engine"),
    (_RANDOM, "random numbers are not compiled; feed them as an input"),
)


def first_line(exc: BaseException) -> str:
    """Return the first line of an error that says something, without the compiler's own stack."""
    return next(_meaningful(str(exc)), type(exc).__name__)


_NOISE = re.compile(r"^(Traceback|File |\[\d\d:\d\d:\d\d\]|Stack trace|\^+|-+$|\d+: )")


def _meaningful(text: str) -> Iterator[str]:
    for line in map(str.strip, text.splitlines()):
        if line and not _NOISE.match(line):
            yield line[:300]
