"""BatchNormalization in inference is y = x·s + t per channel: into the weights before it, or a Mul and an Add.

With s = γ / √(σ² + ε) and t = β − μ·s (Ioffe and Szegedy 2015, section 3.1), computed in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cnncc.graph.draft import STANDARD, Draft, GraphPass, attribute
from cnncc.graph.names import MODULE_KEY, module_path, node_metadata

FUSED_KEY = "cnncc.fused"
"""Metadata key of a node: modules whose work it also does, separated by commas."""

Affine = tuple[NDArray[np.float64], NDArray[np.float64]]


def _fold_batchnorm(draft: Draft) -> int:
    folded = 0
    producers, uses = draft.producers(), draft.uses()
    replaced: list[onnx.NodeProto] = []
    for node in draft.nodes:
        affine = _affine(draft, node)
        if affine is None:
            replaced.append(node)
            continue
        before = producers.get(node.input[0])
        if before is not None and uses[node.input[0]] == 1 and _fold_into(draft, before, affine):
            _note_fused(before, node)
            _rename_output(before, node.input[0], node.output[0])
            producers[node.output[0]] = before
        else:
            pair = _mul_add(draft, node, affine)
            if pair is None:
                replaced.append(node)
                continue
            replaced += pair
        folded += 1
    draft.nodes[:] = replaced
    return folded


def _affine(draft: Draft, node: onnx.NodeProto) -> Affine | None:
    """Return s and t of an inference BatchNormalization with constant, sane statistics."""
    if node.op_type != "BatchNormalization" or node.domain not in STANDARD or attribute(node, "training_mode", 0):
        return None
    if any(node.output[1:]):
        return None
    arrays = [draft.array(name) for name in node.input[1:5]]
    if any(array is None for array in arrays):
        return None
    gamma, beta, mean, var = (np.asarray(array, dtype=np.float64) for array in arrays)
    # a float attribute, and added in the statistics' own precision
    epsilon = np.float64(np.float32(attribute(node, "epsilon", 1e-5)))
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(var + epsilon)
        shift = beta - mean * scale
    sane = np.isfinite(scale).all() and np.isfinite(shift).all()
    return (scale, shift) if sane else None


def _fold_into(draft: Draft, node: onnx.NodeProto, affine: Affine) -> bool:
    """Multiply the weights of the node before; False where it is not one that can be folded into."""
    if node.domain not in STANDARD or node.op_type not in _FOLDS:
        return False
    weight = draft.array(node.input[1])
    bias_name = node.input[2] if len(node.input) > 2 else ""
    bias = draft.array(bias_name) if bias_name else None
    if weight is None or (bias_name and bias is None):
        return False
    made = _FOLDS[node.op_type](node, weight, bias, *affine)
    if made is None or not all(np.isfinite(array).all() for array in made):
        return False
    new_weight, new_bias = made
    stem = node.name or node.output[0]
    for index, name, array in ((1, f"{node.input[1]}", new_weight), (2, bias_name or f"{stem}.bias", new_bias)):
        fresh = draft.fresh(f"{name}_folded" if not name.endswith("_folded") else name)
        draft.set_constant(fresh, array.astype(weight.dtype))
        if index < len(node.input):
            node.input[index] = fresh
        else:
            node.input.append(fresh)
    return True


Made = tuple[NDArray[Any], NDArray[Any]]


def _conv(
    node: onnx.NodeProto, weight: NDArray[Any], bias: NDArray[Any] | None, scale: NDArray[Any], shift: NDArray[Any]
) -> Made | None:
    if weight.shape[0] != scale.size:
        return None
    wide = weight.astype(np.float64) * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return wide, shift + (0.0 if bias is None else bias.astype(np.float64) * scale)


def _conv_transpose(
    node: onnx.NodeProto, weight: NDArray[Any], bias: NDArray[Any] | None, scale: NDArray[Any], shift: NDArray[Any]
) -> Made | None:
    """The weight is [in, out / groups, …]: output channels run within each group of inputs."""
    groups = int(attribute(node, "group", 1))
    if weight.shape[1] * groups != scale.size or weight.shape[0] % groups:
        return None
    per_group = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
    per_group = per_group * scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return per_group.reshape(weight.shape), shift + (0.0 if bias is None else bias.astype(np.float64) * scale)


def _gemm(
    node: onnx.NodeProto, weight: NDArray[Any], bias: NDArray[Any] | None, scale: NDArray[Any], shift: NDArray[Any]
) -> Made | None:
    rows = bool(attribute(node, "transB", 0))
    if weight.shape[0 if rows else 1] != scale.size or attribute(node, "beta", 1.0) != 1.0:
        return None
    if bias is not None and bias.shape not in ((scale.size,), (1, scale.size)):
        return None
    wide = weight.astype(np.float64) * (scale[:, None] if rows else scale[None, :])
    return wide, shift + (0.0 if bias is None else bias.astype(np.float64).reshape(-1) * scale)


_FOLDS = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm}


def _note_fused(node: onnx.NodeProto, gone: onnx.NodeProto) -> None:
    """Note the module of a node whose work another node now does too."""
    path = module_path(gone)
    for entry in node.metadata_props:
        if entry.key == FUSED_KEY:
            entry.value = f"{entry.value},{path}"
            return
    node.metadata_props.add(key=FUSED_KEY, value=path)


def _rename_output(node: onnx.NodeProto, old: str, new: str) -> None:
    node.output[list(node.output).index(old)] = new


def _mul_add(draft: Draft, node: onnx.NodeProto, affine: Affine) -> list[onnx.NodeProto] | None:
    """Return the normalization as two nodes, the channel in dimension 1."""
    shape = draft.shape(node.input[0])
    dtype = draft.array(node.input[1])
    if shape is None or len(shape) < 2 or dtype is None:
        return None
    with np.errstate(over="ignore"):
        scale, shift = (a.astype(dtype.dtype).reshape(-1, *[1] * (len(shape) - 2)) for a in affine)
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    names = [draft.fresh(f"{node.name}.{part}") for part in ("scale", "shift", "scaled")]
    draft.set_constant(names[0], scale)
    draft.set_constant(names[1], shift)
    pair = [
        helper.make_node("Mul", [node.input[0], names[0]], [names[2]], name=f"{node.name}_scale"),
        helper.make_node("Add", [names[2], names[1]], [node.output[0]], name=node.name),
    ]
    known = draft.value(node.output[0])
    if known is not None:
        draft.values[names[2]] = helper.make_value_info(names[2], known.type)
    path = node_metadata(node, MODULE_KEY)
    for made in pair:
        made.metadata_props.add(key=MODULE_KEY, value=path if path is not None else module_path(node))
    return pair


fold_batchnorm = GraphPass("fold_batchnorm", _fold_batchnorm, exact=False)
"""Fold BatchNormalization into Conv, ConvTranspose or Gemm; else make it a Mul and an Add."""
