"""NVIDIA GPUs by name: which compute capability an engine for them is built for."""

from __future__ import annotations

from cnncc.targets.base import Profile

ORIN = "8.7"
"""Jetson Orin: JetPack brings its TensorRT, and no other serves it."""

_CAPABILITIES = {
    "7.5": ("t4", "rtx2070", "rtx2080", "rtx2080ti"),
    "8.0": ("a30", "a100"),
    "8.6": ("a2", "a10", "a40", "rtx3060", "rtx3070", "rtx3080", "rtx3090", "rtx-a6000"),
    ORIN: ("jetson-orin",),
    "8.9": ("l4", "l40", "l40s", "rtx4060", "rtx4070", "rtx4080", "rtx4090", "rtx-6000-ada"),
    "9.0": ("h100", "h200", "gh200"),
    "10.0": ("b200", "gb200"),
    "12.0": ("rtx5060", "rtx5070", "rtx5080", "rtx5090", "rtx-pro-6000"),
    "12.1": ("dgx-spark",),
}
"""Compute capability → devices of it, by NVIDIA's table (developer.nvidia.com/cuda-gpus)."""


def architecture(capability: str) -> str:
    """Return a compute capability's architecture: ``8.9`` → ``sm89``."""
    return f"sm{capability.replace('.', '')}"


GPUS: dict[str, str] = {
    name: capability for capability, devices in _CAPABILITIES.items() for name in (architecture(capability), *devices)
}
"""Device → compute capability; an architecture (``sm89``) is a device too."""


def gpu_profile(name: str) -> Profile:
    """Return the profile of a GPU.

    Args:
        name: One of `GPUS`.
    """
    return Profile(name, gpu=GPUS[name])
