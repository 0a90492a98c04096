"""`shrink()`: a model, smaller and smaller, each size fine-tuned, compiled, measured; and which of them to take.

Every size begins with the one before: channels go, what is left learns from the whole model
(`cnncc.compression.distil`), and becomes an engine for each precision, timed in turns with the whole model's. Where
calibration alone loses more in int8 than may be lost, and float32 does not, int8 is trained too
(`cnncc.compression.qat`). What is done lies in a folder, so that a run that was cut short goes on, and its results so
far are of use at any time.

    shrink.json               what it depends on, and the points so far
    SHARE.safetensors         weights with that share of the channels gone
    SHARE-PRECISION.cnncc     the engine
    SHARE-int8-qatN.cnncc     the engine of int8 that was trained for N epochs
    pareto.svg                accuracy over latency
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from torch import nn

from cnncc.calibration.table import read_table
from cnncc.compiler.calibration import Calibration
from cnncc.compiler.compile_request import Retraining
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.weights import load_weights
from cnncc.compression.channels import Channels
from cnncc.compression.checkpoint import tells_how_to_go_on
from cnncc.compression.distil import Distillation, Lessons
from cnncc.compression.latency import Engines
from cnncc.compression.pareto_plot import plot
from cnncc.compression.prune import Pruning, count_parameters, take_channels
from cnncc.compression.qat import Teacher, Tuning, retraining
from cnncc.compression.recipe import Recipe
from cnncc.compression.task import Task
from cnncc.compression.train import Material, Opened, fit_to, open_material, trainable
from cnncc.compression.training import Job, StageWatcher, evaluate
from cnncc.graph.feeds import random_feeds
from cnncc_runtime.bundle import CALIBRATION, read_bundle
from cnncc_runtime.digests import canonical_json, digest_json
from cnncc_runtime.errors import BudgetExceeded, ModelRefused, TrainingDiverged, UsageError
from cnncc_runtime.files import atomic_file, storage_errors

SHARES = (0.25, 0.4, 0.55, 0.7)
FP32, INT8 = "fp32", "int8"
_STATE = "shrink.json"
_SCHEMA = "cnncc.shrink/1"
PLOT = "pareto.svg"
_DIGITS = 4
"""Of points that are lost: a share that is a float is not exact, and would miss a budget that it meets."""

_GROWING = ("shares", "qat")
"""What of a plan may be another when a run goes on: it adds points, and changes none."""


@dataclass(frozen=True)
class Budget:
    """What the result must hold to; None for no bound.

    Attributes:
        latency: Seconds of a run.
        size: Bytes of the engine and its weights.
        drop: Points of the metric that may be lost (hundredths of it, where it is a share).
    """

    latency: float | None = None
    size: int | None = None
    drop: float | None = None

    @property
    def text(self) -> str:
        """What is bounded, in words."""
        bounds = {
            f"{(self.latency or 0) * 1e3:g} ms": self.latency,
            f"{(self.size or 0) / 1e6:g} MB": self.size,
            f"{self.drop or 0:g} points lost": self.drop,
        }
        return ", ".join(text for text, bound in bounds.items() if bound is not None)

    def holds(self, point: Point, whole: Point, task: Task) -> bool:
        """Tell whether a point is within."""
        return (
            (self.latency is None or point.seconds <= self.latency)
            and (self.size is None or point.size <= self.size)
            and (self.drop is None or lost(point.metric, whole.metric, task) <= self.drop)
        )


class Point(msgspec.Struct, frozen=True):
    """A variant, measured.

    Attributes:
        share: Of the channels that are gone.
        precision: ``fp32`` or ``int8``.
        metric: On the validation data.
        seconds: Of a run.
        ratio: Its time over the whole model's in fp32, measured in turns: value, low and high end of 95 %.
        size: Bytes of the engine and its weights.
        parameters: Of the module.
        weights: File in the folder.
        bundle: Folder in the folder.
        qat: Epochs that its int8 was trained for; 0 where calibration alone found it, and for fp32.
    """

    share: float
    precision: str
    metric: float
    seconds: float
    ratio: tuple[float, float, float]
    size: int
    parameters: int
    weights: str
    bundle: str
    qat: int = 0

    @property
    def name(self) -> str:
        """How much of the model it is: ``whole``, or ``40% gone``."""
        return _gone(self.share)

    @property
    def form(self) -> str:
        """``fp32``, ``int8``, or ``int8 qat`` where it was trained."""
        return f"{self.precision} qat" if self.qat else self.precision


class _State(msgspec.Struct):
    schema: str
    identity: dict[str, str]
    points: list[Point]
    costs: dict[str, dict[str, float]] = {}
    """File of weights → what its channels were chosen by: another measurement might choose others."""
    best: str = ""
    """The bundle that the last run named; empty where none held to its budget."""


@dataclass(frozen=True)
class Shrunk:
    """What came of it.

    Attributes:
        points: All, the largest first; the first is the whole model in fp32.
        front: Those that no other is both faster and better than.
        best: The one to take.
        task: What they are judged by.
    """

    points: tuple[Point, ...]
    front: tuple[Point, ...]
    best: Point
    task: Task


@dataclass(frozen=True)
class Plan:
    """How far it goes.

    Attributes:
        shares: Of the channels that are gone, growing.
        precisions: Of engines: `FP32`, `INT8` or both.
        importance: As `Pruning` has it.
        multiple: Likewise.
        most: Likewise.
        lessons: What variants are taught by the whole model.
        samples: That int8 is calibrated on.
        qat: Epochs that int8 is trained for, by the whole model too, where calibration alone misses the budget of
            accuracy and fp32 holds to it; 0 for never. The recipe is that of the fine-tuning, in float32 and without
            warm-up.
    """

    shares: tuple[float, ...] = SHARES
    precisions: tuple[str, ...] = (FP32, INT8)
    importance: str = "taylor"
    multiple: int = 8
    most: float = 0.9
    lessons: Lessons = field(default_factory=Lessons)
    samples: int = 512
    qat: int = 2

    @property
    def pruning(self) -> Pruning:
        """How each size is pruned; ``shares`` say how much of it."""
        return Pruning(amount=max(self.shares), importance=self.importance, multiple=self.multiple, most=self.most)

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: Shares that do not grow or are none, or a precision that is none.
        """
        if not self.shares or list(self.shares) != sorted(set(self.shares)) or not 0 < min(self.shares) < 1:
            raise UsageError(f"{self.shares} are no growing shares", hint="--shares 0.25,0.5")
        if max(self.shares) >= 1 or not self.precisions or not {*self.precisions} <= {FP32, INT8}:
            raise UsageError("shares are below 1, and precisions are fp32 and int8", hint="--precisions fp32,int8")
        if self.qat < 0:
            raise UsageError("epochs of training in int8 are not negative", hint="--qat 2, or --qat 0 for none")
        self.pruning.check()
        self.lessons.check()


def shrink(
    request: ModelRequest,
    material: Material,
    budget: Budget,
    plan: Plan,
    recipe: Recipe,
    folder: Path,
    watcher: StageWatcher,
    engines: Engines,
    *,
    accelerator: str = "auto",
    workers: int = 0,
    fresh: bool = False,
) -> Shrunk:
    """Make a model smaller until no budget is left, and say which size to take.

    Args:
        request: MODEL and its weights.
        material: What it learns from and is judged on; validation data is needed.
        budget: What must hold.
        plan: How far it goes.
        recipe: Of the fine-tuning of each size.
        folder: Where everything lies; a run that was cut short goes on there.
        watcher: Told how it goes.
        engines: Builds and measures.
        accelerator: As `training.fit` has it.
        workers: As `training.fit` has it.
        fresh: Whether to begin anew where there is a run of other options.

    Raises:
        BudgetExceeded: No variant holds to the budget; says which is nearest. All that was made stays.
        UsageError: The plan makes no sense, or the folder is of another run.
        As `training.fit` and `Engines.build`.
    """
    plan.check()
    recipe.check()
    if not material.validation:
        raise UsageError("variants are judged on validation data", hint="add --val DATA")
    model, module = trainable(request)
    data = open_material(model, material, recipe)
    assert data.validation is not None
    identity = {
        "model": model.digest,
        **material.hooks,
        "task": data.train.kind,
        "data": data.train.identity,
        "validation": data.validation.identity,
        "engines": f"{engines.target} {engines.profile}",
        "recipe": digest_json(vars(recipe)),
        "plan": digest_json([str(value) for name, value in vars(plan).items() if name not in _GROWING]),
    }
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder, identity, fresh=fresh)
    work = _Work(module, data, plan, recipe, folder, watcher, engines, material, state, budget)
    work.accelerator, work.workers = accelerator, workers
    work.teacher = Teacher(copy.deepcopy(module).eval(), model.digest)
    work.examples = tuple(torch.from_numpy(array) for array in random_feeds(model.inputs, batch=2).values())
    with tells_how_to_go_on(folder / _STATE, watcher.note):
        return work.run()


def lost(metric: float, whole: float, task: Task) -> float:
    """Return what is lost of the whole model's metric: in points, where it is a share; less than 0 for a gain."""
    worse = whole - metric if task.higher else metric - whole
    return round(100 * worse, _DIGITS) if task.percent else worse


def front_of(points: Iterable[Point], task: Task) -> tuple[Point, ...]:
    """Return the points that no other is at least as fast and as good as, and better in one: the fastest first."""
    front: list[Point] = []
    best: float | None = None
    for point in sorted(points, key=lambda each: (each.ratio[0], -each.metric if task.higher else each.metric)):
        if best is None or task.better(point.metric, best):
            front.append(point)
            best = point.metric
    return tuple(front)


def choose(points: Sequence[Point], budget: Budget, task: Task) -> Point | None:
    """Return the point to take: of those within the budget the best, where time or size are bounded; else the fastest.

    Args:
        points: The first is the whole model's.
        budget: What must hold.
        task: Says which metric is better.
    """
    within = [point for point in points if budget.holds(point, points[0], task)]
    if not within:
        return None
    if budget.latency is None and budget.size is None:
        return min(within, key=lambda point: point.ratio[0])
    sign = -1 if task.higher else 1
    return min(within, key=lambda point: (sign * point.metric, point.ratio[0]))


@dataclass
class _Work:
    """A run."""

    module: nn.Module
    data: Opened
    plan: Plan
    recipe: Recipe
    folder: Path
    watcher: StageWatcher
    engines: Engines
    material: Material
    state: _State
    budget: Budget
    accelerator: str = "auto"
    workers: int = 0
    teacher: Teacher = field(init=False)
    examples: tuple[torch.Tensor, ...] = ()

    def run(self) -> Shrunk:
        budget, whole = self.budget, self.teacher.module
        self._measure(whole, 0.0)
        total = Channels(copy.deepcopy(whole), self.examples).total
        current, gone = whole, 0.0
        for share in self.plan.shares:
            if not any(self._is_good(point.metric) for point in self._points(gone)):
                break
            engine = self.folder / self._points(gone)[0].bundle
            current, gone = self._variant(current, engine, share, total), share
            self._measure(current, share)
        points, task = tuple(sorted(self.state.points, key=lambda point: point.share)), self.data.task
        front = front_of(points, task)
        plot(points, front, task, self.folder / PLOT)
        best = choose(points, budget, task)
        self.state.best = best.bundle if best is not None else ""
        write_state(self.folder, self.state)
        if best is None:
            nearest = min(points, key=lambda point: (not self._is_good(point.metric), point.ratio[0]))
            raise BudgetExceeded(
                f"no variant holds to {budget.text}; nearest is {describe(nearest, points[0], task)}",
                where=[str(self.folder / nearest.bundle)],
                hint="more --epochs or a gentler --shares recover more; all that was made is in the folder",
            )
        return Shrunk(points, front, best, task)

    def _points(self, share: float) -> list[Point]:
        return [point for point in self.state.points if point.share == share]

    def _is_good(self, metric: float) -> bool:
        """Tell whether a metric is within what may be lost."""
        drop = self.budget.drop
        return drop is None or lost(metric, self.state.points[0].metric, self.data.task) <= drop

    def _variant(self, before: nn.Module, engine: Path, share: float, total: int) -> nn.Module:
        """Return a module with a share of the channels gone: made before, or now, of the next larger one."""
        path = self.folder / f"{share:.2f}.safetensors"
        if path.exists():
            made = copy.deepcopy(self.module)
            load_weights(made, path)
            return made.eval()
        made = copy.deepcopy(before)
        channels = Channels(made, self.examples)
        if path.name not in self.state.costs:
            self.state.costs[path.name] = self.engines.layers(engine)
            write_state(self.folder, self.state)
        since = time.monotonic()
        part = max(0.0, 1 - total * (1 - share) / channels.total)
        take_channels(
            channels, made, part, self.plan.pruning, self.data, self.recipe.batch, self.state.costs[path.name]
        )
        self.watcher.stage(
            "prune", time.monotonic() - since, f"{_gone(share)}: {count_parameters(made):,} parameters are left"
        )
        job = Job(
            made,
            self.recipe,
            self.data.task,
            self.data.train,
            self.data.validation,
            objective=Distillation(self.teacher.module, made, self.data.task, self.plan.lessons),
            identity={"run": digest_json(self.state.identity), "share": f"{share}"},
            accelerator=self.accelerator,
            workers=self.workers,
        )
        fit_to(path, job, self.watcher, pruned=True)
        return made.eval()

    def _measure(self, module: nn.Module, share: float) -> None:
        """Build and measure what is not measured yet of a share."""
        precisions = (
            (FP32, *(each for each in self.plan.precisions if each != FP32)) if not share else self.plan.precisions
        )
        plain = self._plain(module, share)
        for precision in precisions:
            found = self._point(module, share, precision, plain)
            if precision == INT8 and self.plan.qat and not self._is_good(found.metric) and self._is_good(plain):
                self._train(module, share, plain)

    def _train(self, module: nn.Module, share: float, plain: float) -> None:
        """Build and measure int8 that is trained; what cannot be trained is told, and the other points stay."""
        try:
            self._point(module, share, INT8, plain, self.plan.qat)
        except (ModelRefused, TrainingDiverged) as exc:
            self.watcher.note(f"{_gone(share)}: int8 was not trained, and is as calibration made it: {exc.message}")

    def _point(self, module: nn.Module, share: float, precision: str, plain: float, qat: int = 0) -> Point:
        """Return what a variant takes and is worth: measured before, or built and measured now.

        Args:
            module: The variant.
            share: Of the channels that are gone.
            precision: Of the engine.
            plain: The module's metric.
            qat: Epochs that its int8 is trained for.
        """
        for point in self.state.points:
            if (point.share, point.precision, point.qat) == (share, precision, qat):
                self.watcher.stage("engine", None, _taken(point))
                return point
        since = time.monotonic()
        bundle = self.folder / f"{share:.2f}-{precision}{f'-qat{qat}' if qat else ''}.cnncc"
        calibration = self._calibration() if precision == INT8 else None
        self.engines.build(module, bundle, calibration, self._retraining(share, qat) if qat else None)
        whole = self.folder / (self.state.points[0].bundle if self.state.points else bundle.name)
        measured = self.engines.compare({"whole": whole} | ({} if whole == bundle else {"variant": bundle}))
        found = measured.get("variant", measured["whole"])
        made = Point(
            share,
            precision,
            plain if precision == FP32 else self._calibrated(bundle),
            found.ratio[0] * self.state.points[0].seconds if self.state.points else found.seconds,
            found.ratio,
            found.size,
            count_parameters(module),
            f"{share:.2f}.safetensors" if share else "",
            bundle.name,
            qat,
        )
        self.state.points.append(made)
        write_state(self.folder, self.state)
        self.watcher.stage("engine", time.monotonic() - since, _taken(made))
        return made

    def _retraining(self, share: float, epochs: int) -> Retraining:
        self.watcher.note(f"{_gone(share)}: int8 loses more than may be lost, and is trained ({epochs} epochs)")
        recipe = replace(self.recipe, epochs=epochs, warmup=0.0, precision=FP32)
        tuning = Tuning(accelerator=self.accelerator, workers=self.workers)
        return retraining(self.material, recipe, tuning, teacher=self.teacher, watcher=self.watcher)

    def _calibration(self) -> Calibration:
        return Calibration(
            self.material.data,
            self.material.validation,
            samples=self.plan.samples,
            skip_bad=self.material.skip_bad,
            preprocessing=self.material.preprocessing,
        )

    def _plain(self, module: nn.Module, share: float) -> float:
        """Return the metric of a module, whose fp32 engine is proven to compute the same."""
        for point in self._points(share):
            if point.precision == FP32:
                return point.metric
        assert self.data.validation is not None
        return evaluate(module, self.data.task, self.data.validation)

    def _calibrated(self, bundle: Path) -> float:
        """Return the metric of an int8 engine, as its calibration or its training measured it."""
        table = read_table(read_bundle(bundle).file(CALIBRATION))
        if table.accuracy is None or not table.accuracy.metric or not self.data.task.percent:
            raise UsageError(
                "int8 is judged by top-1 or mIoU, which this task has not", hint="--precisions fp32 leaves int8 out"
            )
        return round(table.accuracy.int8 / 100, 6)  # as `evaluate` rounds: ties are ties


def _gone(share: float) -> str:
    return f"{share:.0%} gone" if share else "whole"


def _taken(point: Point) -> str:
    """Return what an engine takes, in a few words."""
    return f"{point.name}, {point.form}: {point.seconds * 1e3:.3f} ms, {1 / point.ratio[0]:.2f} ×"


def describe(point: Point, whole: Point, task: Task) -> str:
    """Return a point in a line."""
    gone = f"{point.share:.0%} of the channels gone" if point.share else "the whole model"
    return (
        f"{gone}, {point.form}: {task.text(point.metric)}, {point.seconds * 1e3:.3f} ms, "
        f"{1 / point.ratio[0]:.2f} × as fast, {point.size / whole.size:.0%} of the size"
    )


def _state(folder: Path, identity: dict[str, str], *, fresh: bool) -> _State:
    path = folder / _STATE
    made = _State(_SCHEMA, identity, [])
    with storage_errors(path):
        data = path.read_bytes() if path.exists() else b""
    if not data or fresh:
        if fresh:
            for old in [*folder.glob("*.safetensors"), *folder.glob("*.checkpoint")]:
                with storage_errors(old):
                    old.unlink()
        write_state(folder, made)
        return made
    try:
        found = msgspec.json.decode(data, type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is damaged: {exc}", hint="--fresh begins anew") from exc
    names = sorted(name for name in identity if found.identity.get(name) != identity[name])
    if found.schema != _SCHEMA or names:
        raise UsageError(
            f"{folder} holds another run: it differs in {', '.join(names) or 'its form'}",
            hint="the command that it began with goes on from it; --fresh begins anew, or choose another -o",
        )
    return found


def write_state(folder: Path, state: _State) -> None:
    """Write how far a run is."""
    with atomic_file(folder / _STATE) as path:
        path.write_bytes(canonical_json(msgspec.to_builtins(state)))
