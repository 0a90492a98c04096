"""Layers that a target computes in float without a word, although the graph looks quantized."""

from __future__ import annotations

import math

import onnx

from cnncc.calibration.lint_rules.rule import GPU, RTX, Issues, Rule
from cnncc.calibration.lint_rules.view import (
    DEQUANTIZE,
    LAYERS,
    MERGING,
    MOVING,
    QUANTIZE,
    Flow,
    Layer,
    View,
    is_standard,
)
from cnncc.calibration.plan import FEWEST
from cnncc.graph.draft import attribute
from cnncc.graph.names import place


def _weight_axis(view: View) -> Issues:
    for layer in view.layers:
        axis, wanted = view.weight_axis(layer), _output_axis(view, layer)
        if axis is not None and wanted is not None and axis != wanted and layer.whole:
            yield layer.node, f"its weights have scales along axis {axis}; output channels are axis {wanted}"


def _activations_only(view: View) -> Issues:
    for layer in view.layers:
        if layer.data.dequantizer is None or layer.weight.dequantizer is not None:
            continue
        what = "its weights are" if layer.weight.constant else "its other operand is"
        yield layer.node, f"its activations are quantized, {what} not{_blocker(layer.weight)}"


def _weights_only(view: View) -> Issues:
    for layer in view.layers:
        if layer.weight.dequantizer is not None and layer.data.dequantizer is None:
            what = "its weights are" if layer.weight.constant else "one operand is"
            yield layer.node, f"{what} quantized, its activations are not{_blocker(layer.data)}"


def _not_quantized(view: View) -> Issues:
    if not any(True for _ in view.quantizers()) and not any(True for _ in view.dequantizers()):
        return
    for layer in view.layers:
        product = not layer.weight.constant and layer.node.op_type == "MatMul"
        if layer.data.dequantizer is None and layer.weight.dequantizer is None and not product:
            yield layer.node, f"neither its activations nor its weights are quantized{_blocker(layer.data)}"


def _activation_per_channel(view: View) -> Issues:
    for layer in view.layers:
        node = layer.data.dequantizer
        if node is not None and view.per_channel(node):
            yield layer.node, "its activations have a scale per channel; TensorRT takes one scale for activations"


def _activation_scale_rank(view: View) -> Issues:
    for layer in view.layers:
        node = layer.data.dequantizer
        rank = view.shape(node.input[1]) if node is not None else None
        if layer.node.op_type == "Conv" and layer.whole and rank == (1,):
            yield layer.node, "the one scale of its activations has the shape [1]; it must be a scalar, shape []"


def _transposed_convolution(view: View) -> Issues:
    for layer in view.layers:
        if layer.node.op_type == "ConvTranspose" and layer.whole:
            yield layer.node, "a quantized transposed convolution is computed in float, and loses accuracy all the same"


def _one_pixel(view: View) -> Issues:
    for layer in view.layers:
        made = view.shape(layer.node.output[0])
        if layer.node.op_type != "Conv" or not layer.whole or made is None or {made[0], *made[2:]} != {1}:
            continue
        sizes = [size for size in (view.shape(layer.node.input[layer.weight_index]) or ())[1:] if isinstance(size, int)]
        if math.prod(sizes) <= FEWEST:
            yield layer.node, "it makes one pixel of sums of at most four products, and is computed in float"


def _pool_split(view: View) -> Issues:
    quantized: set[str] = set()
    for node in reversed(view.nodes):
        passed = is_standard(node, *MOVING, *MERGING) and any(name in quantized for name in node.output)
        if passed or is_standard(node, QUANTIZE):
            quantized.update(node.input)
    split: dict[str, onnx.NodeProto] = {}
    for node in view.nodes:
        above = next((split[name] for name in node.input if name in split), None)
        if view.moved(node) and (above is not None or _fuses(view, node, quantized)):
            split.update((name, above or node) for name in node.output)
    for layer in view.layers:
        pool = split.get(layer.node.input[1 - layer.weight_index])
        if pool is not None and layer.whole:
            yield layer.node, f"{place(pool)}, which it reads, is also read by a QuantizeLinear"


def _fuses(view: View, node: onnx.NodeProto, quantized: set[str]) -> bool:
    """Whether TensorRT-RTX makes one kernel of a DQ, this operator and the Q behind it."""
    direct = view.flow(node.input[0]).step is None
    return is_standard(node, "MaxPool") and direct and node.output[0] in quantized


def _unpaired(view: View) -> Issues:
    for node in view.nodes:
        if is_standard(node, DEQUANTIZE, *MOVING) or node.op_type in _TAKE_INTEGERS:
            continue
        for name in node.input:
            quantizer = view.flow(name).quantizer
            if quantizer is not None and not (is_standard(node, *MERGING) and view.flow(node.output[0]).quantizer):
                yield quantizer, f"{place(node)} reads its integers without a DequantizeLinear"


_TAKE_INTEGERS = ("Shape", "Size", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")


def _output_axis(view: View, layer: Layer) -> int | None:
    """Return the axis of a layer's weight that its output channels are."""
    rank = len(view.shape(layer.node.input[layer.weight_index]) or ())
    if layer.node.op_type == "Conv":
        return 0
    if layer.node.op_type == "Gemm":
        return 0 if attribute(layer.node, "transB", 0) else 1
    if layer.node.op_type == "MatMul" and rank >= 2:
        return rank - 1 if layer.weight_index == 1 else rank - 2
    return None


def _blocker(flow: Flow) -> str:
    """Return what stands between a layer and the DequantizeLinear that it does not read, as the end of a sentence."""
    if flow.stop is None or not flow.behind or is_standard(flow.stop, *LAYERS):
        return ""
    joined = ", whose inputs have different scales," if is_standard(flow.stop, *MERGING) else ""
    return f": {place(flow.stop)}{joined} stands between"


_QUANTIZE_BOTH = (
    "put Q/DQ directly before its activations and DequantizeLinear behind int8 weights; or name it among the layers "
    "that stay in float"
)
_PROBE = "probe: float operands"


RULES = (
    Rule(
        "weight-axis",
        "float",
        GPU,
        "quantize weights along their output channels: axis 0 of Conv and of Gemm with transB, else the last",
        f"{_PROBE} (Conv, Gemm, MatMul)",
        _weight_axis,
    ),
    Rule("activations-only", "float", GPU, _QUANTIZE_BOTH, _PROBE, _activations_only),
    Rule("weights-only", "float", GPU, _QUANTIZE_BOTH, _PROBE, _weights_only),
    Rule("not-quantized", "float", GPU, _QUANTIZE_BOTH, _PROBE, _not_quantized),
    Rule(
        "activation-per-channel",
        "float",
        GPU,
        "use one scale; `cnncc quantize` equalizes channels through the weights instead",
        _PROBE,
        _activation_per_channel,
    ),
    Rule(
        "activation-scale-rank",
        "float",
        (RTX,),
        "write the scale and the zero-point as scalars",
        f"{_PROBE} where a Conv's DequantizeLinear has the scale shape [1]; a Gemm is int8 nevertheless",
        _activation_scale_rank,
    ),
    Rule(
        "transposed-convolution",
        "float",
        (RTX,),
        "leave it in float, and name it among the layers that stay so",
        f"{_PROBE}, whatever the axis, the groups and the compute capability",
        _transposed_convolution,
    ),
    Rule(
        "one-pixel",
        "float",
        (RTX,),
        "leave it in float, and name it among the layers that stay so",
        f"{_PROBE} for one to four channels, a batch of one and one pixel; int8 for five, for two images, for Gemm",
        _one_pixel,
    ),
    Rule(
        "pool-split",
        "float",
        (RTX,),
        "let the layer read the DequantizeLinear of that QuantizeLinear",
        f"{_PROBE}: DequantizeLinear, MaxPool and QuantizeLinear become one kernel, others read float",
        _pool_split,
    ),
    Rule(
        "unpaired",
        "float",
        GPU,
        "put a DequantizeLinear with the same scale behind the QuantizeLinear",
        f"{_PROBE} behind Q and Cast",
        _unpaired,
    ),
)
"""In the order in which they are reported."""
