"""TensorRT's calibration cache: a text file of one activation scale per tensor, read into a calibration table.

Format (TensorRT developer guide, *INT8 Calibration Using C++*; nvinfer1::IInt8Calibrator::writeCalibrationCache): a
line ``TRT-<version>-<calibrator>``, then ``tensor: <float32 scale as 8 hexadecimal digits, big-endian>``. A cache does
not say which weights or data it was made of: that it fits is the user's word, and the table says so.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.table import (
    SCHEMA,
    CalibrationTable,
    Finding,
    GroupRecord,
    LayerRecord,
    digests_of,
    unsupported_records,
)
from cnncc.calibration.thresholds import LEVELS, SMALLEST_SCALE
from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import DataRefused

IMPORTED = "imported"

_HEADER = re.compile(r"TRT-\d+-(EntropyCalibration2?|MinMaxCalibration|LegacyCalibration)")
_ENTRY = re.compile(r"(?P<tensor>.+): (?P<scale>[0-9a-fA-F]{8})")
_MOST_BYTES = 64 << 20
_SHOWN = 5


def read_cache(path: Path) -> dict[str, float]:
    """Return tensor → scale.

    Raises:
        DataRefused: Missing, or not a calibration cache; names the line.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataRefused(f"{path} is too large for a TensorRT calibration cache")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataRefused(f"the TensorRT calibration cache {path} cannot be read: {exc}") from exc
    if not lines or not _HEADER.fullmatch(lines[0].strip()):
        raise DataRefused(
            f"{path} is no TensorRT calibration cache: its first line is not TRT-<version>-<calibrator>",
            hint="give the file that TensorRT's calibrator wrote",
        )
    scales = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        entry = _ENTRY.fullmatch(line.strip())
        scale = struct.unpack("!f", bytes.fromhex(entry["scale"]))[0] if entry else math.nan
        if entry is None or not math.isfinite(scale) or scale < 0:
            raise DataRefused(f"{path} line {number} is not 'tensor: scale'", where=[line[:100]])
        scales[entry["tensor"]] = float(scale)
    return scales


def table_of_cache(
    graph: OnnxGraph, scales: Mapping[str, float], *, name: str, version: str, source: str
) -> CalibrationTable:
    """Return the table that a cache makes for a graph.

    Args:
        graph: Cleaned, in float32.
        scales: Tensor → scale; names are those of the ONNX model that TensorRT was given.
        name: What the user calls the model.
        version: Of cnncc.
        source: The cache's file.

    Raises:
        DataRefused: Tensors that layers read have no scale: the cache is of another model.
        ModelRefused: The model is quantized already.
    """
    layers = layers_of(graph)
    chosen = plan_for(graph, layers)
    modules = {tensor: module_path(node) for node in graph.nodes for tensor in node.output}
    missing = [group.read[0] for group in chosen.groups if not any(tensor in scales for tensor in group.read)]
    if missing:
        raise DataRefused(
            f"{source} has no scale for {len(missing)} of {len(chosen.groups)} tensors that layers read",
            where=[f"{modules.get(tensor, tensor)} ({tensor})" for tensor in missing[:_SHOWN]],
            hint="give the ONNX model that TensorRT was given, or calibrate with --data",
        )
    groups = []
    for group in chosen.groups:
        scale = max(scales.get(tensor, 0.0) for tensor in group.read)
        groups.append(
            GroupRecord(
                tensors=group.tensors,
                read=group.read,
                module=modules.get(group.tensors[0], ""),
                exponent=None,
                counts="",
                largest=scale * LEVELS,
                lowest=0.0,
                channels=0,
                dead=0,
                thresholds={},
                method=IMPORTED,
                threshold=scale * LEVELS,
                scale=max(scale, SMALLEST_SCALE),
            )
        )
    warning = Finding(
        IMPORTED,
        "",
        "",
        f"{source} does not say which weights and data its scales are of",
        "check the accuracy, or calibrate with --data",
    )
    return CalibrationTable(
        schema=SCHEMA,
        cnncc=version,
        model=digests_of(graph, name),
        data=None,
        method=IMPORTED,
        groups=tuple(groups),
        layers=(
            *(LayerRecord(layer.node, layer.module, layer.op, "int8", "", "") for layer in layers),
            *unsupported_records(graph, layers),
        ),
        float_adds=False,
        relu6_to_relu=False,
        equalization=(),
        steps=(),
        sqnr_db=None,
        accuracy=None,
        course={},
        health=(warning,),
    )
