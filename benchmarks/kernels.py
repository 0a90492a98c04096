"""Prints how fast each kernel of a compiled network is: ``python benchmarks/kernels.py [MODEL…]``.

Convolutions and matrix products are given in GFLOP/s and as a share of this machine's measured peak, counted as if
they were computed directly (Winograd's method may exceed it); everything else in GB/s of the tensors that it reads and
writes. With `--precision int8`, kernels that multiply int8 are given in GOP/s and as a share of the integer peak;
depthwise convolutions, which multiply the same steps as float32, as a share of the peak of float32. `ms` is all calls
of a kernel that runs alone, its tensors in caches; `inside`, the same calls within an inference, where weights come
from memory. The sums of both stand beside the latency of the whole network. `loop` is the share of the peak
that LLVM's model of this CPU predicts for a kernel's inner loop: where `% peak` is far below, time goes elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.models import Network, find  # noqa: E402
from benchmarks.peak import UNITS, measure_peak  # noqa: E402
from benchmarks.peers import parse_threads, quantized  # noqa: E402
from cnncc.compiler import compile  # noqa: E402
from cnncc.compiler.bench.prediction import predict_bundle  # noqa: E402
from cnncc.compiler.inspection import summarize  # noqa: E402
from cnncc.compiler.pipeline import FP32, INT8, CompileRequest  # noqa: E402
from cnncc.graph.onnx_graph import OnnxGraph  # noqa: E402
from cnncc.graph.reader import load_trusted  # noqa: E402
from cnncc.targets.devices import resolve_profile  # noqa: E402
from cnncc_runtime.bundle import REFERENCE, read_bundle  # noqa: E402
from cnncc_runtime.errors import CnnccError, RunFailed  # noqa: E402

Parameter = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a network.

    Attributes:
        name: In the engine.
        rule: That scheduled it.
        parameters: dtype and shape of each tensor it reads or writes.
        calls: For one inference, the nodes that each computes.
        precision: Of what it multiplies: ``int8`` by int8, or ``fp32``.
    """

    name: str
    rule: str
    parameters: tuple[Parameter, ...]
    calls: tuple[tuple[int, ...], ...]
    precision: str = FP32

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        from math import prod

        import numpy as np

        return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape in self.parameters)


@dataclass(frozen=True)
class Times:
    """What was measured.

    Attributes:
        kernels: Kernel → seconds per call, with its tensors in caches.
        inside: Kernel → seconds of all its calls within an inference.
        network: Seconds per inference.
    """

    kernels: dict[str, float]
    inside: dict[str, float]
    network: float


@click.command()
@click.argument("models", nargs=-1)
@click.option(
    "--threads", multiple=True, default=("1", "2"), callback=parse_threads, help="Repeatable.  [default: 1,2]"
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--precision", type=click.Choice([FP32, INT8]), default=FP32, show_default=True, help="Of the engine.")
def main(models: tuple[str, ...], threads: tuple[int, ...], rounds: int, precision: str) -> None:
    """Print the kernels of MODELS: names of the built-in networks, or what `cnncc compile` takes."""
    failed = False
    for network in find(models):
        try:
            for line in measure(network, threads, rounds, precision):
                click.echo(line)
        except CnnccError as exc:
            click.echo(f"{network.name}: {exc}\n")
            failed = True
    raise SystemExit(int(failed))


def measure(network: Network, threads: Sequence[int], rounds: int, precision: str) -> Iterator[str]:
    """Compile a network for this machine, time its kernels, and yield the lines of its tables.

    Args:
        network: The network.
        threads: Numbers of threads; a table for each.
        rounds: Interleaved rounds of each.
        precision: ``fp32``, or ``int8`` calibrated on random numbers.

    Raises:
        CnnccError: It could not be compiled, verified or run.
    """
    with tempfile.TemporaryDirectory(prefix="cnncc-kernels-") as folder:
        path = Path(folder) / "model.cnncc"
        request = CompileRequest(network.request, resolve_profile("host"), path)
        compile(quantized(request) if precision == INT8 else request)
        bundle = read_bundle(path)
        graph = load_trusted(bundle.file(REFERENCE))
        kernels = find_kernels(graph, next(iter(bundle.manifest.engine.entries.values())))
        macs = [layer.macs for layer in summarize(graph).layers]
        predicted, problem = predict_shares(path)
        if problem:
            yield f"{network.name}: inner loops are not predicted: {problem}"
        for count in threads:
            times = time_kernels(path, kernels, count, rounds)
            peaks = {each: measure_peak(count, each) for each in dict.fromkeys((precision, FP32))}
            yield from table(network.name, kernels, times, macs, peaks, count, predicted)


def predict_shares(path: Path) -> tuple[dict[str, float], str]:
    """Return kernel → the predicted share of the peak in its inner loop, and why there are none."""
    try:
        report = predict_bundle(path, [read_bundle(path).manifest.target.cpu])
    except CnnccError as exc:
        return {}, exc.message
    return {layer.kernel: found.share for layer in report.layers for found in layer.cpus.values()}, ""


def find_kernels(graph: OnnxGraph, entry: str) -> tuple[Kernel, ...]:
    """Lower a graph as a build does, and return its kernels in order of their first call."""
    import tvm

    from cnncc.targets.devices import named
    from cnncc.targets.llvm.blocked.methods import KernelPolicy
    from cnncc.targets.llvm.importer import import_graph
    from cnncc.targets.llvm.machine import machine_of, target_options
    from cnncc.targets.llvm.pipeline import lower
    from cnncc.targets.llvm.quiet import quiet
    from cnncc.targets.llvm.schedule.conv2d import IntegerConv2d

    profile = named(resolve_profile("host"))
    with quiet():
        target = tvm.target.Target(target_options(profile))
        module = import_graph(graph, entry)
        lowered = lower(module, {entry: KernelPolicy()}, target, machine_of(profile), lambda _what, _fraction: None)
    calls: dict[str, list[tuple[int, ...]]] = {}
    for call in lowered.calls[entry]:
        calls.setdefault(str(call.kernel), []).append(tuple(call.nodes))
    integer = IntegerConv2d().name
    found = []
    for name, nodes in calls.items():
        rule = lowered.kernels[name].rule
        precision = INT8 if rule.startswith(integer) else FP32
        found.append(Kernel(name, rule, _parameters(lowered.module[name]), tuple(nodes), precision))
    return tuple(found)


def _parameters(function: Any) -> tuple[Parameter, ...]:
    return tuple((str(buffer.dtype), tuple(int(size) for size in buffer.shape)) for buffer in function.params)


def time_kernels(bundle: Path, kernels: Sequence[Kernel], threads: int, rounds: int) -> Times:
    """Time kernels and their network in a process of its own.

    Raises:
        RunFailed: The process failed.
    """
    request = {
        "bundle": str(bundle),
        "threads": threads,
        "rounds": rounds,
        "kernels": {kernel.name: kernel.parameters for kernel in kernels},
    }
    command = [sys.executable, str(Path(__file__).with_name("kernel_worker.py"))]
    result = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, check=False)
    if result.returncode:
        said = result.stderr.decode(errors="replace").splitlines()[-3:]
        raise RunFailed(f"the kernels cannot be timed: exit code {result.returncode}", where=said)
    answer = json.loads(result.stdout)
    return Times(answer["kernels"], answer["inside"], answer["network"])


def operations_of(kernels: Sequence[Kernel], times: Times, macs: Sequence[int]) -> dict[str, float]:
    """Return kernel → operations per call, on average over its calls.

    A node may take several kernels (padding, Winograd's transforms): its operations are those of the slowest.

    Args:
        kernels: With the nodes of each call.
        times: Says which is the slowest.
        macs: Multiply-adds of each node.
    """
    slowest: dict[int, str] = {}
    for kernel in sorted(kernels, key=lambda kernel: times.kernels[kernel.name]):
        slowest |= {node: kernel.name for nodes in kernel.calls for node in nodes}
    found: Counter[str] = Counter()
    for node, name in slowest.items():
        found[name] += 2 * macs[node]
    return {kernel.name: found[kernel.name] / len(kernel.calls) for kernel in kernels}


def table(
    name: str,
    kernels: Sequence[Kernel],
    times: Times,
    macs: Sequence[int],
    peaks: Mapping[str, float],
    threads: int,
    predicted: Mapping[str, float],
) -> Iterator[str]:
    """Yield the lines of one table, the kernels that take longest first.

    Args:
        name: Of the network.
        kernels: Of the network.
        times: Of the kernels and the network.
        macs: Multiply-adds of each node.
        peaks: Precision → operations per second; first that of the network.
        threads: That computed.
        predicted: Kernel → share of the peak in its inner loop, where that is known.
    """
    operations = operations_of(kernels, times, macs)
    spent = {kernel.name: times.kernels[kernel.name] * len(kernel.calls) for kernel in kernels}
    total = sum(spent.values())
    precision, peak = next(iter(peaks.items()))
    others = "".join(f", of {each} {peaks[each] / 1e9:.0f} {UNITS[each]}" for each in peaks if each != precision)
    yield f"{name}, {threads} thread{'s' * (threads > 1)}, peak {peak / 1e9:.0f} {UNITS[precision]}{others}"
    yield (
        f"  {'kernel':34}{'rule':14}{'calls':>6}{'ms/call':>10}{'ms':>9}{'inside':>9}{'%':>5}{'rate':>14}{'% peak':>8}"
        f"{'loop':>6}  shapes"
    )
    for kernel in sorted(kernels, key=lambda kernel: -spent[kernel.name]):
        seconds = times.kernels[kernel.name]
        rate, share = f"{kernel.bytes / seconds / 1e9:.1f} GB/s", ""
        if operations[kernel.name]:
            speed = operations[kernel.name] / seconds
            rate = f"{speed / 1e9:.1f} {UNITS[kernel.precision]}"
            share = f"{100 * speed / peaks[kernel.precision]:.0f}"
        loop = f"{100 * predicted[kernel.name]:.0f}" if kernel.name in predicted else ""
        shapes = " ".join("×".join(map(str, shape)) or "scalar" for _dtype, shape in kernel.parameters)
        yield (
            f"  {_short(kernel.name, 33):34}{kernel.rule:14}{len(kernel.calls):>6}{seconds * 1e3:>10.4f}"
            f"{spent[kernel.name] * 1e3:>9.3f}{times.inside[kernel.name] * 1e3:>9.3f}"
            f"{100 * spent[kernel.name] / total:>5.0f}{rate:>14}{share:>8}{loop:>6}  {shapes}"
        )
    inside = sum(times.inside.values())
    speed = 2 * sum(macs) / times.network
    yield (
        f"  kernels {total * 1e3:.3f} ms alone, {inside * 1e3:.3f} ms inside the network "
        f"({100 * (inside / total - 1):+.1f} %), network {times.network * 1e3:.3f} ms "
        f"({100 * (times.network / inside - 1):+.1f} %): {speed / 1e9:.1f} {UNITS[precision]}, "
        f"{100 * speed / peak:.0f} % of the peak\n"
    )


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


if __name__ == "__main__":
    main()
