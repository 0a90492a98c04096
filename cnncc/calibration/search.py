"""Mixed precision: the fewest layers that must stay in float to meet a budget of accuracy or noise.

Greedy and anytime. First each layer is measured: how much noise goes when it alone stays in float (the ranking of
Wu et al., *Integer Quantization for Deep Learning Inference*, arXiv 2004.09602, section 5.1, by SQNR). Then the
smallest number of layers, taken in that order, that meets the budget is found by doubling and bisecting; last, layers
that the budget can do without are given back. What was measured is kept in a file, so that a search that was cut
short goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc.calibration.accuracy import Accuracy
from cnncc.calibration.observe import Progress
from cnncc_runtime.digests import digest_json
from cnncc_runtime.errors import BudgetExceeded
from cnncc_runtime.files import atomic_file, storage_errors

MOST_GIVEN_BACK = 16
"""Layers at most that are tried to be given back, those that gain least first: each costs a measurement."""


@dataclass(frozen=True)
class Budget:
    """What a quantized model must reach; None where nothing is asked.

    Attributes:
        drop: Accuracy that may be lost, in points, on validation data.
        sqnr_db: Least SQNR of the outputs.
    """

    drop: float | None = None
    sqnr_db: float | None = None

    def missed(self, reached: Accuracy, model: Accuracy) -> float:
        """Return by how much the budget is missed: negative or zero when it is met."""
        by_drop = model.value - reached.value - self.drop if self.drop is not None else -math.inf
        by_noise = self.sqnr_db - reached.sqnr_db if self.sqnr_db is not None else -math.inf
        return max(by_drop, by_noise)


class Measured:
    """Measurements by the set of layers that stay in float, kept in a file.

    Args:
        path: The file; its name must tell apart whatever changes a measurement. None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, object] = {}
        if path is not None and path.is_file():
            try:
                self._known = dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError, RecursionError, OSError):
                self._known = {}  # damaged: measured again

    def of(self, kind: str, floats: Collection[str], count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Return the numbers known of a set of layers, so many of this kind, measured now where they are not."""
        key = f"{kind} {digest_json(sorted(floats))}"
        found = self._known.get(key)
        if not isinstance(found, list) or [isinstance(value, int | float) for value in found] != [True] * count:
            found = self._known[key] = measure()
            self._save()
        return found

    def _save(self) -> None:
        if self._path is not None:
            with storage_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as partial:
                partial.write_text(json.dumps(self._known))

    def forget(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        floats: Layers (nodes) that stay in float, those that gain most first.
        reached: By the model with these in float.
        gains: Layer → dB of SQNR that keeping it alone in float gains.
    """

    floats: tuple[str, ...]
    reached: Accuracy
    gains: dict[str, float]


def search(
    layers: Sequence[str],
    budget: Budget,
    *,
    model: Accuracy,
    sqnr: Callable[[Collection[str]], float],
    measure: Callable[[Collection[str]], Accuracy],
    known: Measured,
    progress: Progress = lambda what, fraction: None,
) -> Found:
    """Find the fewest layers to keep in float.

    Args:
        layers: Nodes that can be quantized.
        budget: What must be met.
        model: What the float model reaches.
        sqnr: Output SQNR on a few samples with these layers in float, dB: cheap, for the ranking.
        measure: What is reached on validation data with these layers in float.
        known: Where measurements are kept.
        progress: Told how far the search is.

    Raises:
        BudgetExceeded: Not even the model with every layer in float meets the budget.
    """

    def reached(floats: Sequence[str]) -> Accuracy:
        def now() -> list[float]:
            found = measure(floats)
            return [found.value, found.sqnr_db, float(found.samples)]

        value, noise, samples = known.of("accuracy", floats, 3, now)
        return Accuracy(model.metric, value, noise, int(samples))

    def met(floats: Sequence[str]) -> bool:
        return budget.missed(reached(floats), model) <= 0.0

    if met(()):
        return Found((), reached(()), {})
    base = known.of("sqnr", (), 1, lambda: [sqnr(())])[0]
    gains = {}
    for number, layer in enumerate(layers):
        progress(f"measuring layer {number + 1} of {len(layers)}", 0.8 * number / len(layers))
        gains[layer] = known.of("sqnr", (layer,), 1, lambda layer=layer: [sqnr((layer,))])[0] - base  # type: ignore[misc]
    ranked = sorted(layers, key=lambda layer: -gains[layer])
    count = _fewest(len(ranked), lambda count: met(ranked[:count]), progress)
    if count is None:
        best = reached(ranked)
        raise BudgetExceeded(
            f"no choice of layers meets the budget: with every layer in float the model reaches "
            f"{best.metric or 'an output'} {best.value:.2f} %, {best.sqnr_db:.1f} dB",
            hint="the budget asks for more than the float model gives: raise --max-accuracy-drop or lower --min-sqnr",
        )
    floats = ranked[:count]
    for number, layer in enumerate(reversed(ranked[: count - 1][-MOST_GIVEN_BACK:])):
        progress(f"trying int8 again for layer {number + 1}", 0.95)
        without = [each for each in floats if each != layer]
        if met(without):
            floats = without
    return Found(tuple(floats), reached(floats), gains)


def _fewest(most: int, met: Callable[[int], bool], progress: Progress) -> int | None:
    """Return the smallest count that meets the budget, by doubling and bisecting; None where none does."""
    high = 1
    while not met(high):
        if high == most:
            return None
        high = min(2 * high, most)
        progress(f"trying {high} layers in float", 0.85)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        progress(f"trying {middle} layers in float", 0.9)
        low, high = (low, middle) if met(middle) else (middle, high)
    return high
