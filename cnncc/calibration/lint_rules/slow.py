"""What every target computes as written, at a cost that another placement of Q/DQ does not have."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from cnncc.calibration.lint_rules.rule import ALL, GPU, Issues, Rule
from cnncc.calibration.lint_rules.view import DEQUANTIZE, LAYERS, MERGING, QUANTIZE, Flow, View, is_standard
from cnncc.graph.draft import attribute
from cnncc.graph.names import place

_ACTIVATIONS = (
    "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid", "Softplus",
    "Swish", "Tanh",
)  # fmt: skip


def _skip_unquantized(view: View) -> Issues:
    for quantizer, reader in _read_beside(view):
        if is_standard(reader, "Add", "Sum"):
            yield reader, f"it adds a float tensor that {quantizer.name or 'a QuantizeLinear'} quantizes as well"


def _float_beside_quantized(view: View) -> Issues:
    for quantizer, reader in _read_beside(view):
        if not is_standard(reader, "Add", "Sum", "Shape", "Size", *LAYERS):
            yield reader, f"it reads a float tensor that {quantizer.name or 'a QuantizeLinear'} quantizes as well"


def _requantized(view: View) -> Issues:
    for node in view.quantizers():
        for flow in _before(view, node):
            other = flow.dequantizer
            if other is not None and not flow.constant and not view.same_parameters(node, other):
                yield node, f"it quantizes anew what {other.name or 'a DequantizeLinear'} gives with another scale"
                break


def _quantized_twice(view: View) -> Issues:
    first: dict[str, onnx.NodeProto] = {}
    for node in view.quantizers():
        other = first.setdefault(node.input[0], node)
        if other is not node and not view.same_parameters(node, other):
            yield node, f"it quantizes what {other.name or 'another QuantizeLinear'} quantizes too, with another scale"


def _quantized_before_activation(view: View) -> Issues:
    for node in view.quantizers():
        producer = view.producers.get(node.input[0])
        if producer is None or not is_standard(producer, *LAYERS):
            continue
        for reader in _float_readers(view, node):
            if is_standard(reader, *_ACTIVATIONS):
                yield node, f"it stands between {place(producer)} and its activation, {place(reader)}"
                break


def _narrow_groups(view: View) -> Issues:
    for layer in view.layers:
        shape = view.shape(layer.node.input[1])
        width = shape[1] if shape is not None and len(shape) > 1 else None
        grouped = layer.node.op_type == "Conv" and attribute(layer.node, "group", 1) > 1
        if grouped and layer.whole and isinstance(width, int) and width % 4:
            yield layer.node, f"its groups have {width} input channels, which are padded to {-(-width // 4) * 4}"


def _integer_interface(view: View) -> Issues:
    for node in view.dequantizers():
        flow = view.flow(node.input[0])
        if not flow.constant and flow.quantizer is None and node.input[0] not in view.producers:
            yield node, f"the graph's input '{node.input[0]}' is quantized by the caller"
    for node in view.quantizers():
        if node.output[0] in view.output_names:
            yield node, f"the graph's output '{node.output[0]}' is left quantized"


def _pair_scales(view: View) -> Issues:
    for node in view.dequantizers():
        quantizer = view.pair(node)
        if quantizer is not None and not view.same_parameters(node, quantizer):
            yield node, f"its scale is not that of {quantizer.name or 'its QuantizeLinear'}: the tensor is rescaled"


def _read_beside(view: View) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Yield a quantizer of activations with each node that reads the same tensor in float."""
    for quantizer in view.quantizers():
        name = quantizer.input[0]
        flow = view.flow(name)
        if flow.constant or flow.dequantizer is not None or name not in view.producers:
            continue
        for reader in view.readers.get(name, ()):
            if not is_standard(reader, QUANTIZE):
                yield quantizer, reader


def _before(view: View, quantizer: onnx.NodeProto) -> Iterator[Flow]:
    """Yield what a quantizer reads, and where that is merged or padded, what that is made of."""
    flow = view.flow(quantizer.input[0])
    yield flow
    if flow.stop is not None and is_standard(flow.stop, *MERGING, "Pad"):
        yield from (view.flow(name) for name in flow.stop.input)


def _float_readers(view: View, quantizer: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for node in view.readers.get(quantizer.output[0], ()):
        if is_standard(node, DEQUANTIZE):
            yield from view.readers.get(node.output[0], ())


RULES = (
    Rule(
        "skip-unquantized",
        "slow",
        GPU,
        "let the addition read the DequantizeLinear of that tensor",
        "probe: the tensor is written twice, int8 and float; where it reads the DequantizeLinear, once",
        _skip_unquantized,
    ),
    Rule(
        "float-beside-quantized",
        "slow",
        GPU,
        "let it read the DequantizeLinear of that tensor",
        "as skip-unquantized",
        _float_beside_quantized,
    ),
    Rule(
        "requantized",
        "slow",
        ALL,
        "give both the same scale (the larger range), or drop the Q/DQ before it",
        "probe: rounds twice; with equal scales int8 is moved",
        _requantized,
    ),
    Rule(
        "quantized-twice",
        "slow",
        ALL,
        "quantize a tensor once, and let all that read it read the one DequantizeLinear",
        "probe: an int8 tensor for each scale",
        _quantized_twice,
    ),
    Rule(
        "quantized-before-activation",
        "slow",
        ALL,
        "quantize behind the activation",
        "probe: rounds twice in the same kernel; and half of int8's range goes to values that a ReLU drops",
        _quantized_before_activation,
    ),
    Rule(
        "narrow-groups",
        "slow",
        GPU,
        "if it is not faster on the device, leave it in float",
        "probe: a kernel concatenates zeros to each group, so a depthwise convolution reads as many bytes as in float; "
        "TensorRT's API asks for multiples of 4 (IConvolutionLayer::setNbGroups)",
        _narrow_groups,
    ),
    Rule(
        "integer-interface",
        "slow",
        ALL,
        "keep inputs and outputs in float: Q/DQ at the input costs one small kernel",
        "probe: int8; TVM 0.27: exact. But no bundle says with which scale",
        _integer_interface,
    ),
    Rule(
        "pair-scales",
        "slow",
        ALL,
        "give Q and DQ one scale",
        "probe, and TVM 0.27: multiplied by the quotient, as ONNX says",
        _pair_scales,
    ),
)
"""In the order in which they are reported."""
