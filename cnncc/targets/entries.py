"""Which batch sizes an engine is built for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnncc_runtime.errors import UsageError

if TYPE_CHECKING:
    from cnncc.graph.onnx_graph import OnnxGraph


def batch_sizes(graph: OnnxGraph, batches: tuple[int, ...], target: str) -> tuple[int, ...]:
    """Return the batch sizes to build for; empty where all shapes are static.

    Args:
        graph: Shapes static, or with one symbol: the batch.
        batches: Those that were asked for.
        target: Its name, for messages.

    Raises:
        UsageError: The graph has symbolic sizes and no batch sizes were given, or more than one symbol.
    """
    symbols = {symbol for spec in graph.inputs for symbol in spec.symbols}
    if not symbols:
        return ()
    if not batches:
        raise UsageError(
            f"the graph's inputs have symbolic sizes ({', '.join(sorted(symbols))}) and no batch sizes were given",
            hint="give --batch 1, or an --input-shape without symbols",
        )
    if len(symbols) > 1:
        raise UsageError(
            f"the {target} target takes one symbolic size, the batch; the graph has {', '.join(sorted(symbols))}",
            hint="give --input-shape with one symbol",
        )
    return batches
