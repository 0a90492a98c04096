"""What a model is trained for: its loss, and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from cnncc.compiler.zoo import define_torchvision_schemas
from cnncc.compression.augment import IGNORED
from cnncc_runtime.errors import DataRefused

if TYPE_CHECKING:
    from torchmetrics import Metric

CLASSIFICATION, SEGMENTATION, REGRESSION = TASKS = ("classification", "segmentation", "regression")

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""Outputs and targets → a loss, scalar."""


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Attributes:
        kind: One of `TASKS`.
        loss: What training makes small.
        metric: What a model is judged by, in words.
        measure: Makes a metric of torchmetrics for so many classes.
        higher: Whether more of the metric is better.
        percent: Whether it is a share, and shown as percent.
    """

    kind: str
    loss: Loss
    metric: str
    measure: Callable[[int], Metric]
    higher: bool = True
    percent: bool = True

    def better(self, new: float, old: float) -> bool:
        """Tell whether a value of the metric is better than another; none is better than NaN."""
        return (new > old if self.higher else new < old) or (old != old and new == new)

    def text(self, value: float) -> str:
        """Return a value of the metric for people."""
        return f"{self.metric} {100 * value:.2f} %" if self.percent else f"{self.metric} {value:.4g}"


def task_of(kind: str, smoothing: float = 0.0) -> Task:
    """Return a task.

    Args:
        kind: One of `TASKS`.
        smoothing: Share of a label that is spread over all classes.
    """
    if kind == REGRESSION:
        return Task(kind, _squares, "mean absolute error", _mean_absolute_error, higher=False, percent=False)

    def entropy(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        logits = first_output(outputs)
        ignored = IGNORED if targets.ndim > 1 else -100
        return functional.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=ignored)

    if kind == SEGMENTATION:
        return Task(kind, entropy, "mIoU", _mean_overlap)
    return Task(kind, entropy, "top-1", _top_1)


def first_output(outputs: Any) -> torch.Tensor:
    """Return what of a module's outputs is trained and judged: the first, as everywhere in cnncc."""
    while not isinstance(outputs, torch.Tensor):
        outputs = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return outputs


def check_targets(kind: str, outputs: torch.Tensor, targets: torch.Tensor) -> None:
    """See that targets are what outputs can be trained on.

    Args:
        kind: One of `TASKS`.
        outputs: Of one batch.
        targets: Of the same.

    Raises:
        DataRefused: Shapes that do not go together, or labels that no output stands for.
    """
    if kind == REGRESSION:
        if outputs.shape != targets.shape:
            raise DataRefused(
                f"the model gives {list(outputs.shape)}, the data asks for {list(targets.shape)}",
                hint="give y the shape of the model's first output",
            )
        return
    expected = [outputs.shape[0], *outputs.shape[2:]]
    if outputs.ndim < 2 or list(targets.shape) != expected:
        raise DataRefused(
            f"the model gives {list(outputs.shape)}, and the labels are {list(targets.shape)}",
            hint="a class index for [N, classes], a map of classes [H, W] for [N, classes, H, W]; or --task regression",
        )
    known = targets[targets != IGNORED] if kind == SEGMENTATION else targets
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < outputs.shape[1]:
        raise DataRefused(
            f"labels go from {int(known.min())} to {int(known.max())}, and the model has {outputs.shape[1]} classes",
            hint="labels count classes from 0, in the order of the outputs",
        )


def _squares(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(first_output(outputs), targets)


def _top_1(classes: int) -> Metric:
    define_torchvision_schemas()  # torchmetrics imports torchvision where it is installed
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(classes, average="micro")


def _mean_overlap(classes: int) -> Metric:
    define_torchvision_schemas()
    from torchmetrics.classification import MulticlassJaccardIndex

    return MulticlassJaccardIndex(classes, ignore_index=IGNORED)


def _mean_absolute_error(classes: int) -> Metric:
    define_torchvision_schemas()
    from torchmetrics.regression import MeanAbsoluteError

    return MeanAbsoluteError()
