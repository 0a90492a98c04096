"""What a rule of the Q/DQ lint is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx

from cnncc.calibration.lint_rules.view import View

Severity = Literal["refused", "float", "slow"]
"""``refused``: a target refuses the graph or computes something else; ``float``: a target silently computes in float;
``slow``: every target computes what is written, at a cost of extra tensors, requantization or accuracy."""

TENSORRT, RTX, LLVM = "tensorrt", "tensorrt-rtx", "llvm"
GPU = (TENSORRT, RTX)
ALL = (TENSORRT, RTX, LLVM)

Issues = Iterator[tuple[onnx.NodeProto, str]]
"""A node, and in one sentence what is wrong with it."""


@dataclass(frozen=True)
class Rule:
    """One thing to look for.

    Attributes:
        name: Stable id.
        severity: The worst that a target does.
        targets: Those that do it.
        hint: What to do next.
        source: How it is known. A probe is an engine of TensorRT-RTX 1.7.1 (``tests/calibration/patterns.py``).
        check: Yields each place.
    """

    name: str
    severity: Severity
    targets: tuple[str, ...]
    hint: str
    source: str
    check: Callable[[View], Issues]
