"""What peers that quantize for themselves share: inputs to take ranges from, and the check of what came out.

Their outputs cannot be held to ours. Ours were calibrated on the user's data, theirs on the random inputs of the
benchmark, which may lie far outside of that data; so each is held to the float model that it was made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc.graph.feeds import random_feeds
from cnncc_runtime.errors import ModelRefused
from cnncc_runtime.specs import Tensors, TensorSpec

SAMPLES = 4
"""Inputs that ranges are taken from, drawn as the benchmark's are. What is computed does not depend on the ranges."""

LIMIT = 0.3
"""Largest relative L2 distance of its outputs to the float model's. ONNX Runtime's lie up to 0.013 away on ResNets,
MobileNetV2, EfficientNet-B0 and SqueezeNet with random weights, with weights of 7 bits up to 0.10; those of another
model about 1."""


def samples(specs: Iterable[TensorSpec]) -> list[Tensors]:
    """Return the inputs that ranges are taken from."""
    specs = tuple(specs)
    return [random_feeds(specs, seed=seed) for seed in range(SAMPLES)]


def check(floats: Sequence[NDArray[Any]], quantized: Sequence[NDArray[Any]], library: str) -> None:
    """Compare outputs of the float model with those of what a library made of it.

    Raises:
        ModelRefused: They are farther apart than quantization explains, or are not finite.
    """
    for wanted, found in zip(floats, quantized, strict=True):
        error = np.linalg.norm(np.float64(found) - wanted)
        if not error <= LIMIT * np.linalg.norm(np.float64(wanted)):  # NaN is not
            share = error / max(float(np.linalg.norm(np.float64(wanted))), np.finfo(np.float32).tiny)
            raise ModelRefused(f"what {library} quantized lies {share:.2g} (relative L2) from the float model")
