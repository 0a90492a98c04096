"""Hand-built Q/DQ graphs: one pattern each, with what the lint must say and what TensorRT-RTX makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from tests.calibration.qdq_builder import SCALE, QdqBuilder

_F = np.float32


Body = Callable[[QdqBuilder, str], Any]


@dataclass(frozen=True)
class Pattern:
    """One way to place Q/DQ.

    Attributes:
        name: In prose.
        body: Builds it from a float input and returns its outputs, one name or several.
        rules: The rules that the lint must report, no others.
        rtx: What TensorRT-RTX makes of it: ``int8`` (every convolution and product), ``float`` (some are not),
            ``refused`` (its parser or builder), ``crash``, ``fp8_e4m3``.
        miscomputed: RTX builds it, and computes something else than ONNX says.
        exact: Whether TVM computes the same bits as ONNX Runtime: it holds no means and no transcendental functions.
        shape: Of the input.
        opset: Of the graph.
    """

    name: str
    body: Body
    rules: frozenset[str] = frozenset()
    rtx: str = "int8"
    miscomputed: bool = False
    exact: bool = True
    shape: tuple[int | str, ...] = (1, 16, 8, 8)
    opset: int = 20

    def graph(self) -> OnnxGraph:
        builder = QdqBuilder(self.opset)
        outputs = self.body(builder, builder.input("x", *self.shape))
        return builder.graph(*([outputs] if isinstance(outputs, str) else outputs))


# ---- parts of patterns


def _conv(b: QdqBuilder, x: str, name: str = "conv", **attributes: Any) -> str:
    return b.conv(x, b.weight(16, 16, 3, 3), 16, name, **attributes)


def _relu_conv(b: QdqBuilder, x: str, name: str) -> str:
    return b.op("Relu", _conv(b, x, name))


def _first(b: QdqBuilder, x: str) -> tuple[str, str]:
    """Return what a first convolution and its ReLU give, in float and quantized."""
    y = _relu_conv(b, b.qdq(x), "first")
    return y, b.qdq(y)


def _last(b: QdqBuilder, x: str, channels: int = 16) -> str:
    return b.conv(x, b.weight(16, channels, 3, 3), 16, "last")


def _behind(operator: str, *constants: Any, channels: int = 16, **attributes: Any) -> Body:
    """Return a pattern: DequantizeLinear, an operator, a convolution."""

    def body(b: QdqBuilder, x: str) -> str:
        read = b.op(
            operator, b.qdq(x), *(b.constant(value) if value is not None else "" for value in constants), **attributes
        )
        return _last(b, read, channels)

    return body


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _per_channel(b: QdqBuilder, x: str) -> str:
    return b.qdq(x, np.full(16, SCALE), axis=1)


def _with_scale(make: Callable[[QdqBuilder], str]) -> Body:
    def body(b: QdqBuilder, x: str) -> str:
        return _conv(b, b.shared_qdq(x, make(b), b.constant(np.int8(0))))

    return body


def _with_weight(make: Callable[[QdqBuilder], str]) -> Body:
    return lambda b, x: b.conv(b.qdq(x), make(b), 16)


def _dequantized(
    b: QdqBuilder, weight: Any, scale: Any, zero: Any = None, dtype: int | None = None, **attributes: Any
) -> str:
    inputs = [b.constant(weight, dtype), b.constant(np.asarray(scale, _F))]
    inputs += [] if zero is None else [b.constant(zero)]
    return b.op("DequantizeLinear", *inputs, **attributes)


def _channel_shuffle(b: QdqBuilder, x: str) -> str:
    split = b.op("Reshape", b.qdq(x), b.constant(_ints(1, 2, 8, 8, 8)))
    moved = b.op("Transpose", split, perm=[0, 2, 1, 3, 4])
    return _last(b, b.op("Reshape", moved, b.constant(_ints(1, 16, 8, 8))))


def _residual(b: QdqBuilder, x: str, *, skip: str = "dequantized", main: float | None = None) -> str:
    y, q = _first(b, x)
    made = _conv(b, q, "second")
    made = made if main is None else b.qdq(made, main)
    other = {"dequantized": q, "float": y}.get(skip) or b.qdq(y, 2 * SCALE)
    return _last(b, b.qdq(b.op("Relu", b.op("Add", made, other, name="add"))))


def _downsample(b: QdqBuilder, x: str) -> str:
    _, q = _first(b, x)
    skip = b.conv(q, b.weight(16, 16, 1, 1), 16, "downsample", pads=[0, 0, 0, 0])
    return _last(b, b.qdq(b.op("Relu", b.op("Add", _conv(b, q, "second"), skip))))


def _concat(b: QdqBuilder, x: str, *, before: tuple[float, ...] = (), after: float | None = None) -> str:
    _, q = _first(b, x)
    branches = [_relu_conv(b, q, "left"), _relu_conv(b, q, "right")]
    branches = [b.qdq(branch, scale) for branch, scale in zip(branches, before, strict=True)] if before else branches
    joined = b.op("Concat", *branches, axis=1)
    return _last(b, joined if after is None else b.qdq(joined, after), 32)


def _dense(b: QdqBuilder, x: str, *, after: float = SCALE) -> str:
    _, q = _first(b, x)
    return _last(b, b.qdq(b.op("Concat", q, _relu_conv(b, q, "branch"), axis=1), after), 32)


def _activation(operator: str, **attributes: Any) -> Body:
    return lambda b, x: _last(b, b.qdq(b.op(operator, _conv(b, b.qdq(x), "first"), **attributes)))


def _silu(b: QdqBuilder, x: str) -> str:
    y = _conv(b, b.qdq(x), "first")
    return _last(b, b.qdq(b.op("Mul", y, b.op("Sigmoid", y))))


def _squeeze_excite(b: QdqBuilder, x: str) -> str:
    y = _relu_conv(b, b.qdq(x), "first")
    none = [0, 0, 0, 0]
    squeezed = b.qdq(b.op("GlobalAveragePool", y), SCALE / 4)
    squeezed = b.op("Relu", b.conv(squeezed, b.weight(8, 16, 1, 1), 8, "squeeze", pads=none))
    gate = b.op("Sigmoid", b.conv(b.qdq(squeezed, SCALE / 4), b.weight(16, 8, 1, 1), 16, "excite", pads=none))
    return _last(b, b.qdq(b.op("Mul", y, gate)))


def _pooled(b: QdqBuilder, x: str, *, before: float | None = SCALE, after: float | None = None) -> str:
    y = _relu_conv(b, b.qdq(x), "first")
    y = y if before is None else b.qdq(y, before)
    y = b.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    return _last(b, y if after is None else b.qdq(y, after))


def _between(operator: str, *constants: Any, quantized: bool, **attributes: Any) -> Body:
    """Return a pattern: an operator whose output is quantized, and whose input is or is not."""

    def body(b: QdqBuilder, x: str) -> str:
        y, q = _first(b, x) if quantized else (_relu_conv(b, b.qdq(x), "first"), "")
        inputs = [b.constant(value) if value is not None else "" for value in constants]
        return _last(b, b.qdq(b.op(operator, q or y, *inputs, **attributes)))

    return body


def _padded(b: QdqBuilder, x: str, *pads: int) -> str:
    return b.op("Pad", b.qdq(x), b.constant(_ints(*(pads or (0, 0, 1, 1, 0, 0, 1, 1)))))


def _pool_split(b: QdqBuilder, x: str) -> tuple[str, str]:
    y = b.op("MaxPool", b.qdq(x), kernel_shape=[2, 2])
    return _last(b, y), b.qdq(y)


_NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
_TWICE = (None, np.array([1, 1, 2, 2], _F))


def _transposed(axis: int | None, **attributes: Any) -> Body:
    return lambda b, x: b.op(
        "ConvTranspose", b.qdq(x), b.weight(16, 16, 2, 2, axis=axis), name="up", strides=[2, 2], **attributes
    )


def _grouped(groups: int) -> Body:
    return lambda b, x: b.conv(b.qdq(x), b.weight(16, 16 // groups, 3, 3), 16, group=groups)


def _gemm(axis: int | None, *, transposed: bool) -> Body:
    def body(b: QdqBuilder, x: str) -> str:
        weight = b.weight(*((10, 1024) if transposed else (1024, 10)), axis=axis)
        return b.op("Gemm", b.op("Flatten", b.qdq(x)), weight, b.floats(10), name="fc", transB=int(transposed))

    return body


def _matmul(axis: int | None) -> Body:
    return lambda b, x: b.op("MatMul", b.qdq(x), b.weight(8, 12, axis=axis), name="product")


def _dynamic(b: QdqBuilder, x: str) -> str:
    return _conv(b, b.op("DequantizeLinear", *b.op("DynamicQuantizeLinear", x, outputs=3)))


def _conv_integer(b: QdqBuilder, x: str) -> str:
    made = b.op("ConvInteger", b.quantize(x), b.constant(b.integers(16, 16, 3, 3)))
    return b.op("Cast", made, to=TensorProto.FLOAT)


def _matmul_integer(b: QdqBuilder, x: str) -> str:
    return b.op("Cast", b.op("MatMulInteger", b.quantize(x), b.constant(b.integers(8, 8))), to=TensorProto.FLOAT)


def _qlinear_conv(b: QdqBuilder, x: str) -> str:
    scale, zero = b.constant(_F(SCALE)), b.constant(np.int8(0))
    weight = [b.constant(b.integers(16, 16, 3, 3)), b.constant(_F(2.0**-10)), zero]
    return b.dequantize(b.op("QLinearConv", b.quantize(x), scale, zero, *weight, scale, zero))


def _contrib(b: QdqBuilder, x: str) -> str:
    return _conv(b, b.qdq(x, domain="com.microsoft"))


def _bias(make: Callable[[QdqBuilder], str]) -> Body:
    return lambda b, x: b.op("Conv", b.qdq(x), b.weight(16, 16, 3, 3), make(b), name="conv")


def _int32_bias(b: QdqBuilder) -> str:
    return _dequantized(b, np.arange(16, dtype=np.int32), np.full(16, 2.0**-16), axis=0)


def _unsigned_weight(b: QdqBuilder) -> str:
    weight = (b.integers(16, 16, 3, 3).astype(np.int16) + 128).astype(np.uint8)
    return _dequantized(b, weight, np.full(16, 2.0**-10), np.full(16, 128, np.uint8), axis=0)


def _float_weight_quantized(b: QdqBuilder) -> str:
    return b.qdq(b.floats(16, 16, 3, 3), np.full(16, 2.0**-10), axis=0)


def _float8(b: QdqBuilder, x: str) -> str:
    zero = b.constant(np.zeros(()), TensorProto.FLOAT8E4M3FN)
    weight = _dequantized(b, np.ones((16, 16, 3, 3)), 2.0**-6, dtype=TensorProto.FLOAT8E4M3FN)
    return b.conv(b.shared_qdq(x, b.constant(_F(SCALE)), zero), weight, 16)


def _unsaid_type(b: QdqBuilder, x: str, **attributes: Any) -> str:
    scale = b.constant(_F(SCALE))
    return _conv(b, b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, **attributes), scale))


def _two_readers(other: str, *, scale: float | None = None) -> Body:
    """Return a pattern: a tensor that a convolution reads quantized, and another operator otherwise."""

    def body(b: QdqBuilder, x: str) -> tuple[str, str]:
        y, q = _first(b, x)
        if scale is not None:
            return _last(b, q), _conv(b, b.qdq(y, scale), "other")
        return _last(b, q), b.op(other, y)

    return body


def _kept_float(b: QdqBuilder, x: str) -> str:
    y = _relu_conv(b, b.qdq(x), "first")
    return b.conv(y, b.floats(16, 16, 3, 3), 16, "kept")


def _product_of_activations(*, both: bool) -> Body:
    def body(b: QdqBuilder, x: str) -> str:
        turned = b.op("Transpose", x, perm=[0, 1, 3, 2])
        return b.op("MatMul", b.qdq(x), b.qdq(turned) if both else turned, name="product")

    return body


def _is(*rules: str) -> frozenset[str]:
    return frozenset(rules)


_INT8 = int(TensorProto.INT8)

CLEAN = (
    Pattern("a convolution", lambda b, x: _conv(b, b.qdq(x))),
    Pattern("a convolution of weights with one scale", _with_weight(lambda b: b.weight(16, 16, 3, 3, axis=None))),
    Pattern(
        "weights whose one scale has the shape [1]", _with_weight(lambda b: b.weight(16, 16, 3, 3, scale=[2.0**-10]))
    ),
    Pattern(
        "weights with a negative axis",
        _with_weight(lambda b: _dequantized(b, b.integers(16, 16, 3, 3), np.full(16, 2.0**-10), axis=-4)),
    ),
    Pattern(
        "weights without a zero-point",
        _with_weight(lambda b: _dequantized(b, b.integers(16, 16, 3, 3), np.full(16, 2.0**-10), axis=0)),
    ),
    Pattern("float weights behind Q and DQ", _with_weight(_float_weight_quantized)),
    Pattern(
        "weights behind a Reshape",
        _with_weight(lambda b: b.op("Reshape", b.weight(16, 144), b.constant(_ints(16, 16, 3, 3)))),
    ),
    Pattern("no bias", lambda b, x: b.conv(b.qdq(x), b.weight(16, 16, 3, 3))),
    Pattern(
        "a bias behind an int8 DequantizeLinear",
        _bias(lambda b: _dequantized(b, np.arange(16, dtype=np.int8), np.full(16, 2.0**-10), axis=0)),
    ),
    Pattern("int8 said by output_dtype", lambda b, x: _unsaid_type(b, x, output_dtype=_INT8), opset=21),
    Pattern(
        "a scale in a Constant node", _with_scale(lambda b: b.op("Constant", value=numpy_helper.from_array(_F(SCALE))))
    ),
    Pattern(
        "a scale computed from constants", _with_scale(lambda b: b.op("Mul", b.constant(_F(SCALE)), b.constant(_F(2))))
    ),
    Pattern("opset 13", lambda b, x: _conv(b, b.qdq(x)), opset=13),
    Pattern("opset 23", lambda b, x: _conv(b, b.qdq(x)), opset=23),
    Pattern(
        "three channels, 7×7, stride 2",
        lambda b, x: b.conv(b.qdq(x), b.weight(16, 3, 7, 7), 16, strides=[2, 2]),
        shape=(1, 3, 16, 16),
    ),
    Pattern(
        "one input channel on axis 1",
        lambda b, x: b.conv(b.qdq(x), b.weight(16, 1, 3, 3, axis=1), 16),
        shape=(1, 1, 8, 8),
    ),
    Pattern("a dilated convolution", lambda b, x: _conv(b, b.qdq(x), dilations=[2, 2])),
    Pattern(
        "a convolution in one dimension",
        lambda b, x: b.conv(b.qdq(x), b.weight(16, 16, 3), 16, pads=[1, 1]),
        shape=(1, 16, 8),
    ),
    Pattern("groups of 8 channels", _grouped(2)),
    Pattern("groups of 4 channels", _grouped(4)),
    Pattern("ReLU", _activation("Relu")),
    Pattern("LeakyReLU", _activation("LeakyRelu", alpha=0.125)),
    Pattern("HardSwish", _activation("HardSwish"), exact=False),
    Pattern("SiLU", _silu, exact=False),
    Pattern("squeeze and excite, the product in float", _squeeze_excite, exact=False),
    Pattern("a residual block, the skip dequantized", _residual),
    Pattern("a residual block, both operands dequantized", lambda b, x: _residual(b, x, main=SCALE)),
    Pattern("a residual block with a downsampling convolution", _downsample),
    Pattern("a max pool behind Q/DQ", _pooled),
    Pattern("a max pool before Q/DQ", lambda b, x: _pooled(b, x, before=None, after=SCALE)),
    Pattern("a max pool between equal Q/DQ", lambda b, x: _pooled(b, x, after=SCALE)),
    Pattern("an average pool before Q/DQ", _between("AveragePool", quantized=False, kernel_shape=[2, 2]), exact=False),
    Pattern("an average pool between Q/DQ", _between("AveragePool", quantized=True, kernel_shape=[2, 2]), exact=False),
    Pattern("a global average pool between Q/DQ", _between("GlobalAveragePool", quantized=True), exact=False),
    Pattern("a resize between Q/DQ", _between("Resize", *_TWICE, quantized=True, **_NEAREST)),
    Pattern("a resize before Q/DQ", _between("Resize", *_TWICE, quantized=False, **_NEAREST)),
    Pattern("a concatenation quantized behind", lambda b, x: _concat(b, x, after=SCALE)),
    Pattern("a concatenation of equal scales", lambda b, x: _concat(b, x, before=(SCALE, SCALE))),
    Pattern("a concatenation between equal Q/DQ", lambda b, x: _concat(b, x, before=(SCALE, SCALE), after=SCALE)),
    Pattern("a dense block with one scale", _dense),
    Pattern("Gemm, transB", _gemm(0, transposed=True)),
    Pattern("Gemm", _gemm(1, transposed=False)),
    Pattern("Gemm with one scale", _gemm(None, transposed=False)),
    Pattern("MatMul", _matmul(1)),
    Pattern("MatMul with one scale", _matmul(None)),
    Pattern(
        "MatMul of a transposed weight",
        lambda b, x: b.op("MatMul", b.qdq(x), b.op("Transpose", b.weight(12, 8), perm=[1, 0]), name="product"),
    ),
    Pattern(
        "MatMul with its weight on the left", lambda b, x: b.op("MatMul", b.weight(12, 8), b.qdq(x), name="product")
    ),
    Pattern("a product of activations", _product_of_activations(both=True)),
    Pattern("channel shuffle", _channel_shuffle),
    *(
        Pattern(
            f"{operator} between DQ and a convolution", _behind(operator, *constants, channels=channels, **attributes)
        )
        for operator, constants, channels, attributes in (
            ("DepthToSpace", (), 4, {"blocksize": 2}),
            ("Expand", (_ints(2, 16, 8, 8),), 16, {}),
            ("Gather", (_ints(*range(15, -1, -1)),), 16, {"axis": 1}),
            ("GatherND", (_ints(0).reshape(1, 1),), 16, {}),
            ("GlobalMaxPool", (), 16, {}),
            ("Identity", (), 16, {}),
            ("Pad", (_ints(0, 0, 1, 1, 0, 0, 1, 1),), 16, {}),
            ("Pad", (_ints(0, 0, 1, 1, 0, 0, 1, 1),), 16, {"mode": "reflect"}),
            ("Reshape", (_ints(1, 16, 4, 16),), 16, {}),
            ("Slice", (_ints(0), _ints(4), _ints(2)), 16, {}),
            ("SpaceToDepth", (), 64, {"blocksize": 2}),
            ("Tile", (_ints(1, 1, 2, 1),), 16, {}),
            ("Transpose", (), 16, {"perm": [0, 1, 3, 2]}),
        )
    ),
    Pattern("ReduceMax between DQ and a convolution", _behind("ReduceMax", _ints(2))),
    Pattern("ReduceMin between DQ and a convolution", _behind("ReduceMin", _ints(2))),
    Pattern("Dropout between DQ and a convolution", _behind("Dropout")),
    Pattern(
        "Split between DQ and a convolution",
        lambda b, x: _last(b, b.op("Split", b.qdq(x), outputs=2, axis=1, num_outputs=2)[0], 8),
    ),
    Pattern(
        "Squeeze and Unsqueeze between DQ and a convolution",
        lambda b, x: _last(b, b.op("Unsqueeze", b.op("Squeeze", b.qdq(x), b.constant(_ints(0))), b.constant(_ints(0)))),
    ),
    Pattern("the larger of two tensors with one scale", lambda b, x: _last(b, b.op("Max", b.qdq(x), _first(b, x)[1]))),
    Pattern("the smaller of two tensors with one scale", lambda b, x: _last(b, b.op("Min", b.qdq(x), _first(b, x)[1]))),
    Pattern(
        "a max pool of integers, between Q and DQ",
        lambda b, x: _conv(b, b.dequantize(b.op("MaxPool", b.quantize(x), kernel_shape=[2, 2]))),
    ),
)
"""Every convolution and product is int8, and nothing can be placed better."""

REFUSED = (
    Pattern("an int32 bias", _bias(_int32_bias), _is("bias-int32"), "refused"),
    Pattern("activations with a zero-point", lambda b, x: _conv(b, b.qdq(x, zero=5)), _is("zero-point"), "refused"),
    Pattern(
        "weights with a zero-point",
        _with_weight(lambda b: b.weight(16, 16, 3, 3, zero=3)),
        _is("zero-point"),
        "refused",
    ),
    Pattern(
        "uint8 activations, zero-point 128",
        lambda b, x: _conv(b, b.qdq(x, zero=128, dtype=np.uint8)),
        _is("activation-unsigned", "zero-point"),
        "refused",
    ),
    Pattern(
        "uint8 activations, zero-point 0",
        lambda b, x: _conv(b, b.qdq(x, dtype=np.uint8)),
        _is("activation-unsigned"),
        miscomputed=True,
    ),
    Pattern("uint8 activations, unsaid", _unsaid_type, _is("activation-unsigned"), miscomputed=True),
    Pattern("uint8 weights", _with_weight(_unsigned_weight), _is("weight-unsigned", "zero-point"), "refused"),
    Pattern(
        "int16 activations", lambda b, x: _conv(b, b.qdq(x, dtype=np.int16)), _is("quantized-type"), "refused", opset=21
    ),
    Pattern(
        "int4 weights",
        _with_weight(
            lambda b: _dequantized(
                b, np.clip(b.integers(16, 16, 3, 3), -8, 7), np.full(16, 2.0**-6), dtype=TensorProto.INT4, axis=0
            )
        ),
        _is("quantized-type"),
        "refused",
        opset=21,
    ),
    Pattern("float8", _float8, _is("float8"), "fp8_e4m3", opset=19),
    Pattern(
        "weights in blocks",
        _with_weight(
            lambda b: _dequantized(b, b.integers(16, 16, 3, 3), np.full((16, 2, 3, 3), 2.0**-10), axis=1, block_size=8)
        ),
        _is("blocked"),
        "refused",
        opset=21,
    ),
    Pattern("DynamicQuantizeLinear", _dynamic, _is("dynamic-quantization"), "refused"),
    Pattern("ConvInteger", _conv_integer, _is("integer-operator"), "refused"),
    Pattern("MatMulInteger", _matmul_integer, _is("integer-operator"), "refused"),
    Pattern("QLinearConv", _qlinear_conv, _is("integer-operator"), "refused"),
    Pattern("Q/DQ of ONNX Runtime's own domain", _contrib, _is("contrib-operator", "weights-only"), "refused"),
    Pattern("a scale that is an input", _with_scale(lambda b: b.input("scale")), _is("scale-not-constant"), "crash"),
    *(
        Pattern(
            f"the scale {value}", lambda b, x, value=value: _conv(b, b.qdq(x, value)), _is("scale-value"), "refused"
        )
        for value in (0.0, -0.01, float("nan"))
    ),
    Pattern("an infinite scale", lambda b, x: _conv(b, b.qdq(x, np.inf)), _is("scale-value"), miscomputed=True),
    Pattern("a subnormal scale", lambda b, x: _conv(b, b.qdq(x, 1e-40)), _is("scale-value"), miscomputed=True),
    Pattern(
        "a scale of zero among the weights'",
        _with_weight(lambda b: b.weight(16, 16, 3, 3, scale=[0.0] + [2.0**-10] * 15)),
        _is("scale-value"),
        "refused",
    ),
    Pattern(
        "scales for half of the channels",
        _with_weight(lambda b: b.weight(16, 16, 3, 3, scale=[2.0**-10] * 8)),
        _is("scale-shape"),
        "refused",
    ),
    Pattern(
        "scales in two dimensions",
        _with_weight(lambda b: _dequantized(b, b.integers(16, 16, 3, 3), np.full((16, 1), 2.0**-10), axis=0)),
        _is("scale-shape"),
        "refused",
    ),
    Pattern(
        "a transposed convolution, output channels",
        _transposed(1),
        _is("transposed-convolution", "transposed-axis"),
        "float",
    ),
    Pattern(
        "one zero-point for sixteen scales",
        _with_weight(lambda b: _dequantized(b, b.integers(16, 16, 3, 3), np.full(16, 2.0**-10), np.int8(0), axis=0)),
        _is("scale-shape"),
        "refused",
    ),
)
"""Refused by a target, or computed otherwise than ONNX says."""

FLOAT = (
    Pattern(
        "a convolution with scales along axis 1",
        _with_weight(lambda b: b.weight(16, 16, 3, 3, axis=1)),
        _is("weight-axis"),
        "float",
    ),
    Pattern("Gemm, transB, with scales along axis 1", _gemm(1, transposed=True), _is("weight-axis"), "float"),
    Pattern("Gemm with scales along axis 0", _gemm(0, transposed=False), _is("weight-axis"), "float"),
    Pattern("MatMul with scales along axis 0", _matmul(0), _is("weight-axis"), "float"),
    Pattern(
        "MatMul with its weight on the left, scales along axis 1",
        lambda b, x: b.op("MatMul", b.weight(12, 8, axis=1), b.qdq(x), name="product"),
        _is("weight-axis"),
        "float",
    ),
    Pattern(
        "only activations", lambda b, x: b.conv(b.qdq(x), b.floats(16, 16, 3, 3), 16), _is("activations-only"), "float"
    ),
    Pattern("only weights", lambda b, x: _conv(b, x), _is("weights-only"), "float"),
    Pattern("one of two activations", _product_of_activations(both=False), _is("activations-only"), "float"),
    Pattern("a convolution left out", _kept_float, _is("not-quantized"), "float"),
    Pattern(
        "a scale per channel of activations",
        lambda b, x: _conv(b, _per_channel(b, x)),
        _is("activation-per-channel"),
        "float",
    ),
    Pattern(
        "an activation scale of the shape [1]",
        lambda b, x: _conv(b, b.qdq(x, [SCALE])),
        _is("activation-scale-rank"),
        "float",
    ),
    Pattern("a transposed convolution with one scale", _transposed(None), _is("transposed-convolution"), "float"),
    Pattern("a transposed convolution, input channels", _transposed(0), _is("transposed-convolution"), "float"),
    Pattern(
        "Q and Cast",
        lambda b, x: _conv(b, b.op("Cast", b.quantize(x), to=TensorProto.FLOAT)),
        _is("unpaired", "weights-only"),
        "float",
    ),
    Pattern(
        "a concatenation of different scales",
        lambda b, x: _concat(b, x, before=(SCALE, 2 * SCALE)),
        _is("weights-only"),
        "float",
    ),
    Pattern("a max pool read in both ways", _pool_split, _is("pool-split"), "float"),
    Pattern(
        "an addition not quantized again",
        lambda b, x: _last(b, b.op("Add", b.qdq(x), _first(b, x)[1])),
        _is("weights-only"),
        "float",
    ),
    *(
        Pattern(f"{name} between DQ and a convolution", body, _is("weights-only"), "float")
        for name, body in (
            ("ReLU", _behind("Relu")),
            ("Clip", _behind("Clip", _F(0), _F(6))),
            ("an average pool", _behind("AveragePool", kernel_shape=[2, 2])),
            ("a global average pool", _behind("GlobalAveragePool")),
            ("a resize", _behind("Resize", *_TWICE, **_NEAREST)),
            ("padding and a transpose", lambda b, x: _last(b, b.op("Transpose", _padded(b, x), perm=[0, 1, 3, 2]))),
            (
                "padding that two convolutions read",
                lambda b, x: [_conv(b, y, n) for y in [_padded(b, x)] for n in "ab"],
            ),
            ("padding with channels", lambda b, x: _last(b, _padded(b, x, 0, 4, 0, 0, 0, 4, 0, 0), 24)),
            ("padding with another value than zero", _behind("Pad", _ints(0, 0, 1, 1, 0, 0, 1, 1), _F(0.5))),
        )
    ),
)
"""Computed in float without a word."""

SLOW = (
    Pattern("a residual block, the skip in float", lambda b, x: _residual(b, x, skip="float"), _is("skip-unquantized")),
    Pattern(
        "a residual block, the skip with a Q/DQ of its own",
        lambda b, x: _residual(b, x, skip="own"),
        _is("quantized-twice"),
    ),
    Pattern("a tensor read in float beside its Q", _two_readers("Sigmoid"), _is("float-beside-quantized"), exact=False),
    Pattern("a tensor quantized with two scales", _two_readers("", scale=2 * SCALE), _is("quantized-twice")),
    Pattern("a max pool between different Q/DQ", lambda b, x: _pooled(b, x, after=2 * SCALE), _is("requantized")),
    Pattern(
        "a concatenation between different Q/DQ",
        lambda b, x: _concat(b, x, before=(SCALE, 2 * SCALE), after=4 * SCALE),
        _is("requantized"),
    ),
    Pattern("a dense block with two scales", lambda b, x: _dense(b, x, after=2 * SCALE), _is("requantized")),
    Pattern("Q/DQ twice in a row", lambda b, x: _conv(b, b.qdq(b.qdq(x), 2 * SCALE)), _is("requantized")),
    Pattern(
        "Q/DQ before a ReLU",
        lambda b, x: _last(b, b.qdq(b.op("Relu", b.qdq(_conv(b, b.qdq(x), "first"))))),
        _is("quantized-before-activation"),
    ),
    Pattern("a depthwise convolution", _grouped(16), _is("narrow-groups")),
    Pattern("groups of 2 channels", _grouped(8), _is("narrow-groups")),
    Pattern(
        "Q and DQ of different scales",
        lambda b, x: _conv(b, b.dequantize(b.quantize(x), 2 * SCALE)),
        _is("pair-scales"),
    ),
    Pattern(
        "an int8 input",
        lambda b, x: (_conv(b, b.dequantize(b.input("q", 1, 16, 8, 8, dtype=_INT8))), b.op("Identity", x)),
        _is("integer-interface"),
    ),
    Pattern("an int8 output", lambda b, x: b.quantize(_conv(b, b.qdq(x))), _is("integer-interface")),
)
"""Every convolution and product is int8, but tensors are written twice, rounded twice or padded."""

PATTERNS = (*CLEAN, *REFUSED, *FLOAT, *SLOW)
