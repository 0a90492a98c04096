"""Loops over the pixels of a blocked result, shared among cores: for kernels that compute vector by vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule import tir
from cnncc.targets.llvm.schedule.anchor import Tail

Over = Callable[[tir.Body], Any]
"""Takes what is done at a point, a list of indices, and returns the loops over the points."""

Plane = Callable[[Any, Any, Over], Any]
"""Takes image, block and the loops over some of the block's pixels, and returns their statement."""


class Pixels:
    """The pixels of a blocked result, rows and columns as one axis where everything that is read allows that.

    Args:
        tail: What is stored.
        machine: What the kernel is for.
        sources: Blocked tensors of the result's rows and columns that are read beside what the tail reads.
    """

    def __init__(self, tail: Tail, machine: Machine, sources: Sequence[Any]) -> None:
        self._machine = machine
        self._batch, self._blocks, self._rows, self._columns, self._lanes = tir.shape_of(tail.result)
        flat = tail.flat()
        self._tail = tail if flat is None else flat[0]
        self._aliases: dict[Any, Any] = {}
        if flat is not None:
            self._aliases = dict(flat[1])
            for source in sources:
                if source not in self._aliases:
                    *outer, rows, columns, lanes = tir.shape_of(source)
                    shape = (*outer, rows * columns, lanes)
                    self._aliases[source] = tir.buffer(shape, f"{source.name}_flat", str(source.dtype))

    def view(self, source: Any) -> Any:
        """Return a source as it is indexed by image, block, point and lane."""
        return self._aliases.get(source, source)

    def store(self, indices: Sequence[Any], value: Callable[[Any], Any]) -> Any:
        """Return the stores of one vector.

        Args:
            indices: Image, block and point.
            value: Takes a lane and returns what the tail is applied to.
        """
        return tir.for_vectors(
            self._lanes, self._machine.lanes, lambda lane: self._tail.at([*indices, lane], value(lane))
        )

    def function(self, like: Any, plane: Plane) -> Any:
        """Return the function that computes every block of every image.

        Args:
            like: Function whose signature it has.
            plane: Writes one task.
        """
        flat = len(self._tail.axes) == 4
        length = self._rows * self._columns if flat else self._rows
        planes = self._batch * self._blocks
        chunks = min(length, -(-4 * self._machine.cores // planes))
        chunk = -(-length // chunks)
        chunks = -(-length // chunk)

        def over(start: Any, count: Any) -> Over:
            def loops(body: tir.Body) -> Any:
                if flat:
                    return tir.loop(count, lambda i: body([start + i]), name="point")
                return tir.loop(
                    count, lambda y: tir.loop(self._columns, lambda x: body([start + y, x]), name="x"), name="y"
                )

            return loops

        def task(number: Any) -> Any:
            if chunks == 1:
                return plane(number // self._blocks, number % self._blocks, over(tir.index(0), length))
            part, rest = number % chunks, number // chunks
            start = part * chunk
            count = chunk if length % chunk == 0 else tirx.min(tir.index(chunk), length - start)
            return plane(rest // self._blocks, rest % self._blocks, over(start, count))

        work = planes * self._rows * self._columns * self._lanes
        tasks = planes * chunks
        body = tir.shared(tasks, work, task)
        return tir.function(like, tir.views(self._aliases, body) if self._aliases else body)
