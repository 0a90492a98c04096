"""The reference model in the half precision of a bundle, for peers that compute what an ONNX file says.

A bundle's ``reference.onnx`` is what the engine was meant to compute, in float32. Its peers are given the graph that
the engine was built from: narrowed again, by the same rules and on the same seeded inputs.
"""

from __future__ import annotations

from pathlib import Path

from cnncc.compiler.half import FP16, narrow, overflowing
from cnncc.compiler.verify import random_samples
from cnncc.graph.reader import read_onnx

_SAMPLES = 2


def write_half(source: Path, precision: str, batches: tuple[int, ...], folder: Path) -> Path:
    """Write a model in half precision.

    Args:
        source: ``reference.onnx``.
        precision: ``fp16`` or ``bf16``.
        batches: Sizes that were built; the first is looked at for values that overflow.
        folder: An existing folder.

    Returns:
        The file.

    Raises:
        ModelRefused: The reference cannot be read.
    """
    graph = read_onnx(source)
    feeds, _ = random_samples(graph.inputs, batches=batches[:1], count=_SAMPLES)
    prone = overflowing(graph, feeds) if precision == FP16 else ()
    made = folder / f"{precision}.onnx"
    made.write_bytes(narrow(graph, precision, prone).graph.serialized)
    return made
