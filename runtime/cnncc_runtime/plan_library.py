"""Which library here opens a plan of TensorRT or TensorRT-RTX: found without loading anything, then loaded.

A plan is opened by the very version that built it; where it was built version-compatible (its ABI ends in ``+``), by
that version or a newer one of the same major, which TensorRT's lean runtime does too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cnncc_runtime.bundle import EngineRecord
from cnncc_runtime.cuda_device import BINDINGS, INSTALL_BINDINGS, has_bindings
from cnncc_runtime.errors import EngineMismatch, EnvironmentMissing, TargetUnavailable
from cnncc_runtime.gpu import driver_cuda

COMPATIBLE = "+"
"""What the ABI of a version-compatible plan ends in."""

_CUDA = re.compile(r"-cu(\d+)$")


@dataclass(frozen=True)
class PlanLibrary:
    """A library that opens plans.

    Attributes:
        format: Engine format.
        title: As messages call it.
        module: Python module.
        distributions: Names it is installed by, in the order in which they are asked for its version.
        compatible: Whether it opens version-compatible plans alone.
    """

    format: str
    title: str
    module: str
    distributions: tuple[str, ...]
    compatible: bool = False

    def installed(self) -> Installed | None:
        """Return what is installed; None where nothing is. Only a library without metadata (Debian's) is imported."""
        if importlib.util.find_spec(self.module) is None:
            return None
        for name in self.distributions:
            try:
                found = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            cuda = _CUDA.search(name)
            return Installed(self, found, int(cuda[1]) if cuda else 0)
        try:
            return Installed(self, str(self.load().__version__))
        except (TargetUnavailable, AttributeError):  # a broken installation opens nothing
            return None

    def load(self, hint: str = "install it again") -> Any:
        """Import it.

        Args:
            hint: What to do where it does not load.

        Raises:
            TargetUnavailable: It does not load.
        """
        try:
            return importlib.import_module(self.module)
        except Exception as exc:  # a broken installation raises OSError, ImportError, RuntimeError or what it likes
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise TargetUnavailable(f"{self.title} does not load: {reason}", hint=hint) from exc


@dataclass(frozen=True)
class Installed:
    """A library that is here.

    Attributes:
        library: Which.
        version: Its version.
        cuda: Major version of CUDA that it needs the driver for; 0 where that is not known.
    """

    library: PlanLibrary
    version: str
    cuda: int = 0

    def __str__(self) -> str:
        """Return ``TensorRT-RTX 1.7.1.116``."""
        return f"{self.library.title} {self.version}"


TENSORRT, RTX = "tensorrt", "tensorrt-rtx"


def _names(stem: str) -> tuple[str, ...]:
    return (f"{stem}-cu13", f"{stem}-cu12", stem)  # those that say which CUDA first


FULL = PlanLibrary(TENSORRT, "TensorRT", "tensorrt", _names("tensorrt"))
LEAN = PlanLibrary(TENSORRT, "TensorRT's lean runtime", "tensorrt_lean", _names("tensorrt-lean"), compatible=True)
PORTABLE = PlanLibrary(RTX, "TensorRT-RTX", "tensorrt_rtx", _names("tensorrt-rtx"))

LIBRARIES = (FULL, LEAN, PORTABLE)
"""Those of one format in the order in which they are taken."""

PLANS = tuple(dict.fromkeys(library.format for library in LIBRARIES))
"""Formats of plans."""


def opener(engine: EngineRecord) -> Installed | EnvironmentMissing:
    """Return the library that opens a plan here, or why none does.

    Args:
        engine: Of a format in `PLANS`.
    """
    if not has_bindings():
        return TargetUnavailable(f"{BINDINGS} is not installed: it is what moves tensors to and from GPUs",
                                 hint=INSTALL_BINDINGS)  # fmt: skip
    found = list(_of_format(engine))
    fitting = [each for each in found if _opens(each, engine.abi)]
    if not found:
        return TargetUnavailable(f"nothing here opens plans of {engine.abi}", hint=_install(engine))
    if not fitting:
        return EngineMismatch(
            f"built for: {engine.abi}, found: {', '.join(map(str, found))}",
            hint=f"{_install(engine)}; or compile again with the version that is here",
        )
    driver = driver_cuda()
    if driver and fitting[0].cuda > driver[0]:
        return TargetUnavailable(
            f"{fitting[0]} needs a driver for CUDA {fitting[0].cuda}, this one is for {driver[0]}.{driver[1]}",
            hint="install a newer NVIDIA driver",
        )
    return fitting[0]


def logger_of(trt: Any) -> Any:
    """Return the library's logger, its list ``errors`` emptied; warnings and errors go to Python's logging too.

    There is one a process: the library keeps the first that it was given, and does not hear of others.

    Args:
        trt: The library's module.
    """
    logger = _logger(trt)
    logger.errors.clear()
    return logger


@functools.cache
def _logger(trt: Any) -> Any:
    said = logging.getLogger("cnncc_runtime")

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
                said.error("%s", msg)
            elif severity == trt.ILogger.WARNING:
                said.warning("%s", msg)

    return Logger()


def _of_format(engine: EngineRecord) -> Iterator[Installed]:
    for library in LIBRARIES:
        if library.format == engine.format and (found := library.installed()):
            yield found


def _opens(found: Installed, abi: str) -> bool:
    version = abi.rpartition(" ")[2]
    if not version.endswith(COMPATIBLE):
        return not found.library.compatible and _numbers(found.version) == _numbers(version)
    built, here = _numbers(version), _numbers(found.version)
    return built[:1] == here[:1] and here >= built


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _install(engine: EngineRecord) -> str:
    name = next(library for library in LIBRARIES if library.format == engine.format).distributions[0]
    version = engine.abi.rpartition(" ")[2].removesuffix(COMPATIBLE)
    return f"pip install {name}=={version} {BINDINGS}"
