"""What `cnncc.compiler.pipeline.compile` is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cnncc.calibration.table import CalibrationTable
from cnncc.compiler.cache import Cache
from cnncc.compiler.calibration import Calibration
from cnncc.compiler.kernel_stage import Optimize
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc.targets.base import VM, GpuOptions, KernelOptions, Profile
from cnncc_runtime.preprocess import Preprocessing

FP32, INT8, AUTO = "fp32", "int8", "auto"
FP16, BF16 = "fp16", "bf16"
HALVES = (FP16, BF16)
CALIBRATED = (INT8, AUTO)
"""Precisions that need scales."""

Retraining = Callable[[Stage, Stage, CalibrationTable, "Preprocessing | None", Cache, Reporter], Stage]
"""Makes the stage that trains a quantized model, of those that exported and cleaned it, its table and preprocessing.

The stage takes the place of the one that quantizes, and holds the table of what was trained. `cnncc.compression` has
one, and stands above this package.
"""


@dataclass(frozen=True)
class CompileRequest:
    """What `compile` is asked for.

    Attributes:
        model: The MODEL argument with its weights and shapes.
        profile: The device.
        output: Where the bundle goes; an existing bundle is replaced, anything else is refused.
        target: The target's name.
        batches: Batch sizes to build for, where the model has a symbolic batch.
        kernels: What the target's choice of kernels must heed.
        optimize: How knobs of kernels are found.
        gpu: What the libraries for GPUs must heed.
        data: DATA for real inputs in the parity check, and where half precision overflows; empty for none.
        samples: Real inputs at most.
        preprocessing: Replaces the contract that stands beside the model.
        labels: Replaces the class names that stand beside the model.
        keep_failed: Keep a bundle whose parity failed, marked so.
        reference: Store the cleaned ONNX in the bundle, for `verify` and `bench`.
        precision: ``fp32``; ``fp16`` or ``bf16``, where the target computes in them; ``int8`` by a calibration or its
            table; or ``auto``: int8 where it pays.
        calibration: How to calibrate, for int8 without a table.
        table: A calibration table made before.
        retraining: Trains the int8 model where calibration misses the budget of accuracy, or where there is none; None
            trains nothing.
        runtime: What runs an engine for CPUs: `cnncc.targets.base.VM` or `AOT`.
        with_runtime: Whether the bundle carries what runs it where there is no Python.
        glibc: The oldest C library that the device may have (``2.31``), which that must run on; empty where it is not
            known.
        float_type: ``fp32``, ``fp16`` or ``bf16``: what is not int8 computes in.
        max_fallback: Layers that are int8 (or half precision) in the graph and may be wider in the engine; None for any
            number.
        allow_slow: Whether int8 is taken unmeasured, whether it is faster than fp32 or not.
        name: The model's; by default that of the output.
    """

    model: ModelRequest
    profile: Profile
    output: Path
    target: str = "llvm"
    batches: tuple[int, ...] = ()
    kernels: KernelOptions = field(default_factory=KernelOptions)
    optimize: Optimize = field(default_factory=Optimize)
    gpu: GpuOptions = field(default_factory=GpuOptions)
    data: str = ""
    samples: int = 32
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    keep_failed: bool = False
    reference: bool = True
    precision: str = FP32
    calibration: Calibration = field(default_factory=Calibration)
    table: Path | None = None
    retraining: Retraining | None = None
    runtime: str = VM
    with_runtime: bool = False
    glibc: str = ""
    float_type: str = FP32
    max_fallback: int | None = None
    allow_slow: bool = False
    name: str = ""
