"""How far TensorRT is while it builds. Its classes are made when it is imported."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cnncc.targets.base import Progress, budget_spent


def monitor_of(trt: Any, progress: Progress, budget: float | None = None) -> Any:
    """Return a monitor that tells how far a build is.

    Its ``failure`` is why it stops the build: what ``progress`` raised, or that the budget is spent. The builder asks
    after each step, and some steps take long.

    Args:
        trt: The library's module.
        progress: Told of it.
        budget: Seconds from now on; None for no end.
    """
    start = time.monotonic()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.failure: BaseException | None = None
            self._phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            self._tell(phase_name)
            return self.failure is None  # False asks the builder to stop

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

        def _tell(self, phase: str) -> None:
            if self.failure is not None:
                return
            try:
                progress(f"build: {phase[:1].lower()}{phase[1:]}", self._phases.fraction)
            except BaseException as exc:  # an exception cannot pass through the builder's own code
                self.failure = exc
                return
            if budget is not None and time.monotonic() > start + budget:
                self.failure = budget_spent(budget)

    return Monitor()


class Phases:
    """Nested phases of a build, each of a number of steps; a phase inside another is a part of its current step."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase."""
        self._phases[name] = _Phase(parent if parent in self._phases else None, max(steps, 1))

    def step(self, name: str, step: int) -> None:
        """Note that a step, counted from 0, is done."""
        if phase := self._phases.get(name):
            phase.done = min(step + 1, phase.steps)

    def finish(self, name: str) -> None:
        """End a phase."""
        self._phases.pop(name, None)

    @property
    def fraction(self) -> float:
        """How far the outermost phase is, 0 to 1."""
        outermost = next((name for name, phase in self._phases.items() if phase.parent is None), None)
        return 0.0 if outermost is None else self._fraction(outermost)

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        inner = [self._fraction(other) for other, each in self._phases.items() if each.parent == name]
        return min((phase.done + max(inner, default=0.0)) / phase.steps, 1.0)


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
