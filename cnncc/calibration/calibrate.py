"""Calibration, as a whole: one pass over the data, then each step kept only where it brings the outputs nearer.

::

    prepare     equalize channels (and ReLU6 → ReLU for it), judged on a few samples
    observe     one pass over all samples: histograms
    thresholds  by every method, and per tensor by what its readers compute; the best is kept
    shift       what is hardly ever negative, where its readers can take that up
    correct     biases, layer by layer
    search      layers that must stay in float, where there is a budget
    measure     on validation data
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cnncc.calibration.accuracy import Accuracy, Validation
from cnncc.calibration.bias_correction import Deltas, add_to_biases, bias_deltas
from cnncc.calibration.channels import find_sites
from cnncc.calibration.choose import choose
from cnncc.calibration.equalize import Equalization, equalize, relu6_to_relu
from cnncc.calibration.health import examine, settled
from cnncc.calibration.histogram import Histogram, pool
from cnncc.calibration.judge import BEST_DB, Judge
from cnncc.calibration.observations import Observations
from cnncc.calibration.observe import Batch, Histograms, Progress, batch_of, observe, observe_batches
from cnncc.calibration.plan import Group, Layer, Plan, layers_of, plan_for
from cnncc.calibration.quantize import equalization_record, write
from cnncc.calibration.search import Budget, Measured, search
from cnncc.calibration.shift import Shift, shift_of, shiftable
from cnncc.calibration.stream import DataStream, batches
from cnncc.calibration.table import (
    SCHEMA,
    AccuracyRecord,
    CalibrationTable,
    DataRecord,
    GroupRecord,
    LayerRecord,
    StepRecord,
    counts_text,
    digests_of,
    floats_text,
    unsupported_records,
)
from cnncc.calibration.thresholds import AUTO, METHODS, scale_of
from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.digests import digest_json
from cnncc_runtime.errors import BudgetExceeded, DataRefused, ModelRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import Feeds

_MEASURED_ELEMENTS = 1 << 26
"""Elements that layers read, over the samples that steps are judged by: bounds their time and memory."""

_FEWEST, _MOST = 4, 64
"""Samples that steps are judged by."""

_FEW = 4
"""Samples that thresholds are chosen on at least: each is computed once for every method."""

_WORTH = 0.02
"""Decibels by which a step must better the outputs to be kept: what is within the noise stays undone."""

_QUICK = "mse"
"""The method by which preparations are compared, and which ``auto`` must better."""

_ASKED, _BUDGET = "asked", "budget"


@dataclass(frozen=True)
class Options:
    """What calibration is asked for.

    Attributes:
        method: Of the thresholds: one of `METHODS`, or `AUTO`.
        equalize: Whether channels may be equalized where that helps.
        shift: Whether tensors may be shifted where that helps; only by the method `AUTO`.
        correct_bias: Whether biases may be corrected where that helps.
        float_adds: Whether additions of two tensors read float tensors.
        keep: Patterns of modules or nodes that stay in float.
        budget: What must be reached, by keeping more layers in float.
    """

    method: str = AUTO
    equalize: bool = True
    shift: bool = True
    correct_bias: bool = True
    float_adds: bool = False
    keep: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class Job:
    """What a calibration works on.

    Attributes:
        graph: Cleaned, in float32, shapes known.
        name: What the user calls the model.
        version: Of cnncc.
        stream: The calibration data.
        seed: Of its draw.
        preprocessing: The contract, for the table.
        validation: Data to measure accuracy on; with labels where the budget speaks of accuracy.
        options: What is asked for.
        workers: Samples that are computed side by side; the result does not depend on it.
        resume: A folder for what an interrupted calibration leaves to the next; None leaves nothing.
        progress: Told what is done.
    """

    graph: OnnxGraph
    name: str
    version: str
    stream: DataStream
    seed: int = 0
    preprocessing: Preprocessing | None = None
    validation: DataStream | None = None
    options: Options = field(default_factory=Options)
    workers: int = 1
    resume: Path | None = None
    progress: Progress = lambda what, fraction: None

    def leftover(self, suffix: str) -> Path | None:
        """Return the file that a part of this very calibration leaves when it is interrupted."""
        if self.resume is None:
            return None
        asked = msgspec.to_builtins(self.options)
        data = [self.stream.identity, self.validation.identity if self.validation else ""]
        return self.resume / f"{digest_json([self.version, self.graph.digest, data, asked])[7:39]}.{suffix}"


@dataclass(frozen=True)
class _State:
    """What is decided so far.

    Attributes:
        graph: In float32, prepared.
        layers: All that can be quantized.
        floats: Of these, those that stay in float → why.
        float_adds: Whether additions of two tensors read float tensors.
        scales: Tensor → scale.
        shifts: Tensor → shift.
        deltas: Layer → what is added to its bias while it is int8.
        relu6_to_relu: Whether ReLU6 was replaced.
        equalization: What was scaled.
    """

    graph: OnnxGraph
    layers: tuple[Layer, ...]
    floats: Mapping[str, str]
    float_adds: bool = False
    scales: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, Shift] = field(default_factory=dict)
    deltas: Deltas = field(default_factory=dict)
    relu6_to_relu: bool = False
    equalization: tuple[Equalization, ...] = ()

    @property
    def quantized_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.node not in self.floats]

    def quantized(self, more_floats: Collection[str] = ()) -> OnnxGraph:
        """Return the Q/DQ graph."""
        chosen = [layer for layer in self.quantized_layers if layer.node not in more_floats]
        deltas = {layer.node: self.deltas[layer.node] for layer in chosen if layer.node in self.deltas}
        corrected = add_to_biases(self.graph, chosen, deltas)
        return write(corrected, chosen, self.scales, self.shifts, float_adds=self.float_adds)

    def plan(self) -> Plan:
        """Return what is quantized."""
        return plan_for(self.graph, self.quantized_layers, float_adds=self.float_adds)


def calibrate(job: Job) -> CalibrationTable:
    """Calibrate a model.

    Raises:
        DataRefused: The data is empty or not what the model takes.
        ModelRefused: Nothing can be quantized, the model is quantized already, or a tensor becomes NaN or infinite.
        UsageError: A pattern matches no layer, or all patterns match every layer; the method is unknown, or the budget
            lacks data.
        BudgetExceeded: No choice of layers meets the budget.
    """
    return _Calibration(job).run()


class _Calibration:
    def __init__(self, job: Job) -> None:
        _check(job)
        self.job = job
        self.steps: list[StepRecord] = []
        layers = layers_of(job.graph)
        self.state = _State(job.graph, layers, _kept(layers, job.options.keep), job.options.float_adds)
        if not layers:
            raise ModelRefused(
                "nothing can be quantized: the model has no convolution or product with constant weights",
                hint="compile it with --precision fp32",
            )
        if not self.state.quantized_layers:
            raise UsageError("--keep leaves no layer to quantize", hint="compile the model with --precision fp32")
        job.progress("reading the samples that steps are judged by", 0.0)
        self.few, judged = self._few()
        self.fit: list[Feeds] = [feeds for feeds, _ in self.few]
        self.judge = Judge(job.graph, [feeds for feeds, _ in judged])
        self.scored: tuple[_State, float] | None = None

    def run(self) -> CalibrationTable:
        job = self.job
        self._prepare()
        plan = self.state.plan()
        read = [tensor for group in plan.groups for tensor in group.read]
        leftover = job.leftover("pass.npz")
        seen = observe(self.state.graph, read, job.stream, workers=job.workers, resume=leftover, progress=job.progress)
        job.progress("finding thresholds", 0.0)
        thresholds = {
            group.tensors[0]: {method: find(_pooled(group, seen)) for method, find in METHODS.items()}
            for group in plan.groups
        }
        methods = self._methods(plan, thresholds)
        self._shift(plan, seen)
        self._correct()
        accuracy = self._meet_budget()
        groups = self._group_records(plan, seen, thresholds, methods)
        return CalibrationTable(
            schema=SCHEMA,
            cnncc=job.version,
            model=digests_of(job.graph, job.name),
            data=DataRecord(
                source=job.stream.source,
                digest=job.stream.digest,
                samples=seen.samples,
                seed=job.seed,
                random=job.stream.random,
                skipped=len(job.stream.skipped),
                preprocessing=job.preprocessing,
            ),
            method=job.options.method,
            groups=tuple(groups),
            layers=self._layer_records(),
            float_adds=self.state.float_adds,
            relu6_to_relu=self.state.relu6_to_relu,
            equalization=tuple(equalization_record(each) for each in self.state.equalization),
            steps=tuple(self.steps),
            sqnr_db=round(self._score(), 3),
            accuracy=accuracy,
            course=settled(seen),
            health=examine(groups, seen),
        )

    # ---- steps

    def _few(self) -> tuple[list[Batch], list[Batch]]:
        """Return samples to fit steps on, and others to judge them by; the same where there is but one."""
        size = batch_of(self.job.graph)
        count = max(_FEWEST, min(_MOST, _MEASURED_ELEMENTS // max(_elements(self.job.graph, self.state.layers), 1)))
        rows = itertools.islice(self.job.stream.samples(), 2 * count * size)
        found = [batch for batch in batches(rows, size) if len(batch[1]) == size]
        if not found:
            raise DataRefused(
                f"{self.job.stream.source} has fewer samples than the model's batch of {size}",
                hint="give more samples, or export the model with a batch of 1 or N",
            )
        half = len(found) // 2
        return found[half:], found[:half] or found

    def _prepare(self) -> None:
        """Equalize channels, where that helps: by activations and weights, or else by weights alone."""
        if not self.job.options.equalize:
            return
        self.job.progress("trying to equalize channels", 0.1)
        graph = self.job.graph
        rectified = relu6_to_relu(graph)
        seen = self._observed(graph)
        kept = self._roughly(self.state, seen)
        best = self.judge.sqnr(kept.quantized())
        for base, name in ((graph, "equalization"), (rectified, "ReLU6 → ReLU, equalization")):
            if base is rectified:
                if not _changed(graph, rectified):
                    continue
                seen = self._observed(rectified)
            ranges = {tensor: histogram.channels.astype(np.float64) for tensor, histogram in seen.items()}
            for by, given in (("activations", ranges), ("weights", None)):
                found = self._equalized(base, given)
                if found is None:
                    continue
                after = self.judge.sqnr(found.quantized())
                better = after > best + _WORTH
                self.steps.append(StepRecord(f"{name} by {by}", round(best, 3), round(after, 3), better))
                if better:
                    best, kept = after, replace(found, relu6_to_relu=base is rectified)
                    break
        self.state = replace(kept, scales={})

    def _equalized(self, graph: OnnxGraph, ranges: Mapping[str, NDArray[np.float64]] | None) -> _State | None:
        scaled, done = equalize(graph, ranges=ranges)
        moved = tuple(each for each in done if any(scale != 1.0 for scale in each.scales))
        if not moved:
            return None
        return self._roughly(replace(self.state, graph=scaled, layers=layers_of(scaled), equalization=moved))

    def _observed(self, graph: OnnxGraph) -> Histograms:
        """Observe, over the samples to fit on, what layers read and what equalizing could scale."""
        read = [layer.tensor for layer in self.state.quantized_layers]
        scaled = [tensor for site in find_sites(graph) for tensor in site.tensors]
        return observe_batches(graph, list(dict.fromkeys([*read, *scaled])), self.few)

    def _roughly(self, state: _State, seen: Histograms | None = None) -> _State:
        """Give a state scales that a few samples suffice for."""
        plan = state.plan()
        if seen is None:
            seen = observe_batches(state.graph, [tensor for group in plan.groups for tensor in group.read], self.few)
        scales = {
            tensor: scale_of(METHODS[_QUICK](pool(seen[name] for name in group.read)))
            for group in plan.groups
            for tensor in group.tensors
        }
        return replace(state, scales=scales)

    def _methods(self, plan: Plan, thresholds: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """Set scales by the method asked for, and return it per group."""
        asked = self.job.options.method
        names = [group.tensors[0] for group in plan.groups]
        if asked != AUTO:
            self.state = replace(self.state, scales=_scales(plan, thresholds, dict.fromkeys(names, asked)))
            return dict.fromkeys(names, asked)
        quick = dict.fromkeys(names, _QUICK)
        self.state = replace(self.state, scales=_scales(plan, thresholds, quick))
        self.job.progress("choosing thresholds by what layers compute", 0.3)
        chosen = choose(self.state.graph, plan, thresholds, self.fit[: max(_FEW, len(self.fit) // 4)])
        tried = replace(self.state, scales=_scales(plan, thresholds, chosen))
        return chosen if self._try("thresholds per tensor", tried) else quick

    def _shift(self, plan: Plan, seen: Observations) -> None:
        """Shift what is hardly ever negative, where that helps; a method asked for by name is left as it is."""
        if self.job.options.method != AUTO or not self.job.options.shift:
            return
        able = shiftable(self.state.graph, plan)
        shifts = {
            name: shift
            for group in plan.groups
            if group.tensors[0] in able
            and (shift := shift_of(_pooled(group, seen), self.state.scales[group.tensors[0]])) is not None
            for name in group.tensors
        }
        if shifts:
            self._try("shifts", replace(self.state, shifts=shifts))

    def _correct(self) -> None:
        """Correct biases, where that helps."""
        if not self.job.options.correct_bias:
            return
        self.job.progress("correcting biases", 0.6)
        bare = replace(self.state, deltas={})
        deltas = bias_deltas(bare.graph, bare.quantized(), bare.quantized_layers, self.fit)
        if deltas:
            self._try("bias correction", replace(self.state, deltas=deltas))

    def _meet_budget(self) -> AccuracyRecord | None:
        """Measure on validation data, and keep layers in float until the budget is met."""
        job, budget = self.job, self.job.options.budget
        validation = Validation(job.graph, job.validation) if job.validation else None
        model = validation.measure() if validation else Accuracy("", 0.0, BEST_DB, len(self.fit))

        def measure(floats: Collection[str] = ()) -> Accuracy:
            graph = self.state.quantized(floats)
            return validation.measure(graph) if validation else replace(model, sqnr_db=self.judge.sqnr(graph))

        if budget.drop is not None and not model.metric:
            raise UsageError(
                "there is no accuracy that could drop: no data to measure it on, or the first output is no classes",
                hint="give --min-sqnr instead of --max-accuracy-drop",
            )
        if validation is None and budget.sqnr_db is None:
            return None
        job.progress("measuring the int8 model", 0.7)
        reached = measure()
        if budget.missed(reached, model) > 0:
            reached = self._search(model, measure)
        if validation is None or job.validation is None:
            return None
        return AccuracyRecord(
            metric=model.metric,
            source=job.validation.source,
            digest=job.validation.digest,
            samples=model.samples,
            fp32=round(model.value, 4),
            int8=round(reached.value, 4),
            sqnr_db=round(reached.sqnr_db, 3),
        )

    def _search(self, model: Accuracy, measure: Callable[[Collection[str]], Accuracy]) -> Accuracy:
        known = Measured(self.job.leftover("search.json"))
        try:
            found = search(
                [layer.node for layer in self.state.quantized_layers],
                self.job.options.budget,
                model=model,
                sqnr=lambda floats: self.judge.sqnr(self.state.quantized(floats)),
                measure=measure,
                known=known,
                progress=self.job.progress,
            )
        except BudgetExceeded:
            known.forget()
            raise
        known.forget()
        self.state = replace(self.state, floats={**self.state.floats, **dict.fromkeys(found.floats, _BUDGET)})
        return found.reached

    def _try(self, step: str, tried: _State) -> bool:
        """Keep a step if it betters the outputs."""
        before, after = self._score(), self.judge.sqnr(tried.quantized())
        kept = after > before + _WORTH
        self.steps.append(StepRecord(step, round(before, 3), round(after, 3), kept))
        if kept:
            self.state, self.scored = tried, (tried, after)
        return kept

    def _score(self) -> float:
        """Return the SQNR of the state as it is, measured once."""
        if self.scored is None or self.scored[0] is not self.state:
            self.scored = (self.state, self.judge.sqnr(self.state.quantized()))
        return self.scored[1]

    # ---- records

    def _group_records(
        self, plan: Plan, seen: Observations, thresholds: Mapping[str, Mapping[str, float]], methods: Mapping[str, str]
    ) -> list[GroupRecord]:
        modules = {name: module_path(node) for node in self.job.graph.nodes for name in node.output}
        records = []
        for group in plan.groups:
            name, histogram = group.tensors[0], _pooled(group, seen)
            channels = np.concatenate([seen.histograms[tensor].channels for tensor in group.read])
            threshold = thresholds[name][methods[name]]
            records.append(
                GroupRecord(
                    tensors=group.tensors,
                    read=group.read,
                    module=modules.get(name, ""),
                    exponent=histogram.exponent,
                    counts=counts_text(histogram),
                    largest=histogram.largest,
                    lowest=histogram.lowest,
                    channels=channels.size,
                    dead=int((channels == 0).sum()),
                    thresholds=dict(thresholds[name]),
                    method=methods[name],
                    threshold=threshold,
                    scale=scale_of(threshold),
                    shift=self.state.shifts.get(name),
                )
            )
        return records

    def _layer_records(self) -> tuple[LayerRecord, ...]:
        records = []
        for layer in self.state.layers:
            why = self.state.floats.get(layer.node, "")
            delta = None if why else self.state.deltas.get(layer.node)
            bias = "" if delta is None else floats_text(delta)
            records.append(LayerRecord(layer.node, layer.module, layer.op, "fp32" if why else "int8", why, bias))
        return (*records, *unsupported_records(self.job.graph, self.state.layers))


def _changed(before: OnnxGraph, after: OnnxGraph) -> bool:
    return [node.op_type for node in before.nodes] != [node.op_type for node in after.nodes]


def _check(job: Job) -> None:
    if job.options.method not in (AUTO, *METHODS):
        raise UsageError(
            f"'{job.options.method}' is no method for thresholds", hint=f"one of {', '.join((AUTO, *METHODS))}"
        )


def _kept(layers: Iterable[Layer], patterns: Sequence[str]) -> dict[str, str]:
    """Return the layers that patterns of modules or nodes name.

    Raises:
        UsageError: A pattern names none.
    """
    layers = list(layers)
    kept = {}
    for pattern in patterns:
        named = [each.node for each in layers if fnmatchcase(each.module, pattern) or fnmatchcase(each.node, pattern)]
        if not named:
            raise UsageError(
                f"--keep {pattern} names no layer",
                hint=f"layers are called {', '.join(layer.module for layer in layers[:5])}, …",
            )
        kept.update(dict.fromkeys(named, _ASKED))
    return kept


def _elements(graph: OnnxGraph, layers: Iterable[Layer]) -> int:
    """Return how many elements all layers read on one sample; an unknown size counts as 1."""
    values = {value.name: value for value in (*graph.proto.graph.value_info, *graph.proto.graph.input)}
    tensors = {layer.tensor for layer in layers} & values.keys()
    return sum(
        int(np.prod([dim.dim_value or 1 for dim in values[name].type.tensor_type.shape.dim])) for name in tensors
    )


def _pooled(group: Group, seen: Observations) -> Histogram:
    return pool(seen.histograms[tensor] for tensor in group.read)


def _scales(plan: Plan, thresholds: Mapping[str, Mapping[str, float]], methods: Mapping[str, str]) -> dict[str, float]:
    return {
        tensor: scale_of(thresholds[group.tensors[0]][methods[group.tensors[0]]])
        for group in plan.groups
        for tensor in group.tensors
    }
