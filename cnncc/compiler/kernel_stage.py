"""The stage that measures kernels, or looks them up in a database, before an engine is built.

The database is a file that travels: measured on a device, it serves builds elsewhere. Whatever the target's format is,
this stage only reads it, hands it over, and puts its new content in place, whole, whenever a kernel has been measured:
an interrupted measurement keeps what is finished. What the build takes of it is the stage's result, so that builds are
functions of their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnncc.compiler.build_worker import measure_apart
from cnncc.compiler.cache import Cache
from cnncc.compiler.graph_stages import CLEANED
from cnncc.compiler.reporting import Reporter
from cnncc.compiler.stage import Stage
from cnncc.targets.base import BuildOptions, Measured, MeasureOptions, Measuring, Target
from cnncc.targets.devices import machine_name
from cnncc_runtime.bundle import TargetRecord
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import DataRefused, UsageError
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.session import engine_mismatch

KERNELS = "kernels.json"
"""The stage's file, and the database's name in the cache folder."""

RULES, MEASURED = "rules", "measured"
LEVELS = (RULES, MEASURED)
BUDGET = 60.0
"""Seconds that measuring may take by default."""


@dataclass(frozen=True)
class Optimize:
    """How knobs of kernels are found.

    Attributes:
        level: ``rules``: from shapes and the machine alone; ``measured``: by timing the rules' choice and its
            neighbours on this machine, too.
        budget: Seconds that measuring may take.
        database: The kernel database; by default the one in the cache folder, for ``measured``, and none for ``rules``.
    """

    level: str = RULES
    budget: float = BUDGET
    database: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything but the rules has a say."""
        return self.level == MEASURED or self.database is not None


def check_optimize(optimize: Optimize, target: Target) -> None:
    """Refuse what cannot be measured, before any work is done.

    Raises:
        UsageError: This machine cannot run the target's kernels, or they have no knobs.
        DataRefused: The database is not there, and nothing is to be measured.
    """
    if not optimize.wanted:
        return
    if not isinstance(target, Measuring):
        raise UsageError(f"the kernels of the {target.name} target have no knobs to measure", hint="--optimize rules")
    if optimize.level == RULES:
        if optimize.database is not None and not optimize.database.is_file():
            raise DataRefused(
                f"there is no kernel database {optimize.database}",
                hint="make one on the device: cnncc compile MODEL --optimize measured --kernel-database FILE",
            )
        return
    profile = target.profile
    record = TargetRecord(
        target.name, profile.name, profile.triple, profile.cpu, machine_name(profile.triple), profile.features
    )
    if mismatch := engine_mismatch(record):
        raise UsageError(
            f"kernels of another machine cannot be measured here: {mismatch.message}",
            hint="measure on the device with --optimize measured --kernel-database FILE, then build here with "
            "--kernel-database FILE alone",
        )


def kernel_stage(
    key: str, clean: Stage, target: Target, optimize: Optimize, options: BuildOptions, cache: Cache, reporter: Reporter
) -> Stage:
    """Return the stage whose file `KERNELS` is what a build takes as ``measured``; empty where nothing is known.

    A cached result is not used where kernels are left to measure, or where the database has changed since.

    Args:
        key: Digest of all that determines the engine, but the database.
        clean: Holds the graph.
        target: The target.
        optimize: What was asked for.
        options: What the build will be asked for.
        cache: Where the result is kept.
        reporter: Told of it.

    Raises:
        StorageFailed: The database cannot be read or written.
    """
    path = optimize.database or cache.folder / KERNELS
    before = _read(path)

    def compute(folder: Path) -> tuple[dict[str, Any], dict[str, Path], str]:
        kept = [before]

        def keep(text: str) -> None:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:
                partial.write_text(text, encoding="utf-8")
            kept.append(text)

        budget = optimize.budget if optimize.level == MEASURED else None
        asked = MeasureOptions(replace(options, measured=""), before, str(path), budget, keep, reporter.note)
        found = measure_apart(target.name, clean.file(CLEANED), asked, folder)
        if found.left and budget is not None:
            reporter.note(
                f"the budget of {budget:g} s ended before {found.left} of {found.left + found.measured + found.reused} "
                "convolutions were measured; the rules choose those. Compile again to go on"
            )
        (folder / KERNELS).write_text(found.plans, encoding="utf-8")
        value = {"database": _digest(kept[-1]), "left": found.left if budget is not None else 0}
        return value, {KERNELS: folder / KERNELS}, _summary(found)

    known = cache.get("kernels", key)
    if known is not None and (known.value["left"] or known.value["database"] != _digest(before)):
        cache.forget("kernels", key)
    return Stage("kernels", key, compute, cache, reporter)


def _read(path: Path) -> str:
    try:
        with storage_errors(path):
            return path.read_bytes().decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as exc:
        raise DataRefused(f"{path} is not a kernel database: it is not text", hint="give another file name") from exc


def _digest(text: str) -> str:
    return digest_bytes(text.encode())


def _summary(found: Measured) -> str:
    total = found.measured + found.reused + found.left
    parts = [f"{found.measured} of {total} convolutions measured"]
    parts += [f"{found.reused} known"] if found.reused else []
    parts += [f"{found.left} by rule alone"] if found.left else []
    return f"{', '.join(parts)}; {found.faster} faster than the rule's choice"
