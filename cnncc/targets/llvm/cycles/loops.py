"""Loops of a control flow graph.

Loops are natural loops: a back edge leads to a block that dominates its source (Aho et al., *Compilers*, 9.6).
Dominators are found as by Cooper, Harvey and Kennedy, *A Simple, Fast Dominance Algorithm* (2001). Blocks are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Successors = Sequence[Sequence[int]]
"""Block → blocks that may follow it."""

_BEFORE = -1
"""The block before all entries."""


@dataclass(frozen=True)
class Loop:
    """All natural loops of one header.

    Attributes:
        header: Where it is entered.
        body: Its blocks, those of loops inside it and the header among them.
        latches: Blocks that jump back to the header.
        depth: 1 for a loop that lies in no other.
    """

    header: int
    body: frozenset[int]
    latches: frozenset[int]
    depth: int


def natural_loops(successors: Successors) -> tuple[Loop, ...]:
    """Return the loops of a graph, by header.

    Every block without predecessors is an entry, and so is the first block of what cannot be reached from those: code
    is entered by calls, too.
    """
    entries = _entries(successors)
    order = _reverse_postorder(successors, entries)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for follower in successors[block]:
            predecessors[follower].append(block)
    dominators = _immediate_dominators(predecessors, order, entries)
    latches: dict[int, set[int]] = {}
    for block in order:
        for follower in successors[block]:
            if _dominates(dominators, follower, block):
                latches.setdefault(follower, set()).add(block)
    bodies = {header: _body(predecessors, header, found) for header, found in latches.items()}
    return tuple(
        Loop(header, bodies[header], frozenset(latches[header]), sum(header in body for body in bodies.values()))
        for header in sorted(bodies)
    )


def heaviest_round(
    loop: Loop, loops: Sequence[Loop], successors: Successors, weight: Callable[[int], tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the blocks of one iteration: of all ways from the header to a latch, the heaviest.

    Loops inside are passed by, as if they did nothing: what is returned is the loop's own.

    Args:
        loop: One of the graph's.
        loops: All of them.
        successors: The graph.
        weight: Of a block; those of a way are added, entry by entry.
    """
    inner = [one for one in loops if one.body < loop.body]
    stands_for = {block: block for block in loop.body}
    for one in sorted(inner, key=lambda one: -one.depth):  # the outermost last: it stands for all blocks in it
        stands_for |= dict.fromkeys(one.body, one.header)
    passed = {one.header for one in inner}
    members: dict[int, list[int]] = {}
    for block in _reverse_postorder(successors, [loop.header]):
        if block in loop.body:
            members.setdefault(stands_for[block], []).append(block)
    position = {block: index for index, block in enumerate(members)}
    reached: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {loop.header: ((), ())}
    for block in members:  # each comes before its followers, since a loop inside is entered by its header alone
        total, way = reached[block]
        if block not in passed:
            gain = weight(block)
            total, way = tuple(map(sum, zip(total, gain, strict=True))) if total else gain, (*way, block)
        reached[block] = total, way
        for follower in {stands_for[f] for member in members[block] for f in successors[member] if f in loop.body}:
            if position[follower] > position[block]:
                reached[follower] = max(reached.get(follower, (total, way)), (total, way))
    return max(reached[stands_for[latch]] for latch in loop.latches)[1]


def _reverse_postorder(successors: Successors, roots: Iterable[int]) -> list[int]:
    """Return what can be reached so that, but for back edges, each block comes before its followers."""
    seen: set[int] = set()
    order: list[int] = []
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(successors[root]))]
        while stack:
            block, followers = stack[-1]
            follower = next((one for one in followers if one not in seen), None)
            if follower is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(follower)
                stack.append((follower, iter(successors[follower])))
    return order[::-1]


def _entries(successors: Successors) -> list[int]:
    """Return where code may be entered: each block without predecessors, and what cannot be reached from those."""
    entered = {follower for followers in successors for follower in followers}
    found = [block for block in range(len(successors)) if block not in entered]
    reached = set(_reverse_postorder(successors, found))
    for block in range(len(successors)):
        if block not in reached:
            found.append(block)
            reached |= set(_reverse_postorder(successors, [block]))
    return found


def _immediate_dominators(
    predecessors: Mapping[int, Sequence[int]], order: Sequence[int], entries: Iterable[int]
) -> dict[int, int]:
    """Return block → the block that dominates it next; that of the entries is one before all."""
    number = {block: index for index, block in enumerate(order)} | {_BEFORE: -1}
    found = {_BEFORE: _BEFORE} | dict.fromkeys(entries, _BEFORE)
    changed = True
    while changed:
        changed = False
        for block in order:
            if found.get(block) == _BEFORE:
                continue
            known = [one for one in predecessors[block] if one in found]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if number[new] > number[other]:
                        new = found[new]
                    else:
                        other = found[other]
            changed |= found.get(block) != new
            found[block] = new
    return found


def _dominates(dominators: dict[int, int], block: int, other: int) -> bool:
    while other not in (block, _BEFORE):
        other = dominators[other]
    return other == block


def _body(predecessors: Mapping[int, Sequence[int]], header: int, latches: Iterable[int]) -> frozenset[int]:
    body, waiting = {header}, list(latches)
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting.extend(predecessors[block])
    return frozenset(body)
