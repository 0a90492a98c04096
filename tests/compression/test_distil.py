"""Distillation: loss and gradient are the papers', layers are compared without a trace, and all of it is repeatable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cnncc.compression import training
from cnncc.compression.distil import Distillation, Lessons, attention_distance, soft_targets
from cnncc.compression.examples import Batch
from cnncc.compression.recipe import Recipe
from cnncc.compression.task import task_of
from cnncc.compression.training import Job, evaluate, fit
from cnncc_runtime.errors import ModelRefused, UsageError
from tests.compression.sets import CLASSES, Silence, bars, examples, net

TASK = task_of("classification")
IMAGES = torch.from_numpy(bars(8, 3)[0])
LABELS = torch.from_numpy(bars(8, 3)[1])
BATCH = Batch((IMAGES,), LABELS)
LAYERS = Lessons(features={"0": "0", "3": "3"}, attention={"2": "2"})


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same numbers whichever test runs first."""
    torch.manual_seed(0)


class Killed(BaseException):
    """What ends a run from outside."""


def wide(seed: int = 1) -> nn.Module:
    """Return a network like `net`, of twice the channels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16 * 36, CLASSES),
    )


def objective(lessons: Lessons, student: nn.Module | None = None, teacher: nn.Module | None = None) -> Distillation:
    """Return the objective of a student."""
    return Distillation(teacher or wide(), student or net(dropout=0.0), TASK, lessons, (IMAGES,))


@settings(deadline=None)
@given(st.floats(0.5, 20.0), st.integers(0, 100), st.booleans())
def test_the_gradient_of_soft_targets_is_that_of_the_paper(temperature: float, seed: int, pixels: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5, 2, 2) if pixels else (3, 5)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    wanted = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    soft_targets(outputs, wanted, temperature).backward()
    # Hinton et al. 2015, equation 2, times T²: T · (softmax(z / T) − softmax(v / T)), the mean over what is classified
    student, teacher = (torch.softmax(logits.detach() / temperature, dim=1) for logits in (outputs, wanted))
    count = outputs.numel() // 5
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, temperature * (student - teacher) / count)


def test_a_student_that_knows_all_has_nothing_to_learn() -> None:
    logits = torch.randn(4, 7)
    assert float(soft_targets(logits, logits + 3.0, 4.0)) == pytest.approx(0.0, abs=1e-5)
    maps = torch.randn(4, 3, 5, 5)
    assert float(attention_distance(maps, 2 * maps)) == pytest.approx(0.0, abs=1e-6)


def test_attention_is_the_normalized_sum_of_squares() -> None:
    learnt, known = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    total = 0.0
    for mine, its in zip(learnt, known, strict=True):
        a, b = (each.square().sum(0).flatten() for each in (mine, its))
        total += float((a / a.norm() - b / b.norm()).square().sum())
    assert float(attention_distance(learnt, known)) == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_weighs_the_teacher_against_the_labels(alpha: float) -> None:
    student, teacher = net(dropout=0.0), wide().eval()
    lessons = Lessons(temperature=2.0, alpha=alpha, attention={} if alpha else {"2": "2"})
    loss, outputs = objective(lessons, student, teacher)(student, BATCH)
    with torch.no_grad():
        known = teacher(IMAGES)
    expected = alpha * soft_targets(outputs, known, 2.0) + (1 - alpha) * TASK.loss(outputs, LABELS)
    if not alpha:
        expected = expected + 10.0 * attention_distance(student[:3](IMAGES), teacher[:3](IMAGES))  # type: ignore[index]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_feature_maps_are_compared_through_the_regressor() -> None:
    student, teacher = net(dropout=0.0), wide()
    found = objective(Lessons(alpha=0.0, features={"0": "0"}, feature_weight=0.5), student, teacher)
    assert found.regressors is not None
    [regressor] = found.regressors.values()
    loss, outputs = found(student, BATCH)
    squares = (regressor(student[0](IMAGES)) - teacher[0](IMAGES)).square().mean()  # type: ignore[index]
    assert loss.item() == pytest.approx((TASK.loss(outputs, LABELS) + 0.5 * squares).item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in found.regressors.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_maps_of_as_many_channels_need_no_regressor() -> None:
    assert objective(Lessons(features={"0": "0"}), net(), net(seed=4)).regressors is None
    assert objective(Lessons(attention={"0": "0"})).regressors is None


def test_values_are_learnt_by_squares() -> None:
    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), nn.Sequential(nn.Flatten(), nn.Linear(432, 2))
    found = Distillation(teacher, student, task_of("regression"), Lessons(alpha=0.25))
    values = torch.randn(8, 2)
    loss, outputs = found(student, Batch((IMAGES,), values))
    expected = 0.25 * (outputs - teacher(IMAGES)).square().mean() + 0.75 * (outputs - values).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_are_watched_without_a_trace(tmp_path: Path) -> None:
    student, teacher = net(), wide()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    names = list(student.state_dict())
    found = objective(LAYERS, student, teacher)
    fit(job(tmp_path, student, found), Silence())
    with pytest.raises(RuntimeError):
        found(student, Batch((IMAGES[:, :2],), LABELS))
    for network in (student, teacher):
        assert not any(module._forward_hooks for module in network.modules())
    assert list(student.state_dict()) == names
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # BatchNorm's averages too
    assert all(parameter.grad is None for parameter in teacher.parameters())


def job(tmp_path: Path, student: nn.Module, found: Distillation, **changes: object) -> Job:
    """Return the training of a student on bars."""
    recipe = Recipe(epochs=3, batch=16, rate=5e-3, augment="flip,shift:1,noise:0.1", average=0.9)
    made = Job(student, recipe, TASK, examples(tmp_path), examples(tmp_path, seed=1), objective=found,
               beside=found.regressors, accelerator="cpu")  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_a_distillation_that_was_killed_ends_with_the_same_weights(
    tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)

    def killed(found: Distillation) -> Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]:
        left = iter(range(steps))

        def step(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            if next(left, None) is None:
                raise Killed
            return found(model, batch)

        return step

    students = [net(), net(), net(seed=9)]
    found = [objective(LAYERS, student) for student in students]
    path = tmp_path / "checkpoint"
    whole = job(tmp_path, students[0], found[0])
    fit(whole, Silence())
    cut = replace(whole, model=students[1], objective=killed(found[1]), beside=found[1].regressors, checkpoint=path)
    with pytest.raises(Killed):
        fit(cut, Silence())
    fit(replace(cut, model=students[2], objective=found[2], beside=found[2].regressors), Silence())
    assert found[0].regressors is not None
    assert found[2].regressors is not None
    pairs = [(students[0], students[2]), (found[0].regressors, found[2].regressors)]
    for one, other in pairs:
        for (name, tensor), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(tensor, again), name


def test_a_student_learns_from_the_teacher_alone(tmp_path: Path) -> None:
    data, held = examples(tmp_path), examples(tmp_path, seed=1)
    teacher = wide()
    fit(Job(teacher, Recipe(epochs=6, batch=16, rate=5e-3), TASK, data, accelerator="cpu"), Silence())
    student = net()
    found = Distillation(teacher, student, TASK, Lessons(alpha=1.0))
    fit(job(tmp_path, student, found, recipe=Recipe(epochs=8, batch=16, rate=5e-3)), Silence())
    assert evaluate(student, TASK, held) > 0.9


def test_a_student_in_half_precision_is_taught_in_float32(tmp_path: Path) -> None:
    student = net()
    found = objective(LAYERS, student)
    fit(job(tmp_path, student, found, recipe=Recipe(epochs=1, batch=16, precision="bf16")), Silence())
    assert found.regressors is not None
    assert {p.dtype for p in (*student.parameters(), *found.regressors.parameters())} == {torch.float32}


@pytest.mark.parametrize(
    ("lessons", "said"),
    [
        (Lessons(temperature=0.0), "a temperature of 0"),
        (Lessons(temperature=math.nan), "a temperature of nan"),
        (Lessons(alpha=1.5), "an alpha of 1.5"),
        (Lessons(alpha=0.0), "neither features nor attention"),
        (Lessons(features={"0": "0"}, feature_weight=-1.0), "a weight of features of -1"),
        (Lessons(features={"conv": "0"}), "the student has no layer 'conv'"),
        (Lessons(attention={"0": "00"}), "the teacher has no layer '00'"),
    ],
)
def test_lessons_that_make_no_sense_are_refused(lessons: Lessons, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        objective(lessons)


def test_an_unknown_layer_names_the_nearest() -> None:
    teacher = nn.Sequential()
    teacher.add_module("features", wide())
    with pytest.raises(UsageError) as caught:
        objective(Lessons(features={"0": "feature.0"}), teacher=teacher)
    assert "features.0" in caught.value.hint


def test_a_layer_that_runs_twice_is_no_feature_map() -> None:
    relu = nn.ReLU()
    student = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), relu, nn.Conv2d(8, 8, 3, padding=1), relu)
    with pytest.raises(UsageError, match="'1' runs more than once"):
        objective(Lessons(features={"1": "0"}), student)
    assert not relu._forward_hooks


def test_maps_of_other_sizes_are_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match=r"'0' of the student gives \[8, 8, 12, 12\], '3' .* \[8, 16, 6, 6\]"):
        objective(Lessons(features={"0": "3"}))
    with pytest.raises(ModelRefused, match="'6' of the student"):
        objective(Lessons(attention={"6": "6"}))


def test_outputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(432, 7))
    with pytest.raises(ModelRefused, match=r"the student gives \[16, 4\], the teacher \[16, 7\]"):
        fit(job(tmp_path, net(), Distillation(teacher, net(), TASK, Lessons())), Silence())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_gives_no_numbers_is_refused(value: float) -> None:
    teacher = wide()
    with torch.no_grad():
        teacher[6].bias[0] = value  # type: ignore[index,union-attr,operator]
    student = net()
    with pytest.raises(ModelRefused, match="the teacher gives NaN or infinity"):
        objective(Lessons(), student, teacher)(student, BATCH)
