"""How a model is trained: plain data, which a checkpoint is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn, optim

from cnncc.compression.augment import Augment, parse_augment
from cnncc_runtime.errors import UsageError

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "one-cycle", "constant")
PRECISIONS = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
"""Precision → what Fabric calls it: weights stay in float32."""

_WARMUP_START = 1e-2


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: Passes over the data.
        batch: Samples of a step.
        optimizer: One of `OPTIMIZERS`; momentum of sgd is 0.9, Nesterov's.
        rate: Largest learning rate.
        weight_decay: Of weights with two dimensions or more: biases and normalizations are left alone.
        schedule: One of `SCHEDULES`, step by step. One-cycle rises over a fifth of all steps (Smith and Topin 2018).
        warmup: Epochs over which the rate rises first; not for one-cycle, which has its own.
        clip: Largest norm of all gradients together; None for no bound.
        average: Decay of the moving average of weights that is delivered instead of them; None for none.
        smoothing: Share of a label that is spread over all classes (Szegedy et al. 2016).
        precision: One of `PRECISIONS`.
        patience: Epochs without a better validation after which training ends; None for never.
        augment: As `parse_augment` reads it.
        seed: Of the order of samples, of augmentation, and of torch.
    """

    epochs: int = 30
    batch: int = 32
    optimizer: str = "adam"
    rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0
    clip: float | None = None
    average: float | None = None
    smoothing: float = 0.0
    precision: str = "fp32"
    patience: int | None = None
    augment: str = ""
    seed: int = 0

    def check(self) -> Augment:
        """Refuse what makes no training, before any work; return the augmentation.

        Raises:
            UsageError: A number is out of its bounds, or a name is unknown.
        """
        rules = {
            f"{self.epochs} epochs": self.epochs >= 1,
            f"batches of {self.batch}": self.batch >= 1,
            f"a learning rate of {self.rate:g}": 0 < self.rate < math.inf,
            f"a weight decay of {self.weight_decay:g}": 0 <= self.weight_decay < math.inf,
            f"a warm-up of {self.warmup:g} epochs": 0 <= self.warmup < self.epochs,
            f"gradients clipped at {self.clip}": self.clip is None or 0 < self.clip < math.inf,
            f"a moving average of {self.average}": self.average is None or 0 < self.average < 1,
            f"labels smoothed by {self.smoothing:g}": 0 <= self.smoothing < 1,
            f"a patience of {self.patience}": self.patience is None or self.patience >= 1,
            f"the optimizer '{self.optimizer}'": self.optimizer in OPTIMIZERS,
            f"the schedule '{self.schedule}'": self.schedule in SCHEDULES,
            f"the precision '{self.precision}'": self.precision in PRECISIONS,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise UsageError(f"training makes no sense with {', '.join(wrong)}", hint="see --help for the bounds")
        if self.warmup and self.schedule == "one-cycle":
            raise UsageError("one-cycle has a warm-up of its own", hint="leave --warmup out")
        return parse_augment(self.augment)


def make_optimizer(recipe: Recipe, *models: nn.Module) -> optim.Optimizer:
    """Return the optimizer of models' parameters, those that are trained."""
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return optim.SGD(groups, lr=recipe.rate, momentum=0.9, nesterov=True)
    kind = optim.Adam if recipe.optimizer == "adam" else optim.AdamW
    return kind(groups, lr=recipe.rate)


def make_schedule(recipe: Recipe, optimizer: optim.Optimizer, steps: int) -> optim.lr_scheduler.LRScheduler:
    """Return what sets the learning rate after every step.

    Args:
        recipe: Says how.
        optimizer: Whose.
        steps: Of an epoch.
    """
    total, rising = recipe.epochs * steps, round(recipe.warmup * steps)

    def rate(step: int) -> float:
        if step < rising:
            return _WARMUP_START + (1 - _WARMUP_START) * step / rising
        done = (step - rising) / max(1, total - rising)
        return 1.0 if recipe.schedule == "constant" else (1 + math.cos(math.pi * min(1.0, done))) / 2

    if recipe.schedule == "one-cycle":
        return optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=total + 1, pct_start=0.2)
    return optim.lr_scheduler.LambdaLR(optimizer, rate)
