"""What every session has of its manifest, and that it is a context: `OpenedEngine`, which sessions derive from."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from cnncc_runtime.admission import Admission
from cnncc_runtime.bundle import Manifest
from cnncc_runtime.specs import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenedEngine:
    """An engine whose bundle says what it takes and returns.

    Args:
        manifest: Of the bundle.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._inputs, self._outputs, self._batches = manifest.inputs, manifest.outputs, manifest.batches
        self._admission = Admission(manifest.inputs, manifest.batches)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs, in the model's order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs, in the model's order."""
        return self._outputs

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that were built; empty when the model has no batch dimension."""
        return self._batches

    def close(self) -> None:
        """Free the engine; closing twice is harmless."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""
        self.close()
