"""Operators in float64 for `cnncc.graph.exact`, where onnx's reference is slow or narrows to float32.

Definitions are ONNX's (https://onnx.ai/onnx/operators/); arithmetic is torch's, in float64 on the CPU. Attributes
arrive as keywords under ONNX's names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from torch.nn import functional

Array = NDArray[Any]
Pads = list[tuple[int, int]]

_SLICED_DEPTHWISE = 8
"""Groups from which a depthwise convolution is summed over shifted slices: torch's float64 path goes group by group."""


def _tensor(array: Array | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


def _need(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# ---- geometry shared by convolution and pooling


def window_geometry(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: bool = False,
) -> tuple[Pads, list[int]]:
    """Return padding before and after each spatial axis, and the output sizes.

    The padding after an axis is ONNX's; a window of ``ceil_mode`` may reach beyond it, but must start inside the
    input or the padding before it.
    """
    rank = len(sizes)
    flat = list(pads or [0] * 2 * rank)
    found: Pads = []
    outputs = []
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        stride = strides[axis]
        before, after = flat[axis], flat[axis + rank]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            before = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            after = total - before
        elif auto_pad == "VALID":
            before = after = 0
        span = size + before + after - reach
        count = (math.ceil(span / stride) if ceil_mode else span // stride) + 1
        if ceil_mode and (count - 1) * stride >= size + before:
            count -= 1
        found.append((before, after))
        outputs.append(count)
    return found, outputs


def _pad(x: torch.Tensor, pads: Pads, value: float) -> torch.Tensor:
    if not any(n for pair in pads for n in pair):
        return x
    flat = [n for pair in reversed(pads) for n in pair]
    return functional.pad(x, flat, value=value)


def _reach(
    x: torch.Tensor,
    outputs: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    fill: float,
) -> torch.Tensor:
    """Lengthen the padded input where the last window of ``ceil_mode`` reaches beyond it."""
    extra = [
        (0, max((outputs[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - x.shape[2 + i], 0))
        for i in range(len(kernel))
    ]
    return _pad(x, extra, fill)


def _slices(
    x: torch.Tensor, outputs: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Return, for every place in the kernel, what all windows see there."""
    found = []
    for place in itertools.product(*(range(k) for k in kernel)):
        cut: list[slice] = [slice(None), slice(None)]
        for p, d, s, o in zip(place, dilations, strides, outputs, strict=True):
            cut.append(slice(p * d, p * d + s * (o - 1) + 1, s))
        found.append((place, x[tuple(cut)]))
    return found


def _ones(values: Sequence[int] | None, rank: int) -> list[int]:
    return list(values) if values else [1] * rank


# ---- convolution


def conv(
    x: Array,
    w: Array,
    b: Array | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Array:
    """Conv, of any rank and grouping."""
    rank = x.ndim - 2
    kernel, steps, spread = list(w.shape[2:]), _ones(strides, rank), _ones(dilations, rank)
    padding, outputs = window_geometry(x.shape[2:], kernel, steps, spread, pads, auto_pad or "NOTSET")
    padded, weight, bias = _pad(_need(x), padding, 0.0), _need(w), _tensor(b)
    if group >= _SLICED_DEPTHWISE and w.shape[1] == 1 and w.shape[0] == group:
        total = torch.zeros((x.shape[0], group, *outputs), dtype=padded.dtype)
        for index, (_, part) in enumerate(_slices(padded, outputs, kernel, steps, spread)):
            total.addcmul_(part, weight.reshape(group, -1)[:, index].reshape(1, -1, *[1] * rank))
        return _with_bias(total, bias).numpy()
    function: Callable[..., torch.Tensor] | None = {
        1: functional.conv1d,
        2: functional.conv2d,
        3: functional.conv3d,
    }.get(rank)
    if function is None:
        raise NotImplementedError(f"Conv of rank {rank}")
    return function(padded, weight, bias, steps, 0, spread, group).numpy()


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias.reshape(1, -1, *[1] * (x.ndim - 2))


def conv_transpose(
    x: Array,
    w: Array,
    b: Array | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Array:
    """ConvTranspose: the full transposed convolution, lengthened by the output padding, cut by the pads."""
    rank = x.ndim - 2
    steps, spread = _ones(strides, rank), _ones(dilations, rank)
    extra = list(output_padding or [0] * rank)
    function = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[rank]
    full = function(_need(x), _need(w), None, steps, 0, 0, group, spread)
    padding = _transposed_pads(x.shape[2:], full.shape[2:], extra, steps, pads, auto_pad or "NOTSET", output_shape)
    full = _pad(full, [(0, n) for n in extra], 0.0)
    cut = [slice(None), slice(None)]
    for (before, after), size in zip(padding, full.shape[2:], strict=True):
        cut.append(slice(before, size - after))
    return _with_bias(full[tuple(cut)], _tensor(b)).contiguous().numpy()


def _transposed_pads(
    sizes: Sequence[int],
    full: Sequence[int],
    extra: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
    output_shape: Sequence[int] | None,
) -> Pads:
    rank = len(sizes)
    if output_shape is None and auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        flat = list(pads or [0] * 2 * rank) if auto_pad != "VALID" else [0] * 2 * rank
        return [(flat[i], flat[i + rank]) for i in range(rank)]
    wanted = (
        list(output_shape)[-rank:] if output_shape is not None else [n * s for n, s in zip(sizes, strides, strict=True)]
    )
    found = []
    for axis in range(rank):
        total = max(full[axis] + extra[axis] - wanted[axis], 0)
        # the operator's definition: SAME_UPPER pads more at the end, everything else more at the start
        before = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        found.append((before, total - before))
    return found


# ---- pooling


def max_pool(
    x: Array,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    with_indices: bool = False,
) -> tuple[Array, ...]:
    """MaxPool; with indices into the flattened input, row-major (or column-major within an image)."""
    rank = x.ndim - 2
    kernel, steps, spread = list(kernel_shape), _ones(strides, rank), _ones(dilations, rank)
    padding, outputs = window_geometry(x.shape[2:], kernel, steps, spread, pads, auto_pad or "NOTSET", bool(ceil_mode))
    lowest = -math.inf if x.dtype.kind == "f" else float(np.iinfo(x.dtype).min)

    def lengthened(values: torch.Tensor, fill: float) -> torch.Tensor:
        return _reach(_pad(values, padding, fill), outputs, kernel, steps, spread, fill)

    best = torch.full((*x.shape[:2], *outputs), lowest, dtype=_need(x).dtype)
    parts = _slices(lengthened(_need(x), lowest), outputs, kernel, steps, spread)
    if not with_indices:
        for _, part in parts:
            best = torch.where(torch.isnan(part) | (part > best), part, best)
        return (best.numpy(),)
    order = np.arange(int(np.prod(x.shape[2:])), dtype=np.int64)
    spatial = order.reshape(x.shape[2:]) if not storage_order else order.reshape(x.shape[2:][::-1]).T
    offsets = np.arange(x.shape[0] * x.shape[1], dtype=np.int64).reshape(*x.shape[:2], *[1] * rank) * order.size
    numbers = _slices(lengthened(_need(offsets + spatial), -1), outputs, kernel, steps, spread)
    where = torch.full(best.shape, -1, dtype=torch.int64)
    for (_, part), (_, number) in zip(parts, numbers, strict=True):
        better = (part > best) | ((where < 0) & (number >= 0))
        best, where = torch.where(better, part, best), torch.where(better, number, where)
    return best.numpy(), where.numpy()


def average_pool(
    x: Array,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Array:
    """AveragePool: the divisor counts the input, and the padding where asked, but never what lies beyond."""
    rank = x.ndim - 2
    kernel, steps, spread = list(kernel_shape), _ones(strides, rank), _ones(dilations, rank)
    padding, outputs = window_geometry(x.shape[2:], kernel, steps, spread, pads, auto_pad or "NOTSET", bool(ceil_mode))

    def total(values: torch.Tensor, in_padding: float) -> torch.Tensor:
        padded = _reach(_pad(values, padding, in_padding), outputs, kernel, steps, spread, 0.0)
        found = torch.zeros((*values.shape[:2], *outputs), dtype=torch.float64)
        for _, part in _slices(padded, outputs, kernel, steps, spread):
            found += part
        return found

    ones = torch.ones((1, 1, *x.shape[2:]), dtype=torch.float64)
    return (total(_need(x), 0.0) / total(ones, float(count_include_pad))).numpy()


# ---- normalization and activations


def layer_normalization(
    x: Array, scale: Array, bias: Array | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Array, Array, Array]:
    """LayerNormalization; the stash type, which would narrow to float32, is a hint to engines."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    mean = x.mean(axis=axes, keepdims=True)
    inverse = 1.0 / np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias), mean, inverse


def instance_normalization(x: Array, scale: Array, bias: Array, epsilon: float = 1e-5) -> Array:
    """InstanceNormalization over the spatial axes."""
    return group_normalization(x, scale, bias, num_groups=x.shape[1], epsilon=epsilon)


def group_normalization(
    x: Array, scale: Array, bias: Array, num_groups: int = 1, epsilon: float = 1e-5, stash_type: int = 1
) -> Array:
    """GroupNormalization with scale and bias per channel (opset 21) or per group (opset 18)."""
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean, var = grouped.mean(axis=2, keepdims=True), grouped.var(axis=2, keepdims=True)
    y = ((grouped - mean) / np.sqrt(var + epsilon)).reshape(x.shape)
    channel = (1, -1, *[1] * (x.ndim - 2))
    repeat = x.shape[1] // scale.size
    result: Array = y * np.repeat(scale, repeat).reshape(channel) + np.repeat(bias, repeat).reshape(channel)
    return result


def lrn(x: Array, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1) -> Array:
    """LRN across channels."""
    before = (size - 1) // 2
    padded = np.pad(x**2, ((0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)))
    total = sum(padded[:, i : i + x.shape[1]] for i in range(size))
    result: Array = x / (bias + alpha / size * total) ** beta
    return result


def gelu(x: Array, approximate: str = "none") -> Array:
    """Gelu, exact or by tanh."""
    return functional.gelu(_need(x), approximate=approximate or "none").numpy()


def hard_sigmoid(x: Array, alpha: float = 0.2, beta: float = 0.5) -> Array:
    """HardSigmoid."""
    result: Array = np.clip(alpha * x + beta, 0.0, 1.0)
    return result


def hard_swish(x: Array) -> Array:
    """HardSwish: HardSigmoid with alpha 1/6 and beta 1/2, times x."""
    result: Array = x * np.clip(x / 6.0 + 0.5, 0.0, 1.0)
    return result


def matmul(a: Array, b: Array) -> Array:
    """MatMul; integers go NumPy's way."""
    if a.dtype.kind != "f":
        product: Array = np.matmul(a, b)
        return product
    return torch.matmul(_need(a), _need(b)).numpy()


def gemm(
    a: Array, b: Array, c: Array | None = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Array:
    """Gemm."""
    product: Array = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def batch_normalization(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    var: Array,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Array:
    """BatchNormalization in inference."""
    if training_mode:
        raise NotImplementedError("BatchNormalization in training mode")
    channel = (1, -1, *[1] * (x.ndim - 2))
    factor = scale / np.sqrt(var + epsilon)
    result: Array = x * factor.reshape(channel) + (bias - mean * factor).reshape(channel)
    return result


# ---- quantization


def _along(values: Array, rank: int, axis: int) -> Array:
    """Shape a scale or zero point for broadcasting: one value, or one per slice of an axis."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if index == axis % rank else 1 for index in range(rank)])


def quantize_linear(
    x: Array, scale: Array, zero_point: Array | None = None, axis: int = 1, saturate: int = 1, **others: Any
) -> Array:
    """QuantizeLinear to integers: rounds float64 values, halves to even."""
    if any(others.values()) or (zero_point is not None and zero_point.dtype.kind not in "iu"):
        raise NotImplementedError("QuantizeLinear to blocks or to float types")
    zero = np.zeros((), np.uint8) if zero_point is None else zero_point
    bounds = np.iinfo(zero.dtype)
    steps = np.rint(x / _along(scale, x.ndim, axis)) + _along(zero.astype(np.float64), x.ndim, axis)
    quantized: Array = np.clip(steps, bounds.min, bounds.max).astype(zero.dtype)
    return quantized


def dequantize_linear(x: Array, scale: Array, zero_point: Array | None = None, axis: int = 1, **others: Any) -> Array:
    """DequantizeLinear from integers."""
    if others.get("block_size") or x.dtype.kind not in "iu":
        raise NotImplementedError("DequantizeLinear from blocks or from float types")
    zero = 0.0 if zero_point is None else _along(zero_point.astype(np.float64), x.ndim, axis)
    result: Array = (x.astype(np.float64) - zero) * _along(scale, x.ndim, axis)
    return result


# ---- resizing


_RESIZE_MODES = ("nearest", "linear", "cubic")
_COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"
)  # fmt: skip


def resize_matrix(
    size: int,
    scale: float,
    length: int,
    *,
    mode: str,
    coordinates: str,
    nearest: str,
    cubic: float,
    exclude_outside: bool,
) -> Array:
    """Return the matrix ``[length, size]`` that resizes one axis.

    Coordinates are float32 where they decide which pixel is nearest, as engines compute them.
    """
    real = np.float32 if mode == "nearest" else np.float64
    index = np.arange(length, dtype=real)
    x = _source(index, real(size), real(scale), real(length), coordinates)
    base = np.floor(x).astype(np.int64)
    if mode == "nearest":
        places, weights = _nearest(x, nearest)[:, None], np.ones((length, 1))
    elif mode == "linear":
        part = x - base
        places, weights = np.stack([base, base + 1], 1), np.stack([1.0 - part, part], 1)
    else:
        part = x - base
        places = base[:, None] + np.arange(-1, 3)
        weights = np.stack([_cubic(np.abs(part - offset), cubic) for offset in range(-1, 3)], 1)
    if exclude_outside and mode == "cubic":
        weights = np.where((places < 0) | (places >= size), 0.0, weights)
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((length, size))
    np.add.at(matrix, (np.arange(length)[:, None], np.clip(places, 0, size - 1)), weights)
    return matrix


def _source(index: Array, size: Any, scale: Any, length: Any, coordinates: str) -> Array:
    """Return each output pixel's place in the input (ONNX Resize, coordinate_transformation_mode)."""
    half = type(scale)(0.5)
    place: Array
    if coordinates == "asymmetric":
        place = index / scale
    elif coordinates == "align_corners":
        place = index * (size - 1) / max(length - 1, 1)
    elif coordinates == "pytorch_half_pixel" and length <= 1:
        place = np.zeros_like(index)
    else:
        place = (index + half) / scale - half
    if coordinates == "half_pixel_symmetric":
        place = size / 2 * (1 - length / (scale * size)) + place
    return place


def _nearest(x: Array, mode: str) -> Array:
    rounded: dict[str, Array] = {
        "round_prefer_floor": np.ceil(x - type(x[0])(0.5)),
        "round_prefer_ceil": np.floor(x + type(x[0])(0.5)),
        "floor": np.floor(x),
        "ceil": np.ceil(x),
    }
    return rounded[mode].astype(np.int64)


def _cubic(t: Array, a: float) -> Array:
    """Keys' cubic convolution kernel (1981) at distances 0 ≤ t ≤ 2."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    kernel: Array = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
    return kernel


def can_resize(attributes: dict[str, Any]) -> bool:
    """Whether `resize` covers these attributes; else onnx's own, slow one is used."""
    return (
        not attributes.get("antialias")
        and attributes.get("mode", "nearest") in _RESIZE_MODES
        and attributes.get("coordinate_transformation_mode", "half_pixel") in _COORDINATES
        and (attributes.get("keep_aspect_ratio_policy") or "stretch") == "stretch"
    )


def resize(x: Array, scales: Array | None, sizes: Array | None, attributes: dict[str, Any]) -> Array:
    """Resize, axis by axis: all modes are separable."""
    axes = attributes.get("axes")
    chosen = [int(a) % x.ndim for a in axes] if axes is not None and len(axes) else list(range(x.ndim))
    for place, axis in enumerate(chosen):
        size = x.shape[axis]
        if sizes is not None and sizes.size:
            length = int(sizes[place])
            scale = length / size
        else:
            assert scales is not None
            scale = float(scales[place])
            length = math.floor(size * np.float32(scale))
        if scale == 1.0 and length == size:
            continue
        matrix = resize_matrix(
            size,
            scale,
            length,
            mode=attributes.get("mode", "nearest"),
            coordinates=attributes.get("coordinate_transformation_mode", "half_pixel"),
            nearest=attributes.get("nearest_mode", "round_prefer_floor"),
            cubic=attributes.get("cubic_coeff_a", -0.75),
            exclude_outside=bool(attributes.get("exclude_outside", 0)),
        )
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(x)


# ---- onnx.reference classes


def _operator(name: str, function: Callable[..., Any]) -> type[OpRun]:
    """Return an onnx reference operator that calls a function; attributes without a value keep its defaults."""

    def run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        given = {key: value for key, value in attributes.items() if value is not None}
        result = function(*inputs, **given)
        return result if isinstance(result, tuple) else (result,)

    return type(name, (OpRun,), {"op_domain": "", "_run": run})


def _max_pool_operator() -> type[OpRun]:
    def run(self: OpRun, x: Array, **attributes: Any) -> tuple[Array, ...]:
        given = {key: value for key, value in attributes.items() if value is not None}
        return max_pool(x, with_indices=len(self.output) > 1, **given)

    return type("MaxPool", (OpRun,), {"op_domain": "", "_run": run})


def _resize_operator() -> type[OpRun]:
    from onnx.reference.ops.op_resize import Resize as Stock

    def run(
        self: Any,
        x: Array,
        roi: Array | None = None,
        scales: Array | None = None,
        sizes: Array | None = None,
        **attributes: Any,
    ) -> tuple[Array, ...]:
        given = {key: value for key, value in attributes.items() if value is not None}
        if can_resize(given):
            return (resize(x, scales, sizes, given),)
        result: tuple[Array, ...] = Stock._run(self, x, roi, scales, sizes, **attributes)
        return result

    return type("Resize", (Stock,), {"op_domain": "", "_run": run})


def operators() -> list[type[OpRun]]:
    """Return the operators that replace onnx's own."""
    table: dict[str, Callable[..., Any]] = {
        "Conv": conv,
        "ConvTranspose": conv_transpose,
        "AveragePool": average_pool,
        "GlobalAveragePool": lambda x: x.mean(axis=tuple(range(2, x.ndim)), keepdims=True),
        "GlobalMaxPool": lambda x: x.max(axis=tuple(range(2, x.ndim)), keepdims=True),
        "LayerNormalization": layer_normalization,
        "InstanceNormalization": instance_normalization,
        "GroupNormalization": group_normalization,
        "BatchNormalization": batch_normalization,
        "LRN": lrn,
        "Gelu": gelu,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": hard_swish,
        "Erf": lambda x: torch.erf(_need(x)).numpy(),
        "Sigmoid": lambda x: torch.sigmoid(_need(x)).numpy(),
        "Softplus": lambda x: np.logaddexp(0.0, x),
        "Mish": lambda x: x * np.tanh(np.logaddexp(0.0, x)),
        "Gemm": gemm,
        "QuantizeLinear": quantize_linear,
        "DequantizeLinear": dequantize_linear,
        "MatMul": matmul,
    }
    return [*(_operator(name, function) for name, function in table.items()), _max_pool_operator(), _resize_operator()]
