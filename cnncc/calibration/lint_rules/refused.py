"""What a target refuses, or accepts and computes otherwise than ONNX says."""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import TensorProto

from cnncc.calibration.lint_rules.rule import ALL, GPU, LLVM, TENSORRT, Issues, Rule
from cnncc.calibration.lint_rules.view import View, has_zero_point, is_standard
from cnncc.graph.draft import attribute
from cnncc.graph.values import STANDARD_DOMAINS

_INTEGER_OPERATORS = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_CONTRIB = re.compile(r"^Q[A-Z]|Quantize|Integer")
_SIGNED, _UNSIGNED, _WIDE = int(TensorProto.INT8), int(TensorProto.UINT8), int(TensorProto.INT32)
_FLOAT8 = (int(TensorProto.FLOAT8E4M3FN), int(TensorProto.FLOAT8E5M2))
_OLDEST_PER_CHANNEL = 13
_SMALLEST = float(np.finfo(np.float32).tiny)


def _integer_operator(view: View) -> Issues:
    for node in view.nodes:
        if is_standard(node, *_INTEGER_OPERATORS):
            yield node, f"{node.op_type} is quantization in operators, which only ONNX Runtime computes"


def _contrib_operator(view: View) -> Issues:
    for node in view.nodes:
        if node.domain not in STANDARD_DOMAINS and _CONTRIB.search(node.op_type):
            yield node, f"{node.domain}::{node.op_type} is no operator of ONNX"


def _dynamic_quantization(view: View) -> Issues:
    for node in view.nodes:
        if is_standard(node, "DynamicQuantizeLinear"):
            yield node, "the scale is computed anew for every input"


def _activation_unsigned(view: View) -> Issues:
    for node in view.quantizers():
        if view.integer_type(node) == _UNSIGNED and not view.flow(node.input[0]).constant:
            unsaid = "" if has_zero_point(node) else " (what ONNX takes where no zero-point says otherwise)"
            yield node, f"activations are quantized to uint8{unsaid}; TensorRT takes the bytes for int8"
    for node in view.dequantizers():
        source = view.flow(node.input[0])
        made = source.constant or source.quantizer is not None or view.dynamic(node)
        if view.integer_type(node) == _UNSIGNED and not made:
            yield node, "activations come as uint8; TensorRT takes the bytes for int8"


def _weight_unsigned(view: View) -> Issues:
    for node in view.dequantizers():
        if view.integer_type(node) == _UNSIGNED and view.flow(node.input[0]).constant:
            yield node, "weights are uint8"


def _bias_int32(view: View) -> Issues:
    for node in view.dequantizers():
        if view.integer_type(node) == _WIDE:
            yield node, "an int32 bias is dequantized"


def _quantized_type(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        kind = view.integer_type(node)
        if kind not in (0, _SIGNED, _UNSIGNED, _WIDE, *_FLOAT8) and not _repeats_pair(view, node):
            yield node, f"the quantized type is {_type_name(kind)}"


def _float8(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        kind = view.integer_type(node)
        if kind in _FLOAT8 and not _repeats_pair(view, node):
            yield node, f"the quantized type is {_type_name(kind)}"


def _zero_point(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        if not has_zero_point(node) or _repeats_pair(view, node):
            continue
        zero = view.zero_point(node)
        if zero is not None and np.any(zero):
            yield node, f"the zero-point is {_some(zero)}, not 0"
        elif zero is None and not view.flow(node.input[2]).constant and not view.dynamic(node):
            yield node, "the zero-point is not a constant"


def _scale_not_constant(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        if not view.flow(node.input[1]).constant and not _repeats_pair(view, node) and not view.dynamic(node):
            yield node, "the scale is not a constant"


def _scale_value(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        scale = view.scale(node)
        if scale is None or _repeats_pair(view, node):
            continue
        good = np.isfinite(scale) & (scale >= _SMALLEST)
        if not good.all():
            yield node, f"the scale is {_some(scale[~good])}, not a normal positive number"


def _scale_shape(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        scale = view.shape(node.input[1])
        if scale is None or attribute(node, "block_size", 0) or _repeats_pair(view, node):
            continue
        if len(scale) > 1:
            yield node, f"the scale has the shape {list(scale)}"
            continue
        shape, axis = view.shape(node.input[0]), int(attribute(node, "axis", 1))
        channels = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if view.per_channel(node) and isinstance(channels, int) and scale[0] != channels:
            yield node, f"there are {scale[0]} scales for {channels} channels on axis {axis}"
        zero = view.shape(node.input[2]) if has_zero_point(node) else None
        if zero is not None and _size(zero) != _size(scale):
            yield node, f"the zero-point has the shape {list(zero)}, the scale {list(scale)}"


def _blocked(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()):
        if attribute(node, "block_size", 0) and not _repeats_pair(view, node):
            yield node, f"scales hold for blocks of {attribute(node, 'block_size')}"


def _per_channel_opset(view: View) -> Issues:
    for node in (*view.quantizers(), *view.dequantizers()) if view.opset < _OLDEST_PER_CHANNEL else ():
        if view.per_channel(node) or any(entry.name == "axis" for entry in node.attribute):
            yield node, f"scales are per channel, and the graph's opset is {view.opset}"


def _transposed_axis(view: View) -> Issues:
    for layer in view.layers:
        if layer.node.op_type == "ConvTranspose" and view.weight_axis(layer) == 1:
            yield layer.node, "the weights of a transposed convolution have a scale per output channel (axis 1)"


def _repeats_pair(view: View, node: onnx.NodeProto) -> bool:
    """Whether a DQ has its parameters from the Q before it, so that reporting one of them is enough."""
    quantizer = view.pair(node) if node.op_type == "DequantizeLinear" else None
    return quantizer is not None and list(quantizer.input[1:]) == list(node.input[1:])


def _some(values: object) -> str:
    distinct = np.unique(np.asarray(values).ravel())
    shown = ", ".join(f"{value:g}" for value in distinct[:3].astype(np.float64))
    return shown + (", …" if len(distinct) > 3 else "")


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def _size(shape: tuple[int | str | None, ...]) -> object:
    return 1 if not shape or shape == (1,) else shape


_QUANTIZE_AGAIN = "quantize the float model again: `cnncc quantize` writes signed int8 with zero-point 0"
_PROBE = "probe: refused"

RULES = (
    Rule(
        "integer-operator",
        "refused",
        ALL,
        "export with Q/DQ nodes (QuantFormat.QDQ in ONNX Runtime), not in the operator format",
        f"{_PROBE}; TVM 0.27 has ConvInteger and QLinearConv not either",
        _integer_operator,
    ),
    Rule(
        "contrib-operator",
        "refused",
        ALL,
        "use QuantizeLinear and DequantizeLinear of ONNX's own domain, opset 13 or newer",
        _PROBE,
        _contrib_operator,
    ),
    Rule(
        "dynamic-quantization",
        "refused",
        GPU,
        "calibrate: `cnncc calibrate` finds constant scales",
        _PROBE,
        _dynamic_quantization,
    ),
    Rule(
        "activation-unsigned",
        "refused",
        GPU,
        _QUANTIZE_AGAIN,
        "probe: zero-point 0 is accepted and the tensor typed int8, others are refused; emulated, a ResNet fell from "
        "95.1 to 91.0 % top-1",
        _activation_unsigned,
    ),
    Rule("weight-unsigned", "refused", GPU, _QUANTIZE_AGAIN, _PROBE, _weight_unsigned),
    Rule(
        "bias-int32",
        "refused",
        GPU,
        "leave the bias in float (QuantizeBias=False in ONNX Runtime); it costs nothing",
        _PROBE,
        _bias_int32,
    ),
    Rule(
        "quantized-type",
        "refused",
        ALL,
        _QUANTIZE_AGAIN,
        f"{_PROBE} (int16, uint16, int4); TVM 0.27 does not import int4",
        _quantized_type,
    ),
    Rule(
        "float8",
        "refused",
        (LLVM,),
        _QUANTIZE_AGAIN,
        "TVM 0.27 imports neither; probe: E4M3 is computed, E5M2 refused",
        _float8,
    ),
    Rule("zero-point", "refused", GPU, _QUANTIZE_AGAIN, _PROBE, _zero_point),
    Rule(
        "scale-not-constant",
        "refused",
        GPU,
        "make the scale an initializer",
        "probe: the parser ends the process with a segmentation fault",
        _scale_not_constant,
    ),
    Rule(
        "scale-value",
        "refused",
        ALL,
        "calibrate again; a tensor that is always zero takes the scale 1",
        "probe: zero, negative and NaN are refused (by TVM 0.27 zero); of a scale below 2⁻¹²⁸ the engine holds the "
        "reciprocal, infinity, and 0 · ∞ is NaN",
        _scale_value,
    ),
    Rule(
        "scale-shape",
        "refused",
        ALL,
        "one scale, or one for each channel of the axis; the zero-point of the same shape",
        f"{_PROBE}, and by ONNX Runtime",
        _scale_shape,
    ),
    Rule("blocked", "refused", ALL, _QUANTIZE_AGAIN, f"{_PROBE}; not imported by TVM 0.27", _blocked),
    Rule(
        "per-channel-opset",
        "refused",
        ALL,
        "raise the model to opset 13 or newer",
        "the attribute axis is of opset 13 (ONNX operator specification); ONNX Runtime refuses it before",
        _per_channel_opset,
    ),
    Rule(
        "transposed-axis",
        "refused",
        (TENSORRT,),
        "keep it in float, or give its weights one scale",
        "NVIDIA's answers in NVIDIA/TensorRT #1519, #1694 and #2380: TensorRT 8 takes scales per input channel only, "
        "refuses others or computes wrong numbers; newer ones were not tried",
        _transposed_axis,
    ),
)
"""In the order in which they are reported."""
