"""Weights set to zero, where they are: unstructured, and 2:4.

No channel goes, so dense kernels do the same work as before. Unstructured zeros make a file smaller once it is packed,
and nothing faster; 2:4 is what the sparse tensor cores of NVIDIA's GPUs skip (Mishra et al., *Accelerating Sparse Deep
Neural Networks*, 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from cnncc_runtime.errors import ModelRefused

Masks = dict[str, torch.Tensor]
"""Parameter's name → which of its values stay."""

_GROUP, _KEPT = 4, 2


def unstructured(model: nn.Module, share: float) -> Masks:
    """Return masks that drop the share of all weights that are smallest in magnitude, over all layers together.

    Args:
        model: Its convolutions and linear layers are pruned; biases and normalizations are not.
        share: 0 to 1.

    Raises:
        ModelRefused: It has no such layers.
    """
    weights = dict(_weights(model))
    if not weights:
        raise ModelRefused("the model has no convolution and no linear layer to prune")
    values = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    count = round(share * len(values))
    if not count:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[torch.argsort(values, stable=True)[:count]] = False
    parts = torch.split(keep, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def two_of_four(model: nn.Module) -> tuple[Masks, tuple[str, ...]]:
    """Return masks that keep, of every four weights along the input channels, the two that are largest in magnitude.

    Args:
        model: Its convolutions and linear layers are pruned.

    Returns:
        The masks, and the layers that are left dense: their input channels (of a group) are no multiple of four.

    Raises:
        ModelRefused: No layer can be pruned so.
    """
    masks: Masks = {}
    dense: list[str] = []
    for name, weight in _weights(model):
        channels = weight.shape[1]
        if channels % _GROUP:
            dense.append(name.rpartition(".")[0])
            continue
        groups = weight.detach().abs().movedim(1, -1)
        groups = groups.reshape(*groups.shape[:-1], channels // _GROUP, _GROUP)
        rank = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        masks[name] = (rank < _KEPT).flatten(-2).movedim(-1, 1).contiguous()
    if not masks:
        raise ModelRefused("no layer's input channels are a multiple of four, as 2:4 needs", where=dense[:10])
    return masks, tuple(dense)


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set what masks drop to zero, in place; again after each step of fine-tuning."""
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            parameter.mul_(mask.to(parameter.device))


def zeros(model: nn.Module) -> float:
    """Return which share of the weights of convolutions and linear layers is zero."""
    counts = [(int((weight == 0).sum()), weight.numel()) for _, weight in _weights(model)]
    total = sum(size for _, size in counts)
    return sum(count for count, _ in counts) / total if total else 0.0


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that are pruned, ``[outputs, inputs, …]``; transposed convolutions are laid out otherwise."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not getattr(module, "transposed", False):
            yield (f"{path}." if path else "") + "weight", module.weight
