"""The errors of cnncc, each with its exit code and the way out.

    CnnccError
    ├── CheckFailed             exit 1   a check said no
    │   ├── ParityFailed                 the engine does not compute what the model computes
    │   ├── BudgetExceeded               a latency, size or accuracy gate was missed
    │   └── TrainingDiverged             a loss became NaN or infinite
    ├── UsageError              exit 2   a flag, an argument or an output path is wrong
    ├── EnvironmentMissing      exit 3   this machine lacks something
    │   ├── DependencyMissing            a Python package or a tool is not installed
    │   ├── TargetUnavailable            the target cannot be built or run here
    │   ├── EngineMismatch               the engine was built for another machine
    │   ├── BoardUnavailable             a board in the lab cannot be reached
    │   └── StorageFailed                the disk is full, or a folder cannot be written
    ├── InputRefused            exit 4   a model, its weights or data were refused
    │   ├── ModelRefused
    │   │   ├── UnsupportedGraph         nodes that a target cannot build, all of them
    │   │   └── WeightsRefused
    │   ├── DataRefused
    │   └── BundleRefused                damaged, hostile, or not a bundle
    ├── ToolchainFailed         exit 5   an exporter, a compiler or an engine broke
    │   ├── ExportFailed
    │   ├── BuildFailed
    │   └── RunFailed
    ├── NetworkFailed           exit 20  a registry could not be reached, or broke
    │   ├── FleetBusy                    somebody else changes the fleet now
    │   ├── Paused                       it is not the time to download
    │   └── RegistryRefused              it answered, with a refusal
    │       └── NotInRegistry
    ├── VerificationFailed      exit 30  what was fetched is not what was named or signed
    ├── NoArtifact              exit 40  a release has nothing for this device
    ├── HealthCheckFailed       exit 50  a new engine failed on the device, which went back
    └── Interrupted             exit 130 Ctrl-C

An error says what was wrong (``message``), where (``where``: PyTorch modules, ONNX nodes, files) and
what to do next (``hint``). One class, one exit code; `cnncc.cli` renders them and adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class CnnccError(Exception):
    """Base of every error that cnncc raises on purpose.

    Args:
        message: What was wrong, in one sentence, in the user's terms.
        where: Places the error is about: module paths, node names, files.
        hint: What to do next.
    """

    exit_code: ClassVar[int] = 5

    def __init__(self, message: str, *, where: Iterable[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = tuple(where)
        self.hint = hint

    def __str__(self) -> str:
        """Return the message, the places and the hint, a line each."""
        lines = [self.message, *(f"  at {place}" for place in self.where)]
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class CheckFailed(CnnccError):
    """A check that the user asked for, or that every build makes, said no."""

    exit_code = 1


class ParityFailed(CheckFailed):
    """The engine's outputs lie outside the tolerance derived for the model."""


class BudgetExceeded(CheckFailed):
    """A latency, size or accuracy gate was missed."""


class TrainingDiverged(CheckFailed):
    """A loss became NaN or infinite; the message says in which step."""


class UsageError(CnnccError):
    """A flag, an argument or an output path is wrong."""

    exit_code = 2


class EnvironmentMissing(CnnccError):
    """This machine lacks something that the command needs."""

    exit_code = 3


class DependencyMissing(EnvironmentMissing):
    """A Python package or a tool is not installed."""


class TargetUnavailable(EnvironmentMissing):
    """A target cannot be built or run on this machine."""


class EngineMismatch(EnvironmentMissing):
    """The engine was built for another machine; the message says for which, and what was found."""


class BoardUnavailable(EnvironmentMissing):
    """A board that was asked for cannot be reached, or is in use."""


class StorageFailed(EnvironmentMissing):
    """The disk is full, or a file or folder cannot be read or written."""


class InputRefused(CnnccError):
    """A model, its weights or data were refused."""

    exit_code = 4


class ModelRefused(InputRefused):
    """A model file, a factory or a graph was refused."""


class UnsupportedGraph(ModelRefused):
    """The graph holds nodes that a target cannot build; ``where`` lists every one."""


class WeightsRefused(ModelRefused):
    """Weights are unsafe to load, do not fit the model, or hold NaN or Inf."""


class DataRefused(InputRefused):
    """An input array, image or data set was refused."""


class BundleRefused(InputRefused):
    """A bundle is damaged, hostile, of an unknown schema, or not a bundle."""


class ToolchainFailed(CnnccError):
    """An exporter, a compiler or an engine broke."""

    exit_code = 5


class ExportFailed(ToolchainFailed):
    """PyTorch could not export the module to ONNX."""


class BuildFailed(ToolchainFailed):
    """A target's compiler or linker failed."""


class RunFailed(ToolchainFailed):
    """An engine failed while it ran."""


class NetworkFailed(CnnccError):
    """A registry could not be reached, or broke while it answered; trying later may help."""

    exit_code = 20


class Paused(NetworkFailed):
    """It is not the time to download; what came so far is kept."""


class FleetBusy(NetworkFailed):
    """Somebody else changes the fleet's metadata now, or did so meanwhile; trying later helps."""


class RegistryRefused(NetworkFailed):
    """A registry answered with a refusal: no credentials, no permission, something that it does not take."""


class NotInRegistry(RegistryRefused):
    """A registry has no such repository, tag or digest."""


class VerificationFailed(CnnccError):
    """What was fetched is not what was named, or not what was signed."""

    exit_code = 30


class NoArtifact(CnnccError):
    """A release has no engine that this device can run; ``where`` says why not, engine by engine."""

    exit_code = 40


class HealthCheckFailed(CnnccError):
    """A new engine failed on the device; the one before runs."""

    exit_code = 50


class Interrupted(CnnccError):
    """The user pressed Ctrl-C; nothing half-written was left behind."""

    exit_code = 130
