"""Opens bundles and runs them: `open` gives a `Session` (named arrays in and out), `load` a `Model` to call.

Before anything of an engine is loaded: its parity verdict, its format, its size and digest, and, by the format's
own session class, the machine it was built for, its ISA features and its ABI.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from cnncc_runtime.bundle import AOT_STATIC, Bundle, EngineRecord, Manifest, TargetRecord, read_bundle
from cnncc_runtime.cpu import HostCpu, host_cpu, usable_cores
from cnncc_runtime.errors import (
    BundleRefused,
    CheckFailed,
    DataRefused,
    EngineMismatch,
    EnvironmentMissing,
    ParityFailed,
    TargetUnavailable,
    UsageError,
)
from cnncc_runtime.gpu import gpus_text, host_gpus
from cnncc_runtime.plan_library import PLANS, opener
from cnncc_runtime.preprocess import open_image
from cnncc_runtime.specs import Feeds, Tensors, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from typing_extensions import Self

FORMATS = {
    "tvm-vm": "cnncc_runtime.tvm_session:TvmSession",
    AOT_STATIC: "cnncc_runtime.aot_session:AotSession",
} | dict.fromkeys(PLANS, "cnncc_runtime.plan_session:PlanSession")
"""Engine format → ``module:Class`` (a `SessionClass`), imported when a bundle asks for it."""

FORMATS_GROUP = "cnncc_runtime.formats"
"""Entry-point group by which other distributions add formats."""

MAX_THREADS = 1024


class Session(Protocol):
    """A loaded engine. One call runs at a time; calls from several threads wait for each other."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs, in the model's order; the batch dimension is symbolic where several sizes were built."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs, in the model's order."""
        ...

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that were built; empty when the model has no batch dimension."""
        ...

    @property
    def threads(self) -> int:
        """Cores that a run uses at most."""
        ...

    def run(self, feeds: Feeds) -> Tensors:
        """Run the engine once. The first run of a batch size takes longer: some weights are made of the file then.

        Args:
            feeds: Input name → array; contiguous arrays of more than 64 KiB at 64-byte addresses are not copied.

        Returns:
            Output name → array that the caller owns.

        Raises:
            DataRefused: An input is missing, unknown, or of another dtype or shape.
            RunFailed: The batch size was not built, the session is closed, or the engine failed.
        """
        ...

    def close(self) -> None:
        """Free the engine; arrays that it returned stay valid. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self:
        """Return the session."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""
        ...


class SessionClass(Protocol):
    """What a format's entry names."""

    def __call__(self, bundle: Bundle, engine: BinaryIO, *, threads: int, **options: bool) -> Session:
        """Load an engine.

        Args:
            bundle: Its bundle.
            engine: The engine file, opened; its size and digest were checked through this handle.
            threads: Cores that a run may use.
            options: ``cuda_graph`` where it was asked for; only engines for GPUs are.

        Raises:
            EngineMismatch: The engine was built for another machine or ABI.
            TargetUnavailable: What loads such engines is not installed.
            BundleRefused: The engine is damaged.
        """
        ...


def open(
    bundle: str | Path | Bundle,
    *,
    threads: int | None = None,
    allow_unverified: bool = False,
    cuda_graph: bool = False,
) -> Session:
    """Open a bundle's engine.

    Args:
        bundle: A ``NAME.cnncc`` folder.
        threads: Cores that a run may use; by default the physical cores that this process may use.
        allow_unverified: Open also what has no passed parity check.
        cuda_graph: Whether an engine for a GPU is launched as one CUDA graph, which spares the CPU a launch per kernel.

    Raises:
        BundleRefused: Not a bundle, or damaged.
        CheckFailed: The engine's parity was not checked, or (`ParityFailed`) the check said no.
        EngineMismatch: The engine was built for another machine.
        TargetUnavailable: What loads such engines is not installed.
        UsageError: ``threads`` is not a sensible number, or ``cuda_graph`` is asked of an engine for a CPU.
    """
    width = _threads(threads)
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle))
    if not allow_unverified:
        _check_parity(opened)
    if cuda_graph and not opened.manifest.target.gpu:
        raise UsageError("cuda_graph is for engines for GPUs", hint="leave it out")
    session_class = _session_class(opened.manifest.engine.format)
    options: dict[str, bool] = {"cuda_graph": True} if cuda_graph else {}
    with opened.open(opened.manifest.engine.file) as engine:
        return session_class(opened, engine, threads=width, **options)


def load(
    bundle: str | Path | Bundle,
    *,
    threads: int | None = None,
    allow_unverified: bool = False,
    cuda_graph: bool = False,
) -> Model:
    """Open a bundle as something to call: ``load("x.cnncc")(x)``.

    Args:
        bundle: A ``NAME.cnncc`` folder.
        threads: As for `open`.
        allow_unverified: As for `open`.
        cuda_graph: As for `open`.

    Raises:
        CnnccError: As `open`.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle))
    session = open(opened, threads=threads, allow_unverified=allow_unverified, cuda_graph=cuda_graph)
    return Model(session, opened.manifest)


class Model:
    """A session with the manners of a function.

    Attributes:
        session: The session.
        manifest: What the bundle says of itself.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self.session = session
        self.manifest = manifest

    def __call__(self, *inputs: NDArray[Any] | Mapping[str, NDArray[Any]]) -> Any:
        """Run the model.

        Args:
            inputs: An array per input, in the model's order; or one mapping of input name → array.

        Returns:
            For arrays: the output, or a tuple of the outputs in the model's order. For a mapping: a dict.

        Raises:
            DataRefused: The inputs do not fit.
            RunFailed: The engine failed.
        """
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return self.session.run(inputs[0])
        names = [spec.name for spec in self.session.inputs]
        if len(inputs) != len(names):
            raise DataRefused(
                f"{len(inputs)} inputs were given, the model takes {len(names)}: {', '.join(names)}",
                hint="give an array per input, in this order, or one dict by name",
            )
        results = self.session.run(dict(zip(names, inputs, strict=True)))  # type: ignore[arg-type]
        values = tuple(results[spec.name] for spec in self.session.outputs)
        return values[0] if len(values) == 1 else values

    def preprocess(self, image: str | Path | Image.Image) -> NDArray[Any]:
        """Turn an image into the model's input, by the contract that the bundle stores.

        Returns:
            A batch of one.

        Raises:
            DataRefused: The image cannot be read, or the bundle stores no contract.
            DependencyMissing: Pillow is not installed.
        """
        contract = self.manifest.preprocessing
        if contract is None:
            raise DataRefused(
                "the bundle stores no preprocessing",
                hint="compile it with --preprocess, or make the input array yourself",
            )
        return contract.apply(open_image(Path(image)) if isinstance(image, (str, Path)) else image)

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""
        self.close()


def engine_mismatch(target: TargetRecord, host: HostCpu | None = None) -> EngineMismatch | None:
    """Say why an engine would not run on a machine; it might die of an illegal instruction.

    Args:
        target: What the engine was built for.
        host: The machine; by default this one.

    Returns:
        The error to raise, which names what was built for and what was found; None when the engine fits.
    """
    host = host or host_cpu()
    hint = "compile for this device: --device host"
    if target.machine != host.machine:
        return EngineMismatch(
            f"built for: {target.machine} ({target.device}), found: {host.machine} ({host.model})", hint=hint
        )
    if missing := sorted(set(target.features) - host.features):
        return EngineMismatch(
            f"built for: {target.cpu or target.device}, found: {host.model}, which lacks {', '.join(missing)}",
            hint=hint,
        )
    if target.gpu and not any(gpu.runs(target.gpu) for gpu in host_gpus()):
        return EngineMismatch(
            f"built for: a GPU of compute capability {target.gpu} ({target.device}), found: {gpus_text()}",
            hint="run it on a machine with such a GPU, or compile for another --device",
        )
    return None


def obstacle(target: TargetRecord, engine: EngineRecord) -> EnvironmentMissing | None:
    """Say why an engine cannot be run here: it is for another machine, or nothing here runs its format.

    Args:
        target: What it was built for.
        engine: What it is.

    Returns:
        The error to raise; None where opening the engine says all that is left to say.
    """
    if mismatch := engine_mismatch(target):
        return mismatch
    found = opener(engine) if engine.format in PLANS else None
    return found if isinstance(found, EnvironmentMissing) else None


def _threads(threads: int | None) -> int:
    if threads is None:
        return min(usable_cores(), MAX_THREADS)
    if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads!r}", hint=f"give a whole number from 1 to {MAX_THREADS}")
    return threads


def _check_parity(bundle: Bundle) -> None:
    verdict = bundle.manifest.parity
    where = [str(bundle.path)]
    if verdict == "failed":
        raise ParityFailed(
            "the engine failed its parity check when it was built: its results are wrong",
            where=where,
            hint="`cnncc verify` shows where it departs; allow_unverified=True opens it all the same",
        )
    if verdict != "passed":
        raise CheckFailed(
            f"the engine's parity is '{verdict}': nobody checked that it computes what the model computes",
            where=where,
            hint="run `cnncc verify` on it; allow_unverified=True opens it all the same",
        )


def _session_class(name: str) -> SessionClass:
    target = FORMATS.get(name)
    try:
        if target is not None:
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        entries = importlib.metadata.entry_points(group=FORMATS_GROUP, name=name)
        if entries:
            return next(iter(entries)).load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as exc:
        raise TargetUnavailable(
            f"engines of format '{name}' cannot be run here: {exc}", hint="install the runtime of that format"
        ) from exc
    raise BundleRefused(
        f"the engine's format is '{name}', this runtime knows {', '.join(_formats())}",
        hint="install a newer cnncc-runtime, or the distribution that adds the format",
    )


def _formats() -> list[str]:
    """Return the formats that sessions are known for."""
    return sorted(FORMATS.keys() | {entry.name for entry in importlib.metadata.entry_points(group=FORMATS_GROUP)})
