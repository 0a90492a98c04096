"""Every quantizer that is compared, by name: a new one is a worker and a line here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc_runtime.errors import DependencyMissing, UsageError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Quantizer:
    """A worker that makes int8 of fp32.

    Attributes:
        name: As tables show it.
        about: What it does, in a phrase.
        package: The distribution that it is part of.
        worker: A script beside this file, which takes ``FP32.onnx CALIB.npz INT8.onnx`` and ``arguments``.
        arguments: What the worker is told beyond the files.
        environment: Folder in ``.venv`` that it runs in; empty for this very environment.
    """

    name: str
    about: str
    package: str
    worker: str
    arguments: tuple[str, ...] = ()
    environment: str = ""

    @property
    def variable(self) -> str:
        """Environment variable that may name another Python to run it with."""
        return "CNNCC_BENCH_PYTHON_" + self.environment.upper()

    @property
    def python(self) -> str:
        """The Python that runs it."""
        if not self.environment:
            return sys.executable
        named = os.environ.get(self.variable)
        # not resolved: a virtual environment's Python is a link, and its own place says which it is
        return str(Path(named).absolute() if named else ROOT / ".venv" / self.environment / "bin" / "python")

    def version(self) -> str:
        """Return the version of its package.

        Raises:
            DependencyMissing: It is not installed.
        """
        script = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
        try:
            found = subprocess.run(
                [self.python, "-c", script, self.package], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as exc:
            raise DependencyMissing(
                f"{self.package} is not installed", hint=f"make quantizers, or name its Python in {self.variable}"
            ) from exc
        return found.stdout.strip()

    def commands(self, fp32: Path, shape: str, calibration: Path, int8: Path) -> list[list[str]]:
        """Return what to run to make ``int8`` of ``fp32``.

        Args:
            fp32: The graph.
            shape: Of its input: ``N,3,32,32``.
            calibration: ``.npz`` with ``x``.
            int8: What is written.
        """
        return [[self.python, str(HERE / self.worker), str(fp32), str(calibration), str(int8), *self.arguments]]


@dataclass(frozen=True)
class Ours(Quantizer):
    """`cnncc calibrate`, then `cnncc quantize`; ``arguments`` are the former's, ``quantizing`` the latter's."""

    quantizing: tuple[str, ...] = ()

    def commands(self, fp32: Path, shape: str, calibration: Path, int8: Path) -> list[list[str]]:
        """Return both commands; the calibration table stays beside ``int8``."""
        table = int8.with_suffix(".calib.json")
        cnncc, model = [self.python, "-m", "cnncc.cli"], [str(fp32), "--input-shape", shape]
        return [
            [*cnncc, "calibrate", *model, "--data", str(calibration), "-o", str(table), *self.arguments],
            [*cnncc, "quantize", *model, "--calib", str(table), "-o", str(int8), *self.quantizing],
        ]


def _ort(name: str, about: str, *arguments: str) -> Quantizer:
    return Quantizer(name, about, "onnxruntime", "ort_worker.py", arguments)


def _nncf(name: str, about: str, *arguments: str) -> Quantizer:
    return Quantizer(name, about, "nncf", "nncf_worker.py", arguments, "nncf")


def _modelopt(name: str, about: str, *arguments: str) -> Quantizer:
    return Quantizer(name, about, "nvidia-modelopt", "modelopt_worker.py", arguments, "modelopt")


_ALL = ("--calibration-samples", "1000000")

OURS = (
    Ours("cnncc", "cnncc calibrate, cnncc quantize", "cnncc", "", _ALL),
    Ours(
        "cnncc-float-adds", "the same, residual additions in float as in *-lean", "cnncc", "", (*_ALL, "--float-adds")
    ),
)
"""Ours, on all images that it is given."""

PEERS = (
    _ort("ort-minmax", "ONNX Runtime, s8, fp32 bias", "MinMax"),
    _ort("ort-percentile", "the same", "Percentile"),
    _ort("ort-entropy", "the same", "Entropy"),
    _ort("ort-minmax-lean", "the same, only what convolutions and matrix products read", "MinMax", "--lean"),
    _ort("ort-percentile-lean", "the same", "Percentile", "--lean"),
    _ort("ort-u8", "ONNX Runtime's default activations: u8, asymmetric", "MinMax", "--unsigned"),
    _modelopt("modelopt-entropy", "ModelOpt", "entropy"),
    _modelopt("modelopt-max", "ModelOpt", "max"),
    _nncf("nncf", "NNCF's performance preset"),
    _nncf("nncf-signed", "the same, u8 turned into s8, whole ranges", "--signed"),
)
"""Everyone else."""


def find(names: Sequence[str]) -> tuple[Quantizer, ...]:
    """Return peers by name.

    Raises:
        UsageError: Nobody knows one.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise UsageError(f"'{name}' is not a known quantizer", hint=", ".join(known))
    return tuple(known[name] for name in names)
