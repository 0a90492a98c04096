"""A graph → a plan: the builder's configuration, the build, and what failed in it in the user's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnncc.graph.names import node_label, place
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions
from cnncc.targets.cuda.hearing import monitor_of
from cnncc.targets.cuda.layers import layer_records
from cnncc.targets.cuda.parse import Parsed, parse
from cnncc.targets.cuda.vendors import Chosen, load
from cnncc.targets.devices.gpus import architecture
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.errors import BuildFailed, TargetUnavailable

_MIB = 1 << 20
_SHOWN = 10


@dataclass(frozen=True)
class Compiled:
    """What a build made.

    Attributes:
        version: Of the library, by its own word.
        layers: Its kernels; empty where they cannot be known.
    """

    version: str
    layers: tuple[LayerRecord, ...]


def compile_graph(
    graph: OnnxGraph, batches: tuple[int, ...], gpu: str, chosen: Chosen, options: BuildOptions, plan: Path
) -> Compiled:
    """Build a plan.

    Args:
        graph: Shapes static, or with one symbol: the batch.
        batches: Batch sizes; the plan takes all from the smallest to the largest and is tuned for the first. Empty
            where the shapes are static.
        gpu: Compute capability.
        chosen: The library.
        options: As the target takes them.
        plan: The file to write, as the library's own tools read it.

    Raises:
        UnsupportedGraph: Lists every refused node.
        TargetUnavailable: The library does not load, or not for this GPU.
        BuildFailed: The builder broke.
    """
    options.progress("load", 0.0)
    trt = load(chosen.vendor)
    options.progress("parse", 0.0)
    parsed = parse(graph, trt, chosen)
    config = _configure(parsed, trt, gpu, chosen, options)
    if batches:
        config.add_optimization_profile(_profile(parsed, batches))
    config.progress_monitor = monitor = monitor_of(trt, options.progress)
    built = parsed.builder.build_serialized_network(parsed.network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if built is None:
        raise _failure(graph, parsed, chosen)
    options.progress("read the plan", 1.0)
    data = bytes(built)
    plan.write_bytes(data)
    version = str(trt.__version__)
    made = Chosen(chosen.vendor, version)
    return Compiled(version, layer_records(graph, data, made, parsed.names))


def _configure(parsed: Parsed, trt: Any, gpu: str, chosen: Chosen, options: BuildOptions) -> Any:
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers' names and types, for the audit
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: it multiplies float32 with 10 bits of its 23
    if options.gpu.level is not None:
        config.builder_optimization_level = options.gpu.level
    if options.gpu.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.gpu.workspace * _MIB)
    if chosen.vendor.portable:
        capability = getattr(trt.ComputeCapability, architecture(gpu).upper(), None)
        if capability is None:
            raise TargetUnavailable(f"{chosen} does not build for compute capability {gpu}", hint=chosen.vendor.install)
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    return config


def _profile(parsed: Parsed, batches: tuple[int, ...]) -> Any:
    """Return the range of shapes that the plan takes."""
    profile = parsed.builder.create_optimization_profile()
    sizes = (min(batches), batches[0], max(batches))
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *([size if dim == -1 else dim for dim in tensor.shape] for size in sizes))
    return profile


def _failure(graph: OnnxGraph, parsed: Parsed, chosen: Chosen) -> BuildFailed:
    """Return the builder's own words, and the nodes that they name."""
    said = parsed.logger.errors or ["it does not say why"]
    words = set(re.findall(r"[^\s\[\](){},:'\"]+", " ".join(said)))
    named = {parsed.names.get(word, word) for word in words}
    return BuildFailed(
        f"{chosen} failed: {first_line(said[-1])}",
        where=[place(node) for node in graph.nodes if node_label(node) in named][:_SHOWN],
        hint="--verbose shows the builder's own words; report it with the model that `cnncc export` writes",
    )


def first_line(text: str) -> str:
    """Return the first line of a message, without the builder's own numbering of it."""
    line = text.strip().partition("\n")[0]
    return re.sub(r"^(?:IBuilder::\w+: )?(?:Error Code \d+: )?", "", line)
