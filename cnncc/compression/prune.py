"""`prune()`: fewer channels, or zeros among the weights, a share at a time, with fine-tuning in between.

    structured     channels go, and what is tied to them: every engine does less work
    unstructured   the smallest weights become zero: files pack better, dense engines gain nothing
    2:4            two of every four weights become zero: for the sparse tensor cores of NVIDIA's GPUs

With a target, channels cost what its engine takes for them, measured layer by layer; with a budget of latency, the
share is the smallest that meets it.

A run that was cut short goes on from what it keeps beside the output (`_Progress`), and takes the same channels as one
that was left alone: what was measured is kept, since another measurement might decide otherwise.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnncc.compiler.ingest import Model
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compression.channels import Bundle, Channels, Importance
from cnncc.compression.checkpoint import Kept, checkpoint_of, read_checkpoint, resumable, write_checkpoint
from cnncc.compression.distil import Distillation, Lessons
from cnncc.compression.latency import Engines, Measured
from cnncc.compression.recipe import Recipe
from cnncc.compression.sparsity import Masks, apply_masks, two_of_four, unstructured, zeros
from cnncc.compression.task import Task
from cnncc.compression.train import Material, Opened, open_material, trainable
from cnncc.compression.training import Job, Objective, StageWatcher, circumstances, evaluate, fit
from cnncc.compression.weights_file import check_output, is_pruned, save_weights
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.digests import digest_json
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
    watcher: StageWatcher,
    *,
    engines: Engines | None = None,
    lessons: Lessons | None = None,
    accelerator: str = "auto",
    workers: int = 0,
    fresh: bool = False,
) -> Pruned:
    """Prune a model, fine-tune it, and write its weights; what was cut short goes on.

    Args:
        request: MODEL and its weights.
        material: What it is fine-tuned and judged on.
        pruning: What goes.
        recipe: How it is fine-tuned; its epochs are ``pruning.finetune``.
        output: ``.safetensors``; of fewer channels than the factory gives, its header says so. Checkpoints lie beside
            it until it is written.
        watcher: Told how it goes.
        engines: Measures; needed for a budget of latency, and makes channels cost what they take.
        lessons: What fine-tuning is taught by the model as it was; None for nothing.
        accelerator: As `training.fit` has it.
        workers: As `training.fit` has it.
        fresh: Whether to begin anew where there is a checkpoint.

    Raises:
        BudgetExceeded: No share of channels meets the latency; the fastest that was found is written.
        UsageError: The flags make no sense, or the checkpoint is of another pruning.
        ModelRefused: The model cannot be traced, or does not run with fewer channels.
        As `training.fit`.
    """
    pruning.check()
    check_output(output)
    recipe = replace(recipe, epochs=max(1, pruning.finetune))
    replace(recipe, epochs=max(1, pruning.finetune // pruning.steps)).check()  # a step has these epochs, or one more
    if pruning.latency is not None and engines is None:
        raise UsageError("a budget of latency needs an engine that is measured", hint="add --target llvm")
    model, module = trainable(request)
    data = open_material(model, material, recipe)
    identity = {
        "model": model.digest,
        **material.hooks,
        **circumstances(recipe, data.train, data.validation),
        **{name: str(value) for name, value in vars(pruning).items()},
        **(lessons.identity if lessons else {"distilled": "no"}),
        "engines": f"{engines.target} {engines.profile}" if engines else "none",
    }
    files = checkpoint_of(output), checkpoint_of(output.with_name(f"{output.name}.finetune"))
    with (
        resumable(*files, note=watcher.note, fresh=fresh),
        tempfile.TemporaryDirectory(prefix="cnncc-prune-") as folder,
    ):
        kept = read_checkpoint(_Progress, files[0], identity)
        if kept is not None:
            watcher.note(f"goes on from {files[0]}: {kept.where}")
        work = _Work(model, module, data, pruning, recipe, watcher, engines, files, kept or _Progress(identity))
        work.options = {"accelerator": accelerator, "workers": workers}
        pruned = work.run(Path(folder), output, lessons, was_pruned=is_pruned(request.weights))
    if work.missed:
        raise BudgetExceeded(
            f"{work.missed}; the weights of that are written",
            where=[str(output)],
            hint="a smaller model, or int8 (`cnncc shrink`), may meet it",
        )
    return pruned


Worths = dict[str, torch.Tensor]
"""Layer → what each of its channels is worth."""


@dataclass
class _Progress(Kept):
    """How far a pruning is; kept once something was decided by what was measured, or was cut.

    Attributes:
        costs: Module path → seconds in the engine before anything was cut.
        before: Seconds of that engine; NaN where there is no budget of latency.
        tries: Seconds of the engines of the search for a share, in its order.
        worths: Of each cut of channels: by these the same channels are taken again.
        cuts: Cuts that were made.
        tuned: Cuts that were fine-tuned.
        states: Share, parameters, zeros and metric of each `State`.
        weights: The model's.
        masks: What must stay zero, of the last cut.
        dense: As `Pruned` has it.
    """

    FORM = "cnncc.pruning/1"
    WORK = "pruning"

    costs: dict[str, float] = field(default_factory=dict)
    before: float = float("nan")
    tries: list[float] = field(default_factory=list)
    worths: list[Worths] = field(default_factory=list)
    cuts: int = 0
    tuned: int = 0
    states: list[tuple[float, int, float, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    dense: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Where a run goes on."""
        if not self.cuts:
            return f"engine {len(self.tries) + 1} of the search"
        return f"step {self.cuts}, fine-tuning" if self.tuned < self.cuts else f"step {self.cuts + 1}"


@dataclass
class _Work:
    """A model under the knife."""

    model: Model
    module: nn.Module
    data: Opened
    pruning: Pruning
    recipe: Recipe
    watcher: StageWatcher
    engines: Engines | None
    files: tuple[Path, Path]
    progress: _Progress
    options: dict[str, Any] = field(default_factory=dict)
    missed: str = ""

    def run(self, folder: Path, output: Path, lessons: Lessons | None, *, was_pruned: bool) -> Pruned:
        """Prune, step by step, and write what is left."""
        structured, progress = self.pruning.method == STRUCTURED, self.progress
        teacher = copy.deepcopy(self.module)
        bundles: dict[str, Path] = {}
        if self.engines is not None:
            bundles["before"], since = folder / "before.cnncc", time.monotonic()
            self.engines.build(self.module, bundles["before"])
            if self.pruning.costs and not progress.states:
                progress.costs = self.engines.layers(bundles["before"])
            self.watcher.stage("engine", time.monotonic() - since, "whole")
        if not progress.states:
            self._note_state(0.0)
        share = self._share(folder, bundles)
        channels = Channels(self.module, self._examples()) if structured else None
        self._restore(channels, share)
        for step in range(1, self.pruning.steps + 1):
            part = self._part(share, step)
            if step > progress.cuts:
                self.files[1].unlink(missing_ok=True)  # of the step before, which is over
                since = time.monotonic()
                self._cut(channels, part)
                if channels is not None and step == self.pruning.steps and channels.left == channels.total:
                    self.files[0].unlink(missing_ok=True)  # nothing goes on from it
                    raise UsageError(
                        f"{share:.1%} of {channels.total} channels are none: they go by {self.pruning.multiple}",
                        hint="more --amount, or a smaller --multiple",
                    )
                left = f"{part:.0%} gone: {count_parameters(self.module):,} parameters are left"
                self.watcher.stage("prune", time.monotonic() - since, left if structured else self._zeros_text())
                progress.cuts = step
                self._note_state(part)
                self._keep()
            epochs = self._epochs(step)
            if epochs and step > progress.tuned:
                taught = Distillation(teacher, self.module, self.data.task, lessons) if lessons else None
                self._finetune(step, epochs, taught)
                progress.tuned = step
                self._note_state(part)
                self._keep()
        save_weights(self.module, output, {"pruned": self.pruning.method}, pruned=structured or was_pruned)
        states = [State(*each) for each in progress.states]
        if self.engines is not None:
            bundles["after"], since = folder / "after.cnncc", time.monotonic()
            self.engines.build(self.module, bundles["after"])
            found = self.engines.compare(bundles)
            said = f"{share:.0%} gone: {found['after'].seconds * 1e3:.3f} ms, {1 / found['after'].ratio[0]:.2f} ×"
            self.watcher.stage("engine", time.monotonic() - since, said)
            states[0] = replace(states[0], engine=found["before"])
            states[-1] = replace(states[-1], engine=found["after"])
            self._check_latency(found["after"].seconds)
        return Pruned(tuple(states), self.data.task, progress.dense)

    def _zeros_text(self) -> str:
        return f"{zeros(self.module):.1%} of the weights of convolutions and linear layers are zero"

    def _part(self, share: float, step: int) -> float:
        """Return the share that is gone after a step."""
        return share * step / self.pruning.steps

    def _epochs(self, step: int) -> int:
        """Return the epochs of fine-tuning of a step: over all steps they add up, and the last has its part."""
        whole, steps = self.pruning.finetune, self.pruning.steps
        return whole * step // steps - whole * (step - 1) // steps

    def _restore(self, channels: Channels | None, share: float) -> None:
        """Bring the model to where an earlier run left it."""
        progress = self.progress
        for number, worths in enumerate(progress.worths):
            assert channels is not None
            self._take_again(channels, self._part(share, number + 1), worths)
        if progress.cuts:
            self.module.load_state_dict(progress.weights)

    def _take_again(self, channels: Channels, share: float, worths: Worths) -> None:
        take(channels, share, lambda group: worths.get(channels.name_of(group)), self.pruning, self.progress.costs)

    def _keep(self) -> None:
        self.progress.weights = self.module.state_dict()
        write_checkpoint(self.progress, self.files[0])

    def _check_latency(self, seconds: float) -> None:
        latency = self.pruning.latency
        if latency is not None and seconds > latency and not self.missed:
            self.missed = f"the engine takes {seconds * 1e3:.3f} ms, and {latency * 1e3:g} ms are allowed"

    def _examples(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in random_feeds(self.model.inputs, batch=2).values())

    def _note_state(self, share: float) -> None:
        metric = float("nan")
        if self.data.validation is not None:
            metric = evaluate(self.module, self.data.task, self.data.validation)
        self.progress.states.append((share, count_parameters(self.module), zeros(self.module), metric))

    def _cut(self, channels: Channels | None, share: float) -> None:
        """Take away until a share is gone."""
        progress = self.progress
        if channels is not None:
            progress.worths.append(self._take(channels, self.module, share))
            return
        if self.pruning.method == TWO_OF_FOUR:
            progress.masks, progress.dense = two_of_four(self.module)
        else:
            progress.masks = unstructured(self.module, share)
        apply_masks(self.module, progress.masks)

    def _take(self, channels: Channels, module: nn.Module, share: float) -> Worths:
        return take_channels(channels, module, share, self.pruning, self.data, self.recipe.batch, self.progress.costs)

    def _finetune(self, step: int, epochs: int, objective: Objective | None) -> None:
        job = Job(
            self.module,
            replace(self.recipe, epochs=epochs),
            self.data.task,
            self.data.train,
            self.data.validation,
            objective=objective,
            after_step=lambda module: apply_masks(module, self.progress.masks),
            checkpoint=self.files[1],
            identity={"pruning": digest_json(self.progress.identity), "step of the pruning": f"{step}"},
            **self.options,
        )
        fit(job, self.watcher)

    def _share(self, folder: Path, bundles: Mapping[str, Path]) -> float:
        """Return the share that goes: as asked for, or the smallest whose engine meets the budget."""
        latency = self.pruning.latency
        if latency is None:
            return 0.5 if self.pruning.amount is None else self.pruning.amount
        assert self.engines is not None
        progress = self.progress
        if not progress.tries:
            progress.before = self.engines.compare(bundles)["before"].seconds
        if progress.before <= latency:
            raise UsageError(f"the engine meets {latency * 1e3:g} ms as it is", hint="a smaller --latency, or --amount")
        low, high = 0.0, self.pruning.most
        for number in range(_SEARCH):
            share = high if number == 0 else (low + high) / 2
            if number == len(progress.tries):
                since = time.monotonic()
                progress.tries.append(self._try(folder / f"try-{number}.cnncc", share))
                said = f"{share:.1%} gone: {progress.tries[number] * 1e3:.3f} ms"
                self.watcher.stage("engine", time.monotonic() - since, said)
                self._keep()
            seconds = progress.tries[number]
            if seconds <= _SPARE * latency or (number == 0 and seconds <= latency):
                high = share
            elif number == 0:
                self.missed = (
                    f"no share of channels takes the engine to {latency * 1e3:g} ms: with {share:.0%} gone, "
                    f"it takes {seconds * 1e3:.3f} ms"
                )
                break
            else:
                low = share
        return high

    def _try(self, bundle: Path, share: float) -> float:
        """Return what an engine takes with a share of the channels gone; what it computes does not matter."""
        assert self.engines is not None
        copied = copy.deepcopy(self.module)
        self._take(Channels(copied, self._examples()), copied, share)
        self.engines.build(copied, bundle)
        return self.engines.compare({"variant": bundle})["variant"].seconds


def count_parameters(module: nn.Module) -> int:
    """Return how many parameters a module has, zeros included."""
    return sum(parameter.numel() for parameter in module.parameters())


def take_channels(
    channels: Channels,
    module: nn.Module,
    share: float,
    pruning: Pruning,
    data: Opened,
    batch: int,
    costs: Mapping[str, float],
) -> Worths:
    """Take channels out of a module, those that are worth least for what they cost.

    Args:
        channels: The module's.
        module: The module.
        share: Of the channels that there were at first, which is gone then.
        pruning: Says by what they are judged, and how many may go.
        data: As `importance_of` has it.
        batch: As `importance_of` has it.
        costs: As `cost_of` has them.

    Returns:
        What each was worth.

    Raises:
        As `importance_of` and `Channels.prune`.
    """
    importance, worths = importance_of(pruning, module, channels, data, batch), Worths()

    def noted(group: Any) -> torch.Tensor | None:
        worth = importance(group)
        if worth is not None:
            worths[channels.name_of(group)] = worth.detach().float().cpu()
        return worth

    take(channels, share, noted, pruning, costs)
    return worths


def take(
    channels: Channels, share: float, importance: Importance, pruning: Pruning, costs: Mapping[str, float]
) -> None:
    """Take channels out by what they are worth, as `take_channels` found it or as it was found before."""
    channels.prune(share, importance, cost=cost_of(costs), multiple=pruning.multiple, most=pruning.most)


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
