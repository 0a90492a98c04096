"""Benchmarks a bundle: finds the model that its peers run, and inputs for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cnncc.compiler.bench.report import BenchmarkReport
from cnncc.compiler.bench.runner import run_benchmark
from cnncc.compiler.bench.subjects import find_kind, make_subjects
from cnncc.compiler.cache import Cache
from cnncc.compiler.reporting import Reporter
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.bundle import REFERENCE, Bundle, read_bundle
from cnncc_runtime.errors import UsageError


def bench_bundle(
    path: Path,
    against: Sequence[str],
    *,
    threads: int,
    rounds: int,
    min_time: float,
    batch: int,
    cache: Cache,
    reporter: Reporter,
) -> BenchmarkReport:
    """Measure a bundle beside its peers on seeded random inputs.

    Args:
        path: The bundle.
        against: Peers' names.
        threads: Threads that everyone computes with.
        rounds: Interleaved rounds.
        min_time: Seconds that each is measured for.
        batch: Batch size, where several were built; 0 takes the smallest.
        cache: Where the exported program lies that PyTorch runs.
        reporter: Told of progress.

    Raises:
        BundleRefused: The bundle is damaged.
        UsageError: A peer is unknown, or its form of the model is not at hand; says how to get it.
        CnnccError: As `cnncc.compiler.bench.runner.run_benchmark`.
    """
    bundle = read_bundle(path)
    onnx = bundle.file(REFERENCE) if bundle.has(REFERENCE) else None
    wants_program = any(find_kind(name).form == "program" for name in against)
    subjects = make_subjects(path, against, onnx=onnx, program=_program(bundle, cache) if wants_program else None)
    sizes = bundle.manifest.batches
    if batch and batch not in sizes:
        raise UsageError(
            f"the bundle was not built for batch {batch}", hint=f"built: {', '.join(map(str, sizes)) or 'one size'}"
        )
    feeds = random_feeds(bundle.manifest.inputs, seed=0, batch=batch or min(sizes, default=1))
    reporter.stage("bench")
    return run_benchmark(
        subjects, feeds=feeds, threads=threads, rounds=rounds, min_time=min_time, progress=reporter.progress
    )


def _program(bundle: Bundle, cache: Cache) -> Path:
    digest = bundle.manifest.model.get("program")
    if digest is None:
        raise UsageError(
            "PyTorch cannot be measured: the model was compiled from ONNX", hint="leave torch out of --against"
        )
    path = cache.blob(digest)
    if path is None:
        raise UsageError(
            "PyTorch cannot be measured: the exported program is not in this machine's cache",
            hint=f"compile {bundle.manifest.model['source']} here again, or give the --cache-dir it was compiled with",
        )
    return path
