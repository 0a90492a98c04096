"""Benchmarks a bundle: finds the model that its peers run, and inputs for all."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnncc.compiler.audit import executed
from cnncc.compiler.bench.conversion import convert_subjects
from cnncc.compiler.bench.gpu import host_gpu
from cnncc.compiler.bench.referee import Referee
from cnncc.compiler.bench.report import BenchmarkReport
from cnncc.compiler.bench.runner import AGREEMENT_LIMIT, run_benchmark
from cnncc.compiler.bench.subjects import (
    FLOAT_QDQ,
    FP32,
    INT8,
    KINDS,
    OURS,
    Subject,
    check_device,
    check_names,
    make_subjects,
)
from cnncc.compiler.cache import Cache
from cnncc.compiler.half import BF16, TYPES
from cnncc.compiler.reporting import Reporter
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.bundle import REFERENCE, Bundle, read_bundle
from cnncc_runtime.errors import UsageError
from cnncc_runtime.session import obstacle
from cnncc_runtime.specs import Feeds

BF16_AGREEMENT = 8 * AGREEMENT_LIMIT
"""Largest relative L2 distance between outputs in bfloat16, which has three bits fewer than float16."""

USUAL_PEERS = {False: ("ort",), True: ("ort-cuda",)}
"""Whether the engine is for GPUs → peers that it is measured against unless others are asked for."""


@dataclass(frozen=True)
class Field:
    """A bundle and its peers, ready to be measured as often as one likes.

    Attributes:
        subjects: The bundle first; every path is what its adapter opens.
        feeds: Inputs for all.
        referee: Who left already, and whether others may.
        gpu: The GPU that everyone computes on, in CUDA's order; None for a CPU.
        agreement: Largest relative L2 distance between outputs.
    """

    subjects: tuple[Subject, ...]
    feeds: Feeds
    referee: Referee
    gpu: int | None = None
    agreement: float = AGREEMENT_LIMIT

    def measure(
        self,
        *,
        threads: int,
        rounds: int,
        min_time: float,
        agreement: float | None = None,
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
            agreement=self.agreement if agreement is None else agreement,
            referee=self.referee.copy(),
            gpu=self.gpu,
        )


@contextlib.contextmanager
def open_field(
    path: Path,
    against: Sequence[str] | None,
    *,
    batch: int,
    cache: Cache,
    also: Sequence[str] = (),
    cuda_graph: bool = False,
    lenient: bool = False,
) -> Iterator[Field]:
    """Find or make the models that a bundle's peers open; they are gone when the context ends.

    Args:
        path: The bundle.
        against: Peers' names; None takes `USUAL_PEERS`.
        batch: Batch size, where several were built; 0 takes the smallest.
        cache: Where the exported program lies that PyTorch runs.
        also: Peers beside those, where they are not among them.
        cuda_graph: Whether the bundle's engine is launched as one CUDA graph.
        lenient: Whether to go on without peers that are not installed, cannot convert the model or fail; the report
            names them with their reasons.

    Raises:
        BundleRefused: The bundle is damaged.
        EnvironmentMissing: The engine cannot run here.
        UsageError: A peer is unknown, computes elsewhere than the engine, or its form of the model is not at hand; says
            how to get it.
        CnnccError: As `cnncc.compiler.bench.conversion.convert_subjects`.
    """
    check_names(against or ())
    check_names(also)
    bundle = read_bundle(path)
    manifest = bundle.manifest
    if problem := obstacle(manifest.target, manifest.engine):
        raise problem
    on_gpu = bool(manifest.target.gpu)
    gpu = host_gpu(manifest.target.gpu).index if on_gpu else None
    referee = Referee(lenient=lenient)
    if cuda_graph and not on_gpu:
        raise UsageError("--cuda-graph is for engines for GPUs", hint="leave it out")
    subjects = [Subject(OURS, OURS, path, executed_precision(bundle))]
    feeds = random_feeds(manifest.inputs, seed=0, batch=batch_size(bundle, batch))
    with tempfile.TemporaryDirectory(prefix="cnncc-peers-") as folder:
        for peer in dict.fromkeys((*(USUAL_PEERS[on_gpu] if against is None else against), *also)):
            with referee.watch(peer):
                check_device(peer, gpu=on_gpu)
                subjects += _peer(peer, bundle, cache)
        if gpu is not None:
            options = {"gpu": str(gpu), "precision": _half(bundle), "cuda_graph": "yes" if cuda_graph else ""}
            subjects = [replace(subject, options=options) for subject in subjects]
        limit = BF16_AGREEMENT if _half(bundle) == BF16 else AGREEMENT_LIMIT
        yield Field(convert_subjects(subjects, Path(folder), referee), feeds, referee, gpu, limit)


def bench_bundle(
    path: Path,
    against: Sequence[str] | None,
    *,
    threads: int,
    rounds: int,
    min_time: float,
    batch: int,
    cache: Cache,
    reporter: Reporter,
    also: Sequence[str] = (),
    cuda_graph: bool = False,
) -> BenchmarkReport:
    """Measure a bundle beside its peers on seeded random inputs.

    Args:
        path: The bundle.
        against: Peers' names; None takes `USUAL_PEERS`.
        threads: Threads that everyone computes with.
        rounds: Interleaved rounds.
        min_time: Seconds that each is measured for.
        batch: Batch size, where several were built; 0 takes the smallest.
        cache: Where the exported program lies that PyTorch runs.
        reporter: Told of progress.
        also: Peers beside those, where they are not among them.
        cuda_graph: Whether the bundle's engine is launched as one CUDA graph.

    Raises:
        CnnccError: As `open_field` and `cnncc.compiler.bench.runner.run_benchmark`.
    """
    with open_field(path, against, batch=batch, cache=cache, also=also, cuda_graph=cuda_graph) as field:
        return field.measure(threads=threads, rounds=rounds, min_time=min_time, reporter=reporter)


def _peer(name: str, bundle: Bundle, cache: Cache) -> tuple[Subject, ...]:
    kind, half = KINDS[name], _half(bundle)
    onnx = bundle.file(REFERENCE) if bundle.has(REFERENCE) else None
    program = None
    if kind.form == "program":
        with contextlib.suppress(*([UsageError] if kind.fallback else [])):
            program = _program(bundle, cache)
    return make_subjects(None, [name], onnx=onnx, program=program, quantized=_quantized(bundle), half=half)


def _quantized(bundle: Bundle) -> bool:
    """Whether a bundle was built from a model with Q/DQ; engines for GPUs may not list what was fused or is unknown."""
    layers = bundle.manifest.layers
    return bundle.manifest.precision == INT8 or any("QuantizeLinear" in layer.ops for layer in layers)


def _half(bundle: Bundle) -> str:
    """Return the half precision that a bundle is in; empty for any other."""
    return bundle.manifest.precision if bundle.manifest.precision in TYPES else ""


def executed_precision(bundle: Bundle) -> str:
    """Return what a bundle multiplies, by its list of kernels; half precision was audited when it was built."""
    if not _quantized(bundle):
        return _half(bundle) or FP32
    return INT8 if INT8 in executed(bundle.manifest.layers).values() else FLOAT_QDQ


def batch_size(bundle: Bundle, batch: int) -> int:
    """Return the batch size to measure with; 0 asks for the smallest.

    Raises:
        UsageError: It was not built.
    """
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
