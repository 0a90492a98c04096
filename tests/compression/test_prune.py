"""Pruning that is cut short goes on: the same channels, the same weights, whatever an engine would take by then."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cnncc.compression import training
from cnncc.compression.distil import Lessons
from cnncc.compression.latency import Engines
from cnncc.compression.prune import Pruned, Pruning, prune
from cnncc.compression.recipe import Recipe
from cnncc.compression.train import Material
from cnncc_runtime.errors import BudgetExceeded, UsageError
from tests.compression.sets import Silence, bars, check_same_weights
from tests.compression.stand_ins import NET, REQUEST, jumpy

RECIPE = Recipe(batch=16, rate=2e-3, augment="shift:1,noise:0.1")
STEPS = 4
"""Of an epoch."""
CHANNELS = Pruning(amount=0.5, steps=2, finetune=4, multiple=2)


class Killed(BaseException):
    """What ends a run from outside."""


class Cut(Silence):
    """Ends a run after so many steps of training, or stages."""

    def __init__(self, steps: int = 0, stages: int = 0) -> None:
        super().__init__()
        self._last, self._last_stage = steps, stages

    def step(self, epoch: int, done: float) -> None:
        super().step(epoch, done)
        if self.steps == self._last:
            raise Killed

    def stage(self, name: str, seconds: float | None, detail: str) -> None:
        super().stage(name, seconds, detail)
        if len(self.stages) == self._last_stage:
            raise Killed


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network and data, to be in; checkpoints are kept after each step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    Path("net.py").write_text(NET)
    for name, seed in (("train", 0), ("held", 1)):
        x, y = bars(16 * STEPS, seed)
        np.savez(f"{name}.npz", x=x, y=y)
    return tmp_path


def run(output: str, pruning: Pruning, watcher: Silence, engines: Engines | None = None, **more: object) -> Pruned:
    """Prune in the folder that a test is in."""
    recipe = more.pop("recipe", RECIPE)
    return prune(REQUEST, Material("train.npz", "held.npz"), pruning, recipe, Path(output), watcher,  # type: ignore[arg-type]
                 engines=engines, accelerator="cpu", **more)  # type: ignore[arg-type]  # fmt: skip


TAYLOR = (CHANNELS, Lessons())


@pytest.mark.parametrize(
    ("pruning", "lessons", "steps"),
    [
        (*TAYLOR, 1),
        (*TAYLOR, 2 * STEPS),
        (*TAYLOR, 2 * STEPS + 1),
        (*TAYLOR, 4 * STEPS),
        (replace(CHANNELS, importance="magnitude"), None, 2 * STEPS + 2),
        (replace(CHANNELS, method="unstructured"), None, 2 * STEPS + 2),
        (replace(CHANNELS, method="2:4", amount=None), None, 2),
    ],
    ids=["taylor-1", "taylor-8", "taylor-9", "taylor-16", "magnitude", "unstructured", "2:4"],
)
def test_a_pruning_that_was_killed_ends_with_the_same_weights(
    place: Path, pruning: Pruning, lessons: Lessons | None, steps: int
) -> None:
    whole = run("whole.safetensors", pruning, Silence(), lessons=lessons)
    with pytest.raises(Killed):
        run("cut.safetensors", pruning, Cut(steps), lessons=lessons)
    assert not Path("cut.safetensors").exists()
    watcher = Silence()
    again = run("cut.safetensors", pruning, watcher, lessons=lessons)
    assert any(f"goes on from cut.safetensors.checkpoint: step {1 if steps <= 2 * STEPS else 2}" in note
               for note in watcher.notes)  # fmt: skip
    check_same_weights("whole.safetensors", "cut.safetensors")
    assert (again.states, again.dense) == (whole.states, whole.dense)
    assert not list(place.glob("*.checkpoint"))


@pytest.mark.parametrize(("finetune", "steps", "expected"), [(5, 2, [2, 3]), (1, 2, [1]), (2, 3, [1, 1]), (0, 2, [])])
def test_epochs_of_the_steps_add_up(place: Path, finetune: int, steps: int, expected: list[int]) -> None:
    watcher = Silence()
    pruned = run("small.safetensors", replace(CHANNELS, finetune=finetune, steps=steps), watcher)
    assert len(watcher.epochs) == finetune
    ends = [number for number, fact in enumerate(watcher.epochs, 1) if fact["rate"] == 0]
    assert ends == list(itertools.accumulate(expected)), "a cosine ends with each step"
    assert len(pruned.states) == 1 + steps + len(expected)


@pytest.mark.parametrize("pruning", [replace(CHANNELS, amount=0.01, steps=1), replace(CHANNELS, multiple=64)])
def test_a_share_that_takes_no_channel_is_refused(place: Path, pruning: Pruning) -> None:
    with pytest.raises(UsageError, match="of 40 channels are none: they go by"):
        run("small.safetensors", replace(pruning, finetune=0), Silence())
    assert not list(place.glob("small*"))


def test_a_warm_up_that_no_step_has_room_for_is_refused_before_any_work(place: Path) -> None:
    with pytest.raises(UsageError, match="a warm-up of 2 epochs"):
        run("small.safetensors", CHANNELS, Silence(), recipe=replace(RECIPE, warmup=2.0))
    assert not list(place.glob("small*"))


def test_channels_are_chosen_by_what_was_measured_before_the_kill(place: Path) -> None:
    engines, pruning = jumpy(), replace(CHANNELS, importance="magnitude")
    with pytest.raises(Killed):
        run("cut.safetensors", pruning, Cut(2 * STEPS + 2), engines)
    kept = {path.name: path.read_bytes() for path in place.glob("*.checkpoint")}
    assert len(kept) == 2
    run("cut.safetensors", pruning, Silence(), engines)
    Path("cut.safetensors").rename("first.safetensors")
    for name, data in kept.items():
        Path(name).write_bytes(data)
    run("cut.safetensors", pruning, Silence(), engines)
    check_same_weights("first.safetensors", "cut.safetensors")
    shapes = []
    for name in ("one.safetensors", "other.safetensors"):
        run(name, replace(pruning, finetune=0), Silence(), engines)
        shapes.append(load_file(name)["0.weight"].shape)
    assert shapes[0] != shapes[1], "another measurement chooses other channels"


def test_a_search_goes_on_with_what_it_measured(place: Path) -> None:
    engines = jumpy()
    before = run("all.safetensors", replace(CHANNELS, finetune=0), Silence(), engines).states[0].engine
    assert before is not None
    budget = Pruning(latency=before.seconds * 0.6, finetune=0, multiple=2, costs=False)
    whole = Silence()
    run("whole.safetensors", budget, whole, engines)
    assert [name for name, _ in whole.stages] == ["engine"] * 7 + ["prune", "engine"], "the whole, six tries, the end"
    with pytest.raises(Killed):
        run("cut.safetensors", budget, Cut(stages=4), engines)
    watcher = Silence()
    run("cut.safetensors", budget, watcher, engines)
    # what the third try took was told before it was kept
    assert watcher.notes == ["goes on from cut.safetensors.checkpoint: engine 3 of the search"]
    assert watcher.stages[1:-1] == whole.stages[3:-1]
    check_same_weights("whole.safetensors", "cut.safetensors")


def test_a_budget_that_cannot_be_met_leaves_the_best_and_no_checkpoint(place: Path) -> None:
    with pytest.raises(BudgetExceeded, match="no share of channels takes the engine to 1e-06 ms") as caught:
        run("best.safetensors", Pruning(latency=1e-9, finetune=1, multiple=2), Silence(), jumpy())
    assert "with 90% gone, it takes" in caught.value.message
    assert "the weights of that are written" in caught.value.message
    assert caught.value.where == ("best.safetensors",)
    assert load_file("best.safetensors")["0.weight"].shape[0] == 2
    assert not list(place.glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruning": replace(CHANNELS, amount=0.25)}, "another pruning: it differs in amount"),
        ({"pruning": replace(CHANNELS, steps=4)}, "it differs in steps"),
        ({"recipe": replace(RECIPE, rate=1e-4)}, "it differs in rate"),
        ({"lessons": Lessons()}, "it differs in distilled"),
    ],
)
def test_other_options_are_another_pruning_unless_it_begins_anew(
    place: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(Killed):
        run("cut.safetensors", CHANNELS, Cut(STEPS + 1))
    pruning: Pruning = changes.pop("pruning", CHANNELS)  # type: ignore[assignment]
    with pytest.raises(UsageError, match=said) as caught:
        run("cut.safetensors", pruning, Silence(), **changes)
    assert "--fresh" in caught.value.hint
    watcher = Silence()
    run("cut.safetensors", pruning, watcher, fresh=True, **changes)
    assert not watcher.notes
    run("other.safetensors", pruning, Silence(), **changes)
    check_same_weights("cut.safetensors", "other.safetensors")


def test_a_damaged_checkpoint_is_refused(place: Path) -> None:
    Path("cut.safetensors.checkpoint").write_bytes(b"PK")
    with pytest.raises(UsageError, match="cannot be read"):
        run("cut.safetensors", CHANNELS, Silence())
