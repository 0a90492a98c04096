"""Tensor specs: the name, shape and dtype of a model's inputs and outputs.

NumPy is imported where arrays are: who only reads manifests, as an update agent, spares the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from cnncc_runtime.errors import DataRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feeds: TypeAlias = "Mapping[str, NDArray[Any]]"
Tensors: TypeAlias = "dict[str, NDArray[Any]]"

ITEM_BYTES = {
    "float32": 4, "float64": 8, "float16": 2, "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8, "bool": 1,
}  # fmt: skip
"""Element type → bytes."""

DTYPES = tuple(ITEM_BYTES)
"""NumPy names of the element types that cross an engine's boundary."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: As the ONNX graph and the engine know it.
        shape: Sizes; a string is a symbolic dimension (``"N"``: the batch).
        dtype: One of `DTYPES`.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def bind(self, sizes: Mapping[str, int]) -> TensorSpec:
        """Return the spec with symbolic dimensions replaced by the given sizes."""
        return replace(self, shape=tuple(sizes.get(d, d) if isinstance(d, str) else d for d in self.shape))

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbolic dimensions, in order of appearance."""
        return tuple(dict.fromkeys(d for d in self.shape if isinstance(d, str)))

    def __str__(self) -> str:
        """Return ``name: float32[1, 3, 28, 28]``."""
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    def check(self, array: NDArray[Any]) -> None:
        """Refuse an array of another rank, size or dtype.

        Raises:
            DataRefused: Says what was given and what is wanted.
        """
        import numpy as np

        if not isinstance(array, np.ndarray):
            raise DataRefused(
                f"input '{self.name}' is a {type(array).__name__}, not an array",
                hint=f"convert it: numpy.asarray(x, '{self.dtype}')",
            )
        if array.dtype != np.dtype(self.dtype):
            raise DataRefused(
                f"input '{self.name}' has dtype {array.dtype}, the model takes {self.dtype}",
                hint=f"convert it: array.astype('{self.dtype}')",
            )
        if array.ndim != len(self.shape) or any(
            isinstance(want, int) and want != have for want, have in zip(self.shape, array.shape, strict=True)
        ):
            raise DataRefused(
                f"input '{self.name}' has shape {list(array.shape)}, the model takes "
                f"[{', '.join(map(str, self.shape))}]",
                hint="give the shape the model was compiled for, or compile it again with --input-shape",
            )


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Feeds) -> None:
    """Refuse feeds that lack an input, name an unknown one, or do not fit their specs.

    Raises:
        DataRefused: Names the inputs.
    """
    names = [spec.name for spec in specs]
    if missing := [name for name in names if name not in feeds]:
        raise DataRefused(f"inputs missing: {', '.join(missing)}", hint=f"the model takes {', '.join(names)}")
    if unknown := [name for name in feeds if name not in names]:
        raise DataRefused(f"unknown inputs: {', '.join(unknown)}", hint=f"the model takes {', '.join(names)}")
    for spec in specs:
        spec.check(feeds[spec.name])
