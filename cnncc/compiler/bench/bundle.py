"""Benchmarks a bundle: finds the model that its peers run, and inputs for all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc.compiler.audit import executed
from cnncc.compiler.bench.conversion import convert_subjects
from cnncc.compiler.bench.referee import Referee
from cnncc.compiler.bench.report import BenchmarkReport
from cnncc.compiler.bench.runner import AGREEMENT_LIMIT, run_benchmark
from cnncc.compiler.bench.subjects import FLOAT_QDQ, FP32, INT8, KINDS, OURS, Subject, check_names, make_subjects
from cnncc.compiler.cache import Cache
from cnncc.compiler.reporting import Reporter
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.bundle import REFERENCE, Bundle, read_bundle
from cnncc_runtime.errors import UsageError
from cnncc_runtime.specs import Feeds


@dataclass(frozen=True)
class Field:
    """A bundle and its peers, ready to be measured as often as one likes.

    Attributes:
        subjects: The bundle first; every path is what its adapter opens.
        feeds: Inputs for all.
        referee: Who left already, and whether others may.
    """

    subjects: tuple[Subject, ...]
    feeds: Feeds
    referee: Referee

    def measure(
        self,
        *,
        threads: int,
        rounds: int,
        min_time: float,
        agreement: float = AGREEMENT_LIMIT,
        reporter: Reporter,
    ) -> BenchmarkReport:
        """Measure everyone; arguments and errors are those of `cnncc.compiler.bench.runner.run_benchmark`."""
        reporter.stage("bench")
        return run_benchmark(
            self.subjects,
            feeds=self.feeds,
            threads=threads,
            rounds=rounds,
            min_time=min_time,
            progress=reporter.progress,
            agreement=agreement,
            referee=self.referee.copy(),
        )


@contextlib.contextmanager
def open_field(
    path: Path, against: Sequence[str], *, batch: int, cache: Cache, lenient: bool = False
) -> Iterator[Field]:
    """Find or make the models that a bundle's peers open; they are gone when the context ends.

    Args:
        path: The bundle.
        against: Peers' names.
        batch: Batch size, where several were built; 0 takes the smallest.
        cache: Where the exported program lies that PyTorch runs.
        lenient: Whether to go on without peers that are not installed, cannot convert the model or fail; the report
            names them with their reasons.

    Raises:
        BundleRefused: The bundle is damaged.
        UsageError: A peer is unknown, or its form of the model is not at hand; says how to get it.
        CnnccError: As `cnncc.compiler.bench.conversion.convert_subjects`.
    """
    check_names(against)
    bundle = read_bundle(path)
    referee = Referee(lenient=lenient)
    subjects = [Subject(OURS, OURS, path, _executed(bundle))]
    for name in against:
        with referee.watch(name):
            subjects += _peer(name, bundle, cache)
    feeds = random_feeds(bundle.manifest.inputs, seed=0, batch=_batch(bundle, batch))
    with tempfile.TemporaryDirectory(prefix="cnncc-peers-") as folder:
        yield Field(convert_subjects(subjects, Path(folder), referee), feeds, referee)


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
        CnnccError: As `open_field` and `cnncc.compiler.bench.runner.run_benchmark`.
    """
    with open_field(path, against, batch=batch, cache=cache) as field:
        return field.measure(threads=threads, rounds=rounds, min_time=min_time, reporter=reporter)


def _peer(name: str, bundle: Bundle, cache: Cache) -> tuple[Subject, ...]:
    kind = KINDS[name]
    onnx = bundle.file(REFERENCE) if bundle.has(REFERENCE) else None
    program = None
    if kind.form == "program":
        with contextlib.suppress(*([UsageError] if kind.fallback else [])):
            program = _program(bundle, cache)
    return make_subjects(None, [name], onnx=onnx, program=program, quantized=_quantized(bundle))


def _quantized(bundle: Bundle) -> bool:
    """Whether a bundle was built from a model with Q/DQ."""
    return any("QuantizeLinear" in layer.ops for layer in bundle.manifest.layers)


def _executed(bundle: Bundle) -> str:
    """Return what a bundle multiplies, by its list of kernels."""
    if not _quantized(bundle):
        return FP32
    return INT8 if INT8 in executed(bundle.manifest.layers).values() else FLOAT_QDQ


def _batch(bundle: Bundle, batch: int) -> int:
    sizes = bundle.manifest.batches
    if batch and batch not in sizes:
        raise UsageError(
            f"the bundle was not built for batch {batch}", hint=f"built: {', '.join(map(str, sizes)) or 'one size'}"
        )
    return batch or min(sizes, default=1)


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
