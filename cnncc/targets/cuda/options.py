"""Which options a library heeds, and for which devices: what would have no effect is refused before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from cnncc.targets.base import BuildOptions, GpuOptions, Profile
from cnncc.targets.cuda.vendors import Chosen
from cnncc.targets.devices.gpus import ORIN
from cnncc_runtime.errors import TargetUnavailable, UsageError
from cnncc_runtime.plan_library import TENSORRT

AMPERE, SAME = "ampere+", "same"
AMPERE_PLUS = "8.0+"
"""What engines for Ampere and newer need, as a manifest says it."""

_LEAVE_OUT = f"leave it out, or build with TensorRT, on the GPU itself: --backend {TENSORRT}"
_UNHEEDED = {
    "version_compatible": ("has no lean runtime to put into an engine: --version-compatible fails", _LEAVE_OUT),
    "hardware": ("builds for compute capabilities, not for one GPU: --hardware-compatible changes nothing", _LEAVE_OUT),
    "sparse": ("builds the same engine with --sparse and without", _LEAVE_OUT),
    "dla": ("does not build for DLA", "build on the Jetson, with TensorRT 10"),
}
"""Option → what the libraries do that do not heed it, and what to do."""


def check_options(options: BuildOptions, chosen: Chosen, device: Profile, here: Collection[str]) -> None:
    """Refuse options that contradict each other, the device or the library.

    Args:
        options: What is asked for.
        chosen: The library.
        device: Its compute capability is known.
        here: Compute capabilities of this machine's GPUs.

    Raises:
        UsageError: They do.
        TargetUnavailable: What is asked for needs a GPU, and none is here.
    """
    asked = options.gpu
    for problem in (*_contradictions(options), *_of_device(asked, device)):
        raise problem
    for name, (what, hint) in _UNHEEDED.items():
        if getattr(asked, name) != getattr(GpuOptions, name) and name not in chosen.vendor.heeds:
            raise UsageError(f"{chosen} {what}", hint=hint)
    if (asked.refittable or asked.strip_weights) and not here:
        raise TargetUnavailable(
            f"{chosen} loads a refittable engine onto the GPU while it builds it, and this machine has no NVIDIA GPU",
            hint="build on a machine with a GPU, or leave --refittable and --strip-weights out",
        )


def _contradictions(options: BuildOptions) -> Iterator[UsageError]:
    asked = options.gpu
    if asked.hardware not in (None, SAME, AMPERE):
        yield UsageError(f"unknown hardware compatibility '{asked.hardware}'", hint=f"known: {SAME}, {AMPERE}")
    if asked.version_compatible and (asked.refittable or asked.strip_weights):
        yield UsageError(
            "other versions run a --version-compatible engine by the lean runtime inside it, which refits no weights",
            hint="leave it out, or --refittable and --strip-weights",
        )
    if asked.gpu_fallback and asked.dla is None:
        yield UsageError("--gpu-fallback is for --dla", hint="add --dla 0, or leave it out")
    if asked.dla is not None and len(options.batches) > 1:
        yield UsageError("DLA runs one batch size", hint="--batch with one size, or an engine for each")
    if asked.dla is not None and options.precision == "bf16":
        yield UsageError("DLA computes in float16 and int8", hint="--precision fp16")


def _of_device(asked: GpuOptions, device: Profile) -> Iterator[UsageError]:
    if asked.dla is not None and device.gpu != ORIN:
        yield UsageError(f"DLA is a part of Jetsons, and {device.name} has none", hint="leave --dla out")
    if asked.hardware and device.gpu == ORIN:
        yield UsageError("engines of Jetsons run on no other GPU", hint="leave --hardware-compatible out")
    if asked.hardware == AMPERE and float(device.gpu) < float(AMPERE_PLUS.removesuffix("+")):
        yield UsageError(
            f"{device.name} (compute capability {device.gpu}) is older than Ampere", hint="--hardware-compatible same"
        )
