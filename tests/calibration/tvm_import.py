"""TVM as a witness: runs a graph through its ONNX importer, the Q/DQ computed as written."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.specs import Feeds, Tensors


def tvm_run(graph: OnnxGraph, feeds: Feeds) -> Tensors:
    """Return a graph's outputs by name, as TVM computes them in float on one core of any CPU.

    Args:
        graph: Of static shapes.
        feeds: Input name → array.
    """
    shapes = {spec.name: list(spec.shape) for spec in graph.inputs}
    module = from_onnx(graph.proto, shape_dict=shapes, keep_params_in_input=False)
    machine = relax.VirtualMachine(tvm.compile(module, target=tvm.target.Target("llvm")), tvm.cpu())
    made = machine["main"](*(tvm.runtime.tensor(feeds[spec.name]) for spec in graph.inputs))
    values = [made] if hasattr(made, "numpy") else list(made)
    return {spec.name: value.numpy() for spec, value in zip(graph.outputs, values, strict=True)}
