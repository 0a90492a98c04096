"""Measures how many float32 operations per second this machine's vector units give: ``python benchmarks/peak.py``.

The kernel is a loop of fused multiply-adds on accumulators that stay in registers: enough of them that each is ready
when its turn comes again (latency × units), and few enough that none is spilled. The figure is that of the fastest of
many short runs, so that a busy machine is measured in its quiet moments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cnncc_runtime.errors import RunFailed

ACCUMULATORS = 12
"""Vectors that are added to in turn: two units of four cycles' latency need eight, and twelve with the operand fit
into the sixteen registers of AVX2."""

STEPS = 100_000
"""Of the loop: a call takes about a third of a millisecond at 4 GHz, far more than it takes to wake a thread."""

SAMPLING_S = 2.0
"""Seconds during which calls are timed; the fastest counts."""


@functools.cache
def measure_peak(threads: int) -> float:
    """Return the peak in operations per second (a fused multiply-add is two), measured once in a process of its own.

    Args:
        threads: Threads that compute at the same time.

    Raises:
        RunFailed: It cannot be measured.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(threads), "--json"]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        said = result.stderr.decode(errors="replace").splitlines()[-3:]
        raise RunFailed(f"this machine's peak cannot be measured: exit code {result.returncode}", where=said)
    return float(json.loads(result.stdout)["operations_per_second"])


def build_kernel(threads: int) -> tuple[Any, int]:
    """Return the kernel, of one float32 buffer, and that buffer's elements: a factor, then a sum per accumulator."""
    import tvm

    from cnncc.targets.devices import named, resolve_profile
    from cnncc.targets.llvm.machine import machine_of, target_options

    profile = named(resolve_profile("host"))
    lanes = machine_of(profile).lanes
    function = _function(threads, lanes).with_attr("global_symbol", "peak")
    return tvm.compile(tvm.IRModule({"peak": function}), tvm.target.Target(target_options(profile))), _size(
        threads, lanes
    )


def _size(threads: int, lanes: int) -> int:
    return (1 + threads * ACCUMULATORS) * lanes


def _function(threads: int, lanes: int) -> Any:
    from tvm import tirx
    from tvm.tirx.stmt import ForKind

    def loop(extent: int, body: Any, kind: Any = ForKind.SERIAL) -> Any:
        var = tirx.Var("i", "int32")
        return tirx.For(var, tirx.IntImm("int32", 0), tirx.IntImm("int32", extent), kind, body(var))

    def vector(target: Any, start: Any, value: Any) -> Any:
        return loop(lanes, lambda lane: tirx.BufferStore(target, value(lane), [start + lane]), ForKind.VECTORIZED)

    values = tirx.decl_buffer([_size(threads, lanes)], "float32", "values")
    # a buffer for each vector: LLVM keeps in registers what is small and of its own
    factor, *sums = (tirx.decl_buffer([lanes], "float32", f"sum{n}") for n in range(1 + ACCUMULATORS))

    def work(task: Any) -> Any:
        first = (1 + task * ACCUMULATORS) * lanes
        load = [vector(factor, 0, lambda lane: values[lane])]
        step, save = [], []
        for n, total in enumerate(sums):
            place = first + n * lanes
            load.append(vector(total, 0, lambda lane, place=place: values[place + lane]))
            # one operand beside the accumulators, and nothing that LLVM could fold
            step.append(vector(total, 0, lambda lane, total=total: total[lane] * factor[lane] + total[lane]))
            save.append(vector(values, place, lambda lane, total=total: total[lane]))
        allocate = [tirx.AllocBuffer(buffer) for buffer in (factor, *sums)]
        return tirx.SeqStmt([*allocate, *load, loop(STEPS, lambda _step: tirx.SeqStmt(step)), *save])

    return tirx.PrimFunc([values], loop(threads, work, ForKind.PARALLEL))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--object", type=Path, help="write the kernel's object file, to look at its assembly")
    options = parser.parse_args()
    # TVM reads them when it is imported; by default it has half as many threads as there are processors, pinned
    os.environ |= {"TVM_NUM_THREADS": str(options.threads), "TVM_BIND_THREADS": "0"}
    kernel, size = build_kernel(options.threads)
    if options.object:
        kernel.mod.write_to_file(str(options.object))
    import tvm

    values = tvm.runtime.tensor(np.zeros(size, "float32"))
    run = kernel["peak"]
    best = float("inf")
    end = time.perf_counter() + SAMPLING_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        run(values)
        best = min(best, time.perf_counter() - start)
    lanes = size // (1 + options.threads * ACCUMULATORS)
    rate = 2.0 * options.threads * ACCUMULATORS * lanes * STEPS / best
    if options.json:
        print(json.dumps({"threads": options.threads, "lanes": lanes, "operations_per_second": rate}))
    else:
        print(f"{rate / 1e9:.0f} GFLOP/s on {options.threads} threads, vectors of {lanes}")


if __name__ == "__main__":
    main()
