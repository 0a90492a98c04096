"""Loops of control flow graphs, held against their definitions by brute force."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from cnncc.targets.llvm.cycles.loops import Loop, heaviest_round, natural_loops

Graph = tuple[tuple[int, ...], ...]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph of up to eight blocks, most of them with one or two followers, as code has them."""
    size = draw(st.integers(1, 8))
    block = st.lists(st.integers(0, size - 1), max_size=3, unique=True).map(tuple)
    return tuple(draw(block) for _ in range(size))


def reached(graph: Graph, starts: Iterable[int], without: frozenset[int] = frozenset()) -> set[int]:
    found: set[int] = set()
    waiting = [start for start in starts if start not in without]
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting.extend(follower for follower in graph[block] if follower not in without)
    return found


def entries(graph: Graph) -> set[int]:
    entered = {follower for followers in graph for follower in followers}
    found = set(range(len(graph))) - entered
    while rest := set(range(len(graph))) - reached(graph, found):
        found.add(min(rest))
    return found


def loops_by_definition(graph: Graph) -> dict[int, tuple[set[int], set[int]]]:
    """Return header → latches and body; a block dominates another that no way reaches without it."""
    blocks = range(len(graph))
    backwards = tuple(tuple(b for b in blocks if block in graph[b]) for block in blocks)
    found: dict[int, tuple[set[int], set[int]]] = {}
    for header in blocks:
        hidden = set(blocks) - reached(graph, entries(graph), frozenset({header}))
        latches = {block for block in hidden if header in graph[block]}
        if latches:
            found[header] = (latches, {header} | reached(backwards, latches, frozenset({header})))
    return found


def ways(graph: Graph, loop: Loop, way: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield every way from a header to a latch that meets no block twice."""
    way = way or (loop.header,)
    if way[-1] in loop.latches:
        yield way
    for follower in graph[way[-1]]:
        if follower in loop.body and follower not in way:
            yield from ways(graph, loop, (*way, follower))


def is_innermost(loop: Loop, loops: Sequence[Loop]) -> bool:
    return not any(other.body < loop.body for other in loops)


def has_no_other_cycle(graph: Graph, loop: Loop) -> bool:
    inside = [tuple(f for f in graph[b] if f in loop.body and f != loop.header) for b in range(len(graph))]
    return not any(block in reached(tuple(inside), inside[block]) for block in loop.body)


@given(graphs())
def test_loops_are_the_natural_loops_of_a_graph(graph: Graph) -> None:
    found = natural_loops(graph)
    assert {loop.header: (set(loop.latches), set(loop.body)) for loop in found} == loops_by_definition(graph)


@given(graphs())
def test_loops_are_nested_or_apart_and_depths_count_the_nests(graph: Graph) -> None:
    found = natural_loops(graph)
    for loop in found:
        assert loop.depth == sum(loop.body <= other.body for other in found)
        for other in found:
            assert loop.body <= other.body or other.body <= loop.body or not loop.body & other.body


@given(graphs(), st.lists(st.integers(0, 9), min_size=8, max_size=8))
def test_the_heaviest_round_of_an_inner_loop_is_the_heaviest_of_all_ways(graph: Graph, weights: list[int]) -> None:
    found = natural_loops(graph)
    for loop in found:
        if not is_innermost(loop, found):
            continue
        way = heaviest_round(loop, found, graph, lambda block: (weights[block],))
        all_ways = list(ways(graph, loop))
        assert way in all_ways
        if has_no_other_cycle(graph, loop):
            assert sum(weights[block] for block in way) == max(sum(weights[b] for b in one) for one in all_ways)


@given(graphs())
def test_a_round_of_an_outer_loop_passes_the_inner_ones_by(graph: Graph) -> None:
    found = natural_loops(graph)
    for loop in found:
        way = heaviest_round(loop, found, graph, lambda _block: (1, 1))
        inner = {block for other in found if other.body < loop.body for block in other.body}
        assert way[0] == loop.header
        assert len(set(way)) == len(way)
        assert set(way) <= loop.body - inner


def test_the_loops_of_a_matrix_product() -> None:
    # 0 → 1 ⟲ rows → 2 ⟲ columns → 3 ⟲ sums → 4 stores → 5 next row → 6
    graph = ((1,), (2,), (3,), (3, 4), (2, 5), (1, 6), ())
    found = natural_loops(graph)
    assert [(loop.header, sorted(loop.body), loop.depth) for loop in found] == [
        (1, [1, 2, 3, 4, 5], 1),
        (2, [2, 3, 4], 2),
        (3, [3], 3),
    ]
    assert heaviest_round(found[1], found, graph, lambda _block: (1,)) == (2, 4)


def test_code_that_is_entered_by_calls_alone_has_loops_too() -> None:
    """Parallel loops are functions of their own behind a kernel's, and nothing jumps there."""
    assert [loop.header for loop in natural_loops(((), (2,), (2, 3), ()))] == [2]
    assert [loop.header for loop in natural_loops(((), (1,)))] == [1], "nor does it where the loop is all there is"


def test_a_cycle_with_two_entrances_is_no_natural_loop() -> None:
    assert natural_loops(((1, 2), (2,), (1,))) == ()
