"""The loop: a model, a recipe, examples, and an objective that may ask more than the labels.

Precision, devices and data parallelism are Fabric's (`lightning_fabric`); what makes a training repeatable is here. The
order of an epoch's samples and their augmentation follow from the seed and the numbers of epoch and step, never from
what was drawn before, so a training that was killed goes on from its checkpoint, and ends with the same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from cnncc.compression.augment import Augment
from cnncc.compression.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from cnncc.compression.examples import Batch, Examples
from cnncc.compression.recipe import PRECISIONS, Recipe, make_optimizer, make_schedule
from cnncc.compression.task import Task, check_targets, first_output
from cnncc_runtime.errors import DataRefused, DependencyMissing, ModelRefused, TrainingDiverged

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SAVE_EVERY = 30.0
"""Seconds between checkpoints within an epoch; one is written after each."""
_EVALUATED = 128
_SEED_BITS = 63
_DIGITS = 6
"""Of shares: torchmetrics divides in float32, whose last digits would decide between models that are as good."""

Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
"""Model and batch → loss and first output."""


class Watcher(Protocol):
    """Told how a training goes."""

    def step(self, epoch: int, done: float) -> None:
        """``done`` of an epoch's steps, 0 to 1, are over."""

    def epoch(self, number: int, facts: Mapping[str, float]) -> None:
        """An epoch is over: its loss, learning rate, and the metric where there is validation data."""

    def note(self, text: str) -> None:
        """What the user did not ask for but should know."""


class StageWatcher(Watcher, Protocol):
    """Told how a chain goes that trainings are parts of."""

    def stage(self, name: str, seconds: float | None, detail: str) -> None:
        """Something other than training is over: the seconds that it took (None: made before), and what came of it."""


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        model: Changed in place.
        recipe: How.
        task: What for.
        train: To train on.
        validation: To judge by; None for none, and then the last weights are delivered.
        objective: What is made small; by default the task's loss.
        after_step: Called with the model after each step: keeps pruned weights at zero.
        beside: What the objective trains beside the model, and nobody gets; None for nothing.
        checkpoint: Where it is kept; None for nowhere. It stays when training is over, until whoever asked for it has
            written what came of it, since the disk may be full then.
        identity: What it depends on that is not here: the model's digest, the teacher's.
        accelerator: As Fabric names it: ``auto``, ``cpu``, ``cuda``.
        workers: Processes that read samples which are not in memory.
    """

    model: nn.Module
    recipe: Recipe
    task: Task
    train: Examples
    validation: Examples | None = None
    objective: Objective | None = None
    after_step: Callable[[nn.Module], None] = lambda _: None
    beside: nn.Module | None = None
    checkpoint: Path | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    accelerator: str = "auto"
    workers: int = 0


@dataclass(frozen=True)
class Trained:
    """What came of a training; the model holds its weights, and is in eval mode.

    Attributes:
        epochs: That were trained: fewer than asked for where training ended early.
        best: The metric of the weights on the validation data; NaN without any.
        best_epoch: The epoch that they are of.
        history: Of each epoch: loss, metric, learning rate.
        resumed: Epochs that an earlier run had done.
    """

    epochs: int
    best: float
    best_epoch: int
    history: tuple[Mapping[str, float], ...]
    resumed: int = 0


def fit(job: Job, watcher: Watcher) -> Trained:
    """Train a model, or go on where a training was cut short.

    Args:
        job: The training.
        watcher: Told how it goes.

    Raises:
        TrainingDiverged: The loss became NaN or infinite; the checkpoint before it is kept.
        DependencyMissing: Fabric is not installed.
        DataRefused: Samples and outputs do not go together.
        ModelRefused: The model fails in training.
        UsageError: The recipe makes no sense, or the checkpoint is of another training.
        StorageFailed: The checkpoint cannot be written.
    """
    augment = job.recipe.check()
    try:
        from lightning_fabric import Fabric
    except ImportError as exc:
        raise DependencyMissing(f"training needs {exc.name}", hint="pip install 'cnncc[train]'") from exc
    _check_data(job)
    fabric = Fabric(accelerator=job.accelerator, devices="auto" if job.accelerator != "cpu" else 1,
                    precision=PRECISIONS[job.recipe.precision])  # type: ignore[arg-type]  # fmt: skip
    fabric.launch()
    with torch.random.fork_rng(devices=[]), _deterministic():
        torch.manual_seed(job.recipe.seed)
        return _Fit(job, augment, fabric, watcher).run()


def circumstances(recipe: Recipe, train: Examples, validation: Examples | None) -> dict[str, str]:
    """Return what every training depends on beside its model, as a checkpoint is held against it."""
    return {
        "task": train.kind,
        "data": train.identity,
        "validation": validation.identity if validation else "none",
        **{name: str(value) for name, value in vars(recipe).items()},
        "torch": str(torch.__version__),  # else a class of torch's, which no checkpoint may hold
        "threads": str(torch.get_num_threads()),
    }


def evaluate(model: nn.Module, task: Task, examples: Examples, *, device: torch.device | None = None) -> float:
    """Return the metric of a model on examples.

    Raises:
        DataRefused: Samples and outputs do not go together.
    """
    before = model.training
    model.eval()
    measure: Any = None
    with torch.no_grad():
        for start in range(0, len(examples), _EVALUATED):
            [batch] = examples.__getitems__(range(start, min(start + _EVALUATED, len(examples))))
            batch = _on(batch, device)
            outputs = first_output(model(*batch.inputs)).float()
            if measure is None:
                check_targets(examples.kind, outputs, batch.targets)
                measure = task.measure(outputs.shape[1] if outputs.ndim > 1 else 1).to(outputs.device)
            measure.update(outputs, batch.targets)
    model.train(before)
    value = float(measure.compute())
    return round(value, _DIGITS) if task.percent else value


class _Fit:
    """One training under way."""

    def __init__(self, job: Job, augment: Augment, fabric: Fabric, watcher: Watcher) -> None:
        self._job, self._augment, self._fabric, self._watcher = job, augment, fabric, watcher
        self._batches = _Batches(len(job.train), job.recipe.batch, job.recipe.seed)
        beside = [job.beside.to(fabric.device)] if job.beside is not None else []
        optimizer = make_optimizer(job.recipe, job.model, *beside)
        self._model, self._optimizer = fabric.setup(job.model, optimizer)
        self._schedule = make_schedule(job.recipe, optimizer, len(self._batches))
        self._average = (
            AveragedModel(job.model, multi_avg_fn=_moving(job.recipe.average), use_buffers=True)
            if job.recipe.average
            else None
        )
        self._state = Checkpoint(self._identity())
        self._saved = time.monotonic()

    def run(self) -> Trained:
        """Train to the end."""
        job, state = self._job, self._restored()
        resumed = state.epoch
        while state.epoch < job.recipe.epochs and not self._is_over():
            self._epoch()
        if state.best_weights:
            job.model.load_state_dict(state.best_weights)
        job.model.eval()
        return Trained(state.epoch, state.best, state.best_epoch, tuple(state.history), resumed)

    def _is_over(self) -> bool:
        patience, state = self._job.recipe.patience, self._state
        return patience is not None and state.epoch - state.best_epoch >= patience

    def _epoch(self) -> None:
        job, state = self._job, self._state
        self._model.train()
        loader = DataLoader(
            job.train,
            batch_sampler=[self._mine(batch) for batch in self._batches.of(state.epoch, state.step)],
            collate_fn=_only,
            num_workers=0 if job.train.kept else job.workers,
            generator=torch.Generator(),  # it draws one number, which the model's dropout would miss after a restart
        )
        for batch in loader:
            self._step(batch)
            state.step += 1
            self._watcher.step(state.epoch + 1, state.step / len(self._batches))
            if time.monotonic() - self._saved > SAVE_EVERY:
                self._save()
        self._end_epoch()

    def _mine(self, batch: list[int]) -> list[int]:
        """Return what of a batch this process trains on, where several share it; none is left without a sample."""
        rank, size = self._fabric.global_rank, self._fabric.world_size
        return batch[rank::size] or batch[:1]

    def _step(self, batch: Batch) -> None:
        job, state = self._job, self._state
        generator = torch.Generator().manual_seed(_seed(job.recipe.seed, state.epoch, state.step + 1))
        images, *others = batch.inputs
        targets = batch.targets
        if images.ndim == 4:
            images, targets = self._augment.apply(images.cpu(), targets.cpu(), generator)
        batch = _on(Batch((images, *others), targets), self._fabric.device)
        try:
            loss, outputs = (job.objective or self._supervised)(self._model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError) as exc:
            raise ModelRefused(
                f"the model fails in training: {(str(exc).splitlines() or [type(exc).__name__])[0][:300]}",
                where=[f"epoch {state.epoch + 1}, step {state.step + 1}"],
            ) from exc
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise self._diverged(value)
        self._optimizer.zero_grad()
        self._fabric.backward(loss)
        for parameter in job.beside.parameters() if job.beside is not None else ():
            assert parameter.grad is not None
            mean = self._fabric.all_reduce(parameter.grad)  # between processes, as Fabric does for the model
            parameter.grad.copy_(cast(torch.Tensor, mean))
        if job.recipe.clip is not None:
            self._fabric.clip_gradients(self._model, self._optimizer, max_norm=job.recipe.clip)
        self._optimizer.step()
        self._schedule.step()
        job.after_step(job.model)
        if self._average is not None:
            self._average.update_parameters(job.model)
        state.total += value * len(outputs)

    def _supervised(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = first_output(model(*batch.inputs))
        check_targets(self._job.task.kind, outputs, batch.targets)
        return self._job.task.loss(outputs, batch.targets), outputs

    def _end_epoch(self) -> None:
        job, state = self._job, self._state
        facts = {"loss": state.total / len(job.train), "rate": self._optimizer.param_groups[0]["lr"]}
        state.epoch, state.step, state.total = state.epoch + 1, 0, 0.0
        delivered = self._average.module if self._average is not None else job.model
        if job.validation is not None:
            facts["metric"] = evaluate(delivered, job.task, job.validation, device=self._fabric.device)
        if job.validation is None or job.task.better(facts["metric"], state.best):
            state.best, state.best_epoch = facts.get("metric", float("nan")), state.epoch
            state.best_weights = {
                name: tensor.detach().cpu().clone() for name, tensor in delivered.state_dict().items()
            }
        state.history.append(facts)
        self._watcher.epoch(state.epoch, facts)
        self._save()

    # ---- checkpoints

    def _identity(self) -> dict[str, str]:
        job = self._job
        return {
            **job.identity,
            **circumstances(job.recipe, job.train, job.validation),
            "parameters": str([tuple(parameter.shape) for parameter in job.model.parameters()]),
            "beside": str([tuple(each.shape) for each in job.beside.parameters()] if job.beside is not None else []),
        }

    def _restored(self) -> Checkpoint:
        job = self._job
        found = (
            read_checkpoint(Checkpoint, job.checkpoint, self._state.identity) if job.checkpoint is not None else None
        )
        if found is None:
            return self._state
        for name, part in self._parts().items():
            part.load_state_dict(found.parts[name])
        if found.generator is not None:
            torch.set_rng_state(found.generator)
        where = f"epoch {found.epoch + 1}" + (f", step {found.step + 1}" if found.step else "")
        self._watcher.note(f"goes on from {job.checkpoint}: {where}")
        self._state = found
        return found

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self._job.model,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "precision": self._fabric.strategy.precision,
        }
        others = {"average": self._average, "beside": self._job.beside}
        return parts | {name: other for name, other in others.items() if other is not None}

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self._job.checkpoint is None or not self._fabric.is_global_zero:
            return
        state = self._state
        state.parts = {name: part.state_dict() for name, part in self._parts().items()}
        state.generator = torch.get_rng_state()
        write_checkpoint(state, self._job.checkpoint)

    def _diverged(self, value: float) -> TrainingDiverged:
        job, state = self._job, self._state
        kept = job.checkpoint is not None and job.checkpoint.exists()
        return TrainingDiverged(
            f"the loss became {value} in epoch {state.epoch + 1}, step {state.step + 1}",
            where=[f"the last finite state is {job.checkpoint}"] if kept else [],
            hint="a smaller --lr, --clip 1, or --warmup 1; NaN from the first step on: look at the data",
        )


class _Batches:
    """The order of samples: another in each epoch, the same for the same seed."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, size, seed
        self._bounds = list(range(0, count, size))
        # a batch of one has no variance, which BatchNorm needs: the one before takes it
        if len(self._bounds) > 1 and count - self._bounds[-1] == 1 and size > 1:
            self._bounds.pop()

    def __len__(self) -> int:
        return len(self._bounds)

    def of(self, epoch: int, start: int) -> list[list[int]]:
        """Return an epoch's batches from a step on."""
        generator = torch.Generator().manual_seed(_seed(self._seed, epoch, 0))
        order = torch.randperm(self._count, generator=generator).tolist()
        ends = [*self._bounds[1:], self._count]
        return [order[begin:end] for begin, end in zip(self._bounds, ends, strict=True)][start:]


def _moving(decay: float) -> Callable[..., None]:
    """Return what moves averages by a step."""
    function: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return function


def _seed(*numbers: int) -> int:
    """Return a seed that follows from numbers, far from that of their neighbours."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def _only(batches: list[Batch]) -> Batch:
    [batch] = batches
    return batch


def _on(batch: Batch, device: torch.device | None) -> Batch:
    return Batch(tuple(x.to(device) for x in batch.inputs), batch.targets.to(device)) if device else batch


def _check_data(job: Job) -> None:
    if job.train.kind != job.task.kind:
        raise DataRefused(f"the labels are for {job.train.kind}, the task is {job.task.kind}")
    if job.train.single is not None:
        raise DataRefused(
            f"all labels are {job.train.single}: there is nothing to tell apart", hint="give data of all classes"
        )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch take the same way each time; operators that know no such way say so and go on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
