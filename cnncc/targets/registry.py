"""The table of targets: loaded only when one is asked for."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from cnncc.targets.base import Profile, Target
from cnncc_runtime.errors import DependencyMissing, UsageError

TARGETS = {
    "cuda": "cnncc.targets.cuda.target:CudaTarget",
    "llvm": "cnncc.targets.llvm.target:LlvmTarget",
}
"""Name → ``module:Class``; the class takes a profile."""

GROUP = "cnncc.targets"
"""Entry-point group by which other packages add targets."""


def target_table() -> dict[str, str]:
    """Return name → ``module:Class`` of every target, those of other packages included.

    Raises:
        UsageError: Two packages offer a target by the same name.
    """
    table = dict(TARGETS)
    for point in entry_points(group=GROUP):
        if table.setdefault(point.name, point.value) != point.value:
            raise UsageError(
                f"the target '{point.name}' is offered by '{table[point.name]}' and by '{point.value}'",
                hint="uninstall one of the two packages",
            )
    return table


def target_names() -> tuple[str, ...]:
    """Return the names that ``--target`` takes."""
    return tuple(sorted(target_table()))


def load_target(name: str, profile: Profile) -> Target:
    """Return a target for a device.

    Raises:
        UsageError: No target has this name; near ones are suggested.
        DependencyMissing: Its module cannot be imported.
    """
    table = target_table()
    if name not in table:
        near = difflib.get_close_matches(name, table, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(table))}"
        raise UsageError(f"unknown target '{name}'", hint=hint)
    module, _, attribute = table[name].partition(":")
    try:
        loaded: Target = getattr(importlib.import_module(module), attribute)(profile)
    except (ImportError, AttributeError) as exc:
        raise DependencyMissing(
            f"the target '{name}' ({table[name]}) cannot be loaded: {exc}", hint="install the package that offers it"
        ) from exc
    return loaded
