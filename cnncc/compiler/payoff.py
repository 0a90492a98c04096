"""Whether int8 pays: an engine beside the fp32 engine of the same model, measured here, or predicted for elsewhere."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc.calibration.plan import PRODUCTS
from cnncc.compiler.bench.gpu import host_gpu
from cnncc.compiler.bench.process import WorkerProcess
from cnncc.compiler.bench.protocol import Opened, Profile, Profiled
from cnncc.compiler.bench.report import Interval
from cnncc.compiler.bench.runner import Progress, open_engine, run_benchmark, write_feeds
from cnncc.compiler.bench.subjects import FP32, INT8, OURS, Subject
from cnncc_runtime.bundle import LayerRecord, read_bundle
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.specs import Feeds

SCHEMA = "cnncc.payoff/1"
PAYOFF = "payoff.json"
"""The decision, in the cache and in a bundle."""

MEASURED, PREDICTED = "measured", "predicted"
MIXED = "mixed"

THREADS = 1
"""Of a measurement: with more, they wait for each other and for the machine's other programs."""
_ROUNDS = 10
_SECONDS = 1.0
"""Per engine, over all rounds: 0.1 s a round, in which a network of 50 ms runs twice."""
_TIMEOUT_S = 600.0
_PROFILED = 7
"""Runs with a clock around each kernel, whose median counts."""
_SLOWER = 1.05
"""Times of a layer, int8 against fp32, beyond which it is slower: single kernels are measured to some percent."""
_MATTERS = 0.002
"""Share of the engine's time below which a layer is not worth a change of precision."""


@dataclass(frozen=True)
class Contender:
    """One engine.

    Attributes:
        precision: ``fp32``, ``int8``, or ``mixed``: int8 but for the layers that were slower so.
        time: Median of its latency in seconds (of CPU time where the machine was noisy), or its predicted cycles.
        against: Time over that of fp32, with the 95 % interval where it was measured; None for fp32 itself.
    """

    precision: str
    time: float
    against: Interval | None


@dataclass(frozen=True)
class LayerTime:
    """One layer in two engines.

    Attributes:
        module: PyTorch module path.
        node: ONNX node.
        fp32: Seconds of its kernels in the fp32 engine.
        int8: Seconds of its kernels in the int8 engine.
    """

    module: str
    node: str
    fp32: float
    int8: float

    @property
    def slower(self) -> bool:
        """Whether int8 is slower beyond what single kernels scatter by."""
        return self.int8 > _SLOWER * self.fp32


@dataclass(frozen=True)
class Payoff:
    """What int8 gains.

    Attributes:
        schema: `SCHEMA`.
        basis: ``measured`` or ``predicted``.
        machine: CPU or GPU that it was measured on, or CPU that it was predicted for.
        threads: Of the measurement; 0 where it was none.
        chosen: Precision of the engine in the bundle.
        contenders: fp32, int8 and, where some layers were slower in int8, mixed.
        layers: Convolutions and products in order; empty where nothing was measured. Bias, activation and
            requantization are part of the kernel of a layer; pools and additions between kernels are not listed.
    """

    schema: str
    basis: str
    machine: str
    threads: int
    chosen: str
    contenders: tuple[Contender, ...]
    layers: tuple[LayerTime, ...]

    def of(self, precision: str) -> Contender | None:
        """Return one of the contenders."""
        return next((each for each in self.contenders if each.precision == precision), None)

    @property
    def slower(self) -> tuple[LayerTime, ...]:
        """Layers that int8 slows down by what matters to the network."""
        int8 = self.of(INT8)
        least = _MATTERS * int8.time if int8 else 0.0
        return tuple(layer for layer in self.layers if layer.slower and layer.int8 - layer.fp32 > least)

    def __str__(self) -> str:
        """Return it as a line: what each precision takes of fp32's time."""
        parts = [f"{each.precision} takes {interval_text(each.against)} of fp32's time"
                 for each in self.contenders if each.against is not None]  # fmt: skip
        if self.basis == PREDICTED:
            return f"{', '.join(parts)}, predicted for {self.machine}"
        return f"{', '.join(parts)}, measured on {self.machine}, {self.threads} thread{'s' * (self.threads > 1)}"


def interval_text(interval: Interval) -> str:
    """Return a ratio as text, with its interval where it has one."""
    if interval.low == interval.high:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def measure(bundles: Mapping[str, Path], feeds: Feeds, modules: Mapping[str, str], progress: Progress) -> Payoff:
    """Measure engines of one model in turns, and the layers of int8 beside those of fp32.

    Args:
        bundles: Precision → bundle; ``fp32`` and ``int8`` at least.
        feeds: Inputs for all, of the first batch size that was built.
        modules: ONNX node → PyTorch module path.
        progress: Told how far it is.

    Raises:
        RunFailed: An engine crashed, hung or ran out of memory.
        Interrupted: Ctrl-C.
    """
    capability = read_bundle(bundles[FP32]).manifest.target.gpu
    gpu = host_gpu(capability) if capability else None
    report = run_benchmark(
        [_subject(name, bundles[name]) for name in (FP32, INT8, MIXED) if name in bundles],
        feeds=feeds,
        threads=THREADS,
        rounds=_ROUNDS,
        min_time=_SECONDS,
        timeout=_TIMEOUT_S,
        progress=progress,
        agreement=math.inf,  # calibration measured how far int8 is from fp32
        gpu=None if gpu is None else gpu.index,
    )
    # on a GPU, the engine alone: copies of inputs and outputs are the same for all
    ratios = {ratio.peer: _inverse(ratio.device or ratio.trusted) for ratio in report.ratios}
    cpu = report.ratios[0].basis == "cpu"
    times = {one.name: (one.device or (one.cpu if cpu else one.wall)).p50 for one in report.subjects}
    contenders = [Contender(name, seconds, ratios.get(name)) for name, seconds in times.items()]
    profiles = {name: kernel_times(bundles[name], feeds) for name in (FP32, INT8)}
    layers = layer_times(profiles[FP32], profiles[INT8], modules)
    return decided(MEASURED, gpu.name if gpu else host_cpu().model, THREADS, contenders, layers)


def _inverse(interval: Interval) -> Interval:
    return Interval(1 / interval.value, 1 / interval.high, 1 / interval.low)


def _subject(name: str, bundle: Path) -> Subject:
    return Subject(name, OURS, bundle, options={"unverified": "yes"})  # only what is chosen will be proven


def predicted(cycles: Mapping[str, float], machine: str) -> Payoff:
    """Return what a target's model of cost says.

    Args:
        cycles: Precision → predicted time; ``fp32`` and ``int8``.
        machine: CPU that it is for.
    """
    contenders = [Contender(FP32, cycles[FP32], None)]
    ratio = cycles[INT8] / cycles[FP32] if cycles[FP32] else 1.0
    contenders.append(Contender(INT8, cycles[INT8], Interval(ratio, ratio, ratio)))
    return decided(PREDICTED, machine, 0, contenders, ())


def decided(
    basis: str, machine: str, threads: int, contenders: Sequence[Contender], layers: Sequence[LayerTime]
) -> Payoff:
    """Choose int8, unless fp32 or mixed is faster beyond the scatter of the measurement.

    Mixed has to beat fp32 beyond it, too: what gains nothing is not worth two precisions.

    Args:
        basis: As `Payoff` has it.
        machine: As `Payoff` has it.
        threads: As `Payoff` has it.
        contenders: fp32, int8 and perhaps mixed.
        layers: As `Payoff` has them.
    """
    ends = {
        each.precision: (each.against.low, each.against.high) if each.against else (1.0, 1.0) for each in contenders
    }
    chosen = INT8
    if ends[FP32][1] < ends[INT8][0]:
        chosen = FP32
    if MIXED in ends and ends[MIXED][1] < ends[chosen][0]:
        chosen = MIXED
    return Payoff(SCHEMA, basis, machine, threads, chosen, tuple(contenders), tuple(layers))


# ---- layers


@dataclass(frozen=True)
class KernelTimes:
    """Kernel calls of an engine in order, and the seconds of each."""

    layers: tuple[LayerRecord, ...]
    seconds: tuple[float, ...]

    def by_node(self) -> dict[str, float]:
        """Return convolution's or product's ONNX node → its seconds; a kernel of several is shared out evenly."""
        found: dict[str, float] = {}
        for layer, seconds in zip(self.layers, self.seconds, strict=True):
            products = [node for node, op in zip(layer.nodes, layer.ops, strict=True) if op in PRODUCTS]
            for node in products:
                found[node] = found.get(node, 0.0) + seconds / len(products)
        return found


def kernel_times(bundle: Path, feeds: Feeds) -> KernelTimes:
    """Return what each kernel of an engine takes, with a clock around each: the median of several runs.

    Args:
        bundle: Whose engine; its parity need not be proven.
        feeds: One batch of inputs.

    Raises:
        RunFailed: The engine crashed, hung or ran out of memory.
    """
    name = "profile"
    with tempfile.TemporaryDirectory(prefix="cnncc-payoff-") as folder:
        inputs, home = Path(folder) / "feeds.npz", Path(folder) / "worker"
        home.mkdir()
        write_feeds(inputs, feeds)
        with WorkerProcess(name, home, threads=THREADS, timeout=_TIMEOUT_S) as worker:
            worker.ask(open_engine(_subject(name, bundle), THREADS, inputs, feeds), Opened)
            kernels = worker.ask(Profile(_PROFILED), Profiled).kernels
    layers = read_bundle(bundle).manifest.layers
    names = {layer.kernel for layer in layers}
    called = [(kernel, seconds) for kernel, seconds in kernels if kernel in names]
    assert [kernel for kernel, _ in called] == [layer.kernel for layer in layers]  # the manifest is in order of calls
    return KernelTimes(layers, tuple(seconds for _, seconds in called))


def layer_times(fp32: KernelTimes, int8: KernelTimes, modules: Mapping[str, str]) -> tuple[LayerTime, ...]:
    """Return the layers that both engines have, in order.

    A layer of several kernels takes the sum of them; a kernel of several layers is shared out evenly.
    """
    floats, steps = fp32.by_node(), int8.by_node()
    return tuple(
        LayerTime(modules.get(node, node), node, floats[node], seconds)
        for node, seconds in steps.items()
        if node in floats
    )
