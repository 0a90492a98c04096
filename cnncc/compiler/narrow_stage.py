"""The stage that makes a half-precision graph of the cleaned one, and says what rounding costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnncc.calibration.data import open_data
from cnncc.calibration.stream import DataStream, batches
from cnncc.compiler.cache import Cache
from cnncc.compiler.graph_stages import CLEANED, specs_of
from cnncc.compiler.keys import tools
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import BudgetExceeded, DataRefused
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import Feeds

if TYPE_CHECKING:
    from cnncc.graph.onnx_graph import OnnxGraph

LEAST_SQNR = 20.0
"""dB of the outputs below which a half-precision model is refused: what ``--precision auto`` asks of int8."""

MOST_LOST = 3.0
"""dB that narrowing may take of a model that int8 has below `LEAST_SQNR` already."""

_RANDOM = 2
"""Seeded random inputs that magnitudes are looked at with; rounding too, where there are no real ones."""

SAMPLES = 32
"""Real inputs that magnitudes and rounding are looked at with: `LARGEST` leaves room for what others hold."""

_SHOWN = 5


@dataclass(frozen=True)
class Narrowing:
    """How a graph is narrowed.

    Attributes:
        precision: ``fp16`` or ``bf16``.
        batches: The batch size of the random inputs; empty where shapes are static.
        data: DATA that magnitudes and rounding are looked at with; empty for random inputs alone.
        preprocessing: The contract of images.
    """

    precision: str
    batches: tuple[int, ...]
    data: str
    preprocessing: Preprocessing | None


def narrow_stage(
    export: Stage, clean: Stage, wide: Stage, narrowing: Narrowing, cache: Cache, reporter: Reporter
) -> Stage:
    """Return the stage whose graph takes another's place, its float part in half the bits.

    Its key holds what is known of the data before it is read, as `calibration_stage`'s does.

    Args:
        export: Says what the model's inputs are.
        clean: Holds the cleaned graph, whose outputs are what is wanted.
        wide: Holds the graph that is narrowed: the cleaned one, or its Q/DQ form.
        narrowing: How.
        cache: Where the result is kept.
        reporter: Told of it.

    Raises:
        BudgetExceeded: Rounding leaves too little of the outputs.
        DataRefused: The data was refused.
    """
    inputs, precision = specs_of(export, "inputs"), narrowing.precision
    stream = open_data(narrowing.data, inputs, narrowing.preprocessing, limit=SAMPLES) if narrowing.data else None
    key = cache.key(
        "narrow",
        graph=[clean.value["graph"], wide.value["graph"]],
        precision=precision,
        batches=narrowing.batches,
        data=stream.identity if stream else "",
        tools=tools("onnx", "onnxruntime"),
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        from cnncc.compiler.half import FP16, narrow, overflowing, rounding_sqnr
        from cnncc.compiler.verify import random_samples
        from cnncc.graph.half import emulated
        from cnncc.graph.reader import load_trusted

        graph, meant = load_trusted(wide.file(CLEANED)), load_trusted(clean.file(CLEANED))
        drawn, _ = random_samples(inputs, batches=narrowing.batches, count=_RANDOM)
        given = _whole_batches(graph, stream) if stream else []
        if precision == FP16 and (stream is None or stream.random):
            reporter.note("what overflows in float16 was looked for on random inputs only: --data gives real ones")
        found = narrow(graph, precision, overflowing(graph, [*drawn, *given]) if precision == FP16 else ())
        samples = given or drawn
        sqnr = rounding_sqnr(meant, emulated(found.graph), samples)
        before = math.inf if wide is clean else rounding_sqnr(meant, graph, samples)
        if not sqnr >= min(LEAST_SQNR, before - MOST_LOST):
            lost = "nothing finite of" if sqnr == float("-inf") else f"{sqnr:.1f} dB for"
            raise BudgetExceeded(
                f"{precision} leaves {lost} the outputs, at least {LEAST_SQNR:.0f} dB are asked for",
                hint="bf16, which has float32's range" if precision == FP16 else "fp32",
            )
        data = found.graph.serialized
        (folder / CLEANED).write_bytes(data)
        more = ", …" if len(found.wide) > _SHOWN else ""
        stay = f": {', '.join(found.wide[:_SHOWN])}{more}" if found.wide else ""
        inside = f"{found.nodes - len(found.wide)} of {found.nodes} nodes in {precision}"
        looked = f"{len(given)} batches of {narrowing.data}" if given else "random inputs"
        compared = "" if wide is clean else f" ({before:.1f} dB with float32)"
        detail = f"{inside}, output SQNR {sqnr:.1f} dB{compared} on {looked}" + (f"; in float32{stay}" if stay else "")
        value = {"graph": digest_bytes(data), "wide": list(found.wide), "sqnr": min(sqnr, 1000.0)}
        return value, {CLEANED: folder / CLEANED}, detail

    if stream is not None and stream.count is None:
        cache.forget("narrow", key)
    return Stage("narrow", key, compute, cache, reporter)


def _whole_batches(graph: OnnxGraph, stream: DataStream) -> list[Feeds]:
    """Return samples, in batches of the size that a graph takes.

    Raises:
        DataRefused: Damaged, or too few for one.
    """
    from cnncc.calibration.observe import batch_of

    size = batch_of(graph)
    found: list[Feeds] = [feeds for feeds, rows in batches(stream.samples(), size) if len(rows) == size]
    if not found:
        raise DataRefused(
            f"{stream.source} has fewer samples than the model's batch of {size}",
            hint="give more samples, or export the model with a batch of 1 or N",
        )
    return found
