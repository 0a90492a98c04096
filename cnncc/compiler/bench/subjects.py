"""What can be measured: a table of kinds, and the subjects of one benchmark."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.errors import DependencyMissing, UsageError

OURS = "cnncc"

_ADAPTERS = "cnncc.compiler.bench.adapters"


@dataclass(frozen=True)
class Kind:
    """One way to run a model.

    Attributes:
        name: As ``--against`` takes it.
        title: As tables show it.
        adapter: ``module:Class`` of its `cnncc.compiler.bench.adapters.Adapter`.
        needs: Python module that must be installed.
        install: How to install it.
        form: What it reads: ``bundle``, ``onnx`` or ``program`` (a ``.pt2`` archive).
        options: Passed to the adapter.
    """

    name: str
    title: str
    adapter: str
    needs: str
    install: str
    form: str
    options: dict[str, str] = field(default_factory=dict)


_TORCH = f"{_ADAPTERS}:TorchAdapter"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(OURS, "cnncc", f"{_ADAPTERS}:CnnccAdapter", "cnncc_runtime", "pip install cnncc-runtime", "bundle"),
        Kind(
            "ort", "ONNX Runtime", f"{_ADAPTERS}:OnnxRuntimeAdapter", "onnxruntime", "pip install onnxruntime", "onnx"
        ),
        Kind("torch", "PyTorch", _TORCH, "torch", "pip install torch", "program"),
        Kind(
            "torch-channels-last",
            "PyTorch, channels last",
            _TORCH,
            "torch",
            "pip install torch",
            "program",
            {"layout": "channels_last"},
        ),
        Kind(
            "torch-compile", "torch.compile", _TORCH, "torch", "pip install torch", "program", {"compile": "inductor"}
        ),
    )
}
"""Every kind by name; a new peer is one adapter and one line here."""


@dataclass(frozen=True)
class Subject:
    """One engine to measure.

    Attributes:
        name: How the report calls it; unique in a benchmark.
        kind: Key of `KINDS`.
        path: The bundle's folder, the ``.onnx`` file or the ``.pt2`` archive.
    """

    name: str
    kind: str
    path: Path


def peers() -> tuple[str, ...]:
    """Return the names that ``--against`` takes."""
    return tuple(name for name in KINDS if name != OURS)


def find_kind(name: str) -> Kind:
    """Return a kind that is known and installed.

    Raises:
        UsageError: Unknown; lists the known ones.
        DependencyMissing: Not installed; says how to install it.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"'{name}' is not a known peer", hint=f"known are {', '.join(peers())}")
    if importlib.util.find_spec(kind.needs) is None:
        raise DependencyMissing(f"{kind.title} is not installed", hint=kind.install)
    return kind


def make_subjects(
    bundle: Path | None, against: Sequence[str], *, onnx: Path | None = None, program: Path | None = None
) -> tuple[Subject, ...]:
    """Return the subjects of a benchmark: the bundle first, then its peers.

    Args:
        bundle: Our engine; None measures the peers alone.
        against: Names from `peers`.
        onnx: The model for peers that read ONNX (a bundle's ``reference.onnx``).
        program: The model for PyTorch: a ``.pt2`` archive that cnncc wrote (`torch.export.load` trusts its input).

    Raises:
        UsageError: An unknown peer, a peer named twice, or a peer whose form of the model was not given.
        DependencyMissing: A peer is not installed.
    """
    if doubled := sorted({name for name in against if list(against).count(name) > 1}):
        raise UsageError(f"named twice: {', '.join(doubled)}")
    subjects = [] if bundle is None else [Subject(OURS, OURS, bundle)]
    paths = {"onnx": onnx, "program": program}
    missing = {
        "onnx": "the bundle holds no reference.onnx: compile it again without stripping it",
        "program": "give the model too: PyTorch cannot run a bundle",
    }
    for name in against:
        kind = find_kind(name)
        path = paths.get(kind.form)
        if path is None:
            raise UsageError(f"'{name}' has no model to run", hint=missing.get(kind.form, "give a bundle"))
        subjects.append(Subject(name, name, path))
    return tuple(subjects)


def engine_size(subject: Subject) -> int:
    """Return the bytes of an engine: a bundle's engine file, or the model file.

    Raises:
        BundleRefused: The bundle cannot be read.
    """
    if find_kind(subject.kind).form == "bundle":
        manifest = read_bundle(subject.path).manifest
        return manifest.files[manifest.engine.file].size
    return subject.path.stat().st_size
