"""Says how long each parallel loop is, to the threads that will share it."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx

_REGION = "cnncc_region"
"""A function of pool.c."""


def announce_regions() -> Any:
    """Return a pass that hands the extent of every parallel loop to the engine's threads just before the loop.

    TVM's launch of a loop does not say how many iterations there are: its own pool divides every loop into as many
    parts as there are threads. Ours hands out iterations one by one, see pool.c.
    """

    def announced(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        told = tirx.Evaluate(tirx.call_extern("void", _REGION, tirx.Cast("int64", loop.extent)))
        return tirx.SeqStmt([told, loop])

    def transform(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, [(tirx.For, announced)], order="post"))

    return tirx.transform.prim_func_pass(transform, opt_level=0, name="cnncc.AnnounceRegions")
