"""How a nest walks through memory, and which of its axes are one in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx

from cnncc.targets.llvm.schedule import tir

Axes = Sequence[tuple[Any, int]]


@dataclass(frozen=True)
class Access:
    """A store whose last axes may have been joined.

    Attributes:
        axes: Index variables and their sizes.
        target: Buffer that is stored to.
        indices: Where.
        value: What is stored.
        aliases: Buffer → its view with the joined axis.
    """

    axes: list[tuple[Any, int]]
    target: Any
    indices: tuple[Any, ...]
    value: Any
    aliases: dict[Any, Any]

    def contiguous(self, var: Any, *, store: bool = True) -> bool:
        """Whether every load, and the store, moves by one element or not at all as a variable moves by one."""
        if store and not _unit(list(self.indices), var, must=True):
            return False
        found = [True]

        def check(load: Any) -> None:
            if not (load.source.same_as(self.target) or _unit(list(load.indices), var, must=False)):
                found[0] = False

        tvm_ffi.structural_walk(self.value, [(ir.TensorLoad, check)])
        return found[0] and not _selects(self.value, var)


def joined(axes: Axes, where: tuple[Any, Sequence[Any]], value: Any) -> Access:
    """Join as many of the last axes as are one in memory, in every buffer that they index.

    Args:
        axes: Index variables and their sizes; those of size 1 are dropped.
        where: The buffer that is stored to, and its indices.
        value: What is stored.
    """
    target, indices = where
    units = {var: tir.index(0) for var, extent in axes if extent == 1}
    if units:
        value = _substitute(value, units)
        indices = [_substitute(index, units) for index in indices]
    kept = [(var, extent) for var, extent in axes if extent > 1]
    for first in range(len(kept) - 1):
        found = _join(kept[:first], kept[first:], (target, tuple(indices)), value, inside=False)
        if found is not None:
            return found
    return Access(kept, target, tuple(indices), value, {})


def joined_inside(axes: Axes, access: Access) -> Access:
    """Join as many of the last of some axes as are one in memory but for what lies inside them, as lanes in pixels do.

    Args:
        axes: Index variables and their sizes, from the access or reduced over; those of size 1 are dropped.
        access: Where else they are used.

    Returns:
        The access with these axes alone.
    """
    units = {var: tir.index(0) for var, extent in axes if extent == 1}
    indices = tuple(_substitute(index, units) for index in access.indices)
    value = _substitute(access.value, units)
    kept = [(var, extent) for var, extent in axes if extent > 1]
    for start in range(len(kept) - 1):
        found = _join(kept[:start], kept[start:], (access.target, indices), value, inside=True)
        if found is not None:
            return replace(found, aliases={**access.aliases, **found.aliases})
    return Access(kept, access.target, indices, value, access.aliases)


def _join(outer: Axes, group: Axes, where: tuple[Any, tuple[Any, ...]], value: Any, *, inside: bool) -> Access | None:
    """Return the access with a group of axes as one, or None where some buffer does not hold them side by side.

    Args:
        outer: Axes before the group.
        group: Axes to join.
        where: The buffer that is stored to, and its indices.
        value: What is stored.
        inside: Whether other indices may follow the group's.
    """
    variables = [var for var, _ in group]
    sizes = [extent for _, extent in group]
    total = 1
    for size in sizes:
        total *= size
    point = tirx.Var("point", tir.INDEX)
    aliases: dict[Any, Any] = {}
    failed: list[bool] = []

    def place(source: Any, indices: Sequence[Any]) -> Any | None:
        """Return the view of a buffer and its indices, or None where it does not depend on the group."""
        if not any(mentions(index, variables) for index in indices):
            return None
        around = _around(source, indices, variables, sizes)
        if around is None or (around[1] and not inside):
            failed.append(True)
            return None
        head, tail = around
        sizes_of = tir.shape_of(source)
        shape = (*sizes_of[: len(head)], total, *sizes_of[len(sizes_of) - len(tail) :])
        if source in aliases and tir.shape_of(aliases[source]) != shape:
            failed.append(True)
            return None
        aliases.setdefault(source, tir.buffer(shape, f"{source.name}_joined", str(source.dtype)))
        return aliases[source], (*head, point, *tail)

    def load(found: Any) -> Any:
        placed = place(found.source, list(found.indices))
        return found if placed is None else placed[0][placed[1]]

    target, indices = where
    new_value = tvm_ffi.structural_map(value, [(ir.TensorLoad, load)], order="post")
    placed = place(target, indices)
    new_target, new_indices = placed if placed is not None else where
    if failed or mentions(new_value, variables):
        return None
    return Access([*outer, (point, total)], new_target, tuple(new_indices), new_value, aliases)


def _around(
    source: Any, indices: Sequence[Any], variables: list[Any], sizes: list[int]
) -> tuple[list[Any], list[Any]] | None:
    """Return the indices before and after a group's, where these are together, in order and span their sizes."""
    shape = tir.shape_of(source)
    position = len(indices)
    while not mentions(indices[position - 1], variables):
        position -= 1
    tail = list(indices[position:])
    for var, size in reversed(list(zip(variables, sizes, strict=True))):
        position -= 1
        while position >= 0 and shape[position] == 1 and not indices[position].same_as(var):
            position -= 1
        if position < 0 or not indices[position].same_as(var) or shape[position] != size:
            return None
    head = list(indices[:position])
    return None if any(mentions(index, variables) for index in head) else (head, tail)


def _unit(indices: list[Any], var: Any, *, must: bool) -> bool:
    """Whether indices move by one element as a variable does (or, unless they must, not at all)."""
    if any(mentions(index, [var]) for index in indices[:-1]):
        return False
    if not indices or not mentions(indices[-1], [var]):
        return not must
    found = sym.detect_linear_equation(indices[-1], [var])
    return len(found) == 2 and isinstance(found[0], tirx.IntImm) and int(found[0]) == 1


def _selects(value: Any, var: Any) -> bool:
    """Whether a condition of a value depends on a variable: vectors would compute lane by lane."""
    found = []

    def check(call: Any) -> None:
        if str(getattr(call.op, "name", "")).endswith("if_then_else") and mentions(call.args[0], [var]):
            found.append(True)

    tvm_ffi.structural_walk(value, [(ir.Call, check)])
    return bool(found)


def mentions(value: Any, variables: Sequence[Any]) -> bool:
    """Whether an expression or a region depends on one of some variables."""
    found = []

    def check(var: Any) -> None:
        if any(var.same_as(other) for other in variables):
            found.append(True)

    tvm_ffi.structural_walk(value, [(ir.Var, check)])
    return bool(found)


def _substitute(value: Any, places: dict[Any, Any]) -> Any:
    return tvm_ffi.structural_map(value, [(ir.Var, lambda var: places.get(var, var))], order="post")
