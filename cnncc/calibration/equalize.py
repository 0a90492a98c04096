"""Cross-layer equalization: scales moved between layers so that the channels of a tensor have like ranges.

An int8 tensor has one scale, set by its widest channel; a channel a hundred times narrower keeps one bit. But channels
may be scaled if the layers that read them are scaled back (`cnncc.calibration.channels` finds where), and the network
computes the same.

Two rules set the scales. With activation ranges a, channel i is given a_i·s_i = w_i/s_i, each side relative to its
largest: w_i is the largest weight that reads it, relative to the largest of the weights that share its scale. That is
Xiao et al. 2023 (SmoothQuant, section 4, equation 4, α = 0.5), with weights quantized per output channel. Without
ranges, the producing weights' ranges stand for the activations': Nagel et al. 2019 (Data-Free Quantization Through
Weight Equalization and Bias Correction, section 4.1 and appendix A).

Logit SQNR in dB of Q/DQ models, MSE thresholds (maximum in brackets), without equalization, by weights, by ranges:
seed CNN 44.2 (44.3), 45.3 (45.3), 45.6 (45.9); ResNet 32.2 (30.8), 32.2 (30.6), 32.6 (32.2); MobileNetV2 with ReLU 26.5
(23.5), 26.9 (24.3), 28.5 (28.0); the same with lognormal channel scales 2.7 (1.2), 27.0 (24.5), 28.5 (28.0). Rounding
scales to powers of two, which would keep every bit of the outputs, costs 0.4 to 2.3 dB with ranges; α from 0.25 to
0.75 makes less than 0.7 dB of difference. One training seed each, 600 test images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnncc.calibration.channel_rules import clip_bounds
from cnncc.calibration.channel_walk import FIXED, Weight
from cnncc.calibration.channels import Plan, Site, plan_of
from cnncc.graph.draft import STANDARD, Draft, GraphPass
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import DataRefused, ModelRefused

ROUNDS = 100
"""Passes over all sites at most; networks took 9 to 39 with ranges, 2 to 70 without."""

LIMIT = 2.0**10
"""Largest scale, and the inverse of the smallest: a channel that hardly ever fired must not fill the range."""

IDLE = 2.0**0.125
"""A site whose scales all lie within this factor of 1 is balanced, and left alone."""

_STILL = 2.0**-10
"""Change of a scale's base-2 logarithm below which a round changes nothing."""

_PIECE = 1 << 16
"""Weights that are looked at together: they stay in the second-level cache."""

Log = NDArray[np.float64]
"""Base-2 logarithms; -inf for a range of zero."""


@dataclass(frozen=True)
class Equalization:
    """Scales that a site was given.

    Attributes:
        site: Where.
        scales: Float32 numbers, one a channel of the site: its producers' channels are multiplied by them, its
            consumers' divided. All 1 where the site was balanced.
        rounds: Passes over all sites until the scales stood still.
    """

    site: Site
    scales: tuple[float, ...]
    rounds: int


def equalize(
    graph: OnnxGraph,
    sites: Iterable[Site] | None = None,
    *,
    ranges: Mapping[str, NDArray[np.float64]] | None = None,
    rounds: int = ROUNDS,
) -> tuple[OnnxGraph, tuple[Equalization, ...]]:
    """Scale the channels of a graph's sites; outputs change by float32 rounding only.

    Equalizing again changes nothing (scales are all 1), if ranges are those of the graph then given, and if no scale
    met `LIMIT`. Channels without weights on either side, or that are never active, keep scale 1.

    Args:
        graph: Cleaned; it stays as it is.
        sites: Those to scale, of `find_sites`; None for all, or, without ranges, for those that one layer writes.
        ranges: Tensor → largest absolute activation of each channel, float64[C] (axis 1), for all that the sites'
            consumers read (`Site.tensors`). None: judge by weights alone.
        rounds: Passes at most.

    Returns:
        The scaled graph (the one given, where nothing was to do), and what was done at each site.

    Raises:
        DataRefused: Ranges are missing, of another length, negative or not finite.
        ModelRefused: A site is not one of this graph, or a scaled bias overflows.
    """
    draft = Draft.of(graph)
    plan = plan_of(draft)
    numbers = _default(plan, ranges is None) if sites is None else [_number_of(plan, site) for site in sites]
    free = np.zeros(plan.size, dtype=np.bool_)
    for number in numbers:
        free[plan.spans[number]] = True
    activations = None if ranges is None else _log_ranges(plan, ranges, free)
    logs, taken = _Balance(plan, draft, activations, free).solve(rounds)
    scales = np.exp2(logs).astype(np.float32)
    done = tuple(Equalization(plan.sites[n], tuple(scales[plan.spans[n]].tolist()), taken) for n in numbers)
    return _scaled(graph, draft, plan, scales), done


def apply_equalization(graph: OnnxGraph, equalizations: Iterable[Equalization]) -> OnnxGraph:
    """Return the graph with recorded scales: bit for bit what `equalize` returned for it.

    Raises:
        ModelRefused: A site is not one of this graph, or a scaled bias overflows.
        DataRefused: A record holds the wrong number of scales, or what is no scale.
    """
    draft = Draft.of(graph)
    plan = plan_of(draft)
    scales = np.ones(plan.size, dtype=np.float32)
    for each in equalizations:
        span = plan.spans[_number_of(plan, each.site)]
        scales[span] = _checked(each)
    return _scaled(graph, draft, plan, scales)


def _default(plan: Plan, by_weights: bool) -> list[int]:
    """Return all sites, but by weights alone only those of one layer: sums lost 0.1 to 0.6 dB (four networks)."""
    layers = [{layer.weight for layer in site.producers} for site in plan.sites]
    return [n for n, names in enumerate(layers) if not by_weights or len(names) == 1]


def _number_of(plan: Plan, site: Site) -> int:
    try:
        return plan.sites.index(site)
    except ValueError as exc:
        raise ModelRefused(
            "the equalization is not of this model: its layers or what lies between them differ",
            where=[f"{layer.module} ({layer.weight})" for layer in (*site.producers, *site.consumers)],
            hint="calibrate this model anew",
        ) from exc


def _checked(record: Equalization) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        scales = np.asarray(record.scales, dtype=np.float32)
    if scales.shape != (record.site.channels,) or not (np.isfinite(scales) & (scales > 0)).all():
        raise DataRefused(
            f"an equalization holds {scales.size} scales for {record.site.channels} channels"
            if scales.shape != (record.site.channels,)
            else "an equalization holds a scale that is not a positive number",
            where=[layer.module for layer in record.site.producers],
            hint="the calibration table is damaged: calibrate anew",
        )
    return scales


def _log_ranges(plan: Plan, ranges: Mapping[str, NDArray[np.float64]], free: NDArray[np.bool_]) -> dict[str, Log]:
    wanted = {name: ids.shape for name, ids in plan.tensors.items() if free[ids].any()}
    bad = [name for name, shape in wanted.items() if name not in ranges or not _are_ranges(ranges[name], shape)]
    if bad:
        raise DataRefused(
            "ranges for equalization are missing, of the wrong length, negative or not finite",
            where=bad,
            hint="give the largest absolute activation of each channel of these tensors",
        )
    return {name: _log2(ranges[name]) for name in wanted}


def _are_ranges(values: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    return values.shape == shape and bool((np.isfinite(values) & (values >= 0)).all())


def _log2(values: NDArray[np.float64]) -> Log:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(values), dtype=np.float64)


class _Balance:
    """The search for scales that balance both sides of every channel, in logarithms."""

    def __init__(self, plan: Plan, draft: Draft, activations: dict[str, Log] | None, free: NDArray[np.bool_]) -> None:
        self._plan = plan
        self._weights = [_magnitudes(draft, weight) for weight in plan.weights]
        self._activations = activations
        self._free = free
        self._still: dict[tuple[str, int], Log] = {}
        none = np.zeros(plan.size)
        self._live = free & np.isfinite(self._written(none)) & np.isfinite(self._reading(none))
        self._live[FIXED] = False

    def solve(self, rounds: int) -> tuple[Log, int]:
        """Return the scales' logarithms and the number of rounds."""
        logs = np.zeros(self._plan.size)
        taken, moved = 0, np.inf
        while taken < rounds and moved > _STILL:
            step = np.zeros_like(logs)
            step[self._live] = (self._reading(logs)[self._live] - self._written(logs)[self._live]) / 2
            self._center(step)
            logs += step
            taken, moved = taken + 1, float(np.abs(step).max())
        logs = np.clip(logs, -np.log2(LIMIT), np.log2(LIMIT))
        for span in self._plan.spans:
            if np.abs(logs[span]).max() < np.log2(IDLE):
                logs[span] = 0.0
        return logs, taken

    def _center(self, step: Log) -> None:
        """Let a site's mean stay: a factor common to all its channels changes nothing that is quantized."""
        for span in self._plan.spans:
            live = self._live[span]
            if live.any():
                step[span] -= np.where(live, step[span][live].mean(), 0.0)

    def _written(self, logs: Log) -> Log:
        """Return the ranges of what is written, where it is free."""
        found = np.full(self._plan.size, -np.inf)
        if self._activations is None:
            for weight, values in zip(self._plan.weights, self._weights, strict=True):
                if self._free[weight.outputs].any():
                    np.maximum.at(found, weight.outputs, self._of_outputs(weight, values, logs).ravel())
        else:
            for name, ranges in self._activations.items():
                ids = self._plan.tensors[name]
                np.maximum.at(found, ids, _relative(ranges + logs[ids]))
        return found

    def _reading(self, logs: Log) -> Log:
        """Return the ranges of the weights that read, where these are free."""
        found = np.full(self._plan.size, -np.inf)
        for weight, values in zip(self._plan.weights, self._weights, strict=True):
            if self._free[weight.inputs].any():
                shifts = logs[weight.outputs].reshape(weight.groups, -1)
                if self._activations is not None:  # relative to the largest of those that share a scale
                    largest = self._of_outputs(weight, values, logs)
                    if weight.axis:  # of a ConvTranspose, groups share their output channels' scales
                        largest = largest.max(axis=0, keepdims=True)
                    shifts = shifts - np.where(np.isfinite(largest), largest, 0.0)
                own = self._largest(weight, values, shifts, axis=1 + weight.axis)
                np.maximum.at(found, weight.inputs, own.ravel() - logs[weight.inputs])
        return found

    def _of_outputs(self, weight: Weight, values: NDArray[np.float32], logs: Log) -> Log:
        """Return the largest weight of each output channel, float64[groups, outputs of a group]."""
        shifts = -logs[weight.inputs].reshape(weight.groups, -1)
        own = self._largest(weight, values, shifts, axis=2 - weight.axis)
        return own + logs[weight.outputs].reshape(weight.groups, -1)

    def _largest(self, weight: Weight, values: NDArray[np.float32], shifts: Log, *, axis: int) -> Log:
        """Return the largest along an axis of a block, shifted along it; found once where nothing is shifted."""
        if shifts.any():
            return _shifted_max(values, np.expand_dims(shifts, 3 - axis), axis)
        key = (weight.name, axis)
        if key not in self._still:
            self._still[key] = values.max(axis=axis).astype(np.float64)
        return self._still[key]


def _shifted_max(values: NDArray[np.float32], shifts: Log, axis: int) -> Log:
    """Return the largest of a block's shifted values along axis 1 or 2, in pieces that stay in cache."""
    narrow = shifts.astype(np.float32)
    rows = max(_PIECE // (values.shape[0] * values.shape[2]), 1)
    starts = range(0, values.shape[1], rows)
    parts = [
        (values[:, start : start + rows] + (narrow[:, start : start + rows] if axis == 1 else narrow)).max(axis=axis)
        for start in starts
    ]
    found: Log = (np.max(parts, axis=0) if axis == 1 else np.concatenate(parts, axis=1)).astype(np.float64)
    return found


def _relative(logs: Log) -> Log:
    """Return ranges relative to the largest of a tensor's channels, its first axis."""
    largest = logs.max(axis=0, keepdims=True)
    return logs - np.where(np.isfinite(largest), largest, 0.0)


def _magnitudes(draft: Draft, weight: Weight) -> NDArray[np.float32]:
    """Return the base-2 logarithm of the largest absolute weight of each pair of channels, as a block."""
    array = draft.array(weight.name)
    assert array is not None
    largest = np.abs(array).reshape(*array.shape[:2], -1)
    # NumPy takes as long over axes of one element as over long ones
    pairs = largest[..., 0] if largest.shape[2] == 1 else largest.max(axis=2)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(pairs), dtype=np.float32).reshape(weight.groups, -1, array.shape[1])


def _scaled(graph: OnnxGraph, draft: Draft, plan: Plan, scales: NDArray[np.float32]) -> OnnxGraph:
    """Multiply weights and biases, in float64, rounded once; the graph itself where all scales are 1."""
    if (scales == 1.0).all():
        return graph
    wide = scales.astype(np.float64)
    for weight in plan.weights:
        factors = weight.by_output(wide) / weight.by_input(wide)
        array = draft.array(weight.name)
        if array is not None and (factors != 1.0).any():
            _set(draft, weight.name, array * factors.reshape(*array.shape[:2], *[1] * (array.ndim - 2)))
    uses = draft.uses()
    for offset in plan.offsets:
        name = offset.node.input[offset.index]
        array = draft.array(name)
        if array is None or (wide[offset.ids] == 1.0).all():
            continue
        own = name
        if uses[name] > 1:  # a constant that several nodes read
            own = draft.fresh(f"{name}_equalized")
            offset.node.input[offset.index] = own
            uses[name] -= 1
        _set(draft, own, array * wide[offset.ids].reshape(array.shape))
    return draft.close()


def _set(draft: Draft, name: str, array: NDArray[np.float64]) -> None:
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise ModelRefused(f"'{name}' overflows float32 when it is scaled", hint="quantize without equalization")
    draft.set_constant(name, narrow)


def _relu6_to_relu(draft: Draft) -> int:
    changed = 0
    for node in draft.nodes:
        if node.op_type == "Clip" and node.domain in STANDARD and clip_bounds(draft, node) == (0.0, 6.0):
            bounds = list(node.input[1:])
            node.op_type = "Relu"
            del node.input[1:], node.attribute[:]
            changed += 1
            for name in bounds:
                if name and not draft.uses()[name]:
                    del draft.weights[name]
    return changed


relu6_to_relu = GraphPass("relu6_to_relu", _relu6_to_relu, exact=False)
"""Make every ReLU6, a Clip from 0 to 6, a Relu, through which scales pass. It changes the function: measure it."""
