"""`Judge`: how far a quantized graph is from the float model on a few samples.

Every step of calibration is kept or dropped by what it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference, side_by_side
from cnncc_runtime.specs import Feeds, Tensors

BEST_DB = 300.0
"""What stands for no error at all; float64 itself ends near it."""


class Judge:
    """Compares graphs with the float model by the signal to quantization noise of their outputs.

    Args:
        model: The float model, as the user gave it: before any step that changed it.
        samples: At least one.
        threads: That compute the samples; 0 for one a core.
    """

    def __init__(self, model: OnnxGraph, samples: Sequence[Feeds], *, threads: int = 0) -> None:
        self._samples = list(samples)
        self._threads = threads
        self._truth = self._outputs(model)

    def _outputs(self, graph: OnnxGraph) -> list[Tensors]:
        reference = Reference(graph, threads=self._threads, beside=len(self._samples))
        return side_by_side(reference.run, self._samples, threads=self._threads)

    def sqnr(self, graph: OnnxGraph) -> float:
        """Return the signal to quantization noise ratio of a graph's outputs, in decibels (see `Noise`)."""
        noise = Noise()
        for truth, found in zip(self._truth, self._outputs(graph), strict=True):
            noise.add(truth, found)
        return noise.db


class Noise:
    """Sums of squares of outputs and of their errors, over samples."""

    def __init__(self) -> None:
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def add(self, truth: Tensors, found: Tensors) -> None:
        """Count one sample; integer outputs say nothing."""
        for name, array in truth.items():
            if array.dtype.kind == "f":
                wide = array.astype(np.float64)
                with np.errstate(invalid="ignore"):  # Inf less Inf: the ratio is the worst there is then
                    error = found[name] - wide
                self._signal[name] = self._signal.get(name, 0.0) + float((wide**2).sum())
                self._noise[name] = self._noise.get(name, 0.0) + float((error**2).sum())

    @property
    def db(self) -> float:
        """10·log₁₀(Σ truth² / Σ (found − truth)²).

        Of several outputs the noise shares are averaged, so that each counts alike whatever its magnitude; one that is
        always zero counts where there is no other. `BEST_DB` where there is no error, −`BEST_DB` where it has no
        measure: of Inf, NaN, or outputs of zeros alone.
        """
        measured = [name for name, signal in self._signal.items() if signal] or list(self._signal)
        if not measured:
            return BEST_DB
        share = sum(_share(self._noise[name], self._signal[name]) for name in measured) / len(measured)
        if not math.isfinite(share):
            return -BEST_DB
        return BEST_DB if share <= 10 ** (-BEST_DB / 10) else -10.0 * math.log10(share)


def _share(noise: float, signal: float) -> float:
    return noise / signal if signal else (math.inf if noise else 0.0)
