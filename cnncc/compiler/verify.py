"""Runs an engine and its references on the same samples and applies the rules of `cnncc.compiler.parity`.

Executors are opened one after another, never together: each holds its own copy of the weights, and float64 truth
holds them twice over. What is kept between them is outputs, which are small.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cnncc.compiler.parity import (
    BF16_RULES,
    FLOAT_RULES,
    FP16_RULES,
    QUANTIZED_RULES,
    Comparison,
    LayerParity,
    OutputParity,
    ParityReport,
    Rules,
    SubjectParity,
    Tolerance,
    compare,
    derive_tolerance,
    from_plain,
    judge_floor,
    judge_output,
    make_report,
)
from cnncc.graph.feeds import random_feeds
from cnncc.graph.half import emulated, half_types, is_half, with_float_outputs
from cnncc.graph.jitter import is_quantized, jittered
from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import read_onnx, with_shapes
from cnncc_runtime.bundle import GOLDEN, PARITY, REFERENCE, Bundle
from cnncc_runtime.errors import BundleRefused, DataRefused, ModelRefused
from cnncc_runtime.golden import Golden, GoldenLimit, Runs, golden_bytes, read_golden
from cnncc_runtime.specs import Feeds, Tensors, TensorSpec

Run = Callable[[Feeds], Tensors]
"""Computes outputs by name."""

GraphSource = OnnxGraph | Callable[[], OnnxGraph]
"""A graph, or a function that loads it when it is needed."""

Executor = Callable[[OnnxGraph], Run]
"""Opens a graph for running: an engine build, or a reference."""

DEFAULT_SAMPLES = 2
"""Random samples per model where the caller gives none: one could be lucky, two seldom are."""

_JITTERED = 8
"""Runs with jitter, over all samples, that the noise floor of a graph that rounds is the worst of, at least."""

_LAYER_CHUNK = 256 << 20
"""Bytes of intermediate tensors that one engine of `verify_layers` gives out."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What verifying an engine yields.

    Attributes:
        report: The verdict.
        golden: Content of the bundle's ``golden.npz``: the first sample and the truth of its outputs.
    """

    report: ParityReport
    golden: bytes


@dataclass(frozen=True, eq=False)
class _Samples:
    """The samples, and what the truth and float32 ONNX Runtime make of them; of a graph that rounds, with jitter too.

    ``rules`` are those by which tolerances are derived.
    """

    names: tuple[str, ...]
    feeds: tuple[Feeds, ...]
    truth: tuple[Tensors, ...]
    floor: tuple[Tensors, ...]
    jittered: tuple[tuple[Tensors, ...], ...]
    rules: Rules

    def tolerances(self) -> dict[str, Tolerance]:
        """Derive tolerances from ONNX Runtime's errors, jittered runs included."""
        runs = [self.compare(outputs) for outputs in (self.floor, *self.jittered)]
        return {
            name: derive_tolerance([each for run in runs for each in run[name]], rules=self.rules) for name in runs[0]
        }

    def compare_floor(self) -> dict[str, list[Comparison]]:
        return self.compare(self.floor)

    def compare(self, outputs: Sequence[Tensors]) -> dict[str, list[Comparison]]:
        """Compare outputs with the truth, by output name, one comparison per sample."""
        return {
            name: [
                compare(truth[name], found.get(name), self._deciding(index, name))
                for index, (truth, found) in enumerate(zip(self.truth, outputs, strict=True))
            ]
            for name in self.truth[0]
        }

    def _deciding(self, index: int, name: str) -> NDArray[Any]:
        """Return what says which elements of an output are compared: with jitter all integers, as some may differ."""
        floor = self.floor[index][name]
        return self.truth[index][name] if self.jittered and floor.dtype.kind in "biu" else floor


def random_samples(
    specs: Sequence[TensorSpec], *, batches: Sequence[int] = (), count: int = DEFAULT_SAMPLES, seed: int = 0
) -> tuple[list[Feeds], list[str]]:
    """Make seeded inputs (see `cnncc.graph.feeds`).

    Args:
        specs: The model's inputs.
        batches: Batch sizes to cover; the first gets ``count`` samples, every other one; empty where shapes are
            static.
        count: Samples of the first batch size.
        seed: Equal seeds give equal samples.

    Returns:
        The samples and their names.
    """
    sizes = [*[batches[0]] * count, *batches[1:]] if batches else [1] * count
    feeds: list[Feeds] = [random_feeds(specs, seed + number, size) for number, size in enumerate(sizes)]
    suffixes = [f" (batch {size})" if batches else "" for size in sizes]
    return feeds, [f"random-{number}{suffix}" for number, suffix in enumerate(suffixes, 1)]


def verify_engine(
    *,
    exported: GraphSource,
    cleaned: GraphSource,
    torch_run: Run | None,
    engine_run: Run | None,
    samples: Sequence[Feeds],
    sample_names: Sequence[str],
    truth: Executor | None = None,
) -> Verification:
    """Verify an engine, and every stage that led to it, against float64 truth.

    Four evaluations are judged against the truth: float32 ONNX Runtime (which sets the noise floor), PyTorch (which
    proves the export), the graph after its passes (which proves them) and the engine. The engine's distances to
    PyTorch and to ONNX Runtime are reported too.

    Args:
        exported: The graph as exported: the truth. A function that loads it keeps less memory in use.
        cleaned: The graph after its passes, with the same inputs and outputs; the same object where there were none.
        torch_run: The original module in float32; None for models that did not come from PyTorch.
        engine_run: The engine; None where this machine cannot run it, and then the report's notes say so.
        samples: Inputs by name; at least one.
        sample_names: A name for each sample.
        truth: Evaluates a graph in float64; None takes `cnncc.graph.exact`.

    Raises:
        DataRefused: There are no samples, or one does not fit the model's inputs.
        ModelRefused: ONNX Runtime does not load a graph.
        RunFailed: An engine or a reference failed.
    """
    measured = _measure(exported, samples, sample_names, truth or _exact)
    subjects = [_judge_floor(measured)]
    torch_outputs = None
    if torch_run is not None:
        torch_outputs = [torch_run(feeds) for feeds in samples]
        subjects.append(_judge(measured, "pytorch", "PyTorch", torch_outputs))
    if cleaned is not exported:
        subjects.append(_judge(measured, "cleaned", "the cleaned graph", _all(_reference(cleaned), samples)))
    if engine_run is None:
        notes = ["the engine was not run: this machine is not the one that it was built for", *_golden_notes(measured)]
        return Verification(make_report(sample_names, subjects, notes=notes, rules=measured.rules), _golden(measured))
    outputs = [engine_run(feeds) for feeds in samples]
    subjects.append(_judge(measured, "engine", "the engine", outputs))
    if torch_outputs is not None:
        subjects.append(_report_pair(measured, "engine", "pytorch", outputs, torch_outputs))
    subjects.append(_report_pair(measured, "engine", "onnxruntime", outputs, measured.floor))
    notes = _golden_notes(measured)
    return Verification(make_report(sample_names, subjects, notes=notes, rules=measured.rules), _golden(measured))


def verify_bundle(
    bundle: Bundle,
    *,
    samples: Sequence[Feeds] = (),
    sample_names: Sequence[str] = (),
    layers: Executor | None = None,
    open_session: Callable[[Path], AbstractContextManager[Runs]] | None = None,
    truth: Executor | None = None,
) -> ParityReport:
    """Verify a bundle again.

    Truth and noise floor come from the bundle's own ``reference.onnx``. A bundle that was stripped of it is checked
    against its golden outputs alone, and the report's notes say so.

    Args:
        bundle: From `cnncc_runtime.bundle.read_bundle`.
        samples: Inputs by name; random ones where empty.
        sample_names: A name for each sample.
        layers: Builds an engine of a graph; given, the first sample is compared layer by layer.
        open_session: Opens a bundle's folder; None takes `cnncc_runtime.open`.
        truth: Evaluates a graph in float64; None takes `cnncc.graph.exact`.

    Raises:
        BundleRefused: A file of the bundle is damaged.
        EngineMismatch: The engine was built for another machine.
        RunFailed: The engine failed.
    """
    opener = open_session or _open
    golden = read_golden(bundle.file(GOLDEN)) if bundle.has(GOLDEN) else None
    if not bundle.has(REFERENCE):
        if golden is None:
            raise BundleRefused(
                "the bundle holds neither golden data nor its reference graph", where=[str(bundle.path)]
            )
        with opener(bundle.path) as session:
            note = "the bundle was stripped of its reference graph: only the golden sample was checked"
            return make_report(["golden"], [verify_golden(session, golden)], notes=[note])
    graph = read_reference(bundle)
    if not samples:
        samples, sample_names = random_samples(graph.inputs, batches=bundle.manifest.batches)
    measured = _measure(graph, samples, sample_names, truth or _exact)
    with opener(bundle.path) as session:
        outputs = [session.run(feeds) for feeds in samples]
        checked = [] if golden is None else [verify_golden(session, golden)]
    subjects = [
        _judge_floor(measured),
        _judge(measured, "engine", "the engine", outputs),
        _report_pair(measured, "engine", "onnxruntime", outputs, measured.floor),
        *checked,
    ]
    found = verify_layers(graph, layers, samples[0], truth=truth) if layers else ()
    return make_report(sample_names, subjects, layers=found, notes=_layer_notes(found), rules=measured.rules)


def verify_golden(session: Runs, golden: Golden) -> SubjectParity:
    """Judge an engine on a bundle's golden sample, within the tolerance stored with it.

    Args:
        session: The open engine.
        golden: From `cnncc_runtime.golden.read_golden`.

    Raises:
        RunFailed: The engine failed.
    """
    outputs = session.run(golden.feeds)
    judged = []
    for name, wanted in golden.outputs.items():
        limit = golden.limits.get(name, GoldenLimit(None, 0.0))
        tolerance = Tolerance(limit.rel_l2, limit.max_scaled, None, None)
        comparison = compare(wanted, outputs.get(name))
        judged.append(judge_output("the engine", name, ["golden"], [comparison], tolerance))
    return SubjectParity("engine", "golden", True, tuple(judged))


def read_report(bundle: Bundle) -> ParityReport | None:
    """Return the parity report stored in a bundle, or None where there is none.

    Raises:
        BundleRefused: The report is damaged.
    """
    if not bundle.has(PARITY):
        return None
    path = bundle.file(PARITY)
    try:
        return from_plain(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as exc:
        raise BundleRefused(f"the parity report is not JSON: {exc}", where=[str(path)]) from exc


def read_reference(bundle: Bundle) -> OnnxGraph:
    """Read the bundle's cleaned graph.

    Raises:
        BundleRefused: It is not there, damaged, or no ONNX model.
    """
    path = bundle.file(REFERENCE)
    try:
        return read_onnx(path)
    except ModelRefused as exc:
        raise BundleRefused(
            f"the bundle's reference graph cannot be used: {exc.message}", where=[str(path)], hint=exc.hint
        ) from exc


def verify_layers(
    graph: OnnxGraph, build: Executor, feeds: Feeds, *, truth: Executor | None = None
) -> tuple[LayerParity, ...]:
    """Compare every intermediate tensor of an engine with the truth.

    The engine is built again with the intermediate tensors as outputs, which keeps the target from fusing across
    them: a fault that only fusion causes shows in the whole engine and not here.

    Args:
        graph: The cleaned graph.
        build: Builds an engine of a graph and opens it.
        feeds: One sample.
        truth: Evaluates a graph in float64; None takes `cnncc.graph.exact`.

    Returns:
        One record per node output that is a floating-point tensor, in the graph's order.

    Raises:
        BuildFailed: An engine of the graph with more outputs could not be built.
        RunFailed: An engine or a reference failed.
    """
    shaped = with_shapes(graph)
    found: list[LayerParity] = []
    for chunk in _chunks(_float_tensors(shaped)):
        part, outputs_of = with_float_outputs(shaped, chunk)
        measured = _measure(part, [feeds], ["sample"], truth or _exact)
        outputs = [build(part)(feeds)]
        floor, engine, tolerances = measured.compare_floor(), measured.compare(outputs), measured.tolerances()
        for node in part.nodes:
            for tensor in node.output:
                if (name := outputs_of.get(tensor, "")) in engine:
                    found.append(_layer(node, tensor, floor[name], engine[name], tolerances[name]))
    return tuple(found)


def first_divergence(layers: Sequence[LayerParity]) -> LayerParity | None:
    """Return the first layer, in the graph's order, whose error left its tolerance; None where all are within."""
    return next((layer for layer in layers if not layer.within), None)


def _layer(
    node: onnx.NodeProto,
    name: str,
    floor: Sequence[Comparison],
    engine: Sequence[Comparison],
    tolerance: Tolerance,
) -> LayerParity:
    reached = judge_floor(name, ["sample"], floor)
    judged = judge_output("the engine", name, ["sample"], engine, tolerance)
    return LayerParity(
        module_path(node),
        node_label(node),
        node.op_type,
        name,
        judged.rel_l2,
        judged.sqnr_db,
        judged.max_abs,
        reached.rel_l2,
        not judged.failures,
    )


def _layer_notes(layers: Sequence[LayerParity]) -> list[str]:
    first = first_divergence(layers)
    if first is None:
        return []
    return [f"the error first leaves its tolerance at {first.module} ({first.op} '{first.node}')"]


def _float_tensors(graph: OnnxGraph) -> Iterator[tuple[str, int]]:
    """Yield the name and size in bytes of every floating-point tensor that a node makes and whose type is known."""
    known = {value.name: value.type.tensor_type for value in (*graph.proto.graph.value_info, *graph.proto.graph.output)}
    kinds = onnx.TensorProto
    floats = (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE)
    for node in graph.nodes:
        for name in node.output:
            tensor = known.get(name)
            if tensor is not None and tensor.elem_type in floats and tensor.HasField("shape"):
                sizes = [dim.dim_value or 1 for dim in tensor.shape.dim]
                yield name, 8 * int(np.prod(sizes))


def _chunks(tensors: Iterator[tuple[str, int]]) -> Iterator[list[str]]:
    chunk: list[str] = []
    total = 0
    for name, size in tensors:
        if chunk and total + size > _LAYER_CHUNK:
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += size
    if chunk:
        yield chunk


def _measure(source: GraphSource, samples: Sequence[Feeds], names: Sequence[str], truth: Executor) -> _Samples:
    if not samples or len(samples) != len(names):
        raise DataRefused(f"parity needs samples: there are {len(samples)}, with {len(names)} names")
    floor = _all(_reference(source), samples)
    moved, rules = _jittered(source, samples)
    exact = _all(truth(_load(source)), samples)
    gc.collect()  # onnx's evaluator sits in reference cycles, and it holds the weights in float64
    return _Samples(tuple(names), tuple(samples), exact, floor, moved, rules)


def _all(run: Run, samples: Sequence[Feeds]) -> tuple[Tensors, ...]:
    """Return the outputs for all samples; the executor, and its copy of the weights, are gone afterwards."""
    from cnncc.graph.reference import side_by_side

    return tuple(side_by_side(run, samples))


def _jittered(source: GraphSource, samples: Sequence[Feeds]) -> tuple[tuple[tuple[Tensors, ...], ...], Rules]:
    """Return what a graph that rounds gives where its values are moved, and the rules for graphs of its kind."""
    graph = _load(source)
    halves, quantized = half_types(graph), is_quantized(graph)
    if not halves and not quantized:
        return (), FLOAT_RULES
    runs = []
    for seed in range(max(1, math.ceil(_JITTERED / len(samples)))):
        moved = emulated(graph, seed) if halves else graph
        runs.append(_all(_reference(jittered(moved, seed)), samples))
    half_rules = BF16_RULES if halves == {onnx.TensorProto.BFLOAT16} else FP16_RULES
    return tuple(runs), QUANTIZED_RULES if quantized else half_rules


def _judge_floor(measured: _Samples) -> SubjectParity:
    outputs = [
        judge_floor(name, measured.names, found, rules=measured.rules)
        for name, found in measured.compare_floor().items()
    ]
    return SubjectParity("onnxruntime", "truth", True, tuple(outputs))


def _judge(measured: _Samples, subject: str, wording: str, outputs: Sequence[Tensors]) -> SubjectParity:
    tolerances = measured.tolerances()
    judged: list[OutputParity] = [
        judge_output(wording, name, measured.names, found, tolerances[name])
        for name, found in measured.compare(outputs).items()
    ]
    return SubjectParity(subject, "truth", True, tuple(judged))


def _report_pair(
    measured: _Samples, subject: str, against: str, outputs: Sequence[Tensors], others: Sequence[Tensors]
) -> SubjectParity:
    judged = []
    for name in measured.truth[0]:
        pairs = [
            Comparison(problem="is missing") if name not in other else compare(other[name], found.get(name))
            for found, other in zip(outputs, others, strict=True)
        ]
        judged.append(judge_output(subject, name, measured.names, pairs))
    return SubjectParity(subject, against, False, tuple(judged))


def _golden_notes(measured: _Samples) -> list[str]:
    return [
        f"the golden sample leaves out '{name}': how values are rounded may decide some of its integers"
        for name, tolerance in measured.tolerances().items()
        if tolerance.differing
    ]


def _golden(measured: _Samples) -> bytes:
    """Round the first sample's truth to the outputs' dtypes; NaN and Inf are those that float32 makes."""
    outputs, tolerances = {}, measured.tolerances()
    for name, exact in measured.truth[0].items():
        if tolerances[name].differing:  # devices compare integers for equality
            continue
        reference = measured.floor[0][name]
        with np.errstate(over="ignore", invalid="ignore"):  # float64 may exceed float32; the mask below decides
            rounded = exact.astype(reference.dtype)
        decided = np.isfinite(reference) if reference.dtype.kind == "f" else np.full(reference.shape, True)
        outputs[name] = np.where(decided, rounded, reference)
    limits = {
        name: GoldenLimit(found.rel_l2, found.max_scaled)
        for name, found in tolerances.items()
        if name in outputs and outputs[name].dtype.kind == "f"
    }
    return golden_bytes(measured.feeds[0], outputs, limits)


def _load(source: GraphSource) -> OnnxGraph:
    return source if isinstance(source, OnnxGraph) else source()


def _reference(source: GraphSource) -> Run:
    from cnncc.graph.reference import Reference

    graph = _load(source)
    # a graph of its own, so that the serialized model it caches goes with it
    return Reference(emulated(graph) if is_half(graph) else OnnxGraph(graph.proto)).run


def _exact(graph: OnnxGraph) -> Run:
    from cnncc.graph.exact import Exact

    run: Run = Exact(graph).run
    return run


def _open(path: Path) -> AbstractContextManager[Runs]:
    import cnncc_runtime

    session: AbstractContextManager[Runs] = cnncc_runtime.open(path)
    return session
