"""A graph and its calibration table become a Q/DQ graph: pure, the same bytes every time."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from cnncc.calibration.bias_correction import Deltas, add_to_biases
from cnncc.calibration.channels import Site, find_sites
from cnncc.calibration.equalize import Equalization, apply_equalization, relu6_to_relu
from cnncc.calibration.plan import Layer, layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.calibration.shift import Shift
from cnncc.calibration.table import (
    CalibrationTable,
    EqualizationRecord,
    check_model,
    digests_of,
    floats_of,
    floats_text,
    histogram_of,
)
from cnncc.calibration.thresholds import METHODS, scale_of
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import DataRefused, UsageError

TABLE_KEY = "cnncc.calibration"
"""Metadata key of a model: digest of the calibration table that it was quantized with."""


def quantize(graph: OnnxGraph, table: CalibrationTable, *, name: str, method: str = "") -> OnnxGraph:
    """Quantize a graph with a table.

    Args:
        graph: Cleaned, in float32: the one that was calibrated.
        table: Of this graph.
        name: What the user calls the model, for refusals.
        method: Thresholds of another method than the table's, from its histograms; biases are then left as they
            are and nothing is shifted, since both hold for the table's own scales.

    Returns:
        A Q/DQ graph with the same inputs and outputs.

    Raises:
        DataRefused: The table was made for another model or other weights, or contradicts it.
        UsageError: The method is unknown, or the table has no histograms to find thresholds with.
    """
    check_model(table, digests_of(graph, name))
    scales = _scales(table, method)
    prepared = prepare(graph, table)
    layers = layers_of(prepared)
    deltas = {} if method else _deltas(prepared, layers, table)
    quantized = {layer.node for layer in table.layers if layer.precision == "int8"}
    corrected = add_to_biases(prepared, layers, deltas)
    chosen = [layer for layer in layers if layer.node in quantized]
    return write(corrected, chosen, scales, {} if method else table.shifts, table.digest, float_adds=table.float_adds)


def _deltas(graph: OnnxGraph, layers: Collection[Layer], table: CalibrationTable) -> Deltas:
    """Return what the table adds to biases.

    Raises:
        DataRefused: A layer has another number of channels.
    """
    deltas = {record.node: floats_of(record.bias) for record in table.layers if record.bias}
    channels = {layer.node: graph.constants[layer.weight].dims[layer.axis] for layer in layers}
    if bad := [node for node, delta in deltas.items() if delta.size != channels.get(node)]:
        raise DataRefused("the table corrects biases that the model does not have", where=bad, hint="calibrate again")
    return deltas


def prepare(graph: OnnxGraph, table: CalibrationTable) -> OnnxGraph:
    """Return the float graph with what the table says was done before quantizing.

    Raises:
        DataRefused: The equalization is damaged.
        ModelRefused: It is not of this model.
    """
    if table.relu6_to_relu:
        graph = relu6_to_relu(graph)
    if not table.equalization:
        return graph
    sites = {_key(site): site for site in find_sites(graph)}
    return apply_equalization(graph, [_equalization(record, sites) for record in table.equalization])


def corrected(graph: OnnxGraph, table: CalibrationTable) -> tuple[OnnxGraph, tuple[Layer, ...]]:
    """Return the float graph that a table's scales hold for, biases corrected, and those of its layers that are int8.

    Raises:
        As `prepare`; DataRefused: The table corrects biases that the model does not have.
    """
    graph = prepare(graph, table)
    layers = layers_of(graph)
    graph = add_to_biases(graph, layers, _deltas(graph, layers, table))
    quantized = {layer.node for layer in table.layers if layer.precision == "int8"}
    return graph, tuple(layer for layer in layers_of(graph) if layer.node in quantized)


def equalization_record(done: Equalization) -> EqualizationRecord:
    """Return what a table holds of an equalization."""
    return EqualizationRecord(*_key(done.site), floats_text(np.array(done.scales, np.float32)))


_Key = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def _key(site: Site) -> _Key:
    return (
        tuple(layer.node for layer in site.producers),
        tuple(layer.node for layer in site.consumers),
        site.tensors,
    )


def _equalization(record: EqualizationRecord, sites: Mapping[_Key, Site]) -> Equalization:
    site = sites.get((record.producers, record.consumers, record.tensors))
    if site is None:
        raise DataRefused(
            "the table equalizes channels that this model does not have",
            where=[*record.producers, *record.consumers],
            hint="calibrate this model",
        )
    return Equalization(site, tuple(floats_of(record.scale).tolist()), 0)


def write(
    graph: OnnxGraph,
    layers: Collection[Layer],
    scales: Mapping[str, float],
    shifts: Mapping[str, Shift] | None = None,
    digest: str = "",
    *,
    float_adds: bool = False,
) -> OnnxGraph:
    """Return a prepared graph with these layers quantized.

    Args:
        graph: In float32, prepared.
        layers: Those that become int8.
        scales: Tensor → scale, of at least the tensors that these layers need.
        shifts: Tensors that are shifted.
        digest: Of the table, to be noted in the model.
        float_adds: Whether additions of two tensors read float tensors.

    Raises:
        DataRefused: A tensor has no scale.
    """
    chosen = plan_for(graph, layers, float_adds=float_adds)
    needed = [tensor for group in chosen.groups for tensor in group.tensors]
    if missing := [tensor for tensor in needed if tensor not in scales]:
        raise DataRefused(
            f"{len(missing)} tensors have no scale: {', '.join(missing[:3])}",
            hint="calibrate the model again, or keep the layers that read them in float",
        )
    quantized = insert_qdq(graph, chosen, scales, shifts)
    if digest:
        quantized.proto.metadata_props.add(key=TABLE_KEY, value=digest)
    return quantized


def _scales(table: CalibrationTable, method: str) -> dict[str, float]:
    if not method:
        return table.scales
    if method not in METHODS:
        raise UsageError(f"'{method}' is no method for thresholds", hint=f"one of {', '.join(METHODS)}")
    if bare := [group.tensors[0] for group in table.groups if not group.counts]:
        raise UsageError(
            f"the table has no histograms, its scales were imported: {', '.join(bare[:3])}",
            hint="leave --method out, or calibrate the model",
        )
    return {name: scale_of(METHODS[method](histogram_of(group))) for group in table.groups for name in group.tensors}
