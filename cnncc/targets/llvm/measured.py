"""``--optimize measured``: times the rules' choice against its neighbours on this machine, layer by layer.

The rules' own model names a handful of knobs for each convolution (`candidates`); all are compiled in one module and
timed in turns (`timing`). The rule's choice is replaced only by what was faster beyond doubt, twice: in a round with
all candidates and in one with the winners alone. Convolutions that are predicted to take the most time go first, until
the budget ends. What was found goes to the kernel database, from which builds take it (`plans`).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import tvm

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import Measured, MeasureOptions
from cnncc.targets.llvm.candidates import Candidate, candidates_of
from cnncc.targets.llvm.compile import ask_plans
from cnncc.targets.llvm.kernel_database import (
    Conditions,
    KernelDatabase,
    Measurement,
    MethodTimes,
    Section,
    Timed,
)
from cnncc.targets.llvm.machine import Machine, machine_of, target_options
from cnncc.targets.llvm.plans import MARGIN, MeasuredPlans, Plans, is_current
from cnncc.targets.llvm.quiet import quiet
from cnncc.targets.llvm.rules import ConvShape, DirectPlan, WindowPlan
from cnncc.targets.llvm.timing import Contest, prepare, ratio_of
from cnncc.targets.llvm.winograd_rules import WinogradPlan, depthwise_cycles, direct_cycles, winograd_plans

Layer = TypeVar("Layer")

_CONTEST_S = 0.3
"""Seconds that the candidates of a convolution are timed, and the winners once more."""


@dataclass
class Layers:
    """Convolutions of a network.

    Attributes:
        calls: Shape → calls for one inference.
        winograd: Shapes that may use Winograd's method.
    """

    calls: Counter[ConvShape] = field(default_factory=Counter)
    winograd: set[ConvShape] = field(default_factory=set)


class _Recorder(Plans):
    """Notes every convolution that asks for knobs."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.layers = Layers()

    def direct(self, shape: ConvShape) -> DirectPlan:
        self.layers.calls[shape] += 1
        return super().direct(shape)

    def depthwise(self, shape: ConvShape) -> WindowPlan:
        self.layers.calls[shape] += 1
        return super().depthwise(shape)

    def choose(self, shapes: Mapping[Layer, ConvShape], budget: int, layers: int) -> dict[Layer, WinogradPlan]:
        self.layers.winograd.update(shapes.values())
        return {}  # so that every convolution asks for direct knobs, and is counted


def measure_kernels(graphs: Mapping[str, OnnxGraph], options: MeasureOptions) -> Measured:
    """Measure the convolutions of some graphs, or look them up; see `cnncc.targets.base.Measuring`.

    Args:
        graphs: Entry → graph of static shapes.
        options: The profile's CPU is named.

    Raises:
        DataRefused: The database is damaged or of another kind.
        UnsupportedGraph: Lists every refused node.
        RunFailed: The system has not as many threads to give as the profile has cores.
    """
    profile = options.build.profile
    machine = machine_of(profile)
    conditions = Conditions.of(profile, machine)
    database = KernelDatabase()
    if options.database:
        database = KernelDatabase.parse(options.database.encode(), options.name)
    layers = find_layers(graphs, options)
    work = _Work(database, conditions, machine, layers)
    reused = len(work.known())
    work.report(options)
    measured = 0
    if options.budget is not None:
        target = tvm.target.Target(target_options(profile))
        measured = _measure_all(work, target, options)
    return work.result(measured, reused)


def find_layers(graphs: Mapping[str, OnnxGraph], options: MeasureOptions) -> Layers:
    """Return the convolutions of some graphs as the layout pass asks for them."""
    recorder = _Recorder(machine_of(options.build.profile))
    ask_plans(recorder, graphs, options.build)
    return recorder.layers


@dataclass
class _Work:
    """What is known and what is to be measured."""

    database: KernelDatabase
    conditions: Conditions
    machine: Machine
    layers: Layers

    def known(self) -> dict[ConvShape, Measurement]:
        """Return the measurements that this network can use."""
        found = self.database.of(self.conditions)
        return {shape: found[shape] for shape in self.layers.calls if shape in found and self._holds(found[shape])}

    def _holds(self, measurement: Measurement) -> bool:
        """Whether all methods that matter were measured, against what the rules choose today."""
        shape = measurement.shape
        methods = {times.method for times in measurement.methods}
        return methods >= set(self.candidates(shape)) and all(
            is_current(times, shape, self.machine) for times in measurement.methods
        )

    def candidates(self, shape: ConvShape) -> dict[str, list[Candidate]]:
        """Return method → what to measure."""
        return candidates_of(shape, self.machine, winograd=shape in self.layers.winograd)

    def missing(self) -> list[ConvShape]:
        """Return what is not known, by its share of the predicted time."""
        known = self.known()
        shapes = [shape for shape in self.layers.calls if shape not in known]
        return sorted(shapes, key=lambda shape: -self.layers.calls[shape] * _predicted(shape, self.machine))

    def report(self, options: MeasureOptions) -> None:
        """Say what of the database cannot be used."""
        if older := self.database.older(self.conditions):
            options.note(
                f"{older} convolutions in {options.name} were measured with another TVM or other kernels of cnncc; "
                "they are not used"
            )
        if options.budget is None and not self.known():
            machines = "; ".join(self.database.machines()) or "nothing"
            options.note(
                f"{options.name} holds nothing for this network on {self.conditions.cpu}, {self.machine.cores} "
                f"cores: the rules choose every kernel. It holds: {machines}"
            )

    def result(self, measured: int, reused: int) -> Measured:
        """Return the outcome."""
        known = self.known()
        MeasuredPlans(self.machine, list(known.values())).check()
        plans = KernelDatabase([Section(self.conditions, tuple(known.values()))] if known else [])
        faster = sum(any(times.best != times.rule for times in measurement.methods) for measurement in known.values())
        left = len(self.layers.calls) - len(known)
        return Measured(plans.text().decode() if known else "", measured, reused, left, faster)


def _predicted(shape: ConvShape, machine: Machine) -> float:
    """Return the predicted time of a convolution, in cycles."""
    if shape.depthwise:
        return depthwise_cycles(shape, machine)
    return min([direct_cycles(shape, machine), *(plan.cycles for plan in winograd_plans(shape, machine))])


def _measure_all(work: _Work, target: Any, options: MeasureOptions) -> int:
    """Measure what is not known until the budget ends; return how many were measured."""
    shapes = work.missing()
    if not shapes:
        return 0
    assert options.budget is not None
    deadline = monotonic() + options.budget
    for position, shape in enumerate(shapes):
        if monotonic() >= deadline:
            return position
        options.build.progress("measure kernels", position / len(shapes))
        work.database.put(work.conditions, measure(shape, work.candidates(shape), target, work.machine))
        options.keep(work.database.text().decode())
    options.build.progress("measure kernels", 1.0)
    return len(shapes)


def measure(
    shape: ConvShape, candidates: Mapping[str, Sequence[Candidate]], target: Any, machine: Machine
) -> Measurement:
    """Measure one convolution.

    Args:
        shape: The convolution.
        candidates: Method → knobs, the rule's choice first.
        target: TVM's target; this machine can run its code.
        machine: What kernels are for.
    """
    every = [candidate for found in candidates.values() for candidate in found]
    with quiet():
        contest = prepare(shape, every, target, machine)
    times = contest.run(range(len(every)), _CONTEST_S)
    groups = _positions(candidates)
    finalists = {method: _fastest(positions, times) for method, positions in groups.items()}
    final = _final(contest, [(groups[method][0], winner) for method, winner in finalists.items()])
    contest.pool.close()
    return Measurement(
        shape,
        tuple(_judged(method, every, (groups[method][0], winner), final) for method, winner in finalists.items()),
    )


def _positions(candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, list[int]]:
    """Return method → positions of its candidates in one list of all."""
    found, start = {}, 0
    for method, plans in candidates.items():
        found[method] = list(range(start, start + len(plans)))
        start += len(plans)
    return found


def _fastest(positions: Sequence[int], times: Sequence[Sequence[float]]) -> int:
    """Return the position of the fastest candidate of a method against the method's first, the rule's choice."""
    rule = times[positions[0]]
    return min(positions, key=lambda position: ratio_of(times[position], rule)[0])


def _final(contest: Contest, pairs: Sequence[tuple[int, int]]) -> dict[int, list[float]]:
    """Time the rule's choices and the winners once more, alone; return position → times."""
    contestants = list(dict.fromkeys(position for pair in pairs for position in pair))
    return dict(zip(contestants, contest.run(contestants, _CONTEST_S), strict=True))


def _judged(
    method: str, every: Sequence[Candidate], pair: tuple[int, int], final: Mapping[int, Sequence[float]]
) -> MethodTimes:
    """Return a method's times; its winner is the rule's choice unless the other was faster beyond doubt."""
    rule, winner = pair
    ratio, doubt = ratio_of(final[winner], final[rule])
    best = winner if ratio + doubt < MARGIN else rule
    return MethodTimes(method, _timed(every[rule], final[rule]), _timed(every[best], final[best]))  # type: ignore[arg-type]


def _timed(candidate: Candidate, times: Sequence[float]) -> Timed:
    return Timed(tuple(candidate.plan.numbers), float(f"{statistics.median(times):.3e}"))


__all__ = ["Layers", "find_layers", "measure", "measure_kernels"]
