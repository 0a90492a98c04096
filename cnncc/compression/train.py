"""`train()`: MODEL and DATA to weights in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from cnncc.calibration.data import open_data
from cnncc.compiler.factory import user_function
from cnncc.compiler.ingest import Model, ingest
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compression.checkpoint import checkpoint_of, resumable
from cnncc.compression.examples import Examples
from cnncc.compression.recipe import Recipe
from cnncc.compression.task import REGRESSION, TASKS, Task, task_of
from cnncc.compression.training import Job, Trained, Watcher, fit
from cnncc.compression.weights_file import check_output, is_pruned, save_weights
from cnncc_runtime.errors import ModelRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing


@dataclass(frozen=True)
class Material:
    """What a model is trained on, and what for.

    Attributes:
        data: DATA, with labels.
        validation: Labelled DATA that weights are chosen by; empty for none.
        preprocessing: The contract, instead of the model's own.
        task: One of `TASKS`; empty to follow from the labels.
        loss: The user's, ``file.py:name``: outputs and targets to a scalar; empty for the task's.
        metric: The user's: a callable that makes what has ``update``, ``compute`` and ``higher_is_better`` as metrics
            of torchmetrics do; empty for the task's.
        skip_bad: Whether to leave out samples that cannot be read.
    """

    data: str
    validation: str = ""
    preprocessing: Preprocessing | None = None
    task: str = ""
    loss: str = ""
    metric: str = ""
    skip_bad: bool = False

    @property
    def hooks(self) -> dict[str, str]:
        """The user's own loss and metric, as a checkpoint is held against them."""
        return {"loss": self.loss, "metric": self.metric}


@dataclass(frozen=True)
class Opened:
    """A `Material`, opened.

    Attributes:
        task: What for.
        train: To train on.
        validation: To judge by; None for none.
    """

    task: Task
    train: Examples
    validation: Examples | None


def trainable(request: ModelRequest) -> tuple[Model, nn.Module]:
    """Read a model that can be trained.

    Raises:
        UsageError: MODEL is a graph, which has no training mode.
        As `ingest`.
    """
    model = ingest(request)
    if model.module is None:
        raise UsageError(
            f"{model.source} cannot be trained: it is a graph, without its modules' training mode",
            hint="give file.py:factory, package.module:factory, timm:NAME or torchvision:NAME",
        )
    if not any(parameter.requires_grad for parameter in model.module.parameters()):
        raise ModelRefused(f"{model.source} has no parameter that is trained")
    return model, model.module


def open_material(model: Model, material: Material, recipe: Recipe) -> Opened:
    """Open a model's data, and say what is made small and what is judged by.

    Raises:
        UsageError: The task is unknown, or DATA of no known form.
        DataRefused: The data cannot be used.
    """
    if material.task and material.task not in TASKS:
        raise UsageError(f"'{material.task}' is no task", hint=", ".join(TASKS))
    values = material.task == REGRESSION

    def examples(source: str) -> Examples:
        contract = material.preprocessing or model.preprocessing
        stream = open_data(source, model.inputs, contract, limit=None, skip_bad=material.skip_bad, values=values)
        return Examples(stream, values=values)

    train = examples(material.data)
    task = task_of(material.task or train.kind, recipe.smoothing)
    return Opened(_with_hooks(task, material), train, examples(material.validation) if material.validation else None)


def _with_hooks(task: Task, material: Material) -> Task:
    if material.loss:
        task = replace(task, loss=user_function(material.loss))
    if material.metric:
        make = user_function(material.metric)
        higher = getattr(make(), "higher_is_better", None)
        if higher is None:
            raise UsageError(
                f"{material.metric} does not say which way it is better", hint="give it `higher_is_better = True`"
            )
        name = material.metric.rpartition(":")[2]
        task = replace(task, metric=name, measure=lambda _: make(), higher=bool(higher), percent=False)
    return task


def train(
    request: ModelRequest,
    material: Material,
    recipe: Recipe,
    output: Path,
    watcher: Watcher,
    *,
    accelerator: str = "auto",
    workers: int = 0,
    fresh: bool = False,
) -> tuple[Trained, Task]:
    """Train a model and write its weights; a training that was cut short goes on.

    Args:
        request: MODEL; with ``weights``, training begins with those.
        material: Data and task.
        recipe: How.
        output: ``.safetensors``; its checkpoint lies beside it while training lasts.
        watcher: Told how it goes.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        workers: Processes that read samples.
        fresh: Whether to begin anew where there is a checkpoint.

    Raises:
        As `cnncc.compression.training.fit` and `trainable`.
    """
    check_output(output)
    recipe.check()
    model, module = trainable(request)
    opened = open_material(model, material, recipe)
    job = Job(
        module,
        recipe,
        opened.task,
        opened.train,
        opened.validation,
        identity={"model": model.digest, **material.hooks},
        accelerator=accelerator,
        workers=workers,
    )
    return fit_to(output, job, watcher, pruned=is_pruned(request.weights), fresh=fresh), opened.task


def fit_to(
    output: Path,
    job: Job,
    watcher: Watcher,
    *,
    notes: Mapping[str, str] | None = None,
    pruned: bool = False,
    fresh: bool = False,
) -> Trained:
    """Train a model and write its weights; what was cut short goes on from its checkpoint beside the output.

    Args:
        output: ``.safetensors``.
        job: The training.
        watcher: Told how it goes.
        notes: Kept in the file's header, beside the metric.
        pruned: As `save_weights` has it.
        fresh: Whether to begin anew where there is a checkpoint.

    Raises:
        As `fit` and `save_weights`.
    """
    checkpoint = checkpoint_of(output)
    with resumable(checkpoint, note=watcher.note, fresh=fresh):
        trained = fit(replace(job, checkpoint=checkpoint), watcher)
        judged = {"metric": job.task.text(trained.best)} if job.validation is not None else {}
        save_weights(job.model, output, {**(notes or {}), **judged}, pruned=pruned)
    return trained
