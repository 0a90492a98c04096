"""Structured pruning: which channels must go together, and taking them out.

Dependencies are `torch_pruning`'s (Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023): what is added
to, multiplied with, concatenated with or grouped with a channel goes with it. What to take is decided here: the
channels whose worth is least for what they cost.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnncc_runtime.errors import DependencyMissing, ModelRefused

Importance = Callable[[Any], "torch.Tensor | None"]
"""A group of `torch_pruning` → what each of its channels is worth; None where nothing of it has weights."""

_NO_TRACE = "--method unstructured or 2:4 needs no trace"


@dataclass(frozen=True)
class Bundle:
    """Channels that are tied together, in the same number.

    Attributes:
        layer: Path of the layer that they come out of, one of them.
        layers: Paths of all layers that make or read them: path → whether it makes them.
        units: How many; a unit is one channel, or one in each group of grouped convolutions.
        groups: Channels of a unit.
        first: How many units there were before anything was pruned.
    """

    layer: str
    layers: Mapping[str, bool]
    units: int
    groups: int
    first: int


class Channels:
    """The channels of a model, as they depend on one another.

    Args:
        model: In eval mode; pruned in place.
        examples: Inputs that it is traced with, batch size 1 or more.

    Raises:
        ModelRefused: It cannot be traced.
        DependencyMissing: `torch_pruning` is not installed.
    """

    def __init__(self, model: nn.Module, examples: tuple[torch.Tensor, ...]) -> None:
        try:
            import torch_pruning
        except ImportError as exc:
            raise DependencyMissing(
                "structured pruning needs torch-pruning", hint="pip install 'cnncc[train]'"
            ) from exc
        self._model, self._examples = model, examples
        self._names = {module: name for name, module in model.named_modules()}
        self._pruning = torch_pruning
        self._first: dict[str, int] = {}
        self._trace()
        self._first = {bundle.layer: bundle.units for bundle, _ in self._bundles()}

    def bundles(self) -> tuple[Bundle, ...]:
        """Return what may be pruned: not the model's outputs, nor what no layer makes."""
        return tuple(bundle for bundle, _ in self._bundles())

    def gates(self) -> dict[str, torch.Tensor]:
        """Return layer of each bundle → what the loss would change by, to first order, without each of its channels.

        The parameters have gradients of the loss. Without a channel, what its layers give is multiplied by 0, so that
        the change is minus the derivative by that factor: γ·∂γ + β·∂β of the BatchNorm behind a layer, or w·∂w + b·∂b
        of the layer (Molchanov et al., *Importance Estimation for Neural Network Pruning*, CVPR 2019). Of layers that
        are tied, the changes add up; a depthwise convolution only passes on what another layer made.
        """
        found: dict[str, torch.Tensor] = {}
        for bundle, group in self._bundles():
            change = torch.zeros(bundle.units * bundle.groups)
            normed = {dep.source.module for dep, _ in group if isinstance(dep.target.module, _NORMS)}
            for item in group:
                module, dependency = item.dep.target.module, item.dep
                own = isinstance(module, _LAYERS) and module not in normed and not _is_depthwise(module)
                behind = isinstance(module, _NORMS) and not _is_depthwise(dependency.source.module)
                if (own or behind) and self._graph.is_out_channel_pruning_fn(dependency.handler):
                    at = torch.tensor([int(index) for index in item.root_idxs])
                    change.index_add_(0, at, _derivative(module)[torch.tensor(item.idxs)].cpu())
            found[bundle.layer] = change
        return found

    def name_of(self, group: Any) -> str:
        """Return the layer that names the bundle of a group of `torch_pruning`."""
        name: str = self._names[group[0].dep.target.module]
        return name

    @property
    def total(self) -> int:
        """Units that there were before anything was pruned."""
        return sum(self._first.values())

    @property
    def left(self) -> int:
        """Units that there are."""
        return sum(bundle.units for bundle in self.bundles())

    def prune(
        self,
        share: float,
        importance: Importance,
        *,
        cost: Callable[[Bundle], float] = lambda _: 1.0,
        multiple: int = 8,
        most: float = 0.9,
    ) -> dict[str, int]:
        """Take channels out, so that a share of those that there were at first is gone.

        Args:
            share: 0 to 1, of `total`.
            importance: What channels are worth.
            cost: What a unit of a bundle costs; the least worth for its cost goes first.
            multiple: What is left of a bundle is a multiple of this: channels go by blocks of it, those of least worth
                for their cost first; bundles of fewer are left alone.
            most: Share of a bundle that may go.

        Returns:
            Layer → channels that went: as many as were asked for, to half of a block.

        Raises:
            ModelRefused: The model does not run any more; the layer that fails is named.
        """
        found = list(self._bundles())
        ranked: list[tuple[float, int, list[int]]] = []
        for number, (bundle, group) in enumerate(found):
            worth = importance(group)
            if worth is None:
                continue
            values = worth.detach().float().cpu().view(bundle.groups, -1).mean(0)
            order = values.argsort(stable=True)
            for block in _blocks(bundle, multiple, most):
                block_worth = float(values[order[block]].mean())
                ranked.append((block_worth / max(cost(bundle), 1e-12), number, order[block].tolist()))
        ranked.sort(key=lambda each: each[:2])  # stable: of a bundle, what is worth less stays first
        wanted = round(share * self.total) - (self.total - sum(bundle.units for bundle, _ in found))
        taken: dict[int, list[int]] = {}
        for _, number, units in ranked:
            if 2 * wanted < len(units):
                break
            wanted -= len(units)
            taken.setdefault(number, []).extend(units)
        gone: dict[str, int] = {}
        for number, units in taken.items():
            bundle = found[number][0]
            self._take(bundle, units)
            gone[bundle.layer] = len(units) * bundle.groups
        if gone:
            self._check(gone)
            self._trace()
        return gone

    def _take(self, bundle: Bundle, units: Sequence[int]) -> None:
        layer = self._model.get_submodule(bundle.layer)
        indices = [unit + group * bundle.units for group in range(bundle.groups) for unit in units]
        pruner = self._graph.get_pruner_of_module(layer)
        self._graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(indices)).prune()

    def _trace(self) -> None:
        self._model.eval()
        _check_runs(self._model, self._examples)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph = self._pruning.DependencyGraph().build_dependency(self._model, self._examples)
        except Exception as exc:  # the tracer may raise anything
            layer = _not_followed(exc, self._names)
            raise ModelRefused(
                f"the model cannot be traced for pruning: {_reason(exc)}",
                where=[f"what comes after {layer}"] if layer else (),
                hint=_NO_TRACE,
            ) from exc

    def _bundles(self) -> Iterator[tuple[Bundle, Any]]:
        kinds = [nn.modules.conv._ConvNd, nn.Linear]
        for group in self._graph.get_all_groups(root_module_types=kinds):
            layers: dict[str, bool] = {}
            groups, ends = 1, False
            for dependency, _ in group:
                node, module = dependency.target, dependency.target.module
                made = bool(self._graph.is_out_channel_pruning_fn(dependency.handler))
                # what only reads the channels (the trigger of what lies behind it) makes others of its own
                ends = ends or (made and not node.outputs and self._graph.is_out_channel_pruning_fn(dependency.trigger))
                if module in self._names and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                    layers[self._names[module]] = made
                groups = max(groups, _groups_of(module))
            root = group[0].dep.target.module
            if not ends and root in self._names:
                name, units = self._names[root], int(self._graph.get_out_channels(root)) // groups
                yield Bundle(name, layers, units, groups, self._first.get(name, units)), group

    def _check(self, gone: Mapping[str, int]) -> None:
        """Run the model: code of the user's that counts on a number of channels fails here, not on a device."""
        try:
            with torch.no_grad():
                self._model(*self._examples)
        except (RuntimeError, ValueError, IndexError) as exc:
            raise ModelRefused(
                f"the model does not run with fewer channels: {(str(exc).splitlines() or [''])[0][:200]}",
                where=[f"{layer}: {count} channels fewer" for layer, count in gone.items()],
                hint="does its code name a number of channels, as in view(-1, 64 * 7 * 7)? flatten(1) asks for none",
            ) from exc


def _check_runs(model: nn.Module, examples: tuple[torch.Tensor, ...]) -> None:
    """Run a model: where its code fails, the module is known, which the tracer does not tell.

    Raises:
        ModelRefused: It fails; the innermost module whose code was running is named.
    """
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: object) -> None:
        running.pop()

    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with torch.no_grad():
            model(*examples)
    except Exception as exc:  # the model's code may raise anything
        where = running[-1] if running and running[-1] else f"forward of {type(model).__name__}"
        raise ModelRefused(
            f"the model cannot be traced for pruning: {_reason(exc)}", where=[where], hint=_NO_TRACE
        ) from exc
    finally:
        for hook in hooks:
            hook.remove()


def _not_followed(exc: BaseException, names: Mapping[nn.Module, str]) -> str:
    """Return the layer behind whose outputs the tracer failed; empty where its frames say nothing of it.

    They hold the node of its graph that it could not follow (a view, a transpose, a split). From there against the way
    of the data, the first node that is a module of the model says where that is.
    """
    frames, trace = [], exc.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    held = [value for frame in reversed(frames) for value in frame.f_locals.values()]
    waiting = deque([value for value in held if type(value).__name__ == "Node" and hasattr(value, "inputs")][:1])
    seen = {id(node) for node in waiting}
    while waiting:
        node = waiting.popleft()
        if name := names.get(node.module):
            return name
        new = [before for before in node.inputs if id(before) not in seen]
        seen |= {id(before) for before in new}
        waiting.extend(new)
    return ""


def _reason(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:200]}"


def _blocks(bundle: Bundle, multiple: int, most: float) -> Iterator[slice]:
    """Yield what may go of a bundle's units, ordered by their worth: after each block, a multiple is left."""
    least = max(multiple, math.ceil(bundle.first * (1 - most)))
    begin, end = 0, bundle.units % multiple or multiple
    while bundle.units - end >= least:
        yield slice(begin, end)
        begin, end = end, end + multiple


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._BatchNorm,)


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def _derivative(module: Any) -> torch.Tensor:
    """Return the derivative of the loss by a factor of each output channel, at 1."""
    transposed = bool(getattr(module, "transposed", False))
    change = torch.zeros(module.weight.shape[1 if transposed else 0])
    for parameter in (module.weight, module.bias):
        if parameter is not None and parameter.grad is not None:
            product = (parameter.detach() * parameter.grad).float()
            product = product.transpose(0, 1) if transposed and product.ndim > 1 else product
            change = change.to(product.device) + product.flatten(1).sum(1) if product.ndim > 1 else change + product
    return change


def _groups_of(module: Any) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1 if module.groups == module.in_channels else module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1
