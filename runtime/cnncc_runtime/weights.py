"""The file of weights: which tensors lie where in it, and how it is mapped into memory.

Mapped pages are read when a kernel first touches them, shared by every process that runs the same bundle, and given
back by the system when memory is short; nothing is copied. What is made of the file instead (`Expansion`) is the
process's own.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from cnncc_runtime.errors import BundleRefused
from cnncc_runtime.specs import DTYPES, ITEM_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes; TVM's kernels assume it of every buffer (tvm::runtime::kAllocAlignment)."""

_MAX_RANK = 32  # NumPy 1's bound
_MAX_SIZE = 1 << 40
_MAX_EXPANSION = 8
"""Times the stored bytes that an expansion may take; Winograd's F(4×4) takes 4."""
_PIECE = 4096
"""Columns that are expanded at once: their products stay in the second-level cache."""


@dataclass(frozen=True)
class Expansion:
    """How a tensor is made of what the file holds, when it is first needed: a matrix times each part.

    Winograd's weights are a linear map of a convolution's, up to four times as large: they need not travel.

    Attributes:
        matrix: Position of the matrix among the tensors: ``[rows, columns]``, float64.
        parts: Parts. The file holds ``[parts, columns, n]``, the engine takes ``[parts, rows, n]``, both float32.
    """

    matrix: int
    parts: int


@dataclass(frozen=True)
class WeightRecord:
    """One tensor of the file.

    Attributes:
        offset: Of its first byte, a multiple of `ALIGNMENT`.
        shape: Sizes, as the engine takes it.
        dtype: One of `cnncc_runtime.specs.DTYPES`; little-endian, row-major.
        expansion: How it is made of what the file holds; None where that is the tensor itself.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    expansion: Expansion | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_sane(self) -> bool:
        """Whether there can be such a tensor."""
        return self.dtype in DTYPES and len(self.shape) <= _MAX_RANK and all(0 < n < _MAX_SIZE for n in self.shape)


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
        makeable = [self._can_be_made(tensor) for tensor in self.tensors]
        unmade = [position for position, good in enumerate(makeable) if not good]
        misplaced = [n for n, tensor in enumerate(self.tensors) if makeable[n] and not self._fits(tensor, size)]
        count = len(self.tensors)
        absent = [n for taken in self.entries.values() for n in taken if not 0 <= n < count]
        problems = {
            f"the weights {misplaced}, which do not lie in '{self.file}' ({size} bytes)": not misplaced,
            f"the weights {unmade}, which cannot be made of what '{self.file}' holds": not unmade,
            f"the weights {absent} of {count}": not absent,
            f"weights for the batch sizes {sorted(self.entries)}": self.entries.keys() == set(batches),
        }
        return "; ".join(problem for problem, good in problems.items() if not good)

    def stored(self, tensor: WeightRecord) -> int:
        """Return how many bytes of the file a tensor of this record is made of."""
        if tensor.expansion is None:
            return tensor.nbytes
        rows, columns = self.tensors[tensor.expansion.matrix].shape
        return tensor.nbytes // rows * columns

    def _fits(self, tensor: WeightRecord, size: int) -> bool:
        placed = tensor.offset >= 0 and tensor.offset % ALIGNMENT == 0
        return tensor.is_sane and placed and tensor.offset + self.stored(tensor) <= size

    def _can_be_made(self, tensor: WeightRecord) -> bool:
        made = tensor.expansion
        if made is None:
            return True
        if tensor.dtype != "float32" or not tensor.is_sane or not 0 <= made.matrix < len(self.tensors):
            return False
        matrix = self.tensors[made.matrix]
        plain = matrix.expansion is None and matrix.dtype == "float64" and len(matrix.shape) == 2 and matrix.is_sane
        if not plain or made.parts < 1:
            return False
        rows, columns = matrix.shape
        return rows <= _MAX_EXPANSION * columns and math.prod(tensor.shape) % (made.parts * rows) == 0


class MappedWeights:
    """The tensors of a file that is mapped into memory.

    A tensor lies in the mapped file, which stays mapped as long as one of them is there; or, where it is expanded, in
    memory of its own from when it is first asked for. All can be written to, since DLPack carries no read-only arrays;
    what is written is private to the process.

    Args:
        file: The file, verified; it may be closed afterwards, but not rewritten in place.
        record: As the manifest has it, checked against the file's size.

    Raises:
        BundleRefused: The file cannot be mapped.
    """

    def __init__(self, file: BinaryIO, record: WeightsRecord) -> None:
        self._record = record
        self._made: dict[int, NDArray[Any]] = {}
        try:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as exc:
            raise BundleRefused(
                f"'{record.file}' cannot be mapped into memory: {exc}", hint="copy the bundle to a local disk"
            ) from exc

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._record.tensors)

    def __getitem__(self, position: int) -> NDArray[Any]:
        """Return a tensor.

        Raises:
            MemoryError: There is none left to expand it into.
        """
        import numpy as np

        tensor = self._record.tensors[position]
        dtype = np.dtype(tensor.dtype)
        count = self._record.stored(tensor) // dtype.itemsize
        stored = np.frombuffer(self._mapped, dtype, count, tensor.offset)
        if tensor.expansion is None:
            return stored.reshape(tensor.shape)
        made = self._made.get(position)
        if made is None:  # whoever comes second at the same time makes it in vain
            made = self._made.setdefault(position, self._expanded(tensor, tensor.expansion, stored))
        return made

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Return every tensor in turn."""
        return (self[position] for position in range(len(self)))

    def _expanded(self, tensor: WeightRecord, made: Expansion, stored: NDArray[Any]) -> NDArray[Any]:
        matrix = self[made.matrix]
        rows, columns = matrix.shape
        found = aligned_empty(tensor.shape, stored.dtype)
        expand(matrix, stored.reshape(made.parts, columns, -1), found.reshape(made.parts, rows, -1))
        _forget(self._mapped, tensor.offset, stored.nbytes)
        return found


def expand(matrix: NDArray[np.float64], stored: NDArray[Any], into: NDArray[Any]) -> None:
    """Write a matrix times each part, computed in float64 and rounded once.

    Args:
        matrix: ``[rows, columns]``.
        stored: ``[parts, columns, n]``, float32.
        into: ``[parts, rows, n]``, float32.
    """
    import numpy as np

    for source, target in zip(stored, into, strict=True):
        for start in range(0, source.shape[1], _PIECE):
            piece = slice(start, start + _PIECE)
            target[:, piece] = matrix @ source[:, piece].astype(np.float64)


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array that a session takes without copying it."""
    import numpy as np

    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _forget(mapped: mmap.mmap, start: int, size: int) -> None:
    """Give the pages that lie wholly inside a range back: they are not needed again."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    past = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if past > first and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, first, past - first)
