"""Runs operators on blocked tensors in this process, with garbage in the lanes after the last channel."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from cnncc.targets.base import Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm import codegen, pipeline
from cnncc.targets.llvm.blocked.geometry import pack_channels
from cnncc.targets.llvm.loading import load_objects
from cnncc.targets.llvm.machine import Machine, machine_of, target_options
from cnncc.targets.llvm.quiet import quiet
from cnncc.targets.llvm.schedule.driver import Scheduled, schedule
from cnncc.targets.llvm.schedule.rules import RULES
from tests.targets.llvm.running import entry_of

Emit = Callable[..., Any]
"""Takes the block builder, the machine and the operands; returns the result."""


def profile_of(cpu: str) -> Profile:
    """Return this machine's profile (``host``) or that of an x86 processor."""
    return named(resolve_profile() if cpu == "host" else resolve_profile(mtriple="x86_64-linux-gnu", mcpu=cpu))


def compile_call(emit: Emit, shapes: Sequence[tuple[int, ...]], profile: Profile) -> tuple[Any, dict[str, Scheduled]]:
    """Return a function of tensors of these shapes, and kernel → rule that scheduled it."""
    machine = machine_of(profile)
    target = tvm.target.Target(target_options(profile))
    builder = relax.BlockBuilder()
    operands = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with warnings.catch_warnings(), quiet(), target, tvm.transform.PassContext(opt_level=3):
        with builder.function("main", operands):
            with builder.dataflow():
                done = builder.emit_output(emit(builder, machine, *operands))
            builder.emit_func_output(done)
        module = builder.get()
        for passes in (pipeline.legalize_passes(machine), pipeline.fuse_passes(), pipeline.merge_passes()):
            module = pipeline.run(module, passes)
        module, rules = schedule(module, RULES, machine, lambda _fraction: None)
        module = pipeline.run(module, pipeline.lower_passes())
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_objects(codegen.write_objects(module, target, Path(folder)))
    return entry_of(loaded, "main"), rules


def run_call(emit: Emit, operands: Sequence[NDArray[Any]], profile: Profile) -> NDArray[Any]:
    """Compile and run a function of tensors as they are."""
    run, _ = compile_call(emit, [operand.shape for operand in operands], profile)
    result: NDArray[Any] = run(*[tvm.runtime.tensor(np.require(o, requirements="C")) for o in operands]).numpy()
    return result


def run_blocked(emit: Emit, images: Sequence[NDArray[Any]], channels: int, profile: Profile) -> NDArray[Any]:
    """Compile and run a function of images ``[n, c, h, w]`` that are held blocked.

    Args:
        emit: The function on blocked tensors.
        images: The operands; lanes after their last channel are NaN.
        channels: Channels of the result.
        profile: What to compile for.
    """
    block = machine_of(profile).block
    packed = [pack_channels(image, block, axis=1, fill=float("nan")) for image in images]
    return unpacked(run_call(emit, packed, profile), channels)


def unpacked(blocked: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return an image ``[n, c, h, w]`` of a blocked one."""
    batch, blocks, high, wide, lanes = blocked.shape
    return blocked.transpose(0, 1, 4, 2, 3).reshape(batch, blocks * lanes, high, wide)[:, :channels]


def per_channel(values: NDArray[Any], machine: Machine) -> Any:
    """Return a constant ``[1, blocks, 1, 1, b]`` of one value for each channel."""
    return relax.const(pack_channels(values.astype("float32"), machine.block)[None, :, None, None, :])
