"""What a network's convolutions take by the rules' own model of cost, where there is no machine to measure on.

The model knows multiply-adds, transforms and the streams of weights, not what else a network does: it says which of two
engines of one network is faster, not how long either takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions
from cnncc.targets.llvm.compile import ask_plans, plans_of
from cnncc.targets.llvm.machine import machine_of
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.rules import ConvShape, DirectPlan, WindowPlan
from cnncc.targets.llvm.schedule.products import Dots
from cnncc.targets.llvm.winograd_rules import WinogradPlan, depthwise_cycles, direct_cycles

Layer = TypeVar("Layer")


def predict_cycles(graphs: Mapping[str, OnnxGraph], options: BuildOptions) -> float:
    """Return the predicted time of all convolutions of some graphs, in cycles of one core.

    Args:
        graphs: Entry → graph of static shapes.
        options: The profile's CPU is named.

    Raises:
        UnsupportedGraph: Lists every refused node.
        UsageError: A pattern of modules matches no convolution.
    """
    tally = _Tally(plans_of(options.measured, options.profile, machine_of(options.profile)))
    ask_plans(tally, graphs, options)
    return tally.cycles


class _Tally(Plans):
    """Adds up what the convolutions take that ask for knobs."""

    def __init__(self, plans: Plans) -> None:
        super().__init__(plans.machine)
        self._plans = plans
        self.cycles = 0.0

    def direct(self, shape: ConvShape) -> DirectPlan:
        self.cycles += direct_cycles(shape, self.machine)
        return self._plans.direct(shape)

    def integers(self, shape: ConvShape, dots: Dots) -> DirectPlan:
        self.cycles += dots.instructions * direct_cycles(shape, self.machine)
        return self._plans.integers(shape, dots)

    def depthwise(self, shape: ConvShape) -> WindowPlan:
        self.cycles += depthwise_cycles(shape, self.machine)
        return self._plans.depthwise(shape)

    def choose(self, shapes: Mapping[Layer, ConvShape], budget: int, layers: int) -> dict[Layer, WinogradPlan]:
        chosen = self._plans.choose(shapes, budget, layers)
        self.cycles += sum(plan.cycles for plan in chosen.values())
        return chosen
