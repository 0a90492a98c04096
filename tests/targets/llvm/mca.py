"""llvm-mca, for tests; and engines as bundles, to be predicted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnncc.compiler.bench.prediction import LayerPrediction, Prediction
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions, Profile
from cnncc.targets.llvm.cycles.analyzer import INSTALL, Tools, find_tools
from cnncc.targets.llvm.target import LlvmTarget
from cnncc_runtime.bundle import write_bundle
from cnncc_runtime.errors import DependencyMissing
from tests.runtime.engine_files import manifest

_NEEDED = 19


def require() -> Tools:
    """Skip where there is no llvm-mca with models of the Neoverses, but in CI fail: nothing may go untested there."""
    try:
        tools = find_tools()
        problem = "" if tools.version >= (_NEEDED,) else f"{tools} is too old"
    except DependencyMissing as exc:
        problem = exc.message
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(f"{problem}: {INSTALL}")
    return tools


def bundle_of(graph: OnnxGraph, profile: Profile, folder: Path, runtime: str = "vm") -> Path:
    """Build an engine and write it as a bundle without proof; return its folder."""
    work, bundle = folder / "work", folder / "net.cnncc"
    for each in (work, bundle):
        each.mkdir(parents=True)
    engine = LlvmTarget(profile).build(graph, BuildOptions(profile, runtime=runtime, name="net"), work)
    described = manifest(graph.inputs, graph.outputs, target=engine.target, engine=engine.record, layers=engine.layers)
    write_bundle(bundle, described, dict(engine.files))
    return bundle


def layers_by_schedule(report: Prediction) -> dict[str, LayerPrediction]:
    """Return the rule that scheduled them → the last layer with a loop."""
    return {layer.schedule: layer for layer in report.layers if layer.loop is not None}
