"""Where kernels get their knobs: from the rules, or from measurements where there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from cnncc.targets.llvm.kernel_database import Measurement, MethodTimes
from cnncc.targets.llvm.knobs import (
    DEPTHWISE,
    DIRECT,
    WINOGRAD,
    decode,
    decode_depthwise,
    decode_direct,
    decode_winograd,
)
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import (
    ConvShape,
    DirectPlan,
    WindowPlan,
    cycles_of_sums,
    depthwise_plan,
    direct_plan,
)
from cnncc.targets.llvm.schedule.products import Dots, dots_for
from cnncc.targets.llvm.winograd_rules import (
    WinogradPlan,
    added_bytes,
    choose_winograd,
    direct_cycles,
    winograd_plan,
    winograd_plans,
)

Layer = TypeVar("Layer")

MARGIN = 0.97
"""Measured time, against the rule's choice, above which that choice stays: less is lost in the noise of a network."""


class Plans:
    """The rules' knobs.

    Args:
        machine: What kernels are for.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def of(self, dtype: str) -> Plans:
        """Return where kernels of an element type get their knobs: float16 has the rules' alone."""
        seen = self.machine.of(dtype)
        return self if seen is self.machine else Plans(seen)

    def direct(self, shape: ConvShape) -> DirectPlan:
        """Return the knobs of a direct convolution."""
        return direct_plan(shape, self.machine)

    def dots(self, shape: ConvShape, held: str) -> Dots:
        """Return how a convolution of int8 is summed: as costs least, and as any may be where that is the same.

        Products of matrices need two pixels, and an element of eight channels: images that are not blocked have few.

        Args:
            shape: The convolution, in channels.
            held: Element type of the steps.
        """
        first, *others = dots_for(self.machine, held)
        found = [first, *(dots for dots in others if shape.blocked and shape.pixels >= dots.rows)]
        return min(found, key=lambda dots: cycles_of_sums(shape.in_elements(dots.channels), self.machine))

    def integers(self, shape: ConvShape, _dots: Dots) -> DirectPlan:
        """Return the knobs of a convolution of int8; ``inputs`` of its shape counts elements of some dots."""
        return direct_plan(shape, self.machine)

    def depthwise(self, shape: ConvShape) -> WindowPlan:
        """Return the knobs of a depthwise convolution."""
        return depthwise_plan(shape, self.machine)

    def choose(self, shapes: Mapping[Layer, ConvShape], budget: int, layers: int) -> dict[Layer, WinogradPlan]:
        """Choose the convolutions that use Winograd's method; see `choose_winograd`.

        Args:
            shapes: Convolutions that may.
            budget: Bytes by which the network's weights may grow.
            layers: Convolutions of the network.
        """
        found = {layer: winograd_plans(shape, self.machine) for layer, shape in shapes.items()}
        return choose_winograd(found, budget, layers)


class MeasuredPlans(Plans):
    """Measured knobs where a shape was measured, the rules' elsewhere.

    Args:
        machine: What kernels are for.
        measurements: Taken on such a machine, with the kernels of this version.

    """

    def __init__(self, machine: Machine, measurements: Sequence[Measurement]) -> None:
        super().__init__(machine)
        self._found = {measurement.shape: measurement for measurement in measurements}
        self._rate = self._cycles_a_second()

    def check(self) -> None:
        """Refuse knobs that no kernel has.

        Raises:
            DataRefused: A measurement names some.
        """
        for shape, measurement in self._found.items():
            for times in measurement.methods:
                decode(times.method, times.best.knobs, shape, self.machine)

    def direct(self, shape: ConvShape) -> DirectPlan:
        """Return the fastest knobs of a direct convolution."""
        times = self._times(shape, DIRECT)
        if times is None:
            return super().direct(shape)
        return replace(decode_direct(times.best.knobs, shape, self.machine), measured=True)

    def depthwise(self, shape: ConvShape) -> WindowPlan:
        """Return the fastest knobs of a depthwise convolution."""
        times = self._times(shape, DEPTHWISE)
        if times is None:
            return super().depthwise(shape)
        return replace(decode_depthwise(times.best.knobs, shape, self.machine), measured=True)

    def choose(self, shapes: Mapping[Layer, ConvShape], budget: int, layers: int) -> dict[Layer, WinogradPlan]:
        """Choose by measured times, within the same bounds of size and accuracy.

        A greedy choice by true times could lose to the greedy choice by predicted ones: the better of both is taken.
        """
        found = {layer: self._winograd(shape) for layer, shape in shapes.items()}
        chosen = choose_winograd(found, budget, layers)
        ruled = super().choose(shapes, budget, layers)
        same = {layer: self._measured(shapes[layer], plan) for layer, plan in ruled.items()}
        fits = sum(plan.added for plan in same.values()) <= budget  # another panel pads weights otherwise
        return same if fits and _saved(same) > _saved(chosen) else chosen

    def _winograd(self, shape: ConvShape) -> tuple[WinogradPlan, ...]:
        """Return the plans that are faster than the direct method: by a margin, where the rule does not say so too."""
        ruled = {plan.size: plan for plan in winograd_plans(shape, self.machine)}
        if self._times(shape, DIRECT) is None:
            return tuple(ruled.values())
        plans = []
        for size, method in WINOGRAD.items():
            times, direct = self._times(shape, method), self._times(shape, DIRECT)
            if times is None or direct is None:
                plans += [ruled[size]] if size in ruled else []
            elif times.best.seconds < direct.best.seconds * (1.0 if size in ruled else MARGIN):
                plans.append(self._measured(shape, decode_winograd(times.best.knobs, shape, self.machine)))
        return tuple(plans)

    def _measured(self, shape: ConvShape, plan: WinogradPlan) -> WinogradPlan:
        """Return the fastest plan of the same tile size, with what it saves by measured times in predicted cycles."""
        times, direct = self._times(shape, WINOGRAD[plan.size]), self._times(shape, DIRECT)
        if times is None or direct is None:
            return plan
        best = decode_winograd(times.best.knobs, shape, self.machine)
        return replace(
            best,
            cycles=times.best.seconds * self._rate,
            saved=(direct.best.seconds - times.best.seconds) * self._rate,
            added=added_bytes(shape, self.machine, best),
            measured=True,
        )

    def _times(self, shape: ConvShape, method: str) -> MethodTimes | None:
        measurement = self._found.get(shape)
        return None if measurement is None else measurement.method(method)

    def _cycles_a_second(self) -> float:
        """Return what makes predicted cycles of seconds: layers that were not measured compete for the same bytes."""
        predicted = seconds = 0.0
        for shape in self._found:
            times = self._times(shape, DIRECT)
            if times is not None:
                predicted += direct_cycles(shape, self.machine)
                seconds += times.best.seconds
        return predicted / seconds if seconds else 1.0


def _saved(chosen: Mapping[Layer, WinogradPlan]) -> float:
    return sum(plan.saved for plan in chosen.values())


def is_current(times: MethodTimes, shape: ConvShape, machine: Machine) -> bool:
    """Whether the rule still chooses the knobs that a measurement calls the rule's."""
    return tuple(rule_knobs(times.method, shape, machine)) == times.rule.knobs


def rule_knobs(method: str, shape: ConvShape, machine: Machine) -> list[int]:
    """Return what the rules choose for a method; nothing where it does not apply."""
    if method == DIRECT:
        return direct_plan(shape, machine).numbers
    if method == DEPTHWISE:
        return depthwise_plan(shape, machine).numbers
    size = next(size for size, name in WINOGRAD.items() if name == method)
    plan = winograd_plan(shape, machine, size)
    return [] if plan is None else plan.numbers
