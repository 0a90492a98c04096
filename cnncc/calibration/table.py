"""The calibration table: all that calibration found, in one JSON file that says what it is valid for.

A table names the model by two digests, of its structure and of its weights, and the data by one; applying it to
anything else is refused by name. Histograms are kept, so another method's thresholds cost no new pass.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from cnncc.calibration.histogram import BINS, Histogram
from cnncc.calibration.plan import Layer, unsupported
from cnncc.calibration.shift import Shift
from cnncc.calibration.thresholds import SMALLEST_SCALE
from cnncc.graph.names import module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.digests import digest_bytes, digest_json
from cnncc_runtime.errors import DataRefused
from cnncc_runtime.files import atomic_file
from cnncc_runtime.preprocess import Preprocessing

SCHEMA = "cnncc.calibration/1"

_MOST_BYTES = 256 << 20
_MOST_CHANNELS = 1 << 20
_MOST_COUNTED = 1 << 50
_LARGEST = float(np.finfo(np.float32).max)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a table."""


class ModelDigests(Record, frozen=True):
    """Which model a table is for.

    Attributes:
        name: As the user calls it.
        structure: Digest of nodes, attributes and shapes.
        weights: Digest of the weights' values.
    """

    name: str
    structure: str
    weights: str


class DataRecord(Record, frozen=True):
    """What a model was calibrated on.

    Attributes:
        source: The DATA argument.
        digest: Of every sample and their order.
        samples: How many.
        seed: Of the draw.
        random: Whether they were random numbers: such a model is for trying out, never for publishing.
        skipped: Damaged images that were left out, by ``--skip-bad``.
        preprocessing: How images became inputs.
    """

    source: str
    digest: str
    samples: int
    seed: int
    random: bool
    skipped: int
    preprocessing: Preprocessing | None


class GroupRecord(Record, frozen=True):
    """Tensors that share a scale.

    Attributes:
        tensors: Their names; the first is the group's.
        read: Those that layers read, which the histogram is of.
        module: PyTorch module that makes the first tensor.
        exponent: Of the histogram's range [0, 2^exponent); None where every element was zero.
        counts: The histogram: int64[`BINS`], little-endian, zlib, base64; empty where the scale was imported.
        largest: The largest |x|.
        lowest: The smallest x.
        channels: Channels of the tensors read.
        dead: Those of them that were zero on all samples.
        thresholds: Method → threshold.
        method: The one that was taken; ``imported`` where the scale came from elsewhere.
        threshold: Where the int8 range ends.
        scale: Threshold / 127 in float32.
        shift: The shift and its scale where the tensor is shifted before it is quantized (`cnncc.calibration.shift`).
    """

    tensors: tuple[str, ...]
    read: tuple[str, ...]
    module: str
    exponent: int | None
    counts: str
    largest: float
    lowest: float
    channels: int
    dead: int
    thresholds: dict[str, float]
    method: str
    threshold: float
    scale: float
    shift: Shift | None = None


class LayerRecord(Record, frozen=True):
    """A layer: a convolution or a product.

    Attributes:
        node: ONNX node.
        module: PyTorch module.
        op: ONNX operator.
        precision: ``int8`` or ``fp32``.
        why: Why it is kept in fp32: ``asked``, ``budget``, ``speed``, or ``unsupported`` where targets have no int8
            for it; empty for int8.
        bias: float32[C] to add to its bias, little-endian, base64; empty for none.
    """

    node: str
    module: str
    op: str
    precision: str
    why: str
    bias: str


class StepRecord(Record, frozen=True):
    """A step that was tried, and what the outputs' SQNR said of it.

    Attributes:
        step: Its name.
        before: SQNR without it, dB.
        after: SQNR with it, dB.
        kept: Whether it was kept.
    """

    step: str
    before: float
    after: float
    kept: bool


class AccuracyRecord(Record, frozen=True):
    """What validation data says.

    Attributes:
        metric: ``top-1``, ``mIoU`` or ``agreement`` (with the float model's top-1, where the data has no labels).
        source: The DATA argument.
        digest: Of its samples.
        samples: How many.
        fp32: Of the float model, percent.
        int8: Of the quantized model, percent.
        sqnr_db: Of the quantized model's outputs, dB.
    """

    metric: str
    source: str
    digest: str
    samples: int
    fp32: float
    int8: float
    sqnr_db: float


class Finding(Record, frozen=True):
    """Something that a person should know, and can act on.

    Attributes:
        kind: ``few-samples``, ``unsettled``, ``outlier``, ``dead-channels``, ``constant``, ``alike``, ``clipped``.
        module: PyTorch module, or empty.
        tensor: Its name, or empty.
        message: What is wrong, with numbers.
        advice: What to do.
    """

    kind: str
    module: str
    tensor: str
    message: str
    advice: str


class EqualizationRecord(Record, frozen=True):
    """Channels that were scaled before quantizing; the network computes the same.

    Attributes:
        producers: Layers (nodes) whose output channels were multiplied.
        consumers: Layers (nodes) whose input channels were divided.
        tensors: What the consumers read.
        scale: float32[C], little-endian, base64.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    tensors: tuple[str, ...]
    scale: str


class CalibrationTable(Record, frozen=True):
    """What calibration found.

    Attributes:
        schema: `SCHEMA`.
        cnncc: Version that made it.
        model: Which model it is for.
        data: What it was calibrated on; None where all scales were imported.
        method: What was asked for: a method, ``auto`` or ``imported``.
        groups: Scales.
        layers: Every layer, those that can be quantized first.
        float_adds: Whether additions of two tensors read float tensors.
        relu6_to_relu: Whether ReLU6 was replaced by ReLU, as equalizing needs it.
        equalization: Channel scales, in the order of their application.
        steps: What was tried.
        sqnr_db: Of the outputs on the samples that steps were judged by, dB.
        accuracy: On validation data; None where none was given.
        course: Samples → mean over tensors of the range seen by then, relative to the final one.
        health: Findings.
    """

    schema: str
    cnncc: str
    model: ModelDigests
    data: DataRecord | None
    method: str
    groups: tuple[GroupRecord, ...]
    layers: tuple[LayerRecord, ...]
    float_adds: bool
    relu6_to_relu: bool
    equalization: tuple[EqualizationRecord, ...]
    steps: tuple[StepRecord, ...]
    sqnr_db: float | None
    accuracy: AccuracyRecord | None
    course: dict[int, float]
    health: tuple[Finding, ...]

    def to_bytes(self) -> bytes:
        """Return JSON that a person can read; equal tables give equal bytes."""
        plain = msgspec.to_builtins(self, str_keys=True)
        return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @property
    def digest(self) -> str:
        """Digest of the whole table."""
        return digest_bytes(self.to_bytes())

    @property
    def scales(self) -> dict[str, float]:
        """Tensor → scale."""
        return {name: group.scale for group in self.groups for name in group.tensors}

    @property
    def shifts(self) -> dict[str, Shift]:
        """Tensor → shift, of those that are shifted."""
        return {name: group.shift for group in self.groups if group.shift is not None for name in group.tensors}

    @property
    def kept(self) -> tuple[LayerRecord, ...]:
        """Layers that stay in float."""
        return tuple(layer for layer in self.layers if layer.precision != "int8")


def unsupported_records(graph: OnnxGraph, layers: Iterable[Layer]) -> tuple[LayerRecord, ...]:
    """Return records of the layers that no target computes in int8."""
    return tuple(
        LayerRecord(node.name, module_path(node), node.op_type, "fp32", "unsupported", "")
        for node in unsupported(graph, layers)
    )


def digests_of(graph: OnnxGraph, name: str) -> ModelDigests:
    """Return what a table calls a model by."""
    nodes = [_structure(node) for node in graph.nodes]
    shapes = [[tensor.name, tensor.data_type, list(tensor.dims)] for tensor in graph.proto.graph.initializer]
    specs = [str(spec) for spec in (*graph.inputs, *graph.outputs)]
    weights = [[tensor.name, digest_bytes(_content(tensor))] for tensor in graph.proto.graph.initializer]
    return ModelDigests(name, digest_json([nodes, shapes, specs, graph.opset]), digest_json(weights))


def check_model(table: CalibrationTable, found: ModelDigests) -> None:
    """Refuse a table that was made for another model.

    Raises:
        DataRefused: Says whether the weights or the whole model differ.
    """
    if table.model.structure != found.structure:
        raise DataRefused(
            f"the table was calibrated for another model: '{table.model.name}', and this is '{found.name}'",
            hint="calibrate this model, with the same --input-shape as it is compiled with",
        )
    if table.model.weights != found.weights:
        raise DataRefused(
            f"the table was calibrated for other weights of '{table.model.name}'",
            hint="calibrate again: scales of old weights would cost accuracy in silence",
        )


def write_table(table: CalibrationTable, path: Path) -> None:
    """Write a table.

    Raises:
        StorageFailed: It cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(table.to_bytes())


def read_table(path: Path) -> CalibrationTable:
    """Read a table.

    Raises:
        DataRefused: Missing, damaged, of another schema, or contradicting itself.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataRefused(f"{path} is too large for a calibration table")
        data = path.read_bytes()
    except OSError as exc:
        raise DataRefused(f"the calibration table {path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
    return table_from_bytes(data, str(path))


def table_from_bytes(data: bytes, place: str) -> CalibrationTable:
    """Decode and check a table.

    Raises:
        DataRefused: Damaged, of another schema, or contradicting itself.
    """
    hint = "calibrate again with this cnncc"
    try:
        schema = msgspec.json.decode(data, type=_SchemaOnly).schema
        if schema != SCHEMA:
            raise DataRefused(f"{place} has the schema '{schema}', this cnncc reads '{SCHEMA}'", hint=hint)
        table = msgspec.json.decode(data, type=CalibrationTable)
        for group in table.groups:
            if group.counts:  # imported scales come without
                histogram_of(group)
        for text in (*(each.scale for each in table.equalization), *(layer.bias for layer in table.layers)):
            floats_of(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise DataRefused(f"{place} is no calibration table: {exc}", hint=hint) from exc
    if problem := _problem(table):
        raise DataRefused(f"{place} contradicts itself: {problem}", hint=hint)
    return table


class _SchemaOnly(msgspec.Struct):
    schema: str


def _problem(table: CalibrationTable) -> str:
    names = [name for group in table.groups for name in group.tensors]
    bad = [", ".join(each.tensors) for each in table.groups if not (each.tensors and _is_scale(each.scale))]
    moved = [", ".join(each.tensors) for each in table.groups if each.shift and not _is_shift(each.shift)]
    problems = {
        "a tensor is there twice": len(set(names)) == len(names),
        f"no tensors, or a scale that is no positive float32: {bad}": not bad,
        f"a shift that float32 cannot hold: {moved}": not moved,
        "a layer is there twice": len({layer.node for layer in table.layers}) == len(table.layers),
        "a layer's precision is unknown": {layer.precision for layer in table.layers} <= {"int8", "fp32"},
    }
    return "; ".join(problem for problem, good in problems.items() if not good)


def _is_scale(value: float) -> bool:
    return SMALLEST_SCALE <= value <= _LARGEST


def _is_shift(shift: Shift) -> bool:
    return _is_scale(shift.scale) and abs(shift.amount) <= _LARGEST


def _structure(node: Any) -> list[Any]:
    attributes = sorted(
        (entry.name, digest_bytes(entry.SerializeToString(deterministic=True))) for entry in node.attribute
    )
    return [node.domain, node.op_type, node.name, list(node.input), list(node.output), attributes]


def _content(tensor: Any) -> bytes:
    return bytes(np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes())


# ---- arrays as text


def counts_text(histogram: Histogram) -> str:
    """Return a histogram's counts as a table holds them."""
    return base64.b64encode(zlib.compress(histogram.counts.astype("<i8").tobytes())).decode()


def histogram_of(group: GroupRecord) -> Histogram:
    """Return a group's histogram; its channels are not kept.

    Raises:
        ValueError: The text is damaged, or its counts contradict the largest value.
    """
    name = group.tensors[0] if group.tensors else ""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(group.counts, validate=True), 8 * BINS + 1)
    except (binascii.Error, zlib.error) as exc:
        raise ValueError(f"the histogram of '{name}' is damaged: {exc}") from exc
    if len(data) != 8 * BINS or not unpacker.eof:
        raise ValueError(f"the histogram of '{name}' does not hold {8 * BINS} bytes")
    counts = np.frombuffer(data, "<i8").astype(np.int64)
    histogram = Histogram(group.exponent, counts, group.largest, group.lowest, np.zeros(1, np.float32))
    if not _is_whole(histogram):
        raise ValueError(f"the histogram of '{name}' contradicts its largest value {group.largest}")
    return histogram


def _is_whole(histogram: Histogram) -> bool:
    """Whether elements were counted, and the largest of them lies in the last bin that holds any."""
    counts, largest = histogram.counts, histogram.largest
    if not 0.0 <= largest <= _LARGEST or counts.min() < 0 or counts.max() > _MOST_COUNTED:
        return False
    fraction, exponent = math.frexp(largest)
    last = int(fraction * BINS)
    return bool(histogram.exponent == (exponent if largest else None) and counts[last] and not counts[last + 1 :].any())


def floats_text(array: NDArray[np.float32]) -> str:
    """Return float32[n] as a table holds it."""
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def floats_of(text: str) -> NDArray[np.float32]:
    """Return the array of `floats_text`.

    Raises:
        ValueError: The text is damaged, or holds NaN or Inf.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"an array is damaged: {exc}") from exc
    if len(data) % 4 or len(data) > 4 * _MOST_CHANNELS:
        raise ValueError(f"an array has {len(data)} bytes")
    array = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("an array holds NaN or Inf")
    return array
