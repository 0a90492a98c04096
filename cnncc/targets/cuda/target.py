"""`CudaTarget`: engines for NVIDIA GPUs through TensorRT 10, TensorRT 11 or TensorRT-RTX.

The libraries are imported when a build starts, not before: listing targets must be quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cnncc.targets.base import Availability, BuildOptions, Engine, NodeIssue, Preflight, Profile
from cnncc.targets.cuda.options import AMPERE, AMPERE_PLUS, check_options
from cnncc.targets.cuda.vendors import AUTO, BACKENDS, VENDORS, Chosen, choose, installed, load, vendor_of
from cnncc.targets.devices import HOST, host_machine
from cnncc.targets.entries import batch_sizes
from cnncc_runtime.bundle import EngineRecord, TargetRecord
from cnncc_runtime.errors import BuildFailed, CnnccError, TargetUnavailable, UsageError
from cnncc_runtime.gpu import gpus_text, host_gpus

if TYPE_CHECKING:
    from cnncc.graph.onnx_graph import OnnxGraph

ENGINE = "engine.plan"
"""Exactly what the library serialized: ``trtexec --loadEngine`` and ``tensorrt_rtx`` open it."""

_NOTHING = "neither TensorRT nor TensorRT-RTX is installed"


@dataclass(frozen=True)
class CudaTarget:
    """Builds plans for NVIDIA GPUs.

    Attributes:
        profile: The GPU to build for; ``host`` is this machine's first.
    """

    profile: Profile
    name: str = "cuda"

    def probe(self) -> Availability:
        """Say whether a library is here that builds on this machine, for a GPU of it or for others."""
        found, problems = installed(), []
        for vendor in filter(None, (vendor_of(backend, version) for backend, version in found.items())):
            name = f"{vendor.title} {found[vendor.backend]}"
            try:
                load(vendor)
            except TargetUnavailable as exc:
                problems.append(exc)
                continue
            if vendor.portable:
                detail = f"{name}, for compute capabilities {', '.join(vendor.capabilities)}; here: {gpus_text()}"
                return Availability("ready", detail)
            if host_gpus():
                return Availability("ready", f"{name}, for {gpus_text()}")
            problems.append(TargetUnavailable(f"{name} builds on a GPU, here is none", hint=VENDORS[-1].install))
        if problems:
            return Availability("missing", "; ".join(each.message for each in problems), problems[-1].hint)
        return Availability("missing", _NOTHING, VENDORS[-1].install)

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the libraries that are installed, and the GPUs that TensorRT would time kernels on."""
        return {**installed(), "gpu": gpus_text()}

    def preflight(self, options: BuildOptions) -> Preflight:
        """Refuse what cannot be built here, or say which library builds it; see `cnncc.targets.base.Preflighting`.

        Raises:
            UsageError: The device or the backend is none of this target's, one is not for the other, or an option is
                for neither.
            TargetUnavailable: No library is here that builds for the device.
        """
        chosen = self._choose(options)
        notes = (f"{chosen} builds for {options.profile.name}: {chosen.why}",) if chosen.why else ()
        return Preflight((chosen.vendor.backend,), notes)

    def unsupported(self, graph: OnnxGraph) -> tuple[NodeIssue, ...]:
        """List every node that the parser of the library that ``auto`` takes refuses.

        Raises:
            TargetUnavailable: No library is here that builds for the device.
            BuildFailed: It does not start.
        """
        from cnncc.targets.cuda.parse import refused

        chosen = self._choose(BuildOptions(self.profile))
        with _failures(chosen):
            return refused(graph, load(chosen.vendor), chosen)

    def build(self, graph: OnnxGraph, options: BuildOptions, workdir: Path) -> Engine:
        """Build ``engine.plan``.

        Args:
            graph: Shapes static, or with one symbol: the batch. What is computed in which type is what it says.
            options: Their profile is what the engine is built for.
            workdir: An existing folder.

        Returns:
            The engine; its layers are empty where the library gives no way to know what it executes.

        Raises:
            UnsupportedGraph: Lists every refused node.
            TargetUnavailable: No library is here that builds for the device.
            BuildFailed: The library broke.
            UsageError: The graph has symbolic dimensions but no batch sizes were given, or options are not for the
                device.
        """
        chosen = self._choose(options)
        profile = _named(options.profile)
        batches = batch_sizes(graph, options.batches, self.name)
        payload = workdir / ENGINE
        with _failures(chosen):
            from cnncc.targets.cuda.compile import compile_graph
            from cnncc.targets.cuda.weights import WEIGHTS

            compiled = compile_graph(graph, batches, profile.gpu, chosen, options, payload)
        backend, asked = chosen.vendor.backend, options.gpu
        gpu = AMPERE_PLUS if asked.hardware == AMPERE else profile.gpu
        newer = "+" if asked.version_compatible else ""
        refit = WEIGHTS if asked.strip_weights else ""
        return Engine(
            target=TargetRecord(self.name, profile.name, "", "", host_machine(), (), gpu),
            record=EngineRecord(
                ENGINE, backend, f"{backend} {compiled.version}{newer}", _entries(batches), refit=refit, dla=asked.dla
            ),
            payload=payload,
            toolchain={backend: compiled.version},
            layers=compiled.layers,
            reproducible=chosen.vendor.reproducible,
        )

    def _choose(self, options: BuildOptions) -> Chosen:
        wanted = options.gpu.backend
        if wanted not in (AUTO, *BACKENDS):
            raise UsageError(f"unknown backend '{wanted}'", hint=f"known: {', '.join((AUTO, *BACKENDS))}")
        found = installed()
        if not found and options.profile.name == HOST:  # which GPU that is, matters to whoever can build for one
            raise TargetUnavailable(_NOTHING, hint=VENDORS[-1].install)
        device, here = _named(options.profile), [gpu.capability for gpu in host_gpus()]
        chosen = choose(wanted, device, found, here)
        check_options(options, chosen, device, here)
        return chosen


def _entries(batches: tuple[int, ...]) -> dict[int, str]:
    """Return batch size → optimization profile; there is one, since each would hold its own copy of the weights."""
    return {batch: "profile 0" for batch in batches or (0,)}


def _named(profile: Profile) -> Profile:
    """Return the profile with this machine's GPU where it is to be the host's.

    Raises:
        UsageError: The device is a CPU.
        TargetUnavailable: This machine has no GPU, or nothing builds at all.
    """
    if profile.gpu:
        return profile
    if profile.name != HOST:
        raise UsageError(
            f"the cuda target builds for NVIDIA GPUs, and '{profile.name}' is a CPU",
            hint="--target llvm, or a GPU: --device sm89",
        )
    gpus = host_gpus()
    if not gpus:
        raise TargetUnavailable(
            "this machine has no NVIDIA GPU to build for", hint="name the device: --device sm89, rtx4090, …"
        )
    return replace(profile, gpu=gpus[0].capability)


@contextmanager
def _failures(chosen: Chosen) -> Iterator[None]:
    """Turn whatever the library raises into one error of ours."""
    try:
        yield
    except CnnccError:
        raise
    except MemoryError as exc:
        raise BuildFailed("the builder ran out of memory", hint="close other programs, or build fewer batches") from exc
    except (RuntimeError, TypeError, ValueError, AttributeError) as exc:  # pybind's own, and what a version lacks
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise BuildFailed(
            f"{chosen} failed: {reason}", hint="report it with the model that `cnncc export` writes"
        ) from exc
