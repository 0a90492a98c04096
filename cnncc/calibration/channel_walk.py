"""Variables for the scales of channels, followed through a graph.

Every channel that a layer writes has a variable. What passes scales on hands the variables from its inputs to its
outputs; channels that must be scaled alike have their variables united (a union-find), and what must not be scaled is
united with `FIXED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cnncc.graph.draft import Draft
from cnncc.graph.values import reads

Ids = NDArray[np.int64]
"""Variables of a value along its axes 1, 2, … (those of the channels); the axes after them share."""

FIXED = 0
"""The variable of what must not be scaled."""


@dataclass(frozen=True)
class Weight:
    """Weights of one or more nodes, and the variables of the channels that they write and read.

    Their first two axes, cut into groups, are a block [group, …, …] with the inputs of a group along one axis and its
    outputs along the other. Nodes that share weights agree on both attributes of that layout.

    Attributes:
        name: Of the constant.
        axis: That of the output channels in the weights, 0 or 1.
        groups: Of channels that see only each other.
        nodes: That read it.
        outputs: Variables of the output channels: what they are multiplied with.
        inputs: Variables of the input channels: what they are divided by.
    """

    name: str
    axis: int
    groups: int
    nodes: list[onnx.NodeProto]
    outputs: Ids
    inputs: Ids

    def by_output(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the output channels' values of variables, to be broadcast to the block."""
        return np.expand_dims(values[self.outputs].reshape(self.groups, -1), 2 - self.axis)

    def by_input(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the input channels' values of variables, to be broadcast to the block."""
        return np.expand_dims(values[self.inputs].reshape(self.groups, -1), 1 + self.axis)


@dataclass(frozen=True)
class Offset:
    """A constant that is added to channels: a bias.

    Attributes:
        node: That reads it.
        index: As which of its inputs.
        ids: Variables multiplied with, in the constant's order.
    """

    node: onnx.NodeProto
    index: int
    ids: Ids


@dataclass
class Walk:
    """What is known of a graph's variables so far.

    Attributes:
        draft: The graph.
        ids: Value → variables; values without are not scaled.
        weights: By name.
        offsets: In the graph's order.
        tensors: What layers read → variables along axis 1.
    """

    draft: Draft
    ids: dict[str, Ids] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    offsets: list[Offset] = field(default_factory=list)
    tensors: dict[str, Ids] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=lambda: [FIXED])

    # ---- variables

    def fresh(self, count: int) -> Ids:
        """Return new variables."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def unite(self, one: Ids, other: Ids) -> None:
        """Make variables equal, pair by pair."""
        for a, b in set(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)):
            low, high = sorted((self._root(a), self._root(b)))
            self._parents[high] = low  # so that FIXED stays the root of what is fixed

    def fix(self, ids: Ids) -> None:
        """Scale none of these."""
        self.unite(ids, np.full_like(ids, FIXED))

    def fix_values(self, names: Iterable[str]) -> None:
        """Scale none of these values."""
        for name in names:
            if name in self.ids:
                self.fix(self.ids[name])

    def roots(self) -> Ids:
        """Return variable → the first that it is equal to."""
        return np.array([self._root(variable) for variable in range(len(self._parents))], dtype=np.int64)

    def _root(self, variable: int) -> int:
        while self._parents[variable] != variable:
            self._parents[variable] = self._parents[self._parents[variable]]
            variable = self._parents[variable]
        return variable

    # ---- reading

    def moving(self, node: onnx.NodeProto) -> Ids | None:
        """Return the first input's variables where no other input has any."""
        if any(name in self.ids for name in list(reads(node))[1:]):
            return None
        return self.ids.get(node.input[0])

    def rank(self, name: str) -> int:
        """Return a value's number of axes, 0 where it is unknown."""
        return len(self.draft.shape(name) or ())

    def sizes(self, name: str) -> tuple[int, ...]:
        """Return a value's sizes from axis 1 on; none where one is unknown."""
        sizes = (self.draft.shape(name) or ())[1:]
        known = tuple(size for size in sizes if isinstance(size, int))
        return known if len(known) == len(sizes) else ()

    def is_float(self, name: str) -> bool:
        """Whether a value is a float32 constant."""
        tensor = self.draft.weights.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT

    def is_per_channel(self, name: str, count: int, *, trailing: int) -> bool:
        """Whether a constant holds a float32 for each channel, with so many axes after it."""
        if not self.is_float(name):
            return False
        dims = tuple(self.draft.weights[name].dims)
        return dims[-1 - trailing :] == (count, *[1] * trailing) and all(size == 1 for size in dims[: -1 - trailing])


Rule = Callable[[Walk, onnx.NodeProto], "tuple[Ids, ...] | None"]
"""Gives the variables of a node's outputs; None where the node does not pass scales on, and all it reads is fixed."""
