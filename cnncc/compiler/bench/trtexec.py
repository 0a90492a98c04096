"""TensorRT's own benchmark, ``trtexec``, as a peer: it builds an engine of the model, runs it and times itself.

Its latency is the sum of copying the inputs, computing and copying the outputs, all by the GPU's clock; no host work is
in it. So ours is compared with it by the time of the engine alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnncc.compiler.bench.adapters import Array
from cnncc_runtime.errors import DependencyMissing, RunFailed
from cnncc_runtime.specs import TensorSpec

COMMAND = "trtexec"

PLACES = ("/usr/src/tensorrt/bin",)
"""Where NVIDIA's packages put it, beside the PATH."""

_WARM_UP_MS = 200
_SPARE = 5
"""Inferences beyond those that are asked for: the last ones of the warm-up may be counted among them."""

_BUILD_FLAGS = ("--stronglyTyped", "--noTF32")
_RUN_FLAGS = ("--useSpinWait", "--includeDataTransfers", "--noCudaGraph")
"""Taken where a version has them: TensorRT 11 is always strict, leaves the copies out and launches CUDA graphs unless
it is told otherwise; TensorRT 10 is, and does, the other way round. Ours is timed without a graph, too."""

_ERRORS = 3


@dataclass(frozen=True)
class Times:
    """Seconds of each inference, by trtexec's own clock.

    Attributes:
        latency: Copies included.
        compute: The engine alone.
    """

    latency: tuple[float, ...]
    compute: tuple[float, ...]


def find_trtexec() -> str | None:
    """Return the program; None where it is not installed."""
    return shutil.which(COMMAND) or next(filter(None, (shutil.which(COMMAND, path=place) for place in PLACES)), None)


def parse_version(text: str) -> str:
    """Return the version in trtexec's banner (``[TensorRT v101601]`` is 10.16.1); empty where there is none."""
    found = re.search(r"\[TensorRT v(\d+)\]", text)
    if found is None:
        return ""
    number, step = int(found[1]), 100
    if number < 100_000:  # TensorRT 8 counted in tens: 8601 is 8.6.1
        return f"{number // 1000}.{number // 100 % 10}.{number % 100}"
    return f"{number // step**2}.{number // step % step}.{number % step}"


def parse_times(text: str) -> Times:
    """Read what ``--exportTimes`` wrote.

    Raises:
        RunFailed: It is something else.
    """
    try:
        rows = json.loads(text)
        latency = tuple(float(row["latencyMs"]) / 1e3 for row in rows)
        compute = tuple(float(row["computeMs"]) / 1e3 for row in rows)
    except (ValueError, TypeError, KeyError) as exc:
        raise RunFailed(f"the times that trtexec wrote cannot be read: {exc!r}") from exc
    if not latency:
        raise RunFailed("trtexec timed nothing")
    return Times(latency, compute)


def parse_outputs(text: str, outputs: Sequence[TensorSpec]) -> list[Array]:
    """Read what ``--exportOutput`` wrote.

    Args:
        text: The file's content.
        outputs: The model's, in its order.

    Raises:
        RunFailed: It is something else, or an output is missing.
    """
    try:
        rows = {str(row["name"]): row for row in json.loads(text)}
        return [_array(rows[spec.name], spec) for spec in outputs]
    except (ValueError, TypeError, KeyError) as exc:
        raise RunFailed(f"the outputs that trtexec wrote cannot be read: {exc!r}") from exc


def _array(row: dict[str, Any], spec: TensorSpec) -> Array:
    shape = [int(size) for size in str(row["dimensions"]).split("x") if size]
    return np.array(row["values"], dtype=spec.dtype).reshape(shape)


class TrtexecAdapter:
    """``trtexec`` on an ``.onnx`` file, with the types that the graph says.

    Args:
        options: ``gpu``: the device, in CUDA's order.
    """

    clock = "its own clock"

    def __init__(self, options: dict[str, str]) -> None:
        self._gpu = options.get("gpu", "0")
        self._program = ""
        self._help = ""
        self._model = Path()
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()
        self._arguments: list[str] = []

    def load(self) -> str:
        """Find the program and return TensorRT's version."""
        program = find_trtexec()
        if program is None:
            raise DependencyMissing("trtexec is not on the PATH", hint="it comes with TensorRT's samples and packages")
        self._program = program
        self._help = self._call("--help")
        return parse_version(self._help)

    def open(self, path: Path, threads: int) -> None:
        """Read what an ``.onnx`` file takes and gives."""
        from cnncc.graph.reader import load_trusted

        del threads  # it computes on the GPU
        graph = load_trusted(path)  # the bundle's own, or what we made of it: opset 20 knows no bfloat16 convolutions
        self._model, self._inputs, self._outputs = path, graph.inputs, graph.outputs

    def bind(self, names: Sequence[str], feeds: Sequence[Array]) -> None:
        """Write the inputs, and build an engine for their shapes; both lie in the worker's own folder."""
        del names  # both are in the model's order
        files, shapes = [], []
        for number, (spec, array) in enumerate(zip(self._inputs, feeds, strict=True)):
            file = Path(f"input-{number}.bin")
            file.write_bytes(np.ascontiguousarray(array).tobytes())
            name = f"'{spec.name}'" if set(spec.name) & set(":,") else spec.name
            files.append(f"{name}:{file}")
            if spec.symbols:
                shapes.append(f"{name}:{'x'.join(map(str, array.shape))}")
        sizes = ",".join(shapes)
        profile = [f"--{which}Shapes={sizes}" for which in ("min", "opt", "max")] if shapes else []
        build = [f"--onnx={self._model}", "--saveEngine=engine.plan", "--skipInference", *profile]
        self._call(f"--device={self._gpu}", *build, *self._known(_BUILD_FLAGS))
        self._arguments = [f"--device={self._gpu}", "--loadEngine=engine.plan", f"--loadInputs={','.join(files)}"]
        self._arguments += [f"--shapes={sizes}"] if shapes else []

    def run(self) -> Any:
        """Run it once."""
        return self.times(1)

    def times(self, runs: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return seconds of each of ``runs`` inferences, with the copies and without."""
        out = Path("times.json")
        counts = [f"--iterations={runs + _SPARE}", "--duration=0", f"--warmUp={_WARM_UP_MS}"]
        self._call(*self._arguments, *counts, *self._known(_RUN_FLAGS), f"--exportTimes={out}")
        found = parse_times(out.read_text(encoding="utf-8"))
        if len(found.latency) < runs:
            raise RunFailed(f"trtexec timed {len(found.latency)} inferences instead of {runs}")
        return found.latency[-runs:], found.compute[-runs:]

    def device_times(self, runs: int) -> tuple[float, ...]:
        """Return seconds of the engine alone."""
        return self.times(runs)[1]

    def outputs(self) -> list[Array]:
        """Run it once and return the outputs, in the graph's order."""
        out = Path("outputs.json")
        self._call(*self._arguments, "--iterations=1", "--duration=0", "--warmUp=0", f"--exportOutput={out}")
        return parse_outputs(out.read_text(encoding="utf-8"), self._outputs)

    def _known(self, flags: Sequence[str]) -> list[str]:
        return [flag for flag in flags if flag in self._help]

    def _call(self, *arguments: str) -> str:
        done = subprocess.run([self._program, *arguments], capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        if done.returncode:
            said = [line.partition("[E] ")[2] for line in text.splitlines() if "[E] " in line]
            raise RunFailed(f"trtexec ended with exit code {done.returncode}", where=said[:_ERRORS])
        return text
