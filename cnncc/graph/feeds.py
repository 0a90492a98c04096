"""Seeded inputs: the same numbers on every machine, for proofs, parity and benchmarks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from cnncc_runtime.specs import Tensors, TensorSpec

_INTEGERS = 8
"""Integers are drawn from 0 up to this: small enough for an index or a class number."""


def random_feeds(specs: Iterable[TensorSpec], seed: int = 0, batch: int = 1) -> Tensors:
    """Draw inputs: standard normal floats, integers in [0, 8), fair booleans.

    An input's numbers depend on the seed and its own name and shape, not on the other inputs.

    Args:
        specs: Shapes; symbolic dimensions get the batch.
        seed: Any integer.
        batch: Size of symbolic dimensions.

    Returns:
        Contiguous arrays by name.
    """
    feeds: Tensors = {}
    for spec in specs:
        shape = tuple(batch if isinstance(size, str) else size for size in spec.shape)
        # PCG64 streams are stable across NumPy versions (NEP 19), and crc32 across Pythons, unlike hash()
        generator = np.random.Generator(np.random.PCG64([seed & 0xFFFFFFFF, zlib.crc32(spec.name.encode())]))
        if spec.dtype == "bool":
            feeds[spec.name] = generator.integers(0, 2, shape).astype(np.bool_)
        elif spec.dtype.startswith("float"):
            feeds[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        else:
            feeds[spec.name] = generator.integers(0, _INTEGERS, shape).astype(spec.dtype)
    return feeds
