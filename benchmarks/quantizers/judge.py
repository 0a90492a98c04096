"""Judges an int8 graph beside its fp32 original: accuracy, signal to noise, int8 layers, what TensorRT would refuse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.quantizers.inspection import coverage, faults
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import load_trusted
from cnncc.graph.reference import Reference

BATCH = 50
"""Images that are run at a time."""


@dataclass(frozen=True)
class Verdict:
    """What an int8 graph is worth.

    Attributes:
        accuracy: Top-1 or mIoU, percent.
        reference: The same of the fp32 graph.
        sqnr: 10·log₁₀(Σ fp32² / Σ (int8 − fp32)²) over all logits of the test set, dB.
        quantized: Convolutions and matrix products in int8.
        layers: Those of the fp32 graph.
        faults: Why TensorRT would refuse it or compute something else; empty where it takes it.
    """

    accuracy: float
    reference: float
    sqnr: float
    quantized: int
    layers: int
    faults: tuple[str, ...]

    @property
    def drop(self) -> float:
        """Percentage points lost."""
        return self.reference - self.accuracy


def outputs(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first output of a graph in ONNX Runtime, optimizations off.

    Raises:
        ModelRefused: ONNX Runtime does not load it.
        RunFailed: ONNX Runtime failed on it.
    """
    graph: OnnxGraph = load_trusted(path)
    session = Reference(graph, threads=1)
    name, result = graph.inputs[0].name, graph.outputs[0].name
    return np.concatenate([session.run({name: x[start : start + BATCH]})[result] for start in range(0, len(x), BATCH)])


def judge(fp32: Path, int8: Path, test: Path, metric: str) -> Verdict:
    """Judge ``int8`` on a test set.

    Args:
        fp32: The original.
        int8: What a quantizer made of it.
        test: ``.npz`` with ``x`` and ``y``.
        metric: ``top-1`` or ``mIoU``.

    Raises:
        ModelRefused: ONNX Runtime does not load a graph.
        RunFailed: ONNX Runtime failed on a graph.
    """
    with np.load(test) as held:
        x, y = held["x"], held["y"]
    expected, found = outputs(fp32, x), outputs(int8, x)
    score = top1 if metric == "top-1" else mean_iou
    model = onnx.load(int8)
    return Verdict(
        accuracy=100 * score(found, y),
        reference=100 * score(expected, y),
        sqnr=sqnr(expected, found),
        quantized=coverage(model).quantized,
        layers=coverage(onnx.load(fp32)).layers,
        faults=faults(model),
    )


def top1(logits: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Return the share of images whose largest logit is that of their class; logits are ``[n, classes]``."""
    return float((logits.argmax(1) == y).mean())


def mean_iou(logits: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Return intersection over union, the mean over the classes that occur; logits are ``[n, classes, h, w]``.

    Pixels are counted over the whole set, as in PASCAL VOC (Everingham et al. 2015).
    """
    guessed = logits.argmax(1)
    shares = []
    for label in range(logits.shape[1]):
        here, there = y == label, guessed == label
        union = np.count_nonzero(here | there)
        if union:
            shares.append(np.count_nonzero(here & there) / union)
    return float(np.mean(shares))


def sqnr(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the ratio of signal to quantization noise in dB; infinite where nothing differs."""
    reference = expected.astype(np.float64)
    noise = float(np.square(reference - found).sum())
    return float("inf") if noise == 0 else float(10 * np.log10(np.square(reference).sum() / noise))
