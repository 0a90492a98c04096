"""The cleaning pipeline, and the proof that it changed nothing but form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cnncc.compiler.passes.dedupe import dedupe
from cnncc.compiler.passes.fix_reshapes import fix_reshapes
from cnncc.compiler.passes.fold_batchnorm import fold_batchnorm
from cnncc.compiler.passes.fold_constants import fold_constants
from cnncc.compiler.passes.infer_shapes import infer_shapes
from cnncc.compiler.passes.normalize import normalize
from cnncc.compiler.passes.remove_dead import remove_dead
from cnncc.compiler.passes.remove_identity import remove_identity
from cnncc.compiler.passes.split_sequences import split_sequences
from cnncc.graph.draft import Draft, GraphPass
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference, side_by_side
from cnncc_runtime.errors import ToolchainFailed
from cnncc_runtime.specs import Feeds, Tensors

PASSES: tuple[GraphPass, ...] = (
    # Phase 1: one form for constants and names
    normalize,
    # Phase 2: what is known now; folding shows reshapes and casts to be idle, and their removal more to fold
    fold_constants,
    split_sequences,
    remove_identity,
    remove_dead,
    fold_constants,
    fix_reshapes,
    remove_identity,
    # Phase 3: inference-time normalization into the weights
    fold_batchnorm,
    # Phase 4: sweep
    remove_dead,
    dedupe,
    infer_shapes,
)

ROUNDING = 64 * float(np.finfo(np.float32).eps)
"""Difference, relative to the output's largest value, that reordered float32 roundings may make unexamined.

64 ulp; what exceeds it is measured against the float64 truth of the graph before.
"""

_NOISE = 4.0
"""How much farther from the truth than the graph before the cleaned graph may be."""

_COMPARING = (
    "ArgMax",
    "ArgMin",
    "TopK",
    "NonMaxSuppression",
    "Greater",
    "Less",
    "GreaterOrEqual",
    "LessOrEqual",
    "Equal",
)
_STEPPING = ("Round", "Floor", "Ceil", "Cast", "NonZero", "Sign", "QuantizeLinear")
_DECIDING = frozenset((*_COMPARING, *_STEPPING))
"""Operators that make a choice of a number, so that rounding may turn it."""


@dataclass(frozen=True)
class PassRecord:
    """What one run of a pass did.

    Attributes:
        name: Of the pass.
        changes: How many things it changed.
    """

    name: str
    changes: int


@dataclass(frozen=True)
class CleanReport:
    """What cleaning did, and how it was proved.

    Attributes:
        nodes_before: Nodes of the graph given.
        nodes_after: Nodes of the graph returned.
        passes: In order.
        proof: ``bit-exact``, ``rounding`` (within 64 ulp of the largest output), ``noise`` (as near to the float64
            truth as the graph before), or ``none``.
        difference: Largest difference of an output, relative to that output's largest value.
        seed: Of the inputs that the proof ran with.
    """

    nodes_before: int
    nodes_after: int
    passes: tuple[PassRecord, ...]
    proof: str
    difference: float
    seed: int


def clean(graph: OnnxGraph, *, prove: bool = True, feeds_seed: int = 0) -> tuple[OnnxGraph, CleanReport]:
    """Bring a graph into the form that targets build from.

    No Constant, Identity, Dropout or BatchNormalization nodes that can go, no subgraph of constants, no unused or
    doubled weights; every value has a type and a shape. Names of inputs and outputs stay; nodes keep the module they
    came from, and `cnncc.fused` lists modules whose work they took over. Cleaning a clean graph changes nothing.

    Args:
        graph: From an exporter or a reader; it stays as it is.
        prove: Run both graphs on seeded inputs and compare.
        feeds_seed: Seed of those inputs.

    Returns:
        The cleaned graph and what was done.

    Raises:
        ToolchainFailed: The graphs differ; names the pass.
        ModelRefused: Shapes contradict each other, or the graph exceeds 2 GiB.
    """
    draft = Draft.of(graph)
    records = tuple(PassRecord(each.name, each.change(draft)) for each in PASSES)
    cleaned = draft.close()
    proof, difference = ("none", 0.0)
    if prove:
        exact = not any(r.changes for r, p in zip(records, PASSES, strict=True) if not p.exact)
        proof, difference = _prove(graph, cleaned, exact, feeds_seed)
    count = len(graph.proto.graph.node), len(cleaned.proto.graph.node)
    return cleaned, CleanReport(*count, records, proof, difference, feeds_seed)


def _prove(before: OnnxGraph, after: OnnxGraph, exact: bool, seed: int) -> tuple[str, float]:
    feeds = random_feeds(before.inputs, seed)
    old, new = side_by_side(lambda graph: Reference(graph, beside=2).run(feeds), (before, after))
    verdict = _judge(before, after, feeds, old, new, exact)
    if verdict is None:
        raise _blame(before, feeds, old)
    return verdict


def _judge(
    before: OnnxGraph, after: OnnxGraph, feeds: Feeds, old: Tensors, new: Tensors, exact: bool
) -> tuple[str, float] | None:
    difference = relative_difference(old, new)
    if difference == 0.0:
        return "bit-exact", 0.0
    if exact:
        return None
    if difference <= ROUNDING:
        return "rounding", difference
    decided = [name for name in old if old[name].dtype.kind != "f" and not np.array_equal(old[name], new[name])]
    if decided:
        return _judge_decisions(before, after, feeds, [name for name in old if old[name].dtype.kind == "f"])
    return ("noise", difference) if _within_noise(before, feeds, old, new) else None


def _judge_decisions(before: OnnxGraph, after: OnnxGraph, feeds: Feeds, outputs: list[str]) -> tuple[str, float] | None:
    """Compare what decisions are made from: rounding may turn a near tie of ArgMax, TopK or a comparison."""
    made = {name for node in before.nodes for name in node.output}
    sources = [name for node in after.nodes if node.op_type in _DECIDING for name in node.input if name in made]
    names = [*outputs, *(name for name in dict.fromkeys(sources) if name not in outputs)]
    if not sources:
        return None
    cut, cleaned = before.with_outputs(names), after.with_outputs(names)
    old, new = Reference(cut).run(feeds), Reference(cleaned).run(feeds)
    old = {name: value for name, value in old.items() if value.dtype.kind == "f"}
    difference = relative_difference(old, new)
    held = difference <= ROUNDING or _within_noise(cut, feeds, old, new)
    return ("noise", difference) if old and held else None


def relative_difference(old: Tensors, new: Tensors) -> float:
    """Return the largest difference of any output, relative to that output's largest finite value.

    NaN and infinities must be in the same places: else the difference is infinite.
    """
    return max((_difference(old[name], new[name]) for name in old), default=0.0)


def _difference(old: np.ndarray, new: np.ndarray) -> float:
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
        return 0.0
    if old.dtype.kind != "f":
        return float("inf")
    finite = np.isfinite(old)
    if not np.array_equal(old[~finite], new[~finite], equal_nan=True) or not np.isfinite(new[finite]).all():
        return float("inf")
    a, b = old[finite].astype(np.float64), new[finite].astype(np.float64)
    scale = float(np.abs(a).max())
    return float(np.abs(a - b).max()) / scale if scale else float("inf")


def _within_noise(before: OnnxGraph, feeds: Feeds, old: Tensors, new: Tensors) -> bool:
    """Whether the new outputs are as near to the float64 truth as the old ones."""
    from cnncc.graph.exact import Exact

    truth = Exact(before).run(feeds)
    for name in old:
        exact = truth[name]
        if old[name].dtype.kind != "f":
            continue  # equal, or judged by what they are decided from
        scale = float(np.abs(exact).max(initial=0.0))
        own = float(np.abs(old[name] - exact).max(initial=0.0))
        if not float(np.abs(new[name] - exact).max(initial=0.0)) <= _NOISE * own + ROUNDING * scale:
            return False
    return True


def _blame(before: OnnxGraph, feeds: Feeds, old: Tensors) -> ToolchainFailed:
    """Find the first pass after which the outputs differ."""
    hint = "this is a defect of cnncc: please report it with the model; nothing was built"

    def failed(count: int) -> bool:
        graph = run_passes(before, PASSES[:count])
        exact = all(each.exact for each in PASSES[:count])
        return _judge(before, graph, feeds, old, Reference(graph).run(feeds), exact) is None

    culprit = first_failure(len(PASSES), failed)
    name = PASSES[culprit - 1].name
    return ToolchainFailed(
        f"graph pass '{name}' changed what the model computes",
        where=[f"pass {culprit} of {len(PASSES)}: {name}"],
        hint=hint,
    )


def first_failure(count: int, failed: Callable[[int], bool]) -> int:
    """Return the smallest n in 1…count for which ``failed(n)`` holds, given that it holds for count (bisection)."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if failed(middle) else (middle, high)
    return high


def run_passes(graph: OnnxGraph, passes: Sequence[GraphPass]) -> OnnxGraph:
    """Run passes over one draft."""
    draft = Draft.of(graph)
    for each in passes:
        each.change(draft)
    return draft.close()


def summary(report: CleanReport) -> dict[str, int]:
    """Return pass → changes, over all its runs."""
    total: Counter[str] = Counter()
    for record in report.passes:
        total[record.name] += record.changes
    return dict(total)
