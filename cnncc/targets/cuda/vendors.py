"""The three libraries that build engines for NVIDIA GPUs, in what they differ; and which of them is taken.

Everything else in this package is written against the API that they share: strongly typed networks, explicit Q/DQ,
the ONNX parser. A test holds what is used of it against the bindings of each.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cnncc.targets.base import Profile
from cnncc.targets.devices.gpus import ORIN
from cnncc_runtime.errors import CnnccError, TargetUnavailable, UsageError

AUTO, TENSORRT, RTX = "auto", "tensorrt", "tensorrt-rtx"


@dataclass(frozen=True)
class Vendor:
    """One library.

    Attributes:
        backend: As ``--backend`` takes it, and the format of its engines.
        title: As messages call it.
        module: Python module.
        major: Its major version.
        distributions: Names it is installed by, in the order in which they are asked for its version.
        capabilities: Compute capabilities that it builds for, whatever GPU is here; empty where it builds for the GPU
            of this machine and needs it.
        jetpack: Whether it serves Jetsons.
        reproducible: Whether the same inputs give the same bytes: what times kernels while it builds does not.
        heeds: What it heeds of `GpuOptions` besides what all libraries do.
        install: The command that installs it.
    """

    backend: str
    title: str
    module: str
    major: int
    distributions: tuple[str, ...]
    capabilities: tuple[str, ...]
    jetpack: bool
    reproducible: bool
    heeds: frozenset[str]
    install: str

    @property
    def portable(self) -> bool:
        """Whether it builds without the GPU that the engine is for."""
        return bool(self.capabilities)


_COMPATIBLE = frozenset({"version_compatible", "hardware"})
_TENSORRT_NAMES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")

VENDORS = (
    Vendor(
        TENSORRT, "TensorRT", "tensorrt", 10, _TENSORRT_NAMES, (), jetpack=True, reproducible=False,
        heeds=_COMPATIBLE | {"sparse", "dla"}, install="pip install 'tensorrt==10.*'",
    ),
    Vendor(
        TENSORRT, "TensorRT", "tensorrt", 11, _TENSORRT_NAMES, (), jetpack=False, reproducible=False,
        heeds=_COMPATIBLE | {"sparse"}, install="pip install tensorrt",
    ),
    Vendor(
        RTX,
        "TensorRT-RTX",
        "tensorrt_rtx",
        1,
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
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
        why: Why this one, in a sentence; empty where it was asked for.
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
    found = {}
    for backend in BACKENDS:
        [first, *_] = [vendor for vendor in VENDORS if vendor.backend == backend]
        if importlib.util.find_spec(first.module) is not None and (version_ := _version(first)):
            found[backend] = version_
    return found


def vendor_of(backend: str, version_: str) -> Vendor | None:
    """Return the library of a backend and version; None for a major version that is not known."""
    major = int(version_.partition(".")[0]) if version_.partition(".")[0].isdigit() else 0
    return next((vendor for vendor in VENDORS if (vendor.backend, vendor.major) == (backend, major)), None)


def choose(wanted: str, device: Profile, found: Mapping[str, str], here: Collection[str]) -> Chosen:
    """Return the library that builds an engine.

    Where both can, TensorRT is taken: it times its kernels on the GPU that the engine is for.

    Args:
        wanted: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        device: Its compute capability is known.
        found: As `installed` returns it.
        here: Compute capabilities of this machine's GPUs.

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
            return Chosen(judged.vendor, judged.version, why)
        reasons.append(judged)
    able = [reason for reason in reasons if not isinstance(reason, UsageError)]
    raise TargetUnavailable(
        f"nothing here builds engines for {device.name}",
        where=[reason.message for reason in reasons],
        hint=able[-1].hint,
    )


def _judge(
    backend: str, device: Profile, found: Mapping[str, str], here: Collection[str]
) -> Chosen | UsageError | TargetUnavailable:
    """Return the library of a backend, or why it does not build for a device here."""
    version_ = found.get(backend)
    of_backend = [vendor for vendor in VENDORS if vendor.backend == backend]
    newest = of_backend[-1]
    vendor = vendor_of(backend, version_) if version_ else newest
    if vendor is None:
        known = " or ".join(f"{each.title} {each.major}" for each in of_backend)
        return TargetUnavailable(f"{newest.title} {version_} is installed, cnncc knows {known}", hint=newest.install)
    if vendor.portable and device.gpu not in vendor.capabilities:
        return UsageError(
            f"{vendor.title} builds for the compute capabilities {', '.join(vendor.capabilities)}; "
            f"{device.name} has {device.gpu}",
            hint="build on the device itself, with TensorRT: --backend tensorrt",
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
    return Chosen(vendor, version_)


def _install(vendor: Vendor, device: Profile) -> str:
    if device.gpu == ORIN and not vendor.portable:
        return "on the Jetson: sudo apt-get install python3-libnvinfer"
    return vendor.install


def load(vendor: Vendor) -> Any:
    """Import a library.

    Raises:
        TargetUnavailable: It does not load.
    """
    try:
        return importlib.import_module(vendor.module)
    except Exception as exc:  # a broken installation raises OSError, ImportError, RuntimeError or what it likes
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise TargetUnavailable(f"{vendor.title} does not load: {reason}", hint=vendor.install) from exc


def _version(vendor: Vendor) -> str:
    for name in vendor.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    try:
        return str(load(vendor).__version__)
    except (TargetUnavailable, AttributeError):
        return ""
