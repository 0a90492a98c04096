"""Times an engine's kernels one by one, and the whole network: `benchmarks/kernels.py` starts it.

On stdin it takes a JSON object (``bundle``, ``threads``, ``rounds``, ``kernels``: name → the dtype and shape of each
parameter), on stdout it writes one: ``kernels`` (name → seconds per call, again and again with the same tensors),
``inside`` (name → seconds of all its calls within an inference) and ``network`` (seconds per inference).
The code that is timed is that of the bundle's own engine.
"""

from __future__ import annotations

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

from cnncc_runtime.bundle import read_bundle

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
        for _ in range(request["rounds"]):
            network = min(network, _network(lambda: session.run(feeds)))
            found = _inside(session, feeds)
            inside = {name: min(inside[name], found[name]) for name in best}
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


def _inside(session: Any, feeds: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return kernel → seconds of all its calls in an inference, whose tensors are where the network finds them."""
    spent: Counter[str] = Counter()
    for name, seconds in session.profile(feeds, 2 * SAMPLES):
        spent[name] += seconds
    return dict(spent)


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
