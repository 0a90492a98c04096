"""Measures how many operations per second this machine's vector units give: ``python benchmarks/peak.py``.

The kernel is a loop of fused multiply-adds of float32, or of what sums products of int8 here (`schedule.products`), on
accumulators that stay in registers: enough of them that each is ready when its turn comes again (latency × units), and
few enough that none is spilled. The figure is that of the fastest of many short runs, so that a busy machine is
measured in its quiet moments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cnncc.targets.base import Profile

from cnncc_runtime.errors import RunFailed

FP32, INT8 = "fp32", "int8"
UNITS = {FP32: "GFLOP/s", INT8: "GOP/s"}
"""Of 10⁹ operations per second; a product and its addition are two, of int8 too."""

ACCUMULATORS = 12
"""Vectors that are added to in turn: two units of four cycles' latency need eight, and twelve with the operand fit
into the sixteen registers of AVX2. ``vpmaddwd`` and the addition after it take six cycles, which twelve just hide."""

STEPS = 100_000
"""Of the loop: a call takes about a third of a millisecond at 4 GHz, far more than it takes to wake a thread."""

SAMPLING_S = 2.0
"""Seconds during which calls are timed; the fastest counts."""


@functools.cache
def measure_peak(threads: int, precision: str = FP32) -> float:
    """Return the peak in operations per second (a multiply-add is two), measured once in a process of its own.

    Args:
        threads: Threads that compute at the same time.
        precision: ``fp32``, or ``int8`` summed in int32.

    Raises:
        RunFailed: It cannot be measured.
    """
    options = ["--threads", str(threads), "--precision", precision, "--json"]
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        said = result.stderr.decode(errors="replace").splitlines()[-3:]
        raise RunFailed(f"this machine's peak cannot be measured: exit code {result.returncode}", where=said)
    return float(json.loads(result.stdout)["operations_per_second"])


@dataclass(frozen=True)
class Kernel:
    """What is timed.

    Attributes:
        function: Of one buffer; called ``peak`` in its module.
        dtype: Of the buffer's elements, 32 bits each: a factor, then a sum per accumulator.
        lanes: Elements of a vector.
        products: Of an element.
    """

    function: Any
    dtype: str
    lanes: int
    products: int


def build_kernel(threads: int, precision: str, profile: Profile) -> Kernel:
    """Return the kernel for a machine."""
    import tvm

    from cnncc.targets.llvm.machine import machine_of, target_options
    from cnncc.targets.llvm.schedule.products import dots_for, dots_of

    machine = machine_of(profile)
    dots = dots_for(machine, dots_of(machine, positive=True).steps)[-1] if precision == INT8 else None
    dtype, products = (dots.dtype, dots.channels) if dots else ("float32", 1)
    function = _function(threads, machine.lanes, dots).with_attr("global_symbol", "peak")
    built = tvm.compile(tvm.IRModule({"peak": function}), tvm.target.Target(target_options(profile)))
    return Kernel(built, dtype, machine.lanes, products)


def _size(threads: int, lanes: int) -> int:
    return (1 + threads * ACCUMULATORS) * lanes


def _function(threads: int, lanes: int, dots: Any) -> Any:
    """Return the kernel's function; ``dots`` is None for float32."""
    from tvm import tirx
    from tvm.tirx.stmt import ForKind

    dtype = dots.dtype if dots else "float32"

    def loop(extent: int, body: Any, kind: Any = ForKind.SERIAL) -> Any:
        var = tirx.Var("i", "int32")
        return tirx.For(var, tirx.IntImm("int32", 0), tirx.IntImm("int32", extent), kind, body(var))

    def vector(target: Any, start: Any, value: Any) -> Any:
        return loop(lanes, lambda lane: tirx.BufferStore(target, value(lane), [start + lane]), ForKind.VECTORIZED)

    values = tirx.decl_buffer([_size(threads, lanes)], dtype, "values")
    # a buffer for each vector: LLVM keeps in registers what is small and of its own
    factor, *sums = (tirx.decl_buffer([lanes], dtype, f"sum{n}") for n in range(1 + ACCUMULATORS))

    def add(total: Any) -> Any:
        """One operand beside the accumulators, and nothing that LLVM could fold or compute once."""
        if dots is None:
            return vector(total, 0, lambda lane: total[lane] * factor[lane] + total[lane])
        whole = tirx.Ramp(tirx.IntImm("int32", 0), tirx.IntImm("int32", 1), lanes)
        return tirx.BufferStore(total, dots.added(total[whole], lanes, total[whole], factor[whole]), [whole])

    def work(task: Any) -> Any:
        first = (1 + task * ACCUMULATORS) * lanes
        load = [vector(factor, 0, lambda lane: values[lane])]
        step, save = [], []
        for n, total in enumerate(sums):
            place = first + n * lanes
            load.append(vector(total, 0, lambda lane, place=place: values[place + lane]))
            step.append(add(total))
            save.append(vector(values, place, lambda lane, total=total: total[lane]))
        allocate = [tirx.AllocBuffer(buffer) for buffer in (factor, *sums)]
        return tirx.SeqStmt([*allocate, *load, loop(STEPS, lambda _step: tirx.SeqStmt(step)), *save])

    return tirx.PrimFunc([values], loop(threads, work, ForKind.PARALLEL))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=[FP32, INT8], default=FP32, help="of what is multiplied")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--object", type=Path, help="write the kernel's object file, to look at its assembly")
    options = parser.parse_args()
    # TVM reads them when it is imported; by default it has half as many threads as there are processors, pinned
    os.environ |= {"TVM_NUM_THREADS": str(options.threads), "TVM_BIND_THREADS": "0"}
    from cnncc.targets.devices import named, resolve_profile

    kernel = build_kernel(options.threads, options.precision, named(resolve_profile("host")))
    if options.object:
        kernel.function.mod.write_to_file(str(options.object))
    import tvm

    values = tvm.runtime.tensor(np.zeros(_size(options.threads, kernel.lanes), kernel.dtype))
    run = kernel.function["peak"]
    best = float("inf")
    end = time.perf_counter() + SAMPLING_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        run(values)
        best = min(best, time.perf_counter() - start)
    rate = 2.0 * options.threads * ACCUMULATORS * kernel.lanes * kernel.products * STEPS / best
    if options.json:
        found = {"threads": options.threads, "precision": options.precision, "lanes": kernel.lanes}
        print(json.dumps(found | {"operations_per_second": rate}))
    else:
        unit = UNITS[options.precision]
        print(f"{rate / 1e9:.0f} {unit} on {options.threads} threads, vectors of {kernel.lanes} × 32 bits")


if __name__ == "__main__":
    main()
