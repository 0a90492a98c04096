"""The stage that makes a half-precision graph of the cleaned one, and says what rounding costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnncc.compiler.cache import Cache
from cnncc.compiler.graph_stages import CLEANED, specs_of
from cnncc.compiler.keys import tools
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import BudgetExceeded

LEAST_SQNR = 20.0
"""dB of the outputs below which a half-precision model is refused: what ``--precision auto`` asks of int8."""

_SAMPLES = 2
"""Seeded random inputs that magnitudes and rounding are looked at with."""

_SHOWN = 5


def narrow_stage(
    export: Stage, clean: Stage, precision: str, batches: tuple[int, ...], cache: Cache, reporter: Reporter
) -> Stage:
    """Return the stage whose graph takes the cleaned one's place, in half the bits.

    Args:
        export: Says what the model's inputs are.
        clean: Holds the cleaned graph.
        precision: ``fp16`` or ``bf16``.
        batches: The batch size of the inputs that rounding is looked at with; empty where shapes are static.
        cache: Where the result is kept.
        reporter: Told of it.

    Raises:
        BudgetExceeded: Rounding leaves too little of the outputs.
    """
    key = cache.key(
        "narrow", graph=clean.value["graph"], precision=precision, batches=batches, tools=tools("onnx", "onnxruntime")
    )

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        from cnncc.compiler.half import FP16, narrow, overflowing, rounding_sqnr
        from cnncc.compiler.verify import random_samples
        from cnncc.graph.half import emulated
        from cnncc.graph.reader import load_trusted

        graph = load_trusted(clean.file(CLEANED))
        feeds, _ = random_samples(specs_of(export, "inputs"), batches=batches, count=_SAMPLES)
        prone = overflowing(graph, feeds) if precision == FP16 else ()
        found = narrow(graph, precision, prone)
        sqnr = rounding_sqnr(graph, emulated(found.graph), feeds)
        if not sqnr >= LEAST_SQNR:
            lost = "nothing finite of" if sqnr == float("-inf") else f"{sqnr:.1f} dB for"
            raise BudgetExceeded(
                f"{precision} leaves {lost} the outputs, at least {LEAST_SQNR:.0f} dB are asked for",
                hint="--precision bf16 has float32's range" if precision == FP16 else "--precision fp32",
            )
        data = found.graph.serialized
        (folder / CLEANED).write_bytes(data)
        more = ", …" if len(found.wide) > _SHOWN else ""
        stay = f": {', '.join(found.wide[:_SHOWN])}{more}" if found.wide else ""
        detail = f"{found.nodes - len(found.wide)} of {found.nodes} nodes in {precision}, output SQNR {sqnr:.1f} dB"
        value = {"graph": digest_bytes(data), "wide": list(found.wide), "sqnr": min(sqnr, 1000.0)}
        return value, {CLEANED: folder / CLEANED}, detail + (f"; in float32{stay}" if stay else "")

    return Stage("narrow", key, compute, cache, reporter)
