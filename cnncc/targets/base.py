"""The Target protocol: what a backend offers, and the records that pass through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cnncc_runtime.bundle import EngineRecord, LayerRecord, TargetRecord
from cnncc_runtime.errors import BuildFailed

if TYPE_CHECKING:  # onnx takes 0.2 s to import, and listing targets needs none of it
    from cnncc.graph.onnx_graph import OnnxGraph

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done (0 to 1)."""


@dataclass(frozen=True)
class Profile:
    """A named device that engines are built for.

    Attributes:
        name: As ``--device`` takes it; ``host`` is this machine.
        triple: LLVM target triple; empty for accelerators.
        cpu: LLVM CPU name (``znver3``, ``cortex-a76``).
        features: LLVM feature names that the engine may use (``avx2``, ``fma``).
        cores: Cores that the engine is scheduled for.
        gpu: CUDA compute capability (``8.9``); empty for CPUs.
    """

    name: str
    triple: str = ""
    cpu: str = ""
    features: tuple[str, ...] = ()
    cores: int = 1
    gpu: str = ""


@dataclass(frozen=True)
class Availability:
    """Whether a target can build or run here.

    Attributes:
        state: ``ready``, or ``missing``.
        detail: What was found, or what is missing.
        fix: What would make it ready; empty when it is.
    """

    state: str
    detail: str
    fix: str = ""

    @property
    def ready(self) -> bool:
        """Whether the target can be used."""
        return self.state == "ready"


@dataclass(frozen=True)
class NodeIssue:
    """One node that a target cannot build.

    Attributes:
        module: PyTorch module path.
        node: ONNX node name.
        op: ONNX operator.
        reason: Why, and what would help.
    """

    module: str
    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        """Return ``module (Op 'node'): reason``."""
        return f"{self.module} ({self.op} '{self.node}'): {self.reason}"


@dataclass(frozen=True)
class KernelOptions:
    """What a user asks of the choice of kernels.

    Attributes:
        winograd: Whether convolutions may use Winograd's method, which multiplies less and rounds more.
        direct: Patterns of module paths (``layer4.*``) whose convolutions are computed directly all the same.
        growth: What transformed weights may add to the memory of a network's weights, as a share of them; their file
            does not grow.
    """

    winograd: bool = True
    direct: tuple[str, ...] = ()
    growth: float = 2.0


@dataclass(frozen=True)
class GpuOptions:
    """What a user asks of the libraries that build engines for GPUs.

    Attributes:
        backend: ``tensorrt``, ``tensorrt-rtx``, or ``auto``: whichever is installed and can build for the device.
        level: How long the builder looks for fast kernels, 0 to 5; None for the library's own default.
        workspace: MiB of scratch memory that kernels may take; None for all that the device has.
        budget: Seconds that the builder may take; None for as long as it likes.
        version_compatible: Whether newer versions of the library must be able to run the engine.
        hardware: Which GPUs must be able to run it besides the one that it is built on: ``same`` (all of its compute
            capability), ``ampere+`` (compute capability 8.0 and newer), or None.
        refittable: Whether its weights can be replaced by others.
        strip_weights: Whether its weights are left out of it, and lie beside it.
        sparse: Whether 2:4 sparse weights are multiplied as such.
        dla: The deep learning accelerator of a Jetson that runs it; None for the GPU.
        gpu_fallback: Whether the GPU computes what the accelerator cannot.
    """

    backend: str = "auto"
    level: int | None = None
    workspace: int | None = None
    budget: float | None = None
    version_compatible: bool = False
    hardware: str | None = None
    refittable: bool = False
    strip_weights: bool = False
    sparse: bool = False
    dla: int | None = None
    gpu_fallback: bool = False

    @property
    def lasting(self) -> GpuOptions:
        """The options that an engine is the result of; how long its build may take is none of them."""
        return replace(self, budget=None)


def budget_spent(budget: float) -> BuildFailed:
    """Return the error of a build that takes longer than it may.

    Args:
        budget: Seconds.
    """
    return BuildFailed(
        f"the builder did not finish within {budget:g} s (--build-budget)",
        hint="allow more, or have it search less: --builder-level 0 to 5, by default 3",
    )


VM, AOT = "vm", "aot-static"
"""What runs an engine for CPUs: a virtual machine out of the runtime's library, or the engine itself."""


Specialize = Callable[["OnnxGraph", int], "OnnxGraph"]
"""Returns a graph for one batch size, what became constant folded."""


def _bind_batch(graph: OnnxGraph, batch: int) -> OnnxGraph:
    from cnncc.graph.reader import bind_batch

    return bind_batch(graph, batch)


def _no_note(_text: str) -> None:
    return None


def _no_progress(_what: str, _fraction: float) -> None:
    return None


@dataclass(frozen=True)
class BuildOptions:
    """What a build is asked for.

    Attributes:
        profile: The device.
        batches: Batch sizes to build for; empty when the graph's shapes are all static.
        kernels: What the choice of kernels must heed.
        measured: What `Measuring.measure` returned; empty where rules alone choose.
        gpu: What the libraries for GPUs must heed.
        precision: What the graph computes in, for a target to say no before there is one (`Preflighting`): ``fp32``,
            ``fp16``, ``bf16``, ``int8`` or ``auto``. A build does what the graph says.
        float_type: What is not int8 computes in, likewise.
        runtime: `VM` or `AOT`.
        name: What the C of an engine of `AOT` calls the model.
        timings: Folder where times of kernels are kept, for later builds to be faster; None to keep none.
        progress: Told how far the build is.
        note: Told what the user did not ask for but should know.
        specialize: Makes the graph of one batch size; the compiler hands in its passes, since targets may not import
            them. By default the batch is bound and nothing is folded.
    """

    profile: Profile
    batches: tuple[int, ...] = ()
    kernels: KernelOptions = KernelOptions()
    measured: str = ""
    gpu: GpuOptions = GpuOptions()
    precision: str = "fp32"
    float_type: str = "fp32"
    runtime: str = VM
    name: str = "network"
    timings: Path | None = field(default=None, compare=False)
    progress: Progress = field(default=_no_progress, compare=False)
    note: Callable[[str], None] = field(default=_no_note, compare=False)
    specialize: Specialize = field(default=_bind_batch, compare=False)


@dataclass(frozen=True)
class MeasureOptions:
    """What a measurement of kernels is asked for.

    Attributes:
        build: What the engine will be built for.
        database: Content of the kernel database; empty where there is none yet.
        name: What messages call it.
        budget: Seconds that may be spent; None to measure nothing and only look up.
        keep: Told the database's new content whenever a kernel has been measured.
        note: Told what the user did not ask for but should know.
    """

    build: BuildOptions
    database: str = ""
    name: str = "the kernel database"
    budget: float | None = None
    keep: Callable[[str], None] = field(default=_no_note, compare=False)
    note: Callable[[str], None] = field(default=_no_note, compare=False)


@dataclass(frozen=True)
class Measured:
    """What is known of a network's kernels after a measurement.

    Attributes:
        plans: What `BuildOptions.measured` takes: the measurements that this network can use, and no others.
        measured: Kernels that were measured now.
        reused: Kernels that the database had.
        left: Kernels that nobody measured.
        faster: Kernels for which something was faster than the rule's choice.
    """

    plans: str
    measured: int
    reused: int
    left: int
    faster: int


@dataclass(frozen=True)
class Engine:
    """What a build produced, in its work folder.

    Attributes:
        target: What the engine was built for; a device checks it before loading.
        record: The engine file's format, entries and ABI.
        payload: The engine file; the other files of the record lie beside it.
        toolchain: Name → version of everything that made it.
        layers: Executed kernel and precision per layer, in the user's module names.
        reproducible: Whether the same inputs and toolchain give the same bytes.
        extras: Names of other files beside the payload → their roles in a bundle.
        memory: What it takes, by kind, in bytes; empty where the engine does not know.
    """

    target: TargetRecord
    record: EngineRecord
    payload: Path
    toolchain: dict[str, str]
    layers: tuple[LayerRecord, ...]
    reproducible: bool
    extras: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, tuple[str, Path]]:
        """Names of the engine's files → their roles in a bundle, and where they lie."""
        roles = self.record.roles | self.extras
        return {name: (role, self.payload.with_name(name)) for name, role in roles.items()}


@runtime_checkable
class Measuring(Protocol):
    """A target whose kernels have knobs that measuring can improve on."""

    def measure(self, graph: OnnxGraph, options: MeasureOptions) -> Measured:
        """Time kernels on this machine, or look them up.

        Args:
            graph: As `Target.build` takes it.
            options: Their profile must be one that this machine can run, unless nothing is to be measured.

        Raises:
            DataRefused: The database is damaged or of another kind.
            UsageError: As `Target.build`.
            BuildFailed: The toolchain broke.
        """
        ...


@runtime_checkable
class Predicting(Protocol):
    """A target that has a model of how long its kernels take."""

    def predict(self, graph: OnnxGraph, options: BuildOptions) -> float:
        """Return the predicted time of an inference, in a unit of the target's: good to compare graphs with.

        Args:
            graph: As `Target.build` takes it.
            options: As `Target.build` takes them.

        Raises:
            UnsupportedGraph: Lists every refused node.
            UsageError: As `Target.build`.
            BuildFailed: The toolchain broke.
        """
        ...


@dataclass(frozen=True)
class Preflight:
    """How a target will build.

    Attributes:
        builders: Names by which the Q/DQ lint knows what builds (``llvm``, ``tensorrt``, ``tensorrt-rtx``).
        notes: What the user should know of it, a sentence each.
        toolchain: What else shapes the engine's bytes than `Target.toolchain` says, for these options: name → version.
    """

    builders: tuple[str, ...]
    notes: tuple[str, ...] = ()
    toolchain: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Preflighting(Protocol):
    """A target that judges, before any work, whether it can do what was asked."""

    def preflight(self, options: BuildOptions) -> Preflight:
        """Refuse what cannot be built, or say how it will be.

        Args:
            options: As `Target.build` takes them.

        Raises:
            UsageError: The device is not one of this target's, or options contradict it.
            TargetUnavailable: What builds for the device is not installed, or not able to on this machine.
        """
        ...


class Target(Protocol):
    """A backend. Instances hold a profile and nothing else."""

    @property
    def name(self) -> str:
        """As ``--target`` takes it."""
        ...

    @property
    def profile(self) -> Profile:
        """The device that this instance builds for."""
        ...

    def probe(self) -> Availability:
        """Say whether engines can be built here; never raises."""
        ...

    def toolchain(self) -> dict[str, str]:
        """Return name → version of everything that shapes the engine's bytes, without importing a compiler."""
        ...

    def unsupported(self, graph: OnnxGraph) -> tuple[NodeIssue, ...]:
        """List every node that cannot be built; pure."""
        ...

    def build(self, graph: OnnxGraph, options: BuildOptions, workdir: Path) -> Engine:
        """Build an engine; writes only in ``workdir``.

        Raises:
            UnsupportedGraph: Lists every refused node.
            TargetUnavailable: A compiler or linker is missing.
            BuildFailed: The toolchain broke.
        """
        ...
