"""What the builder is told: `BuildOptions`, in the terms of the three libraries."""

from __future__ import annotations

from typing import Any

from cnncc.targets.base import BuildOptions, GpuOptions
from cnncc.targets.cuda.options import AMPERE, SAME
from cnncc.targets.cuda.parse import Parsed
from cnncc.targets.cuda.vendors import Chosen
from cnncc.targets.devices.gpus import architecture
from cnncc_runtime.errors import TargetUnavailable

_MIB = 1 << 20
_LEVELS = {AMPERE: "AMPERE_PLUS", SAME: "SAME_COMPUTE_CAPABILITY"}


def configure(
    parsed: Parsed, trt: Any, batches: tuple[int, ...], gpu: str, chosen: Chosen, options: BuildOptions
) -> Any:
    """Return the builder's configuration.

    Args:
        parsed: What is built.
        trt: The library's module.
        batches: As `cnncc.targets.cuda.compile.compile_graph` takes them.
        gpu: Compute capability.
        chosen: The library.
        options: Checked by `cnncc.targets.cuda.options.check_options`.

    Raises:
        TargetUnavailable: This version lacks what is asked for.
    """
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers' names and types, for the audit
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: it multiplies float32 with 10 bits of its 23
    if options.gpu.level is not None:
        config.builder_optimization_level = options.gpu.level
    if options.gpu.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.gpu.workspace * _MIB)
    for flag in _flags(options.gpu, trt):
        config.set_flag(flag)
    if options.gpu.hardware:
        config.hardware_compatibility_level = hardware_level(options.gpu.hardware, trt, chosen)
    if options.gpu.dla is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.gpu.dla
    if chosen.vendor.portable:
        # a GPU that is none of the table's is this machine's own (`choose`): the library says whether it builds for it
        name = architecture(gpu).upper() if gpu in chosen.vendor.capabilities else "CURRENT"
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None:
            raise TargetUnavailable(f"{chosen} does not build for compute capability {gpu}", hint=chosen.vendor.install)
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    if batches:
        config.add_optimization_profile(_profile(parsed, batches))
    return config


def _flags(asked: GpuOptions, trt: Any) -> list[Any]:
    """Return the builder's flags.

    Weights that come back to a stripped engine are those that it was built from, and only with that promise may the
    builder look at them; weights of any value need a refittable engine.
    """
    flags = {
        trt.BuilderFlag.VERSION_COMPATIBLE: asked.version_compatible,
        trt.BuilderFlag.REFIT: asked.refittable,
        trt.BuilderFlag.REFIT_IDENTICAL: asked.strip_weights and not asked.refittable,
        trt.BuilderFlag.STRIP_PLAN: asked.strip_weights,
        trt.BuilderFlag.SPARSE_WEIGHTS: asked.sparse,
        trt.BuilderFlag.GPU_FALLBACK: asked.gpu_fallback,
    }
    return [flag for flag, wanted in flags.items() if wanted]


def hardware_level(hardware: str, trt: Any, chosen: Chosen) -> Any:
    """Return the library's name for a hardware compatibility.

    Raises:
        TargetUnavailable: This version has none.
    """
    level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[hardware], None)
    if level is None:
        raise TargetUnavailable(
            f"{chosen} has no --hardware-compatible {hardware}", hint=f"install a newer one: {chosen.vendor.install}"
        )
    return level


def _profile(parsed: Parsed, batches: tuple[int, ...]) -> Any:
    """Return the range of shapes that the plan takes."""
    profile = parsed.builder.create_optimization_profile()
    sizes = (min(batches), batches[0], max(batches))
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *([size if dim == -1 else dim for dim in tensor.shape] for size in sizes))
    return profile
