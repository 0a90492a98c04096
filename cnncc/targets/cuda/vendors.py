"""The three libraries that build engines for NVIDIA GPUs, in what they differ; and which of them is taken.

Everything else in this package is written against the API that they share: strongly typed networks, explicit Q/DQ,
the ONNX parser. A test holds what is used of it against the bindings of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cnncc.targets.base import Profile
from cnncc.targets.devices.gpus import ORIN
from cnncc_runtime.errors import CnnccError, TargetUnavailable, UsageError
from cnncc_runtime.plan_library import FULL, PORTABLE, RTX, PlanLibrary

AUTO = "auto"


@dataclass(frozen=True)
class Vendor:
    """One library.

    Attributes:
        library: What it is, to import and to open its engines by.
        major: Its major version.
        capabilities: Compute capabilities that it builds for, whatever GPU is here; empty where it builds for the GPU
            of this machine and needs it.
        jetpack: Whether it serves Jetsons.
        reproducible: Whether the same inputs give the same bytes: what times kernels while it builds does not.
        heeds: What it heeds of `GpuOptions` besides what all libraries do.
        install: The command that installs it.
    """

    library: PlanLibrary
    major: int
    capabilities: tuple[str, ...]
    jetpack: bool
    reproducible: bool
    heeds: frozenset[str]
    install: str

    @property
    def backend(self) -> str:
        """As ``--backend`` takes it, and the format of its engines."""
        return self.library.format

    @property
    def title(self) -> str:
        """As messages call it."""
        return self.library.title

    @property
    def portable(self) -> bool:
        """Whether it builds without the GPU that the engine is for."""
        return bool(self.capabilities)


_COMPATIBLE = frozenset({"version_compatible", "hardware"})

VENDORS = (
    Vendor(
        FULL, 10, (), jetpack=True, reproducible=False,
        heeds=_COMPATIBLE | {"sparse", "dla"}, install="pip install 'tensorrt==10.*'",
    ),
    Vendor(
        FULL, 11, (), jetpack=False, reproducible=False,
        heeds=_COMPATIBLE | {"sparse"}, install="pip install tensorrt",
    ),
    Vendor(
        PORTABLE,
        1,
        ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        jetpack=False,
        reproducible=True,
        heeds=frozenset(),
        install="pip install tensorrt-rtx-cu13==1.7.1.116",
    ),
)  # fmt: skip
"""TensorRT 11 has no weak typing and no DLA; what is used here of 10 and 11 is the same. Only TensorRT-RTX takes the
compute capability to build for (``IBuilderConfig.set_compute_capability``). It has the others' flags, too, and
heeds none of them: 1.7.1 writes the same bytes, and has no lean runtime to put into an engine."""

BACKENDS = tuple(dict.fromkeys(vendor.backend for vendor in VENDORS))


@dataclass(frozen=True)
class Chosen:
    """The library that builds an engine.

    Attributes:
        vendor: Which.
        version: Of the installed library.
        why: Why this one, or what is odd about it, in a sentence; empty where it was asked for.
    """

    vendor: Vendor
    version: str
    why: str = ""

    def __str__(self) -> str:
        """Return ``TensorRT-RTX 1.7.1.116``."""
        return f"{self.vendor.title} {self.version}"


def installed() -> dict[str, str]:
    """Return backend → version of the libraries that are installed; imports none of them.

    Versions that only the library itself knows (Debian packages without metadata) are found by importing it.
    """
    libraries = dict.fromkeys(vendor.library for vendor in VENDORS)
    return {library.format: found.version for library in libraries if (found := library.installed())}


def vendor_of(backend: str, version_: str) -> Vendor | None:
    """Return the library of a backend and version; None for a major version that is not known."""
    major = int(version_.partition(".")[0]) if version_.partition(".")[0].isdigit() else 0
    return next((vendor for vendor in VENDORS if (vendor.backend, vendor.major) == (backend, major)), None)


def choose(wanted: str, device: Profile, found: Mapping[str, str], here: Sequence[str]) -> Chosen:
    """Return the library that builds an engine.

    Where both can, TensorRT is taken: it times its kernels on the GPU that the engine is for.

    Args:
        wanted: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        device: Its compute capability is known.
        found: As `installed` returns it.
        here: Compute capabilities of this machine's GPUs, in CUDA's order: the first one is built on.

    Raises:
        UsageError: The backend that was asked for never builds for the device.
        TargetUnavailable: It is not installed, or needs a GPU that is not here; for ``auto``, all of them.
    """
    if wanted != AUTO:
        judged = _judge(wanted, device, found, here)
        if isinstance(judged, CnnccError):
            raise judged
        return judged
    reasons: list[UsageError | TargetUnavailable] = []
    for backend in BACKENDS:
        judged = _judge(backend, device, found, here)
        if isinstance(judged, Chosen):
            why = reasons[0].message if reasons else f"it times its kernels on this machine's GPU ({device.gpu})"
            return replace(judged, why=judged.why or why)
        reasons.append(judged)
    able = [reason for reason in reasons if not isinstance(reason, UsageError)]
    raise TargetUnavailable(
        f"nothing here builds engines for {device.name}",
        where=[reason.message for reason in reasons],
        hint=able[-1].hint,
    )


def _judge(
    backend: str, device: Profile, found: Mapping[str, str], here: Sequence[str]
) -> Chosen | UsageError | TargetUnavailable:
    """Return the library of a backend, or why it does not build for a device here."""
    version_ = found.get(backend)
    of_backend = [vendor for vendor in VENDORS if vendor.backend == backend]
    newest = of_backend[-1]
    vendor = vendor_of(backend, version_) if version_ else newest
    if vendor is None:
        known = " or ".join(f"{each.title} {each.major}" for each in of_backend)
        return TargetUnavailable(f"{newest.title} {version_} is installed, cnncc knows {known}", hint=newest.install)
    first = here[0] if here else ""
    if vendor.portable and device.gpu not in vendor.capabilities and device.gpu != first:
        return UsageError(
            f"{vendor.title} builds for the compute capabilities {', '.join(vendor.capabilities)}; "
            f"{device.name} has {device.gpu}",
            hint="build on the device itself, with TensorRT: --backend tensorrt",
        )
    if not vendor.portable and device.gpu in here and device.gpu != first:
        return TargetUnavailable(
            f"{vendor.title} builds on the first GPU, which has {first}; {device.name} has {device.gpu}",
            hint=f"CUDA_VISIBLE_DEVICES={here.index(device.gpu)} makes it the first",
        )
    if not vendor.portable and device.gpu not in here:
        other = f", or take --backend {RTX}, which needs no GPU" if device.gpu in VENDORS[-1].capabilities else ""
        return TargetUnavailable(
            f"{vendor.title} builds on the GPU itself, and this machine has none of compute capability {device.gpu}",
            hint=f"run it on a machine with that GPU{other}",
        )
    if not version_:
        return TargetUnavailable(f"{vendor.title} is not installed", hint=_install(newest, device))
    if device.gpu == ORIN and not vendor.jetpack:
        return TargetUnavailable(
            f"{vendor.title} {version_} does not support JetPack; {device.name} needs TensorRT 10",
            hint=_install(newest, device),
        )
    unlisted = vendor.portable and device.gpu not in vendor.capabilities
    return Chosen(vendor, version_, f"it does not list {device.gpu}, which this machine's GPU has" if unlisted else "")


def _install(vendor: Vendor, device: Profile) -> str:
    if device.gpu == ORIN and not vendor.portable:
        return "on the Jetson: sudo apt-get install python3-libnvinfer"
    return vendor.install


def load(vendor: Vendor) -> Any:
    """Import a library.

    Raises:
        TargetUnavailable: It does not load.
    """
    return vendor.library.load(vendor.install)
