"""Distillation: a student that learns what a teacher makes of the same images, beside the labels or instead of them.

- Soft targets: Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network* (2015).
- Feature maps: Romero et al., *FitNets: Hints for Thin Deep Nets* (ICLR 2015).
- Attention: Zagoruyko and Komodakis, *Paying More Attention to Attention* (ICLR 2017), activation-based.

`Distillation` is an objective of `cnncc.compression.training.fit`: it serves as well to bring a pruned or a quantized
network back to what it was.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from cnncc.compiler.ingest import Model, ingest
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compression.examples import Batch
from cnncc.compression.recipe import Recipe
from cnncc.compression.task import REGRESSION, Task, check_targets, first_output
from cnncc.compression.train import Material, fit_to, open_material, trainable
from cnncc.compression.training import Job, Trained, Watcher
from cnncc.compression.weights_file import check_output, is_pruned
from cnncc_runtime.errors import ModelRefused, UsageError

_SHOWN = 8


@dataclass(frozen=True)
class Lessons:
    """What a student is taught.

    Attributes:
        temperature: T, by which logits are divided before the softmax: the higher, the more the unlikely classes say.
        alpha: Share of the teacher's outputs in the loss; the labels have the rest.
        features: Layers whose outputs are to be alike: the student's path → the teacher's.
        attention: Layers whose attention maps are to be alike, likewise.
        feature_weight: Of the mean square between feature maps, in the loss.
        attention_weight: Of the square between attention maps, each normalized, in the loss.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    features: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, str] = field(default_factory=dict)
    feature_weight: float = 1.0
    attention_weight: float = 10.0

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: A number is out of its bounds, or the teacher has nothing to say.
        """
        rules = {
            f"a temperature of {self.temperature:g}": 0 < self.temperature < math.inf,
            f"an alpha of {self.alpha:g}": 0 <= self.alpha <= 1,
            f"a weight of features of {self.feature_weight:g}": 0 < self.feature_weight < math.inf,
            f"a weight of attention of {self.attention_weight:g}": 0 < self.attention_weight < math.inf,
            "an alpha of 0, and neither features nor attention": self.alpha or self.features or self.attention,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise UsageError(f"distilling makes no sense with {', '.join(wrong)}", hint="see --help for the bounds")

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint is held against."""
        return {f"distilled by {name}": str(value) for name, value in vars(self).items()}


class Distillation:
    """The objective of a student: labels, soft targets, feature maps and attention.

    Args:
        teacher: Another module than the student; put into eval mode and never changed.
        student: What is trained.
        task: Its own: says what labels are and what they cost.
        lessons: What is taught.
        inputs: Of one batch, to find the layers' shapes with; only looked at where layers are compared.
        seed: Of the regressors' first weights.

    Attributes:
        regressors: What brings the student's feature maps to the teacher's channels: trained beside the student, and
            no part of it. None where all channels agree.

    Raises:
        UsageError: A layer is unknown, or is no one layer of a run; or numbers out of their bounds.
        ModelRefused: Feature maps do not go together.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        task: Task,
        lessons: Lessons,
        inputs: tuple[torch.Tensor, ...] = (),
        *,
        seed: int = 0,
    ) -> None:
        lessons.check()
        self._teacher, self._student, self._task, self._lessons = teacher.eval(), student, task, lessons
        pairs = [*lessons.features.items(), *lessons.attention.items()]
        self._taught = tuple(dict.fromkeys(mine for mine, _ in pairs))
        self._teaching = tuple(dict.fromkeys(its for _, its in pairs))
        for module, paths, whose in ((student, self._taught, "student"), (teacher, self._teaching, "teacher")):
            _check_layers(module, paths, whose)
        self.regressors = self._regressors(inputs, seed) if pairs else None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a batch, and the student's first output.

        Raises:
            ModelRefused: The teacher gives NaN or infinity, or outputs of another shape than the student's.
            DataRefused: Labels and outputs do not go together.
        """
        with torch.no_grad(), _kept(self._teacher, self._teaching) as known:
            wanted = first_output(self._teacher.to(batch.targets.device)(*batch.inputs)).float()
        with _kept(self._student, self._taught) as learnt:
            outputs = first_output(model(*batch.inputs))
        self._check_outputs(outputs, wanted)
        lessons = self._lessons
        loss = outputs.new_zeros((), dtype=torch.float32)
        if lessons.alpha < 1:
            check_targets(self._task.kind, outputs, batch.targets)
            loss = loss + (1 - lessons.alpha) * self._task.loss(outputs, batch.targets)
        if lessons.alpha > 0:
            loss = loss + lessons.alpha * self._soft(outputs.float(), wanted)
        for mine, its in lessons.features.items():
            loss = loss + lessons.feature_weight * functional.mse_loss(self._adapted(mine, learnt[mine]), known[its])
        for mine, its in lessons.attention.items():
            loss = loss + lessons.attention_weight * attention_distance(learnt[mine], known[its])
        return loss, outputs

    def _soft(self, outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if self._task.kind == REGRESSION:
            return functional.mse_loss(outputs, wanted)
        return soft_targets(outputs, wanted, self._lessons.temperature)

    def _check_outputs(self, outputs: torch.Tensor, wanted: torch.Tensor) -> None:
        if not torch.isfinite(wanted).all():
            raise ModelRefused(
                "the teacher gives NaN or infinity for samples of the data",
                hint="look at its weights: --teacher-weights, and at the preprocessing that it was trained with",
            )
        if outputs.shape != wanted.shape:
            raise ModelRefused(
                f"the student gives {list(outputs.shape)}, the teacher {list(wanted.shape)}",
                hint="a student needs the teacher's classes, in the same order and resolution",
            )

    # ---- layers

    def _regressors(self, inputs: tuple[torch.Tensor, ...], seed: int) -> nn.ModuleDict | None:
        """Make a 1×1 convolution for each pair of feature maps whose channels differ, from one run of both networks."""
        training = self._student.training
        with torch.no_grad(), _kept(self._student.eval(), self._taught) as mine:
            self._student(*inputs)
        self._student.train(training)
        with torch.no_grad(), _kept(self._teacher, self._teaching) as its:
            self._teacher(*inputs)
        made = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for learnt, known in self._lessons.features.items():
                _check_maps(learnt, mine[learnt], known, its[known], (2, 4))
                taken, given = mine[learnt].shape[1], its[known].shape[1]
                if taken != given:
                    flat = mine[learnt].ndim == 2
                    made[_key(learnt)] = nn.Linear(taken, given) if flat else nn.Conv2d(taken, given, 1)
        for learnt, known in self._lessons.attention.items():
            _check_maps(learnt, mine[learnt], known, its[known], (4,))
        return made if len(made) else None

    def _adapted(self, path: str, features: torch.Tensor) -> torch.Tensor:
        if self.regressors is None or _key(path) not in self.regressors:
            return features
        adapted: torch.Tensor = self.regressors[_key(path)](features)
        return adapted


def soft_targets(outputs: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T² · KL(softmax(wanted / T) ‖ softmax(outputs / T)), the mean over samples and pixels.

    T² keeps its gradient as large as that of the labels, whatever the temperature (Hinton et al. 2015, section 2).

    Args:
        outputs: Logits, ``float32[n, classes, …]``.
        wanted: The teacher's, likewise.
        temperature: T.
    """
    student = functional.log_softmax(outputs / temperature, dim=1)
    teacher = functional.log_softmax(wanted / temperature, dim=1)
    each = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * each.mean()


def attention_distance(learnt: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the squared distance between two layers' attention, the mean over samples: 0 to 4.

    Attention is the sum of squares over channels, as a vector of pixels of length 1.

    Args:
        learnt: ``float32[n, c, …]``.
        known: ``float32[n, d, …]`` of as many pixels.
    """
    return (_attention(learnt) - _attention(known)).pow(2).sum(dim=1).mean()


def _attention(features: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features.pow(2).sum(dim=1).flatten(1), dim=1)


def _key(path: str) -> str:
    """Return a path as the name of a module, which must not hold a point."""
    return path.replace(".", "/")


@contextlib.contextmanager
def _kept(module: nn.Module, paths: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the outputs of layers while a module runs, as they are before anything changes them in place."""
    found: dict[str, torch.Tensor] = {}

    def keep(path: str) -> object:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            if path in found or not isinstance(output, torch.Tensor):
                what = "runs more than once in a pass" if path in found else "does not give one tensor"
                raise UsageError(f"'{path}' {what}, so its output is no feature map", hint="name another layer")
            found[path] = output.clone().float()

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]  # type: ignore[arg-type]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in paths if path not in found]:
        raise UsageError(f"'{missing[0]}' does not run in a pass of the model", hint="name another layer")


def _check_layers(module: nn.Module, paths: Collection[str], whose: str) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for path in paths:
        if path not in names:
            near = difflib.get_close_matches(path, names, 3, 0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names[:_SHOWN])}, …"
            raise UsageError(f"the {whose} has no layer '{path}'", hint=hint)


def _check_maps(mine: str, learnt: torch.Tensor, its: str, known: torch.Tensor, ranks: tuple[int, ...]) -> None:
    if learnt.ndim != known.ndim or learnt.shape[2:] != known.shape[2:] or learnt.ndim not in ranks:
        raise ModelRefused(
            f"'{mine}' of the student gives {list(learnt.shape)}, '{its}' of the teacher {list(known.shape)}",
            hint="compare layers that give images of the same size",
        )


# ---- the command


def distil(
    student: ModelRequest,
    teacher: ModelRequest,
    material: Material,
    recipe: Recipe,
    lessons: Lessons,
    output: Path,
    watcher: Watcher,
    *,
    accelerator: str = "auto",
    workers: int = 0,
    fresh: bool = False,
) -> tuple[Trained, Task]:
    """Train a student by a teacher and write its weights; what was cut short goes on.

    Args:
        student: MODEL; with ``weights``, training begins with those.
        teacher: A MODEL with a module, and its weights.
        material: Data and task.
        recipe: How.
        lessons: What is taught.
        output: ``.safetensors``; its checkpoint lies beside it while training lasts.
        watcher: Told how it goes.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        workers: Processes that read samples.
        fresh: Whether to begin anew where there is a checkpoint.

    Raises:
        As `cnncc.compression.train.train` and `Distillation`.
    """
    check_output(output)
    recipe.check()
    lessons.check()
    model, module = trainable(student)
    known, teaching = _teacher(teacher)
    _check_inputs(model, known, material, watcher)
    opened = open_material(model, material, recipe)
    [probe] = opened.train.__getitems__([0])
    objective = Distillation(teaching, module, opened.task, lessons, probe.inputs, seed=recipe.seed)
    job = Job(
        module,
        recipe,
        opened.task,
        opened.train,
        opened.validation,
        objective=objective,
        beside=objective.regressors,
        identity={"model": model.digest, "teacher": known.digest, **material.hooks, **lessons.identity},
        accelerator=accelerator,
        workers=workers,
    )
    notes, pruned = {"teacher": known.digest}, is_pruned(student.weights)
    return fit_to(output, job, watcher, notes=notes, pruned=pruned, fresh=fresh), opened.task


def _teacher(request: ModelRequest) -> tuple[Model, nn.Module]:
    model = ingest(request)
    if model.module is None:
        raise UsageError(
            f"{model.source} is no teacher: it is a graph, and its layers have no names",
            hint="give file.py:factory, package.module:factory, timm:NAME or torchvision:NAME",
        )
    return model, model.module


def _check_inputs(student: Model, teacher: Model, material: Material, watcher: Watcher) -> None:
    """Refuse a teacher that takes other images than the student; say where the pixels may not mean the same to it."""
    mine, its = ([(spec.shape[1:], spec.dtype) for spec in each.inputs] for each in (student, teacher))
    if mine != its:
        raise UsageError(
            "the student and the teacher take other inputs",
            where=[f"{each.source}: {', '.join(map(str, each.inputs))}" for each in (student, teacher)],
            hint="both must take the same images: --input-shape goes to both",
        )
    contract = material.preprocessing or student.preprocessing
    if contract is not None and teacher.preprocessing not in (None, contract):
        watcher.note(
            f"images go to {teacher.source} as the student gets them, which is not as its own preprocessing says"
        )
