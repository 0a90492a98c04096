"""Training: it learns, it is repeatable to the last bit, whatever interrupts it, and it says what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cnncc.compression import training
from cnncc.compression.examples import Batch
from cnncc.compression.recipe import OPTIMIZERS, SCHEDULES, Recipe
from cnncc.compression.task import task_of
from cnncc.compression.training import Job, Trained, evaluate, fit
from cnncc_runtime.errors import DataRefused, ModelRefused, TrainingDiverged, UsageError
from tests.compression.sets import Silence, examples, net

CLASSES = task_of("classification")
FULL = Recipe(epochs=3, batch=16, augment="shift:1,flip,noise:0.1", average=0.9, clip=1.0, warmup=0.5)


class Killed(BaseException):
    """What ends a run from outside: nothing of ours catches it."""


def job(tmp_path: Path, recipe: Recipe = FULL, **changes: object) -> Job:
    """Return a training on bars, judged on others."""
    made = Job(net(), recipe, CLASSES, examples(tmp_path), examples(tmp_path, seed=1), accelerator="cpu")
    return replace(made, **changes)  # type: ignore[arg-type]


def killed_after(steps: int) -> Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]:
    """Return an objective that ends the run in the middle of a step."""
    left = iter(range(steps))

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(*batch.inputs)
        if next(left, None) is None:
            raise Killed
        return CLASSES.loss(outputs, batch.targets), outputs

    return objective


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_network_learns(tmp_path: Path, optimizer: str, schedule: str) -> None:
    rate = 0.05 if optimizer == "sgd" else 5e-3
    trained = fit(
        job(tmp_path, Recipe(epochs=6, batch=16, optimizer=optimizer, schedule=schedule, rate=rate)), Silence()
    )
    assert trained.best > 0.9
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


def test_a_share_has_no_noise_of_float32(tmp_path: Path) -> None:
    model, judges = net(), examples(tmp_path, count=300)
    [batch] = judges.__getitems__(range(300))
    with torch.no_grad():
        right = int((model.eval()(*batch.inputs).argmax(1) == batch.targets).sum())
    assert evaluate(model, CLASSES, judges) == round(right / 300, 6)


def test_the_weights_that_were_best_are_delivered(tmp_path: Path) -> None:
    made = job(tmp_path, Recipe(epochs=5, batch=16, rate=5e-3))
    trained = fit(made, Silence())
    assert made.validation is not None
    assert trained.best == max(facts["metric"] for facts in trained.history)
    assert training.evaluate(made.model, CLASSES, made.validation) == trained.best
    assert not made.model.training


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 9, 11])
def test_a_training_that_was_killed_ends_with_the_same_weights(
    tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    whole, watcher = job(tmp_path), Silence()
    fit(whole, watcher)
    path = tmp_path / "checkpoint"
    cut = replace(whole, model=net(), checkpoint=path, objective=killed_after(steps))
    with pytest.raises(Killed):
        fit(cut, Silence())
    again, told = replace(whole, model=net(seed=5), checkpoint=path), Silence()
    trained = fit(again, told)
    assert steps + told.steps == watcher.steps
    assert f"goes on from {path}" in told.notes[0]
    assert trained.history == tuple(watcher.epochs)
    for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert path.exists(), "until what came of it is written, which may fail"
    once_more, silent = replace(whole, model=net(seed=6), checkpoint=path), Silence()
    assert fit(once_more, silent).history == trained.history
    assert silent.steps == 0
    assert torch.equal(next(once_more.model.parameters()), next(whole.model.parameters()))


def test_the_same_seed_gives_the_same_weights_and_another_others(tmp_path: Path) -> None:
    made = [job(tmp_path, replace(FULL, seed=seed)) for seed in (3, 3, 4)]
    for each in made:
        fit(each, Silence())
    first, second, third = (next(each.model.parameters()) for each in made)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_torch_draws_on_afterwards_as_if_nothing_had_been(tmp_path: Path) -> None:
    made = job(tmp_path, replace(FULL, epochs=1))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(made, Silence())
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_checkpoint_of_another_training_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    made = job(tmp_path, checkpoint=path, objective=killed_after(5))
    with pytest.raises(Killed):
        fit(made, Silence())
    other = replace(made, model=net(), recipe=replace(FULL, rate=2e-3, batch=8), objective=None)
    with pytest.raises(UsageError, match="differs in batch, rate") as caught:
        fit(other, Silence())
    assert "--fresh" in caught.value.hint
    wider = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 4))
    with pytest.raises(UsageError, match="differs in parameters"):
        fit(replace(made, model=wider, objective=None), Silence())


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        fit(job(tmp_path, checkpoint=path, objective=killed_after(5)), Silence())
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(UsageError, match="cannot be read"):
        fit(job(tmp_path, checkpoint=path), Silence())


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("executed",))

    path = tmp_path / "checkpoint"
    torch.save({"form": Hostile()}, path)
    with pytest.raises(UsageError, match="cannot be read"):
        fit(job(tmp_path, checkpoint=path), Silence())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training_and_names_the_step(tmp_path: Path, value: float) -> None:
    steps = iter(range(100))

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(*batch.inputs)
        return outputs.sum() * (value if next(steps) == 6 else 1e-3), outputs

    path = tmp_path / "checkpoint"
    with pytest.raises(TrainingDiverged, match=r"epoch 2, step 3") as caught:
        fit(job(tmp_path, objective=objective, checkpoint=path), Silence())
    assert str(path) in caught.value.where[0]
    assert caught.value.exit_code == 1
    assert path.exists()


def test_training_ends_early_without_a_better_validation(tmp_path: Path) -> None:
    made = job(tmp_path, Recipe(epochs=50, batch=16, rate=1e-9, patience=2))
    assert fit(made, Silence()).epochs == 3


def test_a_batch_of_one_is_never_left_over(tmp_path: Path) -> None:
    made = job(tmp_path, Recipe(epochs=1, batch=16), train=examples(tmp_path, count=33))
    assert fit(made, Silence()).epochs == 1  # BatchNorm refuses one value per channel where images are 1×1


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.data())
def test_batches_hold_every_sample_once_and_go_on_where_they_were(
    count: int, size: int, epoch: int, data: st.DataObject
) -> None:
    batches = training._Batches(count, size, seed=3)
    whole = batches.of(epoch, 0)
    assert sorted(number for batch in whole for number in batch) == list(range(count))
    assert len(whole) == len(batches)
    assert all(len(batch) <= size + 1 for batch in whole)
    start = data.draw(st.integers(0, len(whole)))
    assert batches.of(epoch, start) == whole[start:]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.full(64, 2), "all labels are 2"),
        (np.arange(64) % 5, "labels go from 0 to 4, and the model has 4 classes"),
        (np.arange(64) % 2 - 1, "labels go from -1 to 0"),
        (np.zeros((64, 12, 12), np.int64) + np.arange(12) % 2, "task is classification"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(tmp_path: Path, labels: np.ndarray, said: str) -> None:
    with pytest.raises(DataRefused, match=said):
        fit(job(tmp_path, train=examples(tmp_path, y=labels)), Silence())


def test_a_model_that_fails_in_training_is_refused_where_it_does(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    with pytest.raises(ModelRefused, match="fails in training") as caught:
        fit(job(tmp_path, model=Broken()), Silence())
    assert caught.value.where == ("epoch 1, step 1",)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": math.nan}, {"weight_decay": -1.0}, {"warmup": 3.0},
        {"clip": 0.0}, {"average": 1.0}, {"smoothing": 1.0}, {"patience": 0}, {"optimizer": "lion"},
        {"schedule": "step"}, {"precision": "fp8"}, {"augment": "spin:3"}, {"augment": "shift"},
        {"augment": "rotate:nan"}, {"schedule": "one-cycle", "warmup": 1.0},
    ],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused_before_any_work(tmp_path: Path, changes: dict[str, object]) -> None:
    watcher = Silence()
    with pytest.raises(UsageError):
        fit(job(tmp_path, replace(Recipe(epochs=3), **changes)), watcher)  # type: ignore[arg-type]
    assert watcher.steps == 0


def test_half_precision_multiplies_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    made = job(tmp_path, Recipe(epochs=6, batch=16, rate=5e-3, precision="bf16"))
    assert fit(made, Silence()).best > 0.9
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}


def test_smoothed_labels_are_what_the_loss_is_taken_of() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0]])
    label = torch.tensor([0])
    plain, smooth = (float(task_of("classification", share).loss(logits, label)) for share in (0.0, 0.3))
    sure = logits.log_softmax(1)
    assert smooth == pytest.approx(-float(0.7 * sure[0, 0] + 0.1 * sure[0].sum()))
    assert plain == pytest.approx(-float(sure[0, 0]))


def test_maps_of_classes_and_values_are_trained_too(tmp_path: Path) -> None:
    from cnncc.calibration.data import open_data
    from cnncc.compression.examples import Examples
    from tests.compression.sets import SPECS, bars

    x, _ = bars(48, 0)
    maps = (x[:, 0] > 0.5).astype(np.int64)
    maps[:, 0] = -1  # not to be judged
    segmenter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    task = task_of("segmentation")
    seen: Trained = fit(
        job(tmp_path, Recipe(epochs=15, batch=16, rate=1e-2, augment="flip,shift:1"), model=segmenter, task=task,
            train=examples(tmp_path, count=48, x=x, y=maps), validation=examples(tmp_path, count=48, x=x, y=maps)),
        Silence(),
    )  # fmt: skip
    assert seen.best > 0.6  # 0.35 for one class everywhere

    np.savez(tmp_path / "values.npz", x=x, y=x.mean(axis=(2, 3)))
    values = Examples(open_data(str(tmp_path / "values.npz"), SPECS, None, limit=None, values=True), values=True)
    regressor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    found = fit(
        job(tmp_path, Recipe(epochs=60, batch=16, rate=5e-2), model=regressor, task=task_of("regression"),
            train=values, validation=values),
        Silence(),
    )  # fmt: skip
    assert found.best < 0.05
    assert found.best == min(facts["metric"] for facts in found.history)
