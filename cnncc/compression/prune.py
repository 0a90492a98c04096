"""`prune()`: fewer channels, or zeros among the weights, a share at a time, with fine-tuning in between.

    structured     channels go, and what is tied to them: every engine does less work
    unstructured   the smallest weights become zero: files pack better, dense engines gain nothing
    2:4            two of every four weights become zero: for the sparse tensor cores of NVIDIA's GPUs

With a target, channels cost what its engine takes for them, measured layer by layer; with a budget of latency, the
share is the smallest that meets it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnncc.compiler.ingest import Model
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compression.channels import Bundle, Channels, Importance
from cnncc.compression.distil import Distillation, Lessons
from cnncc.compression.latency import Engines, Measured
from cnncc.compression.recipe import Recipe
from cnncc.compression.sparsity import Masks, apply_masks, two_of_four, unstructured, zeros
from cnncc.compression.task import Task
from cnncc.compression.train import Material, Opened, open_material, trainable
from cnncc.compression.training import Job, Objective, Watcher, evaluate, fit
from cnncc.compression.weights_file import check_output, is_pruned, save_weights
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.errors import BudgetExceeded, DependencyMissing, ModelRefused, UsageError

STRUCTURED, UNSTRUCTURED, TWO_OF_FOUR = METHODS = ("structured", "unstructured", "2:4")
IMPORTANCES = ("magnitude", "batchnorm", "taylor")

_TAYLOR_SAMPLES = 512
_SEARCH = 6
"""Engines that are built to find the share that meets a budget: it is then known to 3 %."""
_SPARE = 0.97
"""Share of the budget that is aimed at: two measurements of one engine differ by some percent."""


@dataclass(frozen=True)
class Pruning:
    """What is pruned.

    Attributes:
        method: One of `METHODS`.
        amount: Share of channels, or of weights, that goes; 2:4 is always half. None where ``latency`` says it.
        steps: How many times a part of it goes, with fine-tuning after each.
        finetune: Epochs of fine-tuning, all together.
        importance: One of `IMPORTANCES`, of channels: magnitude of the weights of a group; scale of BatchNorm (Liu et
            al., *Network Slimming*, 2017); or by how much the loss would change, to first order (`Channels.gates`),
            which alone can be compared between layers that cost differently.
        multiple: Channels that are left are a multiple of this.
        most: Share of tied channels that may go.
        latency: Seconds that the engine may take; None for no budget.
        costs: Whether channels cost what they take in the engine, where one is measured; or all alike.
    """

    method: str = STRUCTURED
    amount: float | None = None
    steps: int = 1
    finetune: int = 5
    importance: str = "taylor"
    multiple: int = 8
    most: float = 0.9
    latency: float | None = None
    costs: bool = True

    def check(self) -> None:
        """Refuse what makes no sense, before any work.

        Raises:
            UsageError: A number is out of its bounds, a name is unknown, or flags contradict one another.
        """
        if self.method not in METHODS or self.importance not in IMPORTANCES:
            raise UsageError(f"there is no method '{self.method}' by '{self.importance}'", hint=", ".join(METHODS))
        if self.method == TWO_OF_FOUR and self.amount not in (None, 0.5):
            raise UsageError("2:4 takes half of the weights, neither more nor less", hint="leave --amount out")
        if self.latency is not None and (self.method != STRUCTURED or self.amount is not None):
            raise UsageError("--latency says how much of the channels goes", hint="--method structured, no --amount")
        if self.method != TWO_OF_FOUR and self.latency is None and self.amount is None:
            raise UsageError("nothing says how much is pruned", hint="--amount 0.5, or --target llvm --latency 4ms")
        amount = 0.5 if self.amount is None else self.amount
        if not 0 < amount < 1 or not 0 < self.most < 1:
            raise UsageError(f"{amount:g} is no share that can be pruned", hint="more than 0 and less than 1: 0.5")
        if self.steps < 1 or self.finetune < 0 or self.multiple < 1 or not (self.latency is None or self.latency > 0):
            raise UsageError("steps, multiples and a latency are positive numbers, epochs of fine-tuning not negative")


@dataclass(frozen=True)
class State:
    """A model between steps.

    Attributes:
        share: Of channels or weights that is gone.
        parameters: How many it has, zeros included.
        zeros: Share of the weights of convolutions and linear layers.
        metric: On the validation data; NaN without any.
        engine: What its engine takes; None where no target was named.
    """

    share: float
    parameters: int
    zeros: float
    metric: float
    engine: Measured | None = None


@dataclass(frozen=True)
class Pruned:
    """What came of it.

    Attributes:
        states: The model before, after each step's pruning and fine-tuning, and as it was written.
        task: What it is judged by.
        dense: Layers that 2:4 left alone.
    """

    states: tuple[State, ...]
    task: Task
    dense: tuple[str, ...] = ()


def prune(
    request: ModelRequest,
    material: Material,
    pruning: Pruning,
    recipe: Recipe,
    output: Path,
    watcher: Watcher,
    *,
    engines: Engines | None = None,
    lessons: Lessons | None = None,
    accelerator: str = "auto",
    workers: int = 0,
) -> Pruned:
    """Prune a model, fine-tune it, and write its weights.

    Args:
        request: MODEL and its weights.
        material: What it is fine-tuned and judged on.
        pruning: What goes.
        recipe: How it is fine-tuned; its epochs are ``pruning.finetune``.
        output: ``.safetensors``; of fewer channels than the factory gives, its header says so.
        watcher: Told how it goes.
        engines: Measures; needed for a budget of latency, and makes channels cost what they take.
        lessons: What fine-tuning is taught by the model as it was; None for nothing.
        accelerator: As `training.fit` has it.
        workers: As `training.fit` has it.

    Raises:
        BudgetExceeded: No share of channels meets the latency; the fastest that was found is written.
        UsageError: The flags make no sense.
        ModelRefused: The model cannot be traced, or does not run with fewer channels.
        As `training.fit`.
    """
    pruning.check()
    check_output(output)
    recipe = replace(recipe, epochs=max(1, pruning.finetune))
    recipe.check()
    if pruning.latency is not None and engines is None:
        raise UsageError("a budget of latency needs an engine that is measured", hint="add --target llvm")
    model, module = trainable(request)
    work = _Work(model, module, open_material(model, material, recipe), pruning, recipe, watcher, engines)
    work.options = {"accelerator": accelerator, "workers": workers}
    with tempfile.TemporaryDirectory(prefix="cnncc-prune-") as folder:
        return work.run(Path(folder), output, lessons, was_pruned=is_pruned(request.weights))


@dataclass
class _Work:
    """A model under the knife."""

    model: Model
    module: nn.Module
    data: Opened
    pruning: Pruning
    recipe: Recipe
    watcher: Watcher
    engines: Engines | None
    options: dict[str, Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    missed: str = ""

    def run(self, folder: Path, output: Path, lessons: Lessons | None, *, was_pruned: bool) -> Pruned:
        """Prune, step by step, and write what is left."""
        structured = self.pruning.method == STRUCTURED
        teacher = copy.deepcopy(self.module)
        bundles: dict[str, Path] = {}
        if self.engines is not None:
            bundles["before"] = folder / "before.cnncc"
            self.engines.build(self.module, bundles["before"])
            self.costs = self.engines.layers(bundles["before"]) if self.pruning.costs else {}
        states = [self._state(0.0)]
        share = self._share(folder, bundles)
        channels = Channels(self.module, self._examples()) if structured else None
        for step in range(1, self.pruning.steps + 1):
            part = share * step / self.pruning.steps
            masks = self._cut(channels, part)
            states.append(self._state(part))
            if self.pruning.finetune:
                taught = Distillation(teacher, self.module, self.data.task, lessons) if lessons else None
                self._finetune(step, masks, taught)
                states.append(self._state(part))
        save_weights(self.module, output, {"pruned": self.pruning.method}, pruned=structured or was_pruned)
        if self.engines is not None:
            bundles["after"] = folder / "after.cnncc"
            self.engines.build(self.module, bundles["after"])
            found = self.engines.compare(bundles)
            states[0] = replace(states[0], engine=found["before"])
            states[-1] = replace(states[-1], engine=found["after"])
            self._check_latency(found["after"].seconds)
        if self.missed:
            raise BudgetExceeded(self.missed, where=[str(output)], hint="a smaller model, or int8, may meet it")
        return Pruned(tuple(states), self.data.task, self.dense)

    def _check_latency(self, seconds: float) -> None:
        latency = self.pruning.latency
        if latency is not None and seconds > latency and not self.missed:
            self.missed = f"the engine takes {seconds * 1e3:.3f} ms, and {latency * 1e3:g} ms are allowed"

    def _examples(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in random_feeds(self.model.inputs, batch=2).values())

    def _state(self, share: float) -> State:
        metric = float("nan")
        if self.data.validation is not None:
            metric = evaluate(self.module, self.data.task, self.data.validation)
        count = sum(parameter.numel() for parameter in self.module.parameters())
        return State(share, count, zeros(self.module), metric)

    def _cut(self, channels: Channels | None, share: float) -> Masks:
        """Take away until a share is gone; return what must stay zero."""
        if channels is not None:
            importance = importance_of(self.pruning, self.module, channels, self.data, self.recipe.batch)
            channels.prune(
                share, importance, cost=cost_of(self.costs), multiple=self.pruning.multiple, most=self.pruning.most
            )
            return {}
        if self.pruning.method == TWO_OF_FOUR:
            masks, self.dense = two_of_four(self.module)
        else:
            masks = unstructured(self.module, share)
        apply_masks(self.module, masks)
        return masks

    def _finetune(self, step: int, masks: Masks, objective: Objective | None) -> None:
        job = Job(
            self.module,
            replace(self.recipe, epochs=max(1, round(self.pruning.finetune / self.pruning.steps))),
            self.data.task,
            self.data.train,
            self.data.validation,
            objective=objective,
            after_step=lambda module: apply_masks(module, masks),
            identity={"model": self.model.digest, "pruning": f"{self.pruning}, step {step}"},
            **self.options,
        )
        fit(job, self.watcher)

    def _share(self, folder: Path, bundles: Mapping[str, Path]) -> float:
        """Return the share that goes: as asked for, or the smallest whose engine meets the budget."""
        latency = self.pruning.latency
        if latency is None:
            return 0.5 if self.pruning.amount is None else self.pruning.amount
        assert self.engines is not None
        if self.engines.compare(bundles)["before"].seconds <= latency:
            raise UsageError(f"the engine meets {latency * 1e3:g} ms as it is", hint="a smaller --latency, or --amount")
        low, high, met = 0.0, self.pruning.most, False
        for number in range(_SEARCH):
            share = high if number == 0 else (low + high) / 2
            seconds = self._try(folder / f"try-{number}.cnncc", share)
            self.watcher.note(f"{share:.1%} of the channels: {seconds * 1e3:.3f} ms")
            if seconds <= _SPARE * latency or (number == 0 and seconds <= latency):
                high, met = share, True
            elif number == 0:
                self.missed = f"no share of channels takes the engine to {latency * 1e3:g} ms: {seconds * 1e3:.3f} ms"
                return share
            else:
                low = share
        assert met
        return high

    def _try(self, bundle: Path, share: float) -> float:
        """Return what an engine takes with a share of the channels gone; what it computes does not matter."""
        assert self.engines is not None
        copied = copy.deepcopy(self.module)
        channels = Channels(copied, self._examples())
        channels.prune(
            share,
            importance_of(self.pruning, copied, channels, self.data, self.recipe.batch),
            cost=cost_of(self.costs),
            multiple=self.pruning.multiple,
            most=self.pruning.most,
        )
        self.engines.build(copied, bundle)
        return self.engines.compare({"variant": bundle})["variant"].seconds


def importance_of(pruning: Pruning, module: nn.Module, channels: Channels, data: Opened, batch: int) -> Importance:
    """Return what says what a module's channels are worth.

    Args:
        pruning: Says how.
        module: The module.
        channels: Its channels.
        data: For ``taylor``, whose loss it is; the first samples are used.
        batch: Samples of a run.

    Raises:
        DependencyMissing: `torch_pruning` is not installed.
        ModelRefused: It has no BatchNorm to judge by.
    """
    if pruning.importance == "taylor":
        scores = _scores(module, channels, data, batch)
        return lambda group: scores[channels.name_of(group)]
    try:
        from torch_pruning import importance
    except ImportError as exc:
        raise DependencyMissing("structured pruning needs torch-pruning", hint="pip install 'cnncc[train]'") from exc
    norms = nn.modules.batchnorm._BatchNorm
    if pruning.importance == "batchnorm" and not any(isinstance(part, norms) for part in module.modules()):
        raise ModelRefused(
            "channels cannot be judged by the scales of BatchNorm: the model has no BatchNorm",
            hint="--importance magnitude, or taylor",
        )
    kinds = {"batchnorm": importance.BNScaleImportance, "magnitude": importance.GroupMagnitudeImportance}
    found: Importance = kinds[pruning.importance]()
    return found


def _scores(module: nn.Module, channels: Channels, data: Opened, batch: int) -> dict[str, torch.Tensor]:
    """Return layer → the squared change of the loss without each channel, the mean over batches."""
    module.eval()  # statistics of BatchNorm stay
    scores: dict[str, torch.Tensor] = {}
    count = min(_TAYLOR_SAMPLES, len(data.train))
    for start in range(0, count, batch):
        [taken] = data.train.__getitems__(range(start, min(start + batch, count)))
        module.zero_grad(set_to_none=True)
        loss: Any = data.task.loss(module(*taken.inputs), taken.targets)
        loss.backward()
        for layer, change in channels.gates().items():
            scores[layer] = scores.get(layer, torch.zeros_like(change)) + change.square()
    module.zero_grad(set_to_none=True)
    return scores


def cost_of(costs: Mapping[str, float]) -> Callable[[Bundle], float]:
    """Return what a unit of a bundle takes in an engine: its part of every layer that makes or reads it.

    Args:
        costs: Module path → seconds of its convolution or product, before anything was pruned; where there are none,
            every unit costs the same.
    """
    if not costs:
        return lambda _: 1.0
    return lambda bundle: sum(costs.get(layer, 0.0) for layer in bundle.layers) / bundle.first
