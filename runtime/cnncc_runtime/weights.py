"""The file of weights: which tensors lie where in it, and how it is mapped into memory.

Mapped pages are read when a kernel first touches them, shared by every process that runs the same bundle, and given
back by the system when memory is short; nothing is copied.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.errors import BundleRefused
from cnncc_runtime.specs import DTYPES

ALIGNMENT = 64
"""Bytes; TVM's kernels assume it of every buffer (tvm::runtime::kAllocAlignment)."""

_MAX_RANK = 32  # NumPy 1's bound
_MAX_SIZE = 1 << 40


@dataclass(frozen=True)
class WeightRecord:
    """One tensor of the file.

    Attributes:
        offset: Of its first byte, a multiple of `ALIGNMENT`.
        shape: Sizes.
        dtype: One of `cnncc_runtime.specs.DTYPES`; little-endian, row-major.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def fits(self, size: int) -> bool:
        """Whether the record is sane and its tensor lies inside a file of so many bytes."""
        sane = self.dtype in DTYPES and len(self.shape) <= _MAX_RANK and all(0 < n < _MAX_SIZE for n in self.shape)
        return sane and self.offset >= 0 and self.offset % ALIGNMENT == 0 and self.offset + self.nbytes <= size


@dataclass(frozen=True)
class WeightsRecord:
    """The file of weights.

    Attributes:
        file: Its name in the bundle.
        tensors: What lies in it.
        entries: Batch size → positions in ``tensors`` of what the engine's function takes after its inputs.
    """

    file: str
    tensors: tuple[WeightRecord, ...]
    entries: dict[int, tuple[int, ...]]

    def problem(self, size: int, batches: Collection[int]) -> str:
        """Return what is wrong with the record; empty when all is well.

        Args:
            size: Bytes of the file.
            batches: Batch sizes that the engine has functions for.
        """
        misplaced = [position for position, tensor in enumerate(self.tensors) if not tensor.fits(size)]
        count = len(self.tensors)
        absent = [n for taken in self.entries.values() for n in taken if not 0 <= n < count]
        problems = {
            f"the weights {misplaced}, which do not lie in '{self.file}' ({size} bytes)": not misplaced,
            f"the weights {absent} of {count}": not absent,
            f"weights for the batch sizes {sorted(self.entries)}": self.entries.keys() == set(batches),
        }
        return "; ".join(problem for problem, good in problems.items() if not good)


def map_weights(file: BinaryIO, record: WeightsRecord) -> tuple[NDArray[Any], ...]:
    """Map the file into memory.

    Args:
        file: The file, verified; it may be closed afterwards, but not rewritten in place.
        record: As the manifest has it, checked against the file's size.

    Returns:
        An array per tensor, over the mapped file, which stays mapped as long as one of them is there. They can be
        written to, since DLPack carries no read-only arrays; what is written is private to the process.

    Raises:
        BundleRefused: The file cannot be mapped.
    """
    try:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return tuple(
            np.frombuffer(mapped, tensor.dtype, math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)
            for tensor in record.tensors
        )
    except (OSError, ValueError) as exc:
        raise BundleRefused(
            f"'{record.file}' cannot be mapped into memory: {exc}", hint="copy the bundle to a local disk"
        ) from exc
