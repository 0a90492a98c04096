"""`QuantizedNetwork`: a graph that computes what its Q/DQ form computes, and has gradients.

Tensors and weights are rounded where `cnncc.calibration.qdq.insert_qdq` puts Q/DQ, by the same scales. Rounding lets
gradients through (Bengio et al. 2013, straight-through). Scales of tensors are learned by LSQ's gradient (Esser et al.,
*Learned Step Size Quantization*, ICLR 2020), on their logarithm: so they stay positive, and move by shares of
themselves, whatever the optimizer (as in Jain et al., *Trained Quantization Thresholds*, MLSys 2020). Scales of weights
follow the largest weight of each channel, as the Q/DQ writer has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import nn

from cnncc.calibration.plan import Layer, is_mover, plan_for
from cnncc.calibration.qdq import VALUELESS, taken_shifts
from cnncc.calibration.quantize import write
from cnncc.calibration.shift import Shift
from cnncc.calibration.thresholds import LEVELS, SMALLEST_SCALE
from cnncc.compression.graph_network import GraphNetwork
from cnncc.graph.onnx_graph import OnnxGraph

_LOWEST, _HIGHEST = -128.0, 127.0


class QuantizedNetwork(GraphNetwork):
    """A graph with Q/DQ, to be trained.

    Args:
        graph: In float32, prepared (`cnncc.calibration.quantize.prepare`), biases corrected.
        layers: Of this graph, those that are int8.
        scales: Tensor → scale, to begin with.
        shifts: Tensor → shift, likewise; how many steps a tensor is shifted by stays.
        float_adds: Whether additions of two tensors read float tensors.
        learn_scales: Whether scales are trained too.

    Raises:
        UnsupportedGraph: As `GraphNetwork`.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        layers: tuple[Layer, ...],
        scales: Mapping[str, float],
        shifts: Mapping[str, Shift] | None = None,
        *,
        float_adds: bool = False,
        learn_scales: bool = True,
    ) -> None:
        super().__init__(graph)
        self._layers = {layer.node: layer for layer in layers}
        self._float_adds = float_adds
        plan = plan_for(graph, layers, float_adds=float_adds)
        self._floating = plan.floating
        shifted = taken_shifts(graph, plan, shifts or {})
        self.groups = {name: index for index, group in enumerate(plan.groups) for name in group.tensors}
        """Tensor → its place among `scales`."""
        first = [shifted[g.tensors[0]].scale if g.tensors[0] in shifted else scales[g.tensors[0]] for g in plan.groups]
        self.register_buffer("start", torch.tensor(first, dtype=torch.float32))
        self.growth = nn.Parameter(torch.zeros(len(first)), requires_grad=learn_scales)
        """Logarithm of each scale, as a multiple of that which it began with."""
        self._steps = {name: float(round(shift.amount / shift.scale)) for name, shift in shifted.items()}
        self._moved = {
            name for node in graph.nodes if is_mover(node) and set(node.input) & shifted.keys() for name in node.output
        }

    def scales(self) -> torch.Tensor:
        """Return the scale of each group of tensors, ``float32[groups]``."""
        scales: torch.Tensor = self.start * torch.exp(self.growth)  # type: ignore[operator]
        return scales

    def operands(self, node: onnx.NodeProto, values: dict[str, torch.Tensor]) -> list[Any]:
        """Return what a node reads in the Q/DQ graph: rounded tensors and weights, a bias that takes up a shift."""
        found = super().operands(node, values)
        if node.name not in self._floating and node.op_type not in VALUELESS:
            for index, name in enumerate(node.input):
                if name in self.groups:
                    found[index] = self._rounded(name, values)
        layer = self._layers.get(node.name)
        if layer is not None:
            found[1] = round_weight(found[1], layer.axis)
            if layer.tensor in self._steps:
                found[2:] = [self._with_shift(found[1], layer, values)]
        return found

    def forget(self, name: str, values: dict[str, torch.Tensor]) -> None:
        """Let go of a value, and of what it was rounded to."""
        super().forget(name, values)
        values.pop(_rounded_name(name), None)

    def learned(self) -> tuple[dict[str, float], dict[str, Shift]]:
        """Return tensor → scale and tensor → shift, as they are now."""
        each = [float(scale) for scale in self.scales().detach().cpu()]
        scales = {name: each[index] for name, index in self.groups.items()}
        return scales, {name: Shift(self._amount(name).item(), scales[name]) for name in self._steps}

    def quantized(self, digest: str = "") -> OnnxGraph:
        """Return the Q/DQ graph, by the one writer that there is.

        Args:
            digest: Of the calibration table that says the same, to be noted in the model.
        """
        scales, shifts = self.learned()
        layers = tuple(self._layers.values())
        return write(self.trained_graph(), layers, scales, shifts, digest, float_adds=self._float_adds)

    def _amount(self, name: str) -> torch.Tensor:
        return self._steps[name] * self.scales()[self.groups[name]]

    def _rounded(self, name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
        key = _rounded_name(name)
        if key not in values:  # made once, for all readers
            x = values[name]
            if name in self._steps and name not in self._moved:
                x = x - self._amount(name)
            values[key] = fake_quantize(x, self.scales()[self.groups[name]])
        return values[key]

    def _with_shift(self, weight: torch.Tensor, layer: Layer, values: dict[str, torch.Tensor]) -> torch.Tensor:
        others = [axis for axis in range(weight.ndim) if axis != layer.axis]
        taken = self._amount(layer.tensor).double() * weight.double().sum(dim=others)
        return (taken + values[layer.bias] if layer.bias else taken).to(weight.dtype)


def _rounded_name(name: str) -> str:
    """Return a name that no value of a graph bears."""
    return f"{name} rounded, at no node"


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a tensor rounded to steps of int8, zero-point 0, halves to even.

    Args:
        x: float32[n, …].
        scale: float32, a scalar.
    """
    rounded: torch.Tensor = _FakeQuantize.apply(x, scale)  # type: ignore[no-untyped-call]
    return rounded


def round_weight(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Return weights as `cnncc.calibration.qdq.quantize_weight` rounds them; the gradient passes unchanged.

    Args:
        weight: float32.
        axis: Of the output channels.
    """
    rounded: torch.Tensor = _RoundWeight.apply(weight, axis)  # type: ignore[no-untyped-call]
    return rounded


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        steps = x / scale
        whole = steps.round().clamp(_LOWEST, _HIGHEST)
        inside = (steps >= _LOWEST) & (steps <= _HIGHEST)
        ctx.save_for_backward(inside, torch.where(inside, whole - steps, whole))
        return whole * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside, slope = ctx.saved_tensors
        # Esser et al. 2020, equation 3, and section 2.2: divided by √(elements of a sample · Q_P)
        elements = gradient.numel() / max(gradient.shape[0], 1) if gradient.ndim else 1
        return gradient * inside, (gradient * slope).sum() / (elements * _HIGHEST) ** 0.5


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, axis: int) -> torch.Tensor:
        others = [each for each in range(weight.ndim) if each != axis]
        largest = weight.abs().amax(dim=others, keepdim=True).double()
        scales = (largest / LEVELS).clamp_min(SMALLEST_SCALE).float()
        return (weight / scales).round().clamp(-LEVELS, LEVELS) * scales

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
