"""Weights, written: what is trained and what is pruned, in files that MODEL's ``--weights`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cnncc
from cnncc.compiler.pruned import HEADER
from cnncc.compiler.weights import read_header
from cnncc_runtime.errors import UsageError
from cnncc_runtime.files import atomic_file, storage_errors


def check_output(output: Path) -> None:
    """Refuse an output before any work.

    Raises:
        UsageError: It is a folder, or no safetensors file.
        StorageFailed: Its folder does not exist.
    """
    if output.suffix != ".safetensors" or output.is_dir():
        raise UsageError(f"{output} is no safetensors file", hint="-o model.safetensors")
    with storage_errors(output):
        output.parent.stat()


def is_pruned(weights: Path | None) -> bool:
    """Tell whether a weights file is of a network with fewer channels than its factory gives it.

    Raises:
        WeightsRefused: The file is damaged.
    """
    return weights is not None and HEADER in read_header(weights)


def save_weights(
    module: nn.Module, path: Path, notes: Mapping[str, str] | None = None, *, pruned: bool = False
) -> None:
    """Write a module's state dict, whole or not at all.

    Tensors that share memory (tied weights) are written once, as `cnncc.compiler.weights` reads them.

    Args:
        module: Whose.
        path: ``.safetensors``.
        notes: Kept in the file's header.
        pruned: Whether it has fewer channels than its factory gives it.

    Raises:
        StorageFailed: It cannot be written.
    """
    from safetensors.torch import save

    seen: set[tuple[int, Any]] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.detach().cpu().contiguous()
    header = {"cnncc": cnncc.__version__, **(notes or {}), **({HEADER: "channels"} if pruned else {})}
    with atomic_file(path) as partial:
        partial.write_bytes(save(state, header))  # save_file has an error of its own for a full disk
