"""Runs the program that `torch.export` captured: PyTorch's own answer, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree

from cnncc.compiler.archive import load_trusted_program, program_inputs
from cnncc_runtime.errors import RunFailed
from cnncc_runtime.specs import Feeds, Tensors


def program_runner(path: Path, outputs: Sequence[str]) -> Callable[[Feeds], Tensors]:
    """Return what runs a program that cnncc saved.

    Args:
        path: The ``.pt2`` archive.
        outputs: Names for the program's output tensors, in order.

    Raises:
        ModelRefused: The archive cannot be loaded.
    """
    program = load_trusted_program(path)
    names = [spec.name for spec in program_inputs(program)]
    structure = program.call_spec.in_spec
    module = program.module()

    def run(feeds: Feeds) -> Tensors:
        args, kwargs = pytree.tree_unflatten([torch.from_numpy(np.array(feeds[name])) for name in names], structure)
        try:
            with torch.no_grad():
                leaves = pytree.tree_leaves(module(*args, **kwargs))
        except Exception as exc:  # PyTorch raises anything
            raise RunFailed(f"PyTorch failed on the model: {exc}") from exc
        return {name: leaf.detach().numpy() for name, leaf in zip(outputs, leaves, strict=True)}

    return run
