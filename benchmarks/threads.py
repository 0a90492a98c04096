"""Prints what it costs to share loops among threads: ``python benchmarks/threads.py [MODEL]``.

An engine brings its own threads. Measured are the time of a parallel loop that does nothing, on 1 to N threads, and the
latency of a network, alone and in turn with an ONNX Runtime session of as many threads in the same process, whose idle
threads keep a core busy for a while after each of its runs. TVM's own thread pool runs the same code for comparison.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.models import Network, find  # noqa: E402
from cnncc.compiler import compile  # noqa: E402
from cnncc.compiler.pipeline import CompileRequest  # noqa: E402
from cnncc.targets.devices import named, resolve_profile  # noqa: E402
from cnncc_runtime.bundle import REFERENCE, read_bundle  # noqa: E402
from cnncc_runtime.cpu import usable_cores  # noqa: E402
from cnncc_runtime.errors import CnnccError, RunFailed  # noqa: E402

OWN, TVM = "own", "tvm"

ITERATIONS = 8
"""Of the loop that does nothing."""

LOOPS = 2000
"""Such loops in a call: the interpreter does not show."""

SAMPLES = 9
"""Calls, whose median counts."""

_SHARE_ALL_CORES = -3  # tvm::runtime::threading::ThreadGroup::kSpecifyThreadShareAllCore


@click.command()
@click.argument("model", default="resnet18")
@click.option("--threads", type=click.IntRange(1), default=usable_cores(), help="At most.  [default: all cores]")
@click.option("--rounds", type=click.IntRange(2), default=60, show_default=True, help="Inferences of each.")
@click.option("--worker", help="For the program's own use: what to measure, as JSON.", hidden=True)
def main(model: str, threads: int, rounds: int, worker: str | None) -> None:
    """Print the cost of a loop, and the latency of MODEL: a built-in network, or what `cnncc compile` takes."""
    if worker is not None:
        print(json.dumps(measure_here(**json.loads(worker))))
        return
    try:
        report(find((model,))[0], threads, rounds)
    except CnnccError as exc:
        raise click.ClickException(str(exc)) from exc


def report(network: Network, threads: int, rounds: int) -> None:
    """Measure in processes of their own, and print.

    Raises:
        CnnccError: The network could not be compiled, or a process failed.
    """
    with tempfile.TemporaryDirectory(prefix="cnncc-threads-") as folder:
        bundle = Path(folder) / "model.cnncc"
        compile(CompileRequest(network.request, resolve_profile("host"), bundle))
        found = {pool: _measure(pool, bundle, threads, rounds) for pool in (OWN, TVM)}
    print(f"{'a loop of nothing':40}{'ours':>10}{'TVM’s':>10}")
    for number in range(threads):
        label = f"  {number + 1} thread{'s' * (number > 0)}, µs"
        print(f"{label:40}{found[OWN]['loops'][number]:>10.2f}{found[TVM]['loops'][number]:>10.2f}")
    print(f"{network.name}, {threads} threads, median and worst of {rounds}")
    for label, name in (("alone", "alone"), ("in turn with ONNX Runtime", "beside")):
        for statistic, of in (("median", statistics.median), ("worst", max)):
            shown = "".join(f"{of(found[pool][name]) * 1e3:>10.2f}" for pool in (OWN, TVM))
            print(f"  {f'{label}, {statistic}, ms':38}{shown}")


def _measure(pool: str, bundle: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    request = json.dumps({"pool": pool, "bundle": str(bundle), "threads": threads, "rounds": rounds})
    # read when TVM's runtime is loaded: its pool would pin the calling thread, and spin for 0.1 s after each loop
    variables = {"TVM_BIND_THREADS": "0", "TVM_THREAD_POOL_SPIN_COUNT": "2000"}
    command = [sys.executable, __file__, "--worker", request]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    if result.returncode:
        said = result.stderr.splitlines()[-3:]
        raise RunFailed(f"the threads cannot be timed: exit code {result.returncode}", where=said)
    answer: dict[str, list[float]] = json.loads(result.stdout.splitlines()[-1])
    return answer


def measure_here(pool: str, bundle: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Measure one pool in this process.

    Returns:
        ``loops`` (µs for each number of threads), ``alone`` and ``beside`` (seconds of each inference).
    """
    loops = [_apart(lambda width=width: _loop(pool, width)) for width in range(1, threads + 1)]
    alone, beside = _network(pool, Path(bundle), threads, rounds)
    return {"loops": loops, "alone": alone, "beside": beside}


def _apart(call: Callable[[], float]) -> float:
    """Call on a thread of its own: TVM has a pool for each, of a fixed width."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def _set_tvm_width(width: int) -> None:
    import tvm_ffi

    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(_SHARE_ALL_CORES, width, [str(core) for core in range(width)])


def _loop(pool: str, width: int) -> float:
    """Return the time of a loop that does nothing, in µs."""
    import tvm

    from cnncc.targets.llvm.codegen import write_kernels
    from cnncc.targets.llvm.link import find_linker, link
    from cnncc.targets.llvm.loading import load_library
    from cnncc.targets.llvm.machine import target_options
    from cnncc_runtime.cpu import host_machine
    from cnncc_runtime.engine_threads import Pool

    target = tvm.target.Target(target_options(named(resolve_profile("host"))))
    with tempfile.TemporaryDirectory(prefix="cnncc-threads-") as folder:
        _kernels, objects = write_kernels(_loops(), target, Path(folder))
        library = objects[0].with_name("loops.so")
        link(find_linker(host_machine(), host_machine()), host_machine(), objects, library)
        values = tvm.runtime.tensor(np.zeros(ITERATIONS * 16, "float32"))
        if pool == TVM:
            _set_tvm_width(width)
            return _microseconds(lambda: tvm.runtime.load_module(str(library))["loops"], values)
        loaded = load_library(library)
        with Pool(loaded.launcher, width):
            return _microseconds(lambda: loaded.module["loops"], values)


def _microseconds(found: Callable[[], Any], values: Any) -> float:
    function = found()
    times = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        function(values)
        times.append((time.perf_counter() - start) / LOOPS * 1e6)
    return statistics.median(times)


def _loops() -> Any:
    """Return a kernel of loops, one after the other, whose iterations write a value each, to lines of their own."""
    import tvm
    from tvm import tirx
    from tvm.tirx.stmt import ForKind

    values = tirx.decl_buffer([ITERATIONS * 16], "float32", "values")
    round_, item = tirx.Var("round", "int32"), tirx.Var("item", "int32")
    zero = tirx.IntImm("int32", 0)
    store = tirx.BufferStore(values, tirx.Cast("float32", round_), [item * 16])
    loop = tirx.For(item, zero, tirx.IntImm("int32", ITERATIONS), ForKind.PARALLEL, store)
    loops = tirx.For(round_, zero, tirx.IntImm("int32", LOOPS), ForKind.SERIAL, loop)
    return tvm.IRModule({"loops": tirx.PrimFunc([values], loops).with_attr("global_symbol", "loops")})


def _network(pool: str, path: Path, threads: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of inferences, alone and in turn with ONNX Runtime."""
    import onnxruntime

    import cnncc_runtime

    bundle = read_bundle(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    generator = np.random.default_rng(0)
    with cnncc_runtime.open(bundle, threads=threads) as session:
        if pool == TVM:
            _hand_back(bundle.file(bundle.manifest.engine.file))
            _set_tvm_width(threads)
        feeds = {
            spec.name: generator.standard_normal(spec.shape).astype(spec.dtype)  # type: ignore[arg-type]
            for spec in session.inputs
        }
        alone = _times(rounds, lambda: session.run(feeds))
        other = onnxruntime.InferenceSession(bundle.file(REFERENCE), options, providers=["CPUExecutionProvider"])
        beside = _times(rounds, lambda: session.run(feeds), lambda: other.run(None, feeds))
    return alone, beside


def _hand_back(engine: Path) -> None:
    """Let a loaded engine launch its loops on TVM's pool, as if it had no threads of its own."""
    launch = ctypes.CDLL("libtvm_runtime.so").TVMBackendParallelLaunch
    variable = ctypes.c_void_p.in_dll(ctypes.CDLL(str(engine)), "__TVMBackendParallelLaunch")
    variable.value = ctypes.cast(launch, ctypes.c_void_p).value


def _times(rounds: int, run: Callable[[], object], *others: Callable[[], object]) -> Sequence[float]:
    """Time a call again and again, others in between."""
    times = []
    for number in range(rounds + 3):
        for other in others:
            other()
        start = time.perf_counter()
        run()
        if number >= 3:
            times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
