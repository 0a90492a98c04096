"""What a Jetson's deep learning accelerator cannot run, by module, before anything is built for it."""

from __future__ import annotations

import re
from typing import Any

import onnx

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import GpuOptions, NodeIssue
from cnncc.targets.cuda.parse import Parsed
from cnncc_runtime.errors import TargetUnavailable, UnsupportedGraph, UsageError

_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)\]")


def check_dla(graph: OnnxGraph, parsed: Parsed, trt: Any, config: Any, asked: GpuOptions) -> None:
    """Refuse a graph that the accelerator does not run as it was asked to.

    Args:
        graph: The graph.
        parsed: The network made of it.
        trt: The library's module.
        config: Set up for DLA.
        asked: Asks for it.

    Raises:
        UsageError: The graph is in float32.
        TargetUnavailable: This machine has no such core.
        UnsupportedGraph: Lists every layer that it cannot run, unless the GPU may run them.
    """
    if not _is_narrow(graph):
        raise UsageError("DLA computes in float16 and int8, and this graph has neither", hint="--precision fp16, int8")
    cores = parsed.builder.num_DLA_cores
    if asked.dla is None or asked.dla >= cores:
        raise TargetUnavailable(
            f"there is no DLA core {asked.dla} here: {cores} cores", hint="--dla 0, or leave it out"
        )
    if not asked.gpu_fallback and (issues := refused_by_dla(graph, parsed, trt, config)):
        raise UnsupportedGraph(
            f"DLA cannot run {len(issues)} of {len(graph.nodes)} nodes of the graph",
            where=[str(issue) for issue in issues],
            hint="--gpu-fallback has the GPU run them",
        )


def refused_by_dla(graph: OnnxGraph, parsed: Parsed, trt: Any, config: Any) -> tuple[NodeIssue, ...]:
    """List every node that the accelerator cannot run, in the network's order.

    Layers of no node are the parser's own: what it makes of constants goes before anything runs.
    """
    nodes = {node_label(node): node for node in graph.nodes}
    issues: dict[str, NodeIssue] = {}
    for index in range(parsed.network.num_layers):
        layer = parsed.network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT or config.can_run_on_DLA(layer):
            continue
        for label in (parsed.names.get(name, name) for name in _NODE.findall(layer.metadata)):
            if (node := nodes.get(label)) is not None:
                issues[label] = NodeIssue(module_path(node), label, node.op_type, "DLA cannot run it")
    return tuple(issues.values())


def _is_narrow(graph: OnnxGraph) -> bool:
    """Whether a graph computes in float16 or int8 anywhere."""
    quantized = any(node.op_type == "DequantizeLinear" for node in graph.nodes)
    return quantized or any(each.data_type == onnx.TensorProto.FLOAT16 for each in graph.constants.values())
