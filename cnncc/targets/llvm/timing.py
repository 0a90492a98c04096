"""Times kernels against each other in this process: rounds in turn, so that what slows one slows all.

They are linked and loaded as an engine is, and share their loops among as many threads as the engine will have.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from cnncc.targets.llvm.blocked.convolution import definition as direct_definition
from cnncc.targets.llvm.blocked.convolution import packed_shape
from cnncc.targets.llvm.blocked.geometry import blocks_of
from cnncc.targets.llvm.blocked.window import depthwise_definition
from cnncc.targets.llvm.blocked.winograd import definition as winograd_definition
from cnncc.targets.llvm.blocked.winograd import transformed_shape
from cnncc.targets.llvm.candidates import Candidate
from cnncc.targets.llvm.codegen import write_kernels
from cnncc.targets.llvm.layers import bindings_of
from cnncc.targets.llvm.loading import load_objects
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.pipeline import fuse_passes, legalize_passes, merge_passes, run
from cnncc.targets.llvm.rules import ConvShape, DirectPlan, WindowPlan
from cnncc.targets.llvm.schedule.anchor import FUSES
from cnncc.targets.llvm.schedule.driver import schedule
from cnncc.targets.llvm.schedule.rules import RULES
from cnncc_runtime.engine_threads import Pool

_SAMPLE_S = 1e-3
"""Length of a sample at least: the clock's resolution and the interpreter do not show."""
_COLD_BYTES = 32 << 20
"""Calls take copies of the weights in turn, so many bytes in all: each finds its own as cold as in a network whose
weights no cache holds."""
_MOST_COPIES = 64
"""Copies of weights at most; smaller ones are read in no time from wherever they are."""
_LEAST_ROUNDS = 5
"""Rounds that give a median and its spread."""
_MOST_ROUNDS = 15
"""Rounds beyond which little is learnt."""


@dataclass(frozen=True)
class Contest:
    """Kernels that were compiled to be timed against each other.

    Attributes:
        calls: For each candidate, what calls its kernel some times in a row.
        pool: The threads that the kernels run on.
    """

    calls: tuple[Callable[[int], None], ...]
    pool: Pool

    def run(self, contestants: Sequence[int], seconds: float) -> list[list[float]]:
        """Time some of the candidates in rounds.

        Args:
            contestants: Positions of candidates.
            seconds: How long it may take; it takes `_LEAST_ROUNDS` rounds at least.

        Returns:
            Seconds per call of each contestant, one for each round.

        Raises:
            RunFailed: The system has not as many threads to give as the machine has cores.
        """
        with self.pool:
            return self._rounds(contestants, seconds)

    def _rounds(self, contestants: Sequence[int], seconds: float) -> list[list[float]]:
        counts = [self._count(number) for number in contestants]
        times: list[list[float]] = [[] for _ in contestants]
        start = time.perf_counter()
        while len(times[0]) < _LEAST_ROUNDS or (len(times[0]) < _MOST_ROUNDS and time.perf_counter() - start < seconds):
            for position, number in enumerate(contestants):
                times[position].append(self._sample(number, counts[position]))
        return times

    def _count(self, number: int) -> int:
        """Return how many calls make a sample; the first calls warm up."""
        self._sample(number, 1)
        once = self._sample(number, 1)
        return max(1, math.ceil(_SAMPLE_S / max(once, 1e-7)))

    def _sample(self, number: int, count: int) -> float:
        start = time.perf_counter()
        self.calls[number](count)
        return (time.perf_counter() - start) / count


def prepare(shape: ConvShape, plans: Sequence[Candidate], target: Any, machine: Machine) -> Contest:
    """Compile every candidate of a convolution, with bias and ReLU after it, in one module.

    Args:
        shape: The convolution.
        plans: The candidates.
        target: TVM's target; this machine can run its code.
        machine: What kernels are scheduled for.

    Raises:
        TargetUnavailable: There is no linker.
        BuildFailed: The linker refused.
    """
    builder = relax.BlockBuilder()
    with target, tvm.transform.PassContext(opt_level=3):
        for number, candidate in enumerate(plans):
            _add_function(builder, f"candidate{number}", shape, candidate, machine)
        module = builder.get()
        for passes in (legalize_passes(machine), fuse_passes(), merge_passes()):
            module = run(module, passes)
        module, _ = schedule(module, RULES, machine, lambda _fraction: None)
        names = [_kernel(module[f"candidate{number}"]) for number in range(len(plans))]
        with tempfile.TemporaryDirectory(prefix="cnncc-") as folder:
            kernels, objects = write_kernels(module, target, Path(folder))
            loaded = load_objects(objects)
    arguments = _Arguments()
    calls = [_repeated(loaded.module[name], arguments.of(kernels[name])) for name in names]
    return Contest(tuple(calls), Pool(loaded.launcher, machine.cores))


def _add_function(builder: Any, name: str, shape: ConvShape, candidate: Candidate, machine: Machine) -> None:
    """Add a function of data, packed weights and a bias for each channel."""
    define, packed = _definition(shape, candidate, machine)
    group_outputs = shape.groups if shape.depthwise else shape.groups * shape.outputs
    sizes = [_data_shape(shape, machine), packed, (1, blocks_of(group_outputs, machine.block), 1, 1, machine.block)]
    operands = [
        relax.Var(operand, relax.TensorType(size, "float32"))
        for operand, size in zip(("data", "weight", "bias"), sizes, strict=True)
    ]
    with builder.function(name, operands):
        with builder.dataflow():
            made = builder.call_te(define, *operands[:2], primfunc_name_hint="convolution", primfunc_attrs=FUSES)
            biased = builder.emit(relax.op.add(builder.emit(made), operands[2]))
            done = builder.emit_output(relax.op.nn.relu(biased))
        builder.emit_func_output(done)


def _data_shape(shape: ConvShape, machine: Machine) -> tuple[int, ...]:
    channels = shape.groups * shape.inputs
    if not shape.blocked:
        return (shape.batch, channels, *shape.image)
    return (shape.batch, blocks_of(channels, machine.block), *shape.image, machine.block)


def _definition(shape: ConvShape, candidate: Candidate, machine: Machine) -> tuple[Any, tuple[int, ...]]:
    """Return what a candidate computes, and the shape of its weights."""
    plan = candidate.plan
    if isinstance(plan, DirectPlan):
        return direct_definition(shape, plan, machine), packed_shape(shape, plan, machine)
    if isinstance(plan, WindowPlan):
        blocks = blocks_of(shape.groups, machine.block)
        return depthwise_definition(shape, plan), (blocks, *shape.kernel, machine.block)
    return winograd_definition(shape, plan, machine), transformed_shape(shape, plan, machine)


def _kernel(function: Any) -> str:
    """Return the one kernel that a function calls; equal candidates share theirs."""
    [call] = [binding.value for binding in bindings_of(function) if hasattr(binding.value, "args")]
    return str(call.args[0].name_hint)


class _Arguments:
    """Tensors to call kernels with, of random numbers; kernels of a convolution share what they can."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], list[Any]] = {}

    def of(self, function: Any) -> list[list[Any]]:
        """Return lists of arguments, each with other weights: calls take them in turn."""
        data, weight, *rest = [tuple(int(size) for size in buffer.shape) for buffer in function.params]
        copies = max(1, min(_MOST_COPIES, -(-_COLD_BYTES // (4 * math.prod(weight)))))
        fixed = [self._tensors(shape, 1, role)[0] for role, shape in enumerate([data, *rest])]
        return [[fixed[0], held, *fixed[1:]] for held in self._tensors(weight, copies, -1)]

    def _tensors(self, shape: tuple[int, ...], count: int, role: int) -> list[Any]:
        made = self._made.setdefault((role, *shape), [])
        if not made:
            values = _random(shape)
            made += [tvm.runtime.tensor(values) for _ in range(count)]
        return made


def _random(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")


def _repeated(function: Any, arguments: Sequence[Sequence[Any]]) -> Callable[[int], None]:
    position = 0

    def call(count: int) -> None:
        nonlocal position
        for _ in range(count):
            function(*arguments[position])
            position = (position + 1) % len(arguments)

    return call


def ratio_of(times: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return how long one contestant took against another in the same rounds: the median, and how uncertain that is.

    The uncertainty is twice the standard error of a median, from the median absolute deviation (1.48 and 1.25 are the
    factors of a normal distribution).
    """
    ratios = [own / other for own, other in zip(times, base, strict=True)]
    middle = statistics.median(ratios)
    spread = 1.48 * statistics.median(abs(ratio - middle) for ratio in ratios)
    return middle, 2 * 1.25 * spread / math.sqrt(len(ratios))
