"""A graph → a plan: the build as a whole, and what failed in it in the user's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cnncc.graph.names import node_label, place
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions
from cnncc.targets.cuda.config import configure
from cnncc.targets.cuda.dla import check_dla
from cnncc.targets.cuda.hearing import monitor_of
from cnncc.targets.cuda.inspector import layers_of
from cnncc.targets.cuda.parse import Parsed, parse
from cnncc.targets.cuda.sparse import tell_sparse
from cnncc.targets.cuda.timing_cache import kept_timings, timings_file
from cnncc.targets.cuda.vendors import Chosen, load
from cnncc.targets.cuda.weights import WEIGHTS, check_weights, write_weights
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.errors import BuildFailed

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
        plan: The file to write, as the library's own tools read it; `WEIGHTS` lies beside it where it holds none.

    Raises:
        UnsupportedGraph: Lists every refused node.
        UsageError: An option has nothing to act on in this graph.
        TargetUnavailable: The library does not load, or not for this GPU.
        BuildFailed: The builder broke, or took longer than it may.
    """
    if options.gpu.sparse:
        tell_sparse(graph, options.note)
    options.progress("load", 0.0)
    trt = load(chosen.vendor)
    options.progress("parse", 0.0)
    parsed = parse(graph, trt, chosen)
    config = configure(parsed, trt, batches, gpu, chosen, options)
    if options.gpu.dla is not None:
        check_dla(graph, parsed, trt, config, options.gpu)
    version = str(trt.__version__)
    made = Chosen(chosen.vendor, version)
    config.progress_monitor = monitor = monitor_of(trt, options.progress, options.gpu.budget)
    with kept_timings(config, timings_file(options.timings, made, gpu), options.note):
        built = parsed.builder.build_serialized_network(parsed.network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if built is None:
            raise _failure(graph, parsed, chosen)
    options.progress("read the plan", 1.0)
    data = bytes(built)
    if options.gpu.strip_weights:
        check_weights(graph, trt, parsed.logger, data, options.note)
        write_weights(graph, plan.with_name(WEIGHTS))
    plan.write_bytes(data)
    return Compiled(version, layers_of(graph, data, trt, gpu, made, parsed.names))


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
