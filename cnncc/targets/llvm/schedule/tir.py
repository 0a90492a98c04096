"""Loop nests built as nodes. Parsing their text would take seconds a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.stmt import ForKind

INDEX = "int64"

_READ_TO_L2 = tuple(tirx.const(value, "int32") for value in (0, 2, 1))
"""LLVM's prefetch: for reading, to the second level, of data."""

Body = Callable[[Any], Any]


def index(value: int) -> Any:
    """Return an index constant."""
    return tirx.IntImm(INDEX, value)


def unknown(value: int) -> Any:
    """Return a small number that LLVM does not know."""
    bits = tirx.reinterpret("float32", tirx.const(value, "int32"))
    fenced = tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", bits)
    return tirx.reinterpret("int32", fenced).astype(INDEX)


def loop(extent: Any, body: Body, kind: ForKind = ForKind.SERIAL, name: str = "i") -> Any:
    """Return a loop from 0; a serial loop that runs once is its body."""
    if extent == 1 and kind != ForKind.PARALLEL:
        return body(index(0))
    var = tirx.Var(name, INDEX)
    return tirx.For(var, index(0), index(extent) if isinstance(extent, int) else extent, kind, body(var))


def parallel(extent: Any, body: Body) -> Any:
    """Return a loop that cores share."""
    return loop(extent, body, ForKind.PARALLEL, "task")


PARALLEL_WORK = 6144
"""Elements below which sharing costs more than it saves: a region takes half a microsecond, and what the other core
wrote must come over from its cache."""


def shared(tasks: int, work: int, body: Body) -> Any:
    """Return a loop that cores share where there is enough to do.

    Args:
        tasks: How often the loop runs.
        work: Elements that all of it touches.
        body: Number of the task → its work.
    """
    return parallel(tasks, body) if work >= PARALLEL_WORK and tasks > 1 else loop(tasks, body)


@dataclass
class Lanes:
    """A vector loop that is being built: values that it names live in buffers of its length.

    Attributes:
        lane: The loop's variable.
        count: Lanes.
        buffers: Values named so far.
    """

    lane: Any
    count: int
    buffers: list[Any] = field(default_factory=list)

    def temporary(self, dtype: str) -> tuple[Any, Any]:
        """Return a new buffer and the index of this lane in it."""
        made = buffer([self.count], "value", dtype, "local")
        self.buffers.append(made)
        return made, self.lane


_building: list[Lanes] = []


@contextmanager
def lanes_of(lane: Any, count: int) -> Iterator[Lanes]:
    """Let what is built inside name values; ask the result for the buffers to allocate."""
    _building.append(Lanes(lane, count))
    try:
        yield _building[-1]
    finally:
        _building.pop()


def current_lanes() -> Lanes | None:
    """Return the vector loop that is being built, or None outside any."""
    return _building[-1] if _building else None


def vector(lanes: int, body: Body) -> Any:
    """Return a loop that is one vector operation."""
    lane = tirx.Var("lane", INDEX) if lanes > 1 else index(0)
    with lanes_of(lane, lanes) as building:
        done = body(lane)
    if lanes > 1:
        done = tirx.For(lane, index(0), index(lanes), ForKind.VECTORIZED, done)
    return block(done, building.buffers, "vector") if building.buffers else done


def sequence(statements: Sequence[Any]) -> Any:
    """Return statements one after the other; none is a statement that does nothing."""
    if not statements:
        return tirx.Evaluate(tirx.const(0, "int32"))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def buffer(shape: Sequence[int], name: str, dtype: str = "float32", scope: str = "global") -> Any:
    """Return a buffer that a `block` allocates."""
    return tirx.decl_buffer([index(size) for size in shape], dtype, name, scope=scope)


def store(target: Any, indices: Sequence[Any], value: Any) -> Any:
    """Return a store."""
    return tirx.BufferStore(target, value, list(indices))


def prefetch(source: Any, indices: Sequence[Any]) -> Any:
    """Return a statement that asks for a cache line ahead of its use; the place may lie beyond the buffer."""
    address = tirx.address_of(source[tuple(indices)])
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *_READ_TO_L2))


def when(condition: Any, body: Any) -> Any:
    """Return a statement under a condition; a condition known to hold disappears."""
    if isinstance(condition, bool):
        condition = tirx.const(condition, "bool")
    return tirx.IfThenElse(condition, body, None)


def block(body: Any, allocate: Sequence[Any] = (), name: str = "body") -> Any:
    """Return an opaque block that allocates buffers."""
    return s_tir.SBlockRealize(
        [], True, s_tir.SBlock([], [], [], name, body, None, list(allocate), None, {"cnncc.opaque": 1})
    )


def function(like: Any, body: Any, allocate: Sequence[Any] = ()) -> Any:
    """Return a function with another's signature and a new body."""
    return like.with_body(block(body, allocate, "root"))


def views(aliases: dict[Any, Any], body: Any) -> Any:
    """Return a body that sees buffers under other shapes too.

    Args:
        aliases: Buffer → the buffer of another shape over the same memory.
        body: The statement.
    """
    declared = [tirx.DeclBuffer(view, data=tirx.buffer_data(whole)) for whole, view in aliases.items()]
    return sequence([*declared, body])


def at(buf: Any, *indices: Any) -> Any:
    """Return a load."""
    return buf[indices]


def one_of(source: Any, first: Any, count: int, number: int) -> Any:
    """Return one of several neighbours, loaded as one vector."""
    if count == 1:
        return source[first]
    return tirx.Shuffle([source[tirx.Ramp(first, index(1), count)]], [tirx.const(number, "int32")])


def pieces(extent: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """Split a range into vectors: full ones first, then halves of halves.

    Yields:
        First element, lanes, how many such vectors follow each other.
    """
    start = 0
    while lanes >= 1:
        count = (extent - start) // lanes
        if count:
            yield start, lanes, count
            start += count * lanes
        lanes //= 2


def for_vectors(extent: int, lanes: int, body: Body) -> Any:
    """Return vector loops that cover a range whatever its length."""

    def run(start: int, width: int, count: int) -> Any:
        return loop(count, lambda step: vector(width, lambda lane: body(start + step * width + lane)), name="step")

    return sequence([run(*piece) for piece in pieces(extent, lanes)])


def shape_of(buf: Any) -> tuple[int, ...]:
    """Return a buffer's shape; every kernel has a static one."""
    return tuple(int(size) for size in buf.shape)


def root_blocks(fun: Any) -> tuple[Any, list[Any]]:
    """Return a schedule of a function and its top-level blocks."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": fun}))
    return schedule, list(schedule.get_child_blocks(schedule.get_sblock("root")))
