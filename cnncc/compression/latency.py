"""What a module takes as an engine: compiled for its target, and run on this machine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from cnncc.compiler.bench.gpu import host_gpu
from cnncc.compiler.bench.runner import run_benchmark
from cnncc.compiler.bench.subjects import OURS, Subject
from cnncc.compiler.cache import Cache, default_cache_folder
from cnncc.compiler.calibration import Calibration
from cnncc.compiler.compile_request import INT8, CompileRequest, Retraining
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.payoff import THREADS, kernel_times
from cnncc.compiler.pipeline import compile
from cnncc.compiler.reporting import Reporter, Silent
from cnncc.compression.weights_file import save_weights
from cnncc.graph.feeds import random_feeds
from cnncc.graph.names import module_path
from cnncc.graph.reader import load_trusted
from cnncc.targets.base import Profile
from cnncc_runtime.bundle import REFERENCE, read_bundle
from cnncc_runtime.errors import UsageError
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import Feeds

_ROUNDS, _SECONDS = 8, 1.0
"""Rounds of a measurement, and seconds for each engine over all of them."""


@dataclass(frozen=True)
class Measured:
    """An engine's time.

    Attributes:
        seconds: Median of a run, of CPU time where the machine was noisy.
        size: Bytes of the engine and its weights.
        ratio: Of the first engine's time, with its 95 % interval: value, low, high; ones for the first itself.
    """

    seconds: float
    size: int
    ratio: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Engines:
    """Makes engines of a model's variants, and measures them.

    Attributes:
        request: The model; its weights are replaced.
        profile: The device: one whose engines run here.
        target: The target's name.
        cache: Of the compiler's stages.
        reporter: Told of the compiler's notes.
        preprocessing: The contract that bundles carry, instead of the model's own.
    """

    request: ModelRequest
    profile: Profile
    target: str = "llvm"
    cache: Cache = field(default_factory=lambda: Cache(default_cache_folder(), lambda _: None))
    reporter: Reporter = field(default_factory=Silent)
    preprocessing: Preprocessing | None = None

    def build(
        self,
        module: nn.Module,
        bundle: Path,
        calibration: Calibration | None = None,
        retraining: Retraining | None = None,
    ) -> None:
        """Compile a variant into a bundle, proven as every bundle is.

        Args:
            module: Of the model's modules, with as many channels or fewer.
            bundle: Where it goes.
            calibration: Makes it int8, whether that is faster or not; None for float32.
            retraining: Trains it in int8, whatever calibration reaches; None for calibration alone.

        Raises:
            As `cnncc.compiler.pipeline.compile`.
        """
        with tempfile.TemporaryDirectory(prefix="cnncc-variant-") as folder:
            weights = Path(folder) / "weights.safetensors"
            save_weights(module, weights, pruned=True)
            model = replace(self.request, weights=weights)
            request = CompileRequest(
                model, self.profile, bundle, self.target, preprocessing=self.preprocessing, retraining=retraining
            )
            if calibration is not None:
                request = replace(request, precision=INT8, calibration=calibration, allow_slow=True)
            if compile(request, cache=self.cache, reporter=self.reporter).parity != "passed":
                raise UsageError(
                    f"engines for {self.profile.name} do not run on this machine: their latency cannot be measured",
                    hint="leave --target out, or prune where the device is",
                )

    def compare(self, bundles: Mapping[str, Path]) -> dict[str, Measured]:
        """Measure engines of variants in turns, on one thread.

        Args:
            bundles: Name → bundle.

        Raises:
            RunFailed: An engine crashed, hung or ran out of memory.
        """
        manifests = {name: read_bundle(path).manifest for name, path in bundles.items()}
        capability = next(iter(manifests.values())).target.gpu
        gpu = host_gpu(capability) if capability else None
        report = run_benchmark(
            [Subject(name, OURS, path) for name, path in bundles.items()],
            feeds=_feeds(next(iter(bundles.values()))),
            threads=THREADS,
            rounds=_ROUNDS,
            min_time=_SECONDS,
            agreement=math.inf,  # other channels, other outputs
            gpu=None if gpu is None else gpu.index,
        )
        cpu = bool(report.ratios) and report.ratios[0].basis == "cpu"
        ratios = {
            each.peer: (1 / each.trusted.value, 1 / each.trusted.high, 1 / each.trusted.low) for each in report.ratios
        }
        return {
            each.name: Measured(
                (each.device or (each.cpu if cpu else each.wall)).p50,
                sum(record.size for record in manifests[each.name].files.values() if record.role in _PAYLOAD),
                ratios.get(each.name, (1.0, 1.0, 1.0)),
            )
            for each in report.subjects
        }

    def layers(self, bundle: Path) -> dict[str, float]:
        """Return module path → seconds of its convolution or product in an engine.

        Raises:
            RunFailed: The engine crashed, hung or ran out of memory.
        """
        graph = load_trusted(read_bundle(bundle).file(REFERENCE))
        modules = {node.name: module_path(node) for node in graph.nodes}
        found: dict[str, float] = {}
        for node, seconds in kernel_times(bundle, _feeds(bundle)).by_node().items():
            found[modules[node]] = found.get(modules[node], 0.0) + seconds
        return found


_PAYLOAD = ("engine", "weights")


def _feeds(bundle: Path) -> Feeds:
    return random_feeds(read_bundle(bundle).manifest.inputs)
