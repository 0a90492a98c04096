"""Which channels of a graph may be scaled, by which layers' weights, and which of them must be scaled alike.

A channel that one layer writes and others read can be multiplied by s > 0 in its writer's weights and divided by s in
its readers', if all between them passes the factor on (Nagel et al. 2019, Data-Free Quantization Through Weight
Equalization and Bias Correction, section 4.1).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import onnx

from cnncc.calibration.channel_rules import RULES
from cnncc.calibration.channel_walk import FIXED, Ids, Offset, Walk, Weight
from cnncc.graph.draft import STANDARD, Draft
from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.values import reads


@dataclass(frozen=True)
class Layer:
    """A node with constant weights, as users know it.

    Attributes:
        node: Its name in the graph.
        module: The PyTorch module that it came from.
        weight: Name of its weights.
    """

    node: str
    module: str
    weight: str


@dataclass(frozen=True)
class Site:
    """Channels that may be scaled: written by some layers, read by others.

    Attributes:
        producers: Layers whose output channels, weights and bias, are multiplied.
        consumers: Layers whose input channels are divided.
        tensors: What the consumers read.
        channels: How many scales the site has; channels that must be scaled alike share one.
    """

    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]
    tensors: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class Plan:
    """All that can be scaled in a draft. Variables are numbered site by site, from 1; 0 is `FIXED`.

    Attributes:
        sites: In the graph's order.
        spans: The variables of each site.
        weights: What variables scale.
        offsets: What else they scale.
        tensors: Values that layers read → variables along axis 1.
    """

    sites: tuple[Site, ...]
    spans: tuple[slice, ...]
    weights: tuple[Weight, ...]
    offsets: tuple[Offset, ...]
    tensors: dict[str, Ids]

    @property
    def size(self) -> int:
        """How many variables there are, the fixed one included."""
        return 1 + sum(site.channels for site in self.sites)


def find_sites(graph: OnnxGraph) -> tuple[Site, ...]:
    """Return the sites of a cleaned graph: BatchNormalization folded, shapes known, weights initializers.

    Scales pass through Relu, LeakyRelu and PRelu, pools and means, resizing, padding with zeros, Concat, Split and
    Slice, reshapes that keep channels apart, channel shuffles, products with a constant or with a gate that is not
    scaled itself (squeeze-and-excite), and additions, all of whose terms then share their scales. Channels that reach
    anything else, or an output of the graph, are no part of a site; neither are weights that something else reads too.
    """
    return plan_of(Draft.of(graph)).sites


def plan_of(draft: Draft) -> Plan:
    """Return what can be scaled in a draft; the nodes in it are the draft's own."""
    walk = Walk(draft)
    for node in draft.nodes:
        _visit(walk, node)
    walk.fix_values(draft.output_names())
    uses = draft.uses()
    for weight in walk.weights.values():
        if uses[weight.name] != len(weight.nodes):
            walk.fix(weight.outputs)
            walk.fix(weight.inputs)
    return _number(walk)


def _visit(walk: Walk, node: onnx.NodeProto) -> None:
    rule = RULES.get(node.op_type) if node.domain in STANDARD else None
    made = rule(walk, node) if rule is not None and node.input else None
    if made is None:
        walk.fix_values(reads(node))
        return
    for name, ids in zip(node.output, made, strict=False):  # a MaxPool's indices come second, and are not scaled
        shape = walk.draft.shape(name)
        if shape is not None and shape[1 : 1 + ids.ndim] == ids.shape:
            walk.ids[name] = ids
        else:
            walk.fix(ids)


def _number(walk: Walk) -> Plan:
    """Number the free variables site by site: those that one layer writes belong to one site."""
    roots = walk.roots()
    consumed = {int(v) for weight in walk.weights.values() for v in roots[weight.inputs]} - {FIXED}
    groups = _grouped([[v for v in roots[w.outputs].tolist() if v in consumed] for w in walk.weights.values()])
    numbers = np.full(len(roots), FIXED, dtype=np.int64)
    spans: list[slice] = []
    for members in groups:
        first = spans[-1].stop if spans else 1
        spans.append(slice(first, first + len(members)))
        numbers[members] = np.arange(first, first + len(members))
    final = numbers[roots]
    weights = tuple(replace(w, outputs=final[w.outputs], inputs=final[w.inputs]) for w in walk.weights.values())
    offsets = tuple(replace(offset, ids=final[offset.ids]) for offset in walk.offsets)
    tensors = {name: final[ids] for name, ids in walk.tensors.items()}
    return Plan(_sites(weights, tensors, spans), tuple(spans), weights, offsets, tensors)


def _grouped(sets: list[list[int]]) -> list[list[int]]:
    """Return the sets, those that overlap joined, members and sets in ascending order."""
    group_of: dict[int, list[int]] = {}
    for variables in sets:
        joined = {id(group): group for v in variables if (group := group_of.get(v)) is not None}
        merged = sorted({*variables, *(v for group in joined.values() for v in group)})
        group_of.update(dict.fromkeys(merged, merged))
    return sorted({id(group): group for group in group_of.values()}.values())


def _sites(weights: tuple[Weight, ...], tensors: dict[str, Ids], spans: list[slice]) -> tuple[Site, ...]:
    counts = [span.stop - span.start for span in spans]
    owner = np.repeat(np.arange(-1, len(spans)), [1, *counts])

    def owners(ids: Ids) -> list[int]:
        return [int(site) for site in np.unique(owner[ids]) if site >= 0]

    producers: dict[int, list[Layer]] = defaultdict(list)
    consumers: dict[int, list[Layer]] = defaultdict(list)
    read: dict[int, list[str]] = defaultdict(list)
    for weight in weights:
        layers = [Layer(node_label(node), module_path(node), weight.name) for node in weight.nodes]
        for site in owners(weight.outputs):
            producers[site] += layers
        for site in owners(weight.inputs):
            consumers[site] += layers
    for name, ids in tensors.items():
        for site in owners(ids):
            read[site].append(name)
    return tuple(
        Site(tuple(producers[n]), tuple(consumers[n]), tuple(read[n]), count) for n, count in enumerate(counts)
    )
