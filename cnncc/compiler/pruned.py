"""Modules with fewer channels than their factory gave them: made to fit a state dict that structured pruning left.

A pruned network has the code of the whole one, and other numbers of channels. `cnncc prune` says so in the header of
its weights file; here the factory's modules are given those numbers, before the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cnncc_runtime.errors import WeightsRefused

HEADER = "cnncc.pruned"
"""Key in a safetensors file's header: the weights are of fewer channels than the factory gives."""


def fit_channels(module: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Give modules the numbers of channels that a state dict has.

    Args:
        module: Changed in place; its values are lost where a shape changes.
        state: Of a network of the same modules, none with more channels.

    Returns:
        Module path → channels before and after, of convolutions and linear layers that have others now.

    Raises:
        WeightsRefused: A module of a kind that cannot lose channels has another shape; names it.
    """
    changed: dict[str, tuple[int, int]] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = {name: state[prefix + name].shape for name, _ in own if prefix + name in state}
        if all(tensor.shape == shapes.get(name, tensor.shape) for name, tensor in own):
            continue
        resize = next((rule for kind, rule in _RULES.items() if isinstance(part, kind)), None)
        if resize is None or any(
            len(shapes[name]) != tensor.ndim
            or any(new > old for new, old in zip(shapes[name], tensor.shape, strict=True))
            for name, tensor in own
            if name in shapes
        ):
            raise WeightsRefused(
                f"the pruned weights do not fit {path or 'the model'}, a {type(part).__name__}",
                where=[f"{prefix}{name}: {list(shape)}" for name, shape in shapes.items()],
                hint="give the factory that the weights were pruned from",
            )
        before = getattr(part, "out_channels", getattr(part, "out_features", 0))
        resize(part, shapes)
        for name, tensor in own:
            if name in shapes:
                _replace(part, name, tensor, shapes[name])
        after = getattr(part, "out_channels", getattr(part, "out_features", 0))
        if before != after:
            changed[path] = (before, after)
    return changed


def _replace(part: nn.Module, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    made = torch.zeros(shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        part.register_parameter(name, nn.Parameter(made, requires_grad=tensor.requires_grad))
    else:
        part.register_buffer(name, made, persistent=True)


Shapes = Mapping[str, torch.Size]


def _convolution(part: Any, shapes: Shapes) -> None:
    first, second, *_ = shapes["weight"]
    outer, inner = (second, first) if part.transposed else (first, second)
    if part.groups == part.in_channels > 1:  # depthwise: a group for each channel
        part.groups = part.in_channels = first
        part.out_channels = second * first if part.transposed else first
    elif part.transposed:
        part.in_channels, part.out_channels = inner, outer * part.groups
    else:
        part.out_channels, part.in_channels = outer, inner * part.groups


def _linear(part: Any, shapes: Shapes) -> None:
    part.out_features, part.in_features = shapes["weight"]


def _batch_norm(part: Any, shapes: Shapes) -> None:
    [part.num_features] = next(iter(shapes.values()))


def _group_norm(part: Any, shapes: Shapes) -> None:
    [part.num_channels] = shapes["weight"]


def _layer_norm(part: Any, shapes: Shapes) -> None:
    part.normalized_shape = tuple(shapes["weight"])


def _prelu(part: Any, shapes: Shapes) -> None:
    [part.num_parameters] = shapes["weight"]


_RULES: dict[type[nn.Module], Callable[[Any, Shapes], None]] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.PReLU: _prelu,
}
