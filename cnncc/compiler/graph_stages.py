"""The stages from MODEL to its cleaned ONNX graph."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec

from cnncc.compiler.cache import Cache
from cnncc.compiler.keys import tools
from cnncc.compiler.model_reference import ModelRequest, existing_file, parse_reference
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc_runtime.bundle import to_plain
from cnncc_runtime.digests import digest_bytes, digest_file
from cnncc_runtime.errors import ModelRefused, WeightsRefused
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import TensorSpec

EXPORTED = "exported.onnx"

CLEANED = "cleaned.onnx"
"""The graph that engines are built from, whichever stage made it."""


def export_stage(model: ModelRequest, cache: Cache, reporter: Reporter) -> Stage:
    """Return the stage that turns MODEL into ONNX.

    Its key holds the digests of the files that the request names. The files that a factory's code read while it ran
    are known only afterwards; they are stored with the result, and a result whose files changed is not used.
    """
    key = cache.key(
        "export",
        request=[model.reference, model.input_shapes, model.input_dtypes],
        files=_named_files(model),
        tools=tools("torch", "onnx", "onnxscript"),
    )
    stage = Stage("export", key, functools.partial(_export, model, reporter), cache, reporter)
    known = cache.get(stage.name, stage.key)
    if known is not None and not _dependencies_hold(known.value["dependencies"]):
        reporter.note("a file that the model's code reads has changed; it is exported again")
        cache.forget(stage.name, stage.key)
    return stage


def _export(model: ModelRequest, reporter: Reporter, folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
    from cnncc.compiler.ingest import ingest

    reporter.progress("loading the model", 0.1)
    ingested = ingest(model)
    files = {EXPORTED: folder / EXPORTED}
    graph = ingested.graph
    if graph is None:
        from cnncc.compiler.export import export  # imports torch, which takes seconds and an ONNX model does not need

        reporter.progress("exporting to ONNX", 0.4)
        exported = export(ingested)
        graph = exported.graph
        files["program.pt2"] = folder / "program.pt2"
        exported.save_program(files["program.pt2"])
    data = graph.serialized
    files[EXPORTED].write_bytes(data)
    digest = digest_bytes(data)
    value = {
        "name": ingested.name,
        "source": ingested.source,
        "digest": ingested.digest or digest,
        "graph": digest,
        "inputs": to_plain(graph.inputs),
        "outputs": to_plain(graph.outputs),
        "preprocessing": to_plain(ingested.preprocessing),
        "labels": list(ingested.labels),
        "dependencies": {str(path): digest_file(path) for path in ingested.dependencies},
        "notes": list(ingested.notes),
        "nodes": len(graph.proto.graph.node),
    }
    return value, files, f"{ingested.source} → ONNX opset {graph.opset}, {value['nodes']} nodes"


def clean_stage(export: Stage, cache: Cache, reporter: Reporter) -> Stage:
    """Return the stage that cleans the exported graph."""
    for note in export.value["notes"]:
        reporter.note(note)
    key = cache.key("clean", graph=export.value["graph"], tools=tools("onnx", "onnxruntime"))
    return Stage("clean", key, functools.partial(_clean, export), cache, reporter)


def _clean(export: Stage, folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
    from cnncc.calibration.plan import QUANTIZATION
    from cnncc.compiler.passes.pipeline import clean
    from cnncc.graph.reader import load_trusted

    graph = load_trusted(export.file(EXPORTED))
    cleaned, report = clean(graph)
    path = folder / CLEANED
    data = cleaned.serialized
    path.write_bytes(data)
    before, after = len(graph.proto.graph.node), len(cleaned.proto.graph.node)
    quantized = any(node.op_type in QUANTIZATION for node in cleaned.nodes)
    value = {"graph": digest_bytes(data), "report": to_plain(report), "nodes": after, "quantized": quantized}
    return value, {CLEANED: path}, f"{before} → {after} nodes, numerics proved"


def specs_of(export: Stage, which: str) -> tuple[TensorSpec, ...]:
    """Return the specs of a model's ``inputs`` or ``outputs``."""
    return msgspec.convert(export.value[which], tuple[TensorSpec, ...])


def preprocessing_of(export: Stage) -> Preprocessing | None:
    """Return the contract that stands beside a model."""
    stored = export.value["preprocessing"]
    return msgspec.convert(stored, Preprocessing) if stored else None


def _named_files(model: ModelRequest) -> dict[str, str]:
    """Return the digests of the files that the request itself names."""
    path, weights = parse_reference(model.reference).path, model.weights
    if weights is not None and not weights.is_file():
        what = "is a folder" if weights.is_dir() else "does not exist"
        raise WeightsRefused(f"the weights file {weights} {what}", hint="give a .safetensors or .pt file")
    found = {}
    for role, file in (("model", path), ("weights", weights)):
        if file is None:
            continue
        try:
            found[role] = digest_file(existing_file(file))
        except OSError as exc:
            raise ModelRefused(f"{file} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
    return found


def _dependencies_hold(recorded: dict[str, str]) -> bool:
    try:
        return all(digest_file(Path(path)) == digest for path, digest in recorded.items())
    except OSError:
        return False
