"""Which operators pass the scales of channels on, and how: a rule for each.

An operator passes scales on if it is positively homogeneous in them, f(s·x) = s·f(x) for s > 0: Nagel et al. 2019
(Data-Free Quantization Through Weight Equalization and Bias Correction), section 4.1, for ReLU and PReLU.
"""

from __future__ import annotations

import numpy as np
import onnx

from cnncc.calibration.channel_walk import FIXED, Ids, Offset, Rule, Walk, Weight
from cnncc.graph.draft import Draft, attribute

# ---- layers: they write channels of their own and divide what they read


def _conv(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Weights are [out, in / groups, …]."""
    dims, groups = _weight_dims(walk, node), int(attribute(node, "group", 1))
    if len(dims) < 3 or groups < 1 or dims[0] % groups:
        return None
    return _layer(walk, node, 0, groups, inputs=dims[1] * groups, outputs=dims[0])


def _conv_transpose(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Weights are [in, out / groups, …]: output channels run within each group of inputs."""
    dims, groups = _weight_dims(walk, node), int(attribute(node, "group", 1))
    if len(dims) < 3 or groups < 1 or dims[0] % groups:
        return None
    return _layer(walk, node, 1, groups, inputs=dims[0], outputs=dims[1] * groups)


def _gemm(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    if attribute(node, "transA", 0):
        return None
    return _product(walk, node, 0 if attribute(node, "transB", 0) else 1)


def _matmul(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """A product of matrices; with more axes, as in transformers, axis 1 is not the channels'."""
    return _product(walk, node, 1) if walk.rank(node.input[0]) == 2 else None


def _product(walk: Walk, node: onnx.NodeProto, axis: int) -> tuple[Ids, ...] | None:
    dims = _weight_dims(walk, node)
    return _layer(walk, node, axis, 1, inputs=dims[1 - axis], outputs=dims[axis]) if len(dims) == 2 else None


def _weight_dims(walk: Walk, node: onnx.NodeProto) -> tuple[int, ...]:
    """Return the shape of float32 weights, () where there are none."""
    if len(node.input) < 2 or not walk.is_float(node.input[1]):
        return ()
    return tuple(walk.draft.weights[node.input[1]].dims)


def _layer(
    walk: Walk, node: onnx.NodeProto, axis: int, groups: int, *, inputs: int, outputs: int
) -> tuple[Ids, ...] | None:
    """Note a layer; nodes with the same weights share the variables on both sides."""
    value, name = node.input[0], node.input[1]
    bias = node.input[2] if len(node.input) > 2 else ""
    read = walk.ids.get(value, np.full(inputs, FIXED, dtype=np.int64))
    if read.shape != (inputs,) or (bias and not walk.is_per_channel(bias, outputs, trailing=0)):
        return None
    known = walk.weights.get(name)
    if known is None:
        known = walk.weights[name] = Weight(name, axis, groups, [], walk.fresh(outputs), read)
    elif (known.axis, known.groups) != (axis, groups):
        return None
    known.nodes.append(node)
    walk.unite(known.inputs, read)
    if bias:
        walk.offsets.append(Offset(node, 2, known.outputs))
    if value in walk.ids:
        walk.tensors[value] = read
    return (known.outputs,)


# ---- one value


def _same(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Each element by itself."""
    ids = walk.moving(node)
    return None if ids is None else (ids,)


def _spatial(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Channels are axis 1; each channel's pixels are mixed."""
    ids = walk.moving(node)
    return None if ids is None or ids.ndim != 1 else (ids,)


def _clip(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Only what is ReLU: from 0 to infinity."""
    return _same(walk, node) if clip_bounds(walk.draft, node) == (0.0, np.inf) else None


def clip_bounds(draft: Draft, node: onnx.NodeProto) -> tuple[float, float]:
    """Return the bounds of a Clip, NaN for one that is not a constant."""
    bounds = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        given = node.input[index] if len(node.input) > index else ""
        array = draft.array(given) if given else np.asarray(attribute(node, name, default))
        bounds.append(np.nan if array is None or array.size != 1 else float(array.reshape(())))
    return bounds[0], bounds[1]


def _reduce(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """A mean, sum or maximum over axes after those of the channels."""
    ids, rank = walk.moving(node), walk.rank(node.input[0])
    given = node.input[1] if len(node.input) > 1 else ""
    axes = walk.draft.array(given) if given else attribute(node, "axes")
    if ids is None or axes is None:
        return None
    first = min((int(axis) % rank for axis in np.asarray(axes).ravel()), default=0)
    return (ids,) if first > ids.ndim else None


def _resize(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Linear in the image, unless it is extrapolated by a constant."""
    crops = attribute(node, "coordinate_transformation_mode", b"half_pixel") == b"tf_crop_and_resize"
    return None if crops else _spatial(walk, node)


def _pad(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Images padded with zeros or with themselves."""
    given = node.input[2] if len(node.input) > 2 else ""
    value = walk.draft.array(given) if given else np.asarray(attribute(node, "value", 0.0))
    pads = walk.draft.array(node.input[1]) if len(node.input) > 1 else np.asarray(attribute(node, "pads", ()))
    if value is None or value.any() or pads is None or pads.size < 4 or len(node.input) > 3:
        return None
    return None if pads[1] or pads[1 + pads.size // 2] else _spatial(walk, node)


def _reshape(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Channels stay apart where the new axes 1, 2, … up to one hold all of them, each as often as another."""
    ids = walk.moving(node)
    before, after = walk.sizes(node.input[0]), walk.sizes(node.output[0])
    if ids is None or not before or np.prod(before) != np.prod(after):
        return None  # equal products: axis 0 stays the batch, whatever its size
    pixels = int(np.prod(before[ids.ndim :], dtype=np.int64))
    for axes in range(1, len(after) + 1):
        times, rest = divmod(int(np.prod(after[:axes], dtype=np.int64)), ids.size)
        if times and not rest and pixels % times == 0:
            return (np.repeat(ids.ravel(), times).reshape(after[:axes]),)
    return None


def _transpose(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Axes of channels swapped among themselves, as in a channel shuffle."""
    ids, perm = walk.moving(node), attribute(node, "perm")
    if ids is None or perm is None or perm[0] != 0:
        return None
    order = [axis - 1 for axis in perm[1 : 1 + ids.ndim]]
    return (ids.transpose(order),) if sorted(order) == list(range(ids.ndim)) else None


def _split(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    ids, rank = walk.moving(node), walk.rank(node.input[0])
    if ids is None or ids.ndim != 1 or not rank:
        return None
    axis = int(attribute(node, "axis", 0)) % rank
    if axis != 1:
        return tuple(ids for _ in node.output) if axis > 1 else None
    sizes = [(*walk.sizes(name), 0)[0] for name in node.output]
    return tuple(np.split(ids, np.cumsum(sizes)[:-1])) if sum(sizes) == ids.size else None


def _slice(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Constant bounds; ONNX clamps those beyond the ends as Python does."""
    ids, rank = walk.moving(node), walk.rank(node.input[0])
    given = {index: walk.draft.array(name) for index, name in enumerate(node.input) if index and name}
    if ids is None or ids.ndim != 1 or not {1, 2} <= given.keys() or any(array is None for array in given.values()):
        return None
    starts, ends = (np.asarray(given[index]).ravel() for index in (1, 2))
    axes = np.asarray(given.get(3, np.arange(starts.size)))
    steps = np.asarray(given.get(4, np.ones(starts.size, dtype=np.int64)))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if int(axis) % rank == 1:
            ids = ids[int(start) : int(end) : int(step)]
    return (ids,)


# ---- several values


def _concat(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Along the channels, one part after another; along the image, parts share their scales."""
    rank = walk.rank(node.output[0])
    parts = [_or_fixed(walk, name) for name in node.input]
    ids = [part for part in parts if part is not None and part.ndim == 1]
    if not rank or len(ids) < len(parts):
        return None
    axis = int(attribute(node, "axis")) % rank
    if axis == 1:
        return (np.concatenate(ids),)
    return _united(walk, ids) if axis > 1 else None


def _or_fixed(walk: Walk, name: str) -> Ids | None:
    """Return a value's variables, fixed ones where it has none."""
    sizes = walk.sizes(name)
    return walk.ids.get(name, np.full(sizes[0], FIXED, dtype=np.int64) if sizes else None)


def _united(walk: Walk, parts: list[Ids]) -> tuple[Ids, ...] | None:
    if any(part.shape != parts[0].shape for part in parts):
        return None
    for part in parts[1:]:
        walk.unite(parts[0], part)
    return (parts[0],)


def _add(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """Terms share their scales; a constant for each channel is scaled as a bias is."""
    constants = [index for index, name in enumerate(node.input) if name in walk.draft.weights]
    if len(constants) == 1 and len(node.input) == 2:
        return _shift(walk, node, constants[0])
    parts = [walk.ids[name] for name in node.input if name in walk.ids]
    if len(parts) < len(node.input) or len({walk.rank(name) for name in node.input}) != 1:
        return None
    return _united(walk, parts)


def _shift(walk: Walk, node: onnx.NodeProto, index: int) -> tuple[Ids, ...] | None:
    value = node.input[1 - index]
    ids, rank = walk.ids.get(value), walk.rank(value)
    if ids is None or ids.ndim != 1 or rank != walk.rank(node.output[0]):
        return None
    if not walk.is_per_channel(node.input[index], ids.size, trailing=rank - 2):
        return None
    walk.offsets.append(Offset(node, index, ids))
    return (ids,)


def _multiply(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    """A product with what is not scaled, a constant or a gate, passes the other factor's scales on."""
    scaled = [name for name in node.input if name in walk.ids]
    if len(scaled) != 1 or walk.rank(scaled[0]) != walk.rank(node.output[0]):
        return None
    return (walk.ids[scaled[0]],)


def _divide(walk: Walk, node: onnx.NodeProto) -> tuple[Ids, ...] | None:
    return _multiply(walk, node) if node.input[0] in walk.ids else None


RULES: dict[str, Rule] = {
    # layers
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    # one value
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs"), _same),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _spatial),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Clip": _clip,
    "Resize": _resize,
    "Pad": _pad,
    "Transpose": _transpose,
    "Split": _split,
    "Slice": _slice,
    # several
    **dict.fromkeys(("Add", "Sub", "Sum"), _add),
    "Concat": _concat,
    "Mul": _multiply,
    "Div": _divide,
}
"""Operator → its rule. A rule may unite variables; that the outputs' shapes fit is checked after it."""
