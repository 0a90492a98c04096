"""What can be measured: a table of kinds, and the subjects of one benchmark."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cnncc.compiler.bench.trtexec import find_trtexec
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.errors import DependencyMissing, UsageError

OURS = "cnncc"

FP32, INT8 = "fp32", "int8"
FLOAT_QDQ = "fp32, Q/DQ"
"""What a subject multiplies: floats, int8, or floats that a Q/DQ model rounds to int8 in between."""

_ADAPTERS = "cnncc.compiler.bench.adapters"


def _variable(name: str) -> str:
    return "CNNCC_BENCH_PYTHON_" + name.upper().replace("-", "_")


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
        fallback: What it reads where a model is not at hand in that form; empty for nothing else.
        converts: Whether the adapter makes a form of its own of that, once
            (`cnncc.compiler.bench.adapters.Converter`).
        qdq: What it multiplies where an ``onnx`` model has Q/DQ: `INT8` or `FLOAT_QDQ`; empty where it cannot run it.
        quantizes: Whether the adapter makes int8 of the float32 model by the library's own tool.
        gpu: Whether it computes on a GPU; our own engine does where its bundle says so.
        times_itself: Whether it is a program that is run and times itself; ``needs`` is empty then.
    """

    name: str
    title: str
    adapter: str
    needs: str
    install: str
    form: str
    options: dict[str, str] = field(default_factory=dict)
    fallback: str = ""
    converts: bool = False
    qdq: str = ""
    quantizes: bool = False
    gpu: bool = False
    times_itself: bool = False

    @property
    def variable(self) -> str:
        """Environment variable that may name the Python to run it with, for a library that needs one of its own."""
        return _variable(self.name)

    @property
    def python(self) -> str:
        """The Python that runs it: this one, unless its variable names another."""
        named = os.environ.get(self.variable)
        return str(Path(named).absolute()) if named else sys.executable


_TORCH = f"{_ADAPTERS}:TorchAdapter"
_GPU_ADAPTERS = "cnncc.compiler.bench.gpu_adapters"
_TORCH_CUDA = f"{_GPU_ADAPTERS}:TorchCudaAdapter"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(OURS, "cnncc", f"{_ADAPTERS}:CnnccAdapter", "cnncc_runtime", "pip install cnncc-runtime", "bundle"),
        Kind(
            "ort",
            "ONNX Runtime",
            f"{_ADAPTERS}:OnnxRuntimeAdapter",
            "onnxruntime",
            "pip install onnxruntime",
            "onnx",
            qdq=FLOAT_QDQ,
        ),
        Kind(
            "ort-int8",
            "ONNX Runtime, its int8",
            f"{_ADAPTERS}:OnnxRuntimeInt8Adapter",
            "onnxruntime",
            "pip install onnxruntime",
            "onnx",
            converts=True,
            quantizes=True,
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
        Kind(
            "openvino", "OpenVINO", f"{_ADAPTERS}:OpenVinoAdapter", "openvino", "pip install openvino", "onnx", qdq=INT8
        ),
        Kind("mnn", "MNN", f"{_ADAPTERS}:MnnAdapter", "MNN", "pip install MNN", "onnx", converts=True),
        Kind(
            "ncnn",
            "ncnn",
            f"{_ADAPTERS}:NcnnAdapter",
            "ncnn",
            "pip install ncnn pnnx",
            "program",
            fallback="onnx",
            converts=True,
        ),
        *(
            Kind(
                name,
                title,
                f"{_ADAPTERS}:ExecuTorchAdapter",
                "executorch",
                f"make executorch, or name a Python that has it in {_variable(name)}",
                "program",
                {"precision": INT8} if quantizes else {},
                converts=True,
                quantizes=quantizes,
            )
            for name, title, quantizes in (
                ("executorch", "ExecuTorch, XNNPACK", False),
                ("executorch-int8", "ExecuTorch, its int8", True),
            )
        ),
        Kind(
            "ort-cuda",
            "ONNX Runtime, CUDA",
            f"{_GPU_ADAPTERS}:OnnxRuntimeCudaAdapter",
            "onnxruntime",
            f"onnxruntime-gpu, in an environment that {_variable('ort-cuda')} names",
            "onnx",
            qdq=FLOAT_QDQ,
            gpu=True,
        ),
        Kind("torch-cuda", "PyTorch, CUDA", _TORCH_CUDA, "torch", "pip install torch", "program", gpu=True),
        Kind(
            "torch-compile-cuda",
            "torch.compile, CUDA",
            _TORCH_CUDA,
            "torch",
            "pip install torch",
            "program",
            {"compile": "max-autotune"},
            gpu=True,
        ),
        Kind(
            "trtexec",
            "trtexec",
            "cnncc.compiler.bench.trtexec:TrtexecAdapter",
            "",
            "it comes with TensorRT's packages; put it on the PATH",
            "onnx",
            qdq=INT8,
            gpu=True,
            times_itself=True,
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
        path: The bundle's folder, the ``.onnx`` file, the ``.pt2`` archive, or what a converter made of one.
        precision: What it multiplies: `FP32`, ``fp16``, ``bf16``, `INT8` or `FLOAT_QDQ`.
        approximate: Whether it runs another approximation of the network than the others do: what they run before it
            was quantized, or what its library quantized. Its outputs cannot be held to theirs.
        options: Passed to the adapter beside those of the kind.
    """

    name: str
    kind: str
    path: Path
    precision: str = FP32
    approximate: bool = False
    options: dict[str, str] = field(default_factory=dict)


def peers() -> tuple[str, ...]:
    """Return the names that ``--against`` takes."""
    return tuple(name for name in KINDS if name != OURS)


def check_names(against: Sequence[str]) -> None:
    """Check that peers are known, installed or not, and named once.

    Raises:
        UsageError: Names those that are not.
    """
    if doubled := sorted({name for name in against if list(against).count(name) > 1}):
        raise UsageError(f"named twice: {', '.join(doubled)}")
    for name in against:
        if name not in peers():
            raise UsageError(f"'{name}' is not a known peer", hint=f"known are {', '.join(peers())}")


def check_device(name: str, *, gpu: bool) -> None:
    """Refuse a peer that computes elsewhere than a bundle's engine.

    Args:
        name: A known peer.
        gpu: Whether the engine is for GPUs.

    Raises:
        UsageError: It does.
    """
    if KINDS[name].gpu == gpu:
        return
    where = {True: "a GPU", False: "the CPU"}
    alike = ", ".join(peer for peer in peers() if KINDS[peer].gpu == gpu)
    raise UsageError(
        f"'{name}' computes on {where[not gpu]}, the bundle's engine on {where[gpu]}", hint=f"its peers are {alike}"
    )


def find_kind(name: str) -> Kind:
    """Return a kind that is known and installed.

    Raises:
        UsageError: Unknown; lists the known ones.
        DependencyMissing: Not installed; says how to install it.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise UsageError(f"'{name}' is not a known peer", hint=f"known are {', '.join(peers())}")
    if not (find_trtexec() if kind.times_itself else _has(kind.python, kind.needs)):
        raise DependencyMissing(f"{kind.title} is not installed", hint=kind.install)
    return kind


@functools.cache
def _has(python: str, module: str) -> bool:
    """Say whether a Python finds a module, without importing it.

    Raises:
        UsageError: There is no such Python.
    """
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    script = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    try:
        return subprocess.run([python, "-c", script, module], capture_output=True, check=False).returncode == 0
    except OSError as exc:
        raise UsageError(f"'{python}' does not run: {exc}", hint="see the CNNCC_BENCH_PYTHON_… variables") from exc


def make_subjects(
    bundle: Path | None,
    against: Sequence[str],
    *,
    onnx: Path | None = None,
    program: Path | None = None,
    quantized: bool = False,
    half: str = "",
) -> tuple[Subject, ...]:
    """Return the subjects of a benchmark: the bundle first, then its peers.

    Args:
        bundle: Our engine; None measures the peers alone.
        against: Names from `peers`.
        onnx: The model for peers that read ONNX (a bundle's ``reference.onnx``).
        program: The model for PyTorch: a ``.pt2`` archive that cnncc wrote (`torch.export.load` trusts its input).
        quantized: Whether ``onnx`` has Q/DQ; ``program`` is what it was before.
        half: ``fp16`` or ``bf16`` where that is what ``onnx`` is in and peers compute in; else empty.

    Raises:
        UsageError: An unknown peer, a peer named twice, or a peer whose form of the model was not given or that
            cannot run a model with Q/DQ.
        DependencyMissing: A peer is not installed.
    """
    check_names(against)
    subjects = [] if bundle is None else [Subject(OURS, OURS, bundle, INT8 if quantized else half or FP32)]
    paths = {"onnx": onnx, "program": program}
    missing = {
        "onnx": "the bundle holds no reference.onnx: compile it again without stripping it",
        "program": "give the model too: PyTorch cannot run a bundle",
    }
    for name in against:
        kind = find_kind(name)
        form = kind.form if paths.get(kind.form) or not kind.fallback else kind.fallback
        path = paths.get(form)
        if path is None:
            raise UsageError(f"'{name}' has no model to run", hint=missing.get(kind.form, "give a bundle"))
        subjects.append(_peer(kind, path, quantized=quantized, form=form, half=half))
    return tuple(subjects)


def _peer(kind: Kind, path: Path, *, quantized: bool, form: str, half: str) -> Subject:
    if kind.quantizes:
        return Subject(kind.name, kind.name, path, INT8, approximate=True)
    if not quantized or form != "onnx":
        return Subject(kind.name, kind.name, path, half or FP32, approximate=quantized)
    if not kind.qdq:
        alike = [other for other in KINDS.values() if other.gpu == kind.gpu]
        able = ", ".join(other.name for other in alike if other.qdq or other.quantizes)
        raise UsageError(f"{kind.title} cannot run a model with Q/DQ in int8", hint=f"of int8 bundles, try {able}")
    return Subject(kind.name, kind.name, path, kind.qdq)


def engine_size(subject: Subject) -> int:
    """Return the bytes of an engine: a bundle's engine with its weights, or the model's file or files.

    Raises:
        BundleRefused: The bundle cannot be read.
    """
    if find_kind(subject.kind).form == "bundle":
        return read_bundle(subject.path).manifest.engine_bytes
    if subject.path.is_dir():
        return sum(file.stat().st_size for file in subject.path.iterdir())
    return subject.path.stat().st_size
