"""`GraphNetwork`: an ONNX graph as a module of torch, so that the very graph of an engine can be trained.

Definitions are ONNX's (https://onnx.ai/onnx/operators/). What products multiply by and their biases are its parameters;
all other constants stay as they are, those of a BatchNorm that could not be folded among them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

from cnncc.calibration.plan import PRODUCTS
from cnncc.graph.draft import STANDARD
from cnncc.graph.exact_ops import can_resize, resize_matrix, window_geometry
from cnncc.graph.names import module_path, place
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.values import subgraphs
from cnncc_runtime.errors import ModelRefused, UnsupportedGraph

Value = torch.Tensor
Operator = Callable[..., "Value | tuple[Value, ...]"]
"""Operands (None where one is left out), and attributes by name → what a node gives."""

_NEAR = 1e-3
"""Share of the largest output by which sums in another order may move outputs."""


class GraphNetwork(nn.Module):
    """A graph in float32, to be run on batches of any size and trained.

    Args:
        graph: Cleaned, in float32.

    Raises:
        UnsupportedGraph: Operators that it cannot train through; lists each.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        self.graph = graph
        self._nodes = graph.nodes
        _check(graph)
        self._attributes = [_attributes(node) for node in self._nodes]
        self._inputs = [spec.name for spec in graph.inputs]
        self._outputs = [spec.name for spec in graph.outputs]
        self._done = _last_reads(self._nodes, self._outputs)
        first = graph.inputs[0].shape[0] if graph.inputs[0].shape else None
        self._batch = first if isinstance(first, int) else None
        trained = {
            name: None
            for node in self._nodes
            if node.op_type in PRODUCTS
            for name in node.input[1:]
            if name in graph.constants and graph.constants[name].data_type == onnx.TensorProto.FLOAT
        }
        self.names = tuple(trained)
        """Initializers that are trained: those of `weights`, in their order."""
        self.weights = nn.ParameterList(nn.Parameter(_tensor(graph.constants[name])) for name in self.names)
        self._integers: dict[str, Value] = {}
        self._floats: dict[str, str] = {}
        for name, proto in graph.constants.items():
            value = _tensor(proto)
            if not value.is_floating_point():
                self._integers[name] = value
            elif name not in trained:
                self._floats[name] = f"constant_{len(self._floats)}"
                self.register_buffer(self._floats[name], value, persistent=False)

    def forward(self, *inputs: Value) -> Value | tuple[Value, ...]:
        """Return the output; a tuple of several.

        Raises:
            ModelRefused: A node fails on this batch.
        """
        values: dict[str, Value] = {**self._constants(), **dict(zip(self._inputs, inputs, strict=True))}
        for node, attributes, done in zip(self._nodes, self._attributes, self._done, strict=True):
            operands = self.operands(node, values)
            if node.op_type in ("Reshape", "Expand"):
                operands[1] = self._rebatched(operands[0], operands[1], inputs[0].shape[0] if inputs[0].ndim else 1)
            try:
                made = _OPERATORS[node.op_type](*operands, **attributes)
            except (RuntimeError, ValueError, IndexError, TypeError) as exc:
                reason = (str(exc).splitlines() or [type(exc).__name__])[0][:200]
                raise ModelRefused(f"{place(node)} fails in training: {reason}") from exc
            values.update(zip(node.output, made if isinstance(made, tuple) else (made,), strict=False))
            for name in done:
                self.forget(name, values)
        found = tuple(values[name] for name in self._outputs)
        return found[0] if len(found) == 1 else found

    def operands(self, node: onnx.NodeProto, values: dict[str, Value]) -> list[Any]:
        """Return what a node reads; None where an operand is left out."""
        return [values[name] if name else None for name in node.input]

    def forget(self, name: str, values: dict[str, Value]) -> None:
        """Let go of a value that nobody reads any more."""
        values.pop(name, None)

    def trained_graph(self) -> OnnxGraph:
        """Return the graph with the weights as they are now."""
        proto = self.graph.copy_proto()
        held = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name, weight in zip(self.names, self.weights, strict=True):
            held[name].CopyFrom(numpy_helper.from_array(weight.detach().cpu().numpy(), name))
        return OnnxGraph(proto)

    def _constants(self) -> dict[str, Value]:
        found = dict(self._integers)
        found.update({name: getattr(self, buffer) for name, buffer in self._floats.items()})
        found.update(zip(self.names, self.weights, strict=True))
        return found

    def _rebatched(self, x: Value, shape: Value, batch: int) -> Value:
        """Return a shape that was written for the batch of the graph, for the batch that there is."""
        if self._batch in (None, batch) or not x.ndim or not len(shape):
            return shape
        if int(shape[0]) == self._batch and x.shape[0] == batch:
            return torch.cat([torch.tensor([batch]), shape[1:]])
        return shape


def check_batches(network: GraphNetwork, inputs: tuple[Value, ...]) -> None:
    """See that a batch gives what its samples give: a graph may count on the batch that it was exported with.

    Args:
        network: In eval mode.
        inputs: Two samples or more.

    Raises:
        ModelRefused: It does not.
    """
    hint = "export it with a batch of any size: --input-shape N,…"
    with torch.no_grad():
        one_by_one = [network(*(x[index : index + 1] for x in inputs)) for index in range(len(inputs[0]))]
        try:
            together = network(*inputs)
        except ModelRefused as exc:
            raise ModelRefused(f"the model takes no batches: {exc.args[0]}", hint=hint) from exc
    for several, each in zip(_several(together), zip(*map(_several, one_by_one), strict=True), strict=True):
        single = torch.cat(each) if each[0].ndim else torch.stack(each)
        near = _NEAR * float(single.abs().max()) if single.numel() else 0.0
        if several.shape != single.shape or not torch.allclose(several, single, rtol=0.0, atol=near):
            raise ModelRefused("the model gives something else for a batch than for its samples", hint=hint)


def _several(outputs: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _check(graph: OnnxGraph) -> None:
    bad = [
        node
        for node in graph.nodes
        if node.domain not in STANDARD
        or node.op_type not in _OPERATORS
        or any(True for _ in subgraphs(node))
        or (node.op_type == "Resize" and not can_resize(_attributes(node)))
        or (node.op_type == "MaxPool" and any(node.output[1:]))
    ]
    if bad:
        raise UnsupportedGraph(
            f"{len(bad)} operators cannot be trained through: {', '.join(sorted({node.op_type for node in bad}))}",
            where=[f"{module_path(node)} ({node.op_type})" for node in bad],
            hint="quantize the model without training it",
        )


def _last_reads(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[list[str]]:
    """Return for each node the values that it is the last to read, or that nobody reads."""
    last = {name: index for index, node in enumerate(nodes) for name in (*node.output, *node.input) if name}
    found: list[list[str]] = [[] for _ in nodes]
    for name, index in last.items():
        if name not in outputs:
            found[index].append(name)
    return found


def _tensor(proto: onnx.TensorProto) -> Value:
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type == "Split":
        found["count"] = len(node.output)
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


# ---- convolution and pooling


def _padded(x: Value, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Value:
    if not any(any(pair) for pair in pads):
        return x
    return functional.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


def _conv(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Value:
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    around, _ = window_geometry(x.shape[2:], weight.shape[2:], steps, spread, pads or None, auto_pad)
    run: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    if all(before == after for before, after in around):
        return run(x, weight, bias, steps, [before for before, _ in around], spread, group)  # type: ignore[no-any-return]
    return run(_padded(x, around), weight, bias, steps, 0, spread, group)  # type: ignore[no-any-return]


def _conv_transpose(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    output_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Value:
    rank = x.ndim - 2
    flat = list(pads or [0] * 2 * rank)
    if auto_pad not in ("NOTSET", "VALID") or output_shape or flat[:rank] != flat[rank:]:
        raise ValueError("transposed convolutions are trained with symmetric padding alone")
    run: Any = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[rank]
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    return run(x, weight, bias, steps, flat[:rank], extra, group, spread)  # type: ignore[no-any-return]


def _windows(
    x: Value, kernel: Sequence[int], given: dict[str, Any]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int], list[int]]:
    """Return padding, what windows of ``ceil_mode`` reach beyond it, strides and dilations."""
    rank = x.ndim - 2
    steps, spread = list(given.get("strides") or [1] * rank), list(given.get("dilations") or [1] * rank)
    around, sizes = window_geometry(
        x.shape[2:],
        kernel,
        steps,
        spread,
        given.get("pads"),
        given.get("auto_pad", "NOTSET"),
        bool(given.get("ceil_mode")),
    )
    beyond = []
    for axis, (before, after) in enumerate(around):
        reach = (sizes[axis] - 1) * steps[axis] + (kernel[axis] - 1) * spread[axis] + 1
        beyond.append((0, max(reach - x.shape[2 + axis] - before - after, 0)))
    return around, beyond, steps, spread


def _max_pool(x: Value, *, kernel_shape: Sequence[int], **given: Any) -> Value:
    around, beyond, steps, spread = _windows(x, kernel_shape, given)
    padded = _padded(_padded(x, around, -math.inf), beyond, -math.inf)
    run: Any = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[x.ndim - 2]
    return run(padded, list(kernel_shape), steps, 0, spread)  # type: ignore[no-any-return]


def _average_pool(x: Value, *, kernel_shape: Sequence[int], count_include_pad: int = 0, **given: Any) -> Value:
    around, beyond, steps, spread = _windows(x, kernel_shape, given)
    if any(each != 1 for each in spread):
        raise ValueError("average pools with dilation are not trained")
    run: Any = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[x.ndim - 2]

    def mean(values: Value, in_padding: float) -> Value:
        padded = _padded(_padded(values, around, in_padding), beyond)
        return run(padded, list(kernel_shape), steps)  # type: ignore[no-any-return]

    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    return mean(x, 0.0) / mean(ones, float(count_include_pad))


def _reduce(run: Callable[..., Value]) -> Operator:
    def operator(
        x: Value,
        given: Value | None = None,
        *,
        axes: Sequence[int] = (),
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Value:
        found = given.tolist() if given is not None else list(axes)
        if not found and noop_with_empty_axes:
            return x
        return run(x, found or list(range(x.ndim)), bool(keepdims))

    return operator


def _gemm(
    a: Value,
    b: Value,
    c: Value | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Value:
    a, b = (a.t() if transA else a), (b.t() if transB else b)
    product = a @ b if alpha == 1.0 else alpha * (a @ b)
    return product if c is None else product + (c if beta == 1.0 else beta * c)


# ---- shapes


def _reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(shape.tolist())])


def _flatten(x: Value, *, axis: int = 1) -> Value:
    axis = axis % x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _squeeze(x: Value, given: Value | None = None, *, axes: Sequence[int] = ()) -> Value:
    found = given.tolist() if given is not None else list(axes)
    return x.squeeze(tuple(found)) if found else x.squeeze()


def _unsqueeze(x: Value, given: Value | None = None, *, axes: Sequence[int] = ()) -> Value:
    found = given.tolist() if given is not None else list(axes)
    for axis in sorted(axis % (x.ndim + len(found)) for axis in found):
        x = x.unsqueeze(axis)
    return x


def _slice(x: Value, *given: Value | None, **attributes: Any) -> Value:
    lists = [None if each is None else each.tolist() for each in given]
    starts, ends = lists[:2] if lists else (attributes["starts"], attributes["ends"])
    assert starts is not None
    assert ends is not None
    axes = (lists[2] if len(lists) > 2 else attributes.get("axes")) or list(range(len(starts)))
    steps = (lists[3] if len(lists) > 3 else None) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # torch knows no negative steps: the places are counted out
        places = (
            torch.arange(x.shape[axis])[slice(start, end, step)] if step > 0 else _backwards(x, axis, start, end, step)
        )
        x = x.index_select(axis, places.to(x.device))
    return x


def _backwards(x: Value, axis: int, start: int, end: int, step: int) -> Value:
    return torch.tensor(range(x.shape[axis])[slice(start, None if end < -x.shape[axis] else end, step)])


def _split(
    x: Value, given: Value | None = None, *, count: int, axis: int = 0, split: Sequence[int] = (), num_outputs: int = 0
) -> tuple[Value, ...]:
    sizes = given.tolist() if given is not None else list(split)
    return torch.split(x, sizes or -(-x.shape[axis] // count), axis)


def _pad(
    x: Value, pads: Value, value: Value | None = None, axes: Value | None = None, *, mode: str = "constant"
) -> Value:
    flat, chosen = pads.tolist(), axes.tolist() if axes is not None else list(range(x.ndim))
    around = [(0, 0)] * x.ndim
    for index, axis in enumerate(chosen):
        around[axis] = (flat[index], flat[index + len(chosen)])
    if mode == "constant":
        return _padded(x, around, float(value) if value is not None else 0.0)
    if any(any(pair) for pair in around[:2]):
        raise ValueError(f"padding of mode {mode} of batches or channels is not trained")
    kind = {"edge": "replicate", "reflect": "reflect"}[mode]
    return functional.pad(x, [n for pair in reversed(around[2:]) for n in pair], mode=kind)


def _gather(x: Value, places: Value, *, axis: int = 0) -> Value:
    axis %= x.ndim
    found = x.index_select(axis, places.reshape(-1).to(x.device) % x.shape[axis])
    return found.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _depth_to_space(x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    n, c, h, w = x.shape
    if mode == "CRD":
        return functional.pixel_shuffle(x, blocksize)
    parts = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


def _space_to_depth(x: Value, *, blocksize: int) -> Value:
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


def _resize(
    x: Value, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None, **attributes: Any
) -> Value:
    """Resize by a matrix for each axis, as `cnncc.graph.exact_ops.resize` does."""
    axes = list(attributes.get("axes") or range(x.ndim))
    for place_, axis in enumerate(axes):
        size = x.shape[axis]
        if sizes is not None and sizes.numel():
            length = int(sizes[place_])
            scale = length / size
        else:
            assert scales is not None
            scale = float(scales[place_])
            length = math.floor(size * scale)
        if axis == 0 or (scale == 1.0 and length == size):
            continue  # the batch is what it is, whatever the graph was exported with
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
        weights = torch.from_numpy(matrix).to(x)
        x = torch.tensordot(weights, x, dims=([1], [axis])).movedim(0, axis)
    return x


# ---- normalization


def _along_channels(values: Value, x: Value) -> Value:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def _batch_normalization(
    x: Value, scale: Value, bias: Value, mean: Value, variance: Value, *, epsilon: float = 1e-5, **_: Any
) -> Value:
    factor = scale / torch.sqrt(variance + epsilon)
    return x * _along_channels(factor, x) + _along_channels(bias - mean * factor, x)


def _layer_normalization(
    x: Value, scale: Value, bias: Value | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: Any
) -> Value:
    return functional.layer_norm(x, list(x.shape[axis % x.ndim :]), scale, bias, epsilon)


def _instance_normalization(x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5) -> Value:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_normalization(
    x: Value, scale: Value, bias: Value, *, num_groups: int, epsilon: float = 1e-5, **_: Any
) -> Value:
    repeat = x.shape[1] // scale.numel()
    return functional.group_norm(
        x, num_groups, scale.repeat_interleave(repeat), bias.repeat_interleave(repeat), epsilon
    )


# ---- the rest


def _clip(x: Value, least: Value | None = None, most: Value | None = None, **bounds: float) -> Value:
    lower, upper = bounds.get("min", least), bounds.get("max", most)
    return x if lower is None and upper is None else torch.clamp(x, lower, upper)  # type: ignore[arg-type]


def _cast(x: Value, *, to: int, **_: Any) -> Value:
    return x.to(torch.from_numpy(onnx.helper.tensor_dtype_to_np_dtype(to).type(0).reshape(1)).dtype)


def _prelu(x: Value, slope: Value) -> Value:
    return torch.where(x < 0, x * slope, x)


def _plain(run: Callable[..., Value]) -> Operator:
    """Return an operator of a function whose attributes mean nothing to it."""
    return lambda *operands, **_: run(*operands)


_OPERATORS: dict[str, Operator] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(dim=tuple(range(2, x.ndim)), keepdim=True),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "BatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization,
    "Relu": functional.relu,
    "Clip": _clip,
    "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha),
    "PRelu": _prelu,
    "Elu": lambda x, alpha=1.0: functional.elu(x, alpha),
    "Sigmoid": torch.sigmoid,
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0.0, 1.0),
    "HardSwish": functional.hardswish,
    "Tanh": torch.tanh,
    "Gelu": lambda x, approximate="none": functional.gelu(x, approximate=approximate),
    "Mish": functional.mish,
    "Softplus": functional.softplus,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Sqrt": torch.sqrt,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Pow": torch.pow,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "Min": lambda *values: functools.reduce(torch.minimum, values),
    "Max": lambda *values: functools.reduce(torch.maximum, values),
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "LogSoftmax": lambda x, axis=-1: torch.log_softmax(x, axis),
    "Identity": lambda x: x,
    "Dropout": _plain(lambda x, *_: x),
    "Cast": _cast,
    "Shape": lambda x, start=0, end=None: torch.tensor(x.shape[start:end], dtype=torch.int64),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda x, perm=None: x.permute(*(perm or range(x.ndim)[::-1])),
    "Concat": lambda *values, axis: torch.cat(values, axis),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": lambda x, shape: x * torch.ones(shape.tolist(), dtype=x.dtype, device=x.device),
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
}
