"""What LLVM knows of processors. It is asked only for names that it has, since it answers others by warnings."""

from __future__ import annotations

import functools
from typing import Any

from cnncc.targets.base import Profile
from cnncc.targets.devices.isa import isa_of
from cnncc_runtime.errors import TargetUnavailable


@functools.cache
def host_cpu_name() -> str:
    """Return LLVM's name of this machine's CPU; empty where LLVM is not here."""
    try:
        return str(_codegen().llvm_get_system_cpu())
    except TargetUnavailable:
        return ""


@functools.cache
def cpus_of(triple: str) -> frozenset[str]:
    """Return the CPU names of a triple's architecture.

    Raises:
        TargetUnavailable: LLVM is not here.
    """
    codegen = _codegen()
    return frozenset(str(name) for name in codegen.llvm_get_cpu_archlist(_target(triple)))


@functools.cache
def features_of(triple: str, cpu: str, changes: tuple[str, ...] = ()) -> frozenset[str]:
    """Return every feature that LLVM turns on for a CPU.

    Args:
        triple: A known triple.
        cpu: A CPU of it.
        changes: Known features with their sign.

    Raises:
        TargetUnavailable: LLVM is not here.
    """
    codegen = _codegen()
    return frozenset(str(name) for name in codegen.llvm_get_cpu_features(_target(triple, cpu, changes)))


def attributes(profile: Profile) -> tuple[str, ...]:
    """Return the changes to a CPU's features that leave exactly the profile's.

    What the profile has is turned on, and what the CPU's name implies but the profile lacks (hidden by a virtual
    machine, or taken away by the user) is turned off.

    Raises:
        TargetUnavailable: LLVM is not here.
    """
    isa = isa_of(profile.triple)
    relevant = frozenset(isa.features) if isa else frozenset()
    implied = features_of(profile.triple, profile.cpu) & relevant
    lacked = sorted(implied - frozenset(profile.features))
    return (*(f"+{feature}" for feature in profile.features), *(f"-{feature}" for feature in lacked))


def closure(triple: str, cpu: str, features: frozenset[str], changes: tuple[str, ...]) -> frozenset[str]:
    """Return the features once those that others imply are there, and those that need a missing one are not.

    Raises:
        TargetUnavailable: LLVM is not here.
    """
    implied = features_of(triple, cpu)
    signs = [*(f"-{name}" for name in sorted(implied - features) if f"-{name}" in changes), *changes]
    return (features_of(triple, cpu, tuple(signs)) & (features | _added(changes, implied, triple, cpu))) - {
        change[1:] for change in changes if change.startswith("-")
    }


def _added(changes: tuple[str, ...], implied: frozenset[str], triple: str, cpu: str) -> frozenset[str]:
    added = tuple(change for change in changes if change.startswith("+"))
    return features_of(triple, cpu, added) - implied if added else frozenset()


def _target(triple: str, cpu: str = "", changes: tuple[str, ...] = ()) -> Any:
    from tvm.target import Target

    options: dict[str, Any] = {"kind": "llvm", "mtriple": triple}
    if cpu:
        options["mcpu"] = cpu
    if changes:
        options["mattr"] = list(changes)
    return Target(options)


def _codegen() -> Any:
    try:
        from tvm.target import codegen
    except Exception as exc:  # a broken installation raises OSError, ImportError, RuntimeError or what it likes
        raise TargetUnavailable("LLVM is needed to know the processor, and it comes with apache-tvm",
                                hint="pip install cnncc") from exc  # fmt: skip
    return codegen
