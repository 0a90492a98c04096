"""Times a bundle's engine on a board: alone, by the board's own clock. Peers are not there to be measured beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnncc.compiler.bench.bundle import batch_size, executed_precision
from cnncc.compiler.bench.report import Latency, Noise
from cnncc.compiler.bench.runner import MAX_RUNS_PER_ROUND, NOISY_SPREAD, WARM_UP_S, batch_of, summarize_latency
from cnncc.compiler.bench.statistics import SETTLE_WINDOW, settled, spread
from cnncc.compiler.remote.address import BoardAddress
from cnncc.compiler.remote.board_process import BoardReport
from cnncc.compiler.remote.engine import RemoteEngine
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.bundle import read_bundle

SCHEMA = "cnncc.remote-benchmark/1"

NOTES = (
    "the time is the engine's alone, by the board's clock: inputs and outputs do not travel in it",
    "over RPC the engine's loops run on TVM's thread pool; cnncc-runtime gives it one of its own",
)
"""What a reader must know, whatever was measured."""


@dataclass(frozen=True)
class RemoteBenchmark:
    """An engine's time on a board.

    Attributes:
        schema: `SCHEMA`.
        board: What the board is, and how long it took to send it the engine.
        precision: What the engine multiplies, as `cnncc.compiler.bench.report.SubjectResult` has it.
        batch: Batch size.
        rounds: Rounds of measured runs.
        runs: Measured runs.
        warm_up_runs: Runs before them.
        settled: Whether the warm-up's latency settled before its time was up.
        engine: Seconds per run of the engine alone.
        throughput: Samples per second.
        first_run_s: Seconds of the first run, before which the weights travelled.
        size: Bytes of the engine file and its weights.
        noise: Whether to believe it.
        notes: `NOTES`.
    """

    schema: str
    board: BoardReport
    precision: str
    batch: int
    rounds: int
    runs: int
    warm_up_runs: int
    settled: bool
    engine: Latency
    throughput: float
    first_run_s: float
    size: int
    noise: Noise
    notes: tuple[str, ...]


def bench_remote(
    path: Path,
    board: BoardAddress,
    *,
    threads: int | None,
    rounds: int,
    min_time: float,
    batch: int,
    progress: Callable[[str, float], None],
) -> RemoteBenchmark:
    """Measure a bundle's engine on a board, on seeded random inputs.

    Args:
        path: The bundle.
        board: Where the board is.
        threads: Of TVM's pool on the board; None takes all that its server has.
        rounds: Rounds; each is one request, so that the connection's waits lie between runs, never in them.
        min_time: Seconds to measure for, over all rounds.
        batch: Batch size, where several were built; 0 takes the smallest.
        progress: Told how far the benchmark is.

    Raises:
        CnnccError: As `cnncc.compiler.remote.engine.RemoteEngine`.
        UsageError: The batch size was not built, or the board's server has fewer threads.
    """
    bundle = read_bundle(path)
    feeds = random_feeds(bundle.manifest.inputs, seed=0, batch=batch_size(bundle, batch))
    samples = batch_of(feeds)
    progress("sending the engine", 0.0)
    with RemoteEngine(path, board, threads=threads) as engine:
        started = time.perf_counter()
        engine.run(feeds)
        first = time.perf_counter() - started
        progress("warming up", 0.1)
        warm = _warm_up(engine)
        typical = max(float(np.median(warm[-SETTLE_WINDOW:])), 1e-9)
        # a round is one request, and must be answered within the board's time
        runs = max(1, min(MAX_RUNS_PER_ROUND, math.ceil(min_time / rounds / typical), int(board.timeout / 2 / typical)))
        times = []
        for done in range(1, rounds + 1):
            times.append(engine.time(runs))
            progress(f"round {done} of {rounds}", (3 + 7 * done / rounds) / 10)
    latency = summarize_latency(times)
    scatter = spread(times)
    reasons = (f"the medians of its rounds scatter by {scatter:.0%}",) if scatter > NOISY_SPREAD else ()
    return RemoteBenchmark(
        SCHEMA,
        engine.report,
        executed_precision(bundle),
        samples,
        rounds,
        runs * rounds,
        len(warm),
        settled(warm),
        latency,
        samples / latency.p50,
        first,
        bundle.manifest.engine_bytes,
        Noise(bool(reasons), reasons),
        NOTES,
    )


def _warm_up(engine: RemoteEngine) -> list[float]:
    warm: list[float] = []
    while not settled(warm) and sum(warm) < WARM_UP_S:
        left = WARM_UP_S - sum(warm)
        warm += engine.time(1 if not warm else max(1, min(SETTLE_WINDOW, int(left / max(warm[-1], 1e-9)))))
    return warm
