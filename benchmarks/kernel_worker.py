"""Times an engine's kernels one by one, and the whole network: `benchmarks/kernels.py` starts it.

On stdin it takes a JSON object (``bundle``, ``threads``, ``rounds``, ``kernels``: name → the dtype and shape of each
parameter), on stdout it writes one: ``kernels`` (name → seconds per call, again and again with the same tensors),
``inside`` (name → seconds of all its calls within an inference) and ``network`` (seconds per inference).
The code that is timed is that of the bundle's own engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.bundle import Bundle, read_bundle
from cnncc_runtime.weights import MappedWeights

SAMPLE_S = 2e-3
"""Least length of a sample: calls are repeated until it is reached, so that the clock's resolution does not show."""

SAMPLES = 5
"""Samples of a turn, whose median counts; of the rounds, the fastest counts."""


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong into the answer
    import tvm

    import cnncc_runtime
    from cnncc.targets.llvm.loading import load_library
    from cnncc_runtime.engine_threads import Pool

    bundle = read_bundle(Path(request["bundle"]))
    with tempfile.TemporaryDirectory() as folder, cnncc_runtime.open(bundle, threads=request["threads"]) as session:
        copy = shutil.copy(bundle.file(bundle.manifest.engine.file), folder)  # a library apart from the session's
        loaded = load_library(Path(copy))
        [library] = loaded.module.imports
        pool = Pool(loaded.launcher, request["threads"])
        kernels = {
            name: (library, name, [tvm.runtime.tensor(_values(*parameter)) for parameter in parameters])
            for name, parameters in request["kernels"].items()
        }
        generator = np.random.default_rng(0)
        feeds = {
            spec.name: generator.standard_normal(spec.shape).astype(spec.dtype)  # type: ignore[arg-type]
            for spec in session.inputs
        }
        best, inside = dict.fromkeys(kernels, float("inf")), dict.fromkeys(kernels, float("inf"))
        network = float("inf")
        calls = _Calls(loaded.module, bundle, feeds)
        for _ in range(request["rounds"]):
            network = min(network, _network(lambda: session.run(feeds)))
            with pool:
                inside = {name: min(inside[name], seconds) for name, seconds in calls.measure().items() if name in best}
            for name, kernel in kernels.items():
                with pool:
                    best[name] = min(best[name], _kernel(*kernel))
    json.dump({"kernels": best, "inside": inside, "network": network}, sink)
    sink.flush()
    os._exit(0)  # TVM's libraries need not be unloaded one by one


def _values(dtype: str, shape: list[int]) -> NDArray[Any]:
    """Return what a parameter is called with: small numbers, or zeros where they may be indices."""
    if dtype.startswith("float"):
        return np.random.default_rng(len(shape)).uniform(0.1, 1.0, shape).astype(dtype)
    return np.zeros(shape, dtype)


def _kernel(library: Any, name: str, arguments: list[Any]) -> float:
    import tvm

    def sample(number: int, repeat: int) -> list[float]:
        return list(library.time_evaluator(name, tvm.cpu(), number=number, repeat=repeat)(*arguments).results)

    once = min(sample(1, 3))
    return statistics.median(sample(max(1, round(SAMPLE_S / max(once, 1e-7))), SAMPLES))


class _Calls:
    """Runs a network with a clock around each kernel call: weights and tensors are where the network finds them."""

    def __init__(self, module: Any, bundle: Bundle, feeds: Mapping[str, NDArray[Any]]) -> None:
        import tvm
        import tvm_ffi

        engine = bundle.manifest.engine
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(bundle.open(engine.weights.file)) if engine.weights else None
            weights = MappedWeights(file, engine.weights) if file and engine.weights else ()
        batch, entry = next(iter(engine.entries.items()))
        taken = engine.weights.entries.get(batch, ()) if engine.weights else ()
        self._arguments = [tvm.runtime.tensor(feeds[spec.name]) for spec in bundle.manifest.inputs]
        self._arguments += [tvm_ffi.from_dlpack(weights[position]) for position in taken]
        machine = module["vm_load_executable"]()
        machine["vm_initialization"](1, 0, 2)  # on the CPU, with pooled memory
        machine["set_instrument"](tvm_ffi.convert(self._note))
        self._run = machine[entry]
        self._started = 0.0
        self._spent: Counter[str] = Counter()

    def measure(self) -> dict[str, float]:
        """Return kernel → seconds per inference: the median of some."""
        found: dict[str, list[float]] = {}
        for _ in range(2 * SAMPLES):
            self._spent.clear()
            self._run(*self._arguments)
            for name, seconds in self._spent.items():
                found.setdefault(name, []).append(seconds)
        return {name: statistics.median(times) for name, times in found.items()}

    def _note(self, _function: Any, name: str, before: bool, *_rest: Any) -> int:
        if before:
            self._started = time.perf_counter()
        else:
            self._spent[name] += time.perf_counter() - self._started
        return 0  # go on


def _network(run: Any) -> float:
    run()
    times: list[float] = []
    while len(times) < SAMPLES or sum(times) < SAMPLES * SAMPLE_S:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
