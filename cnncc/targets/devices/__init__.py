"""Device profiles: which processor an engine is built for.

``host`` is this machine; GPUs go by their names (`cnncc.targets.devices.gpus`). ``mtriple``, ``mcpu`` and ``mattr``
override parts of a CPU's profile, as LLVM's own tools take them; LLVM itself would only warn about a name that it does
not know, so every name is checked here first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

from cnncc.targets.base import Profile
from cnncc.targets.devices import llvm_lists
from cnncc.targets.devices.gpus import GPUS, gpu_profile
from cnncc.targets.devices.isa import ISAS, Isa, isa_of, isa_of_machine
from cnncc_runtime import cpu
from cnncc_runtime.errors import TargetUnavailable, UsageError

NATIVE = "native"
"""CPU of the host's profile until something is built: see `named`."""

HOST = "host"


def host_machine() -> str:
    """Return this computer's machine as ELF files name it."""
    return cpu.host_machine()


def machine_name(triple: str) -> str:
    """Return the ELF machine of a triple.

    Raises:
        UsageError: Engines are not built for it.
    """
    return _isa(triple).machine


def profile_names() -> tuple[str, ...]:
    """Return the names that `resolve_profile` takes."""
    return (HOST, *GPUS)


def resolve_profile(
    name: str = HOST,
    mtriple: str | None = None,
    mcpu: str | None = None,
    mattr: Iterable[str] = (),
) -> Profile:
    """Return the profile of a device, with overrides.

    Args:
        name: A device's name; ``host`` is this machine, whichever of its processors the target is for.
        mtriple: LLVM target triple (``aarch64-linux-gnu``).
        mcpu: LLVM CPU name (``cortex-a76``); ``native`` is this machine's.
        mattr: LLVM features, each with ``+`` or ``-`` (``+dotprod``); without a sign it is added.

    Returns:
        The profile; its features are all that an engine may execute, those of the CPU included.

    Raises:
        UsageError: An unknown device, triple, CPU or feature; near matches are suggested.
        TargetUnavailable: LLVM is needed to check a name, and is not here.
    """
    if name not in profile_names():
        raise _unknown("device", name, profile_names())
    changes = tuple(mattr)
    if name in GPUS:
        if mtriple or mcpu or changes:
            raise UsageError(f"--mtriple, --mcpu and --mattr are for CPUs; '{name}' is a GPU", hint="leave them out")
        return gpu_profile(name)
    host = _host_profile()
    if not (mtriple or mcpu or changes):
        return host
    host = named(host)
    isa = _isa(mtriple) if mtriple else _isa(host.triple)
    foreign = isa.machine != machine_name(host.triple)
    if mcpu == NATIVE:
        if foreign:
            raise UsageError(f"'{NATIVE}' is no CPU of {isa.machine}", hint="name the CPU, as in --mcpu cortex-a76")
        mcpu = None
    triple = mtriple or host.triple
    if mcpu is None and not foreign:
        features = frozenset(host.features)
        base = replace(host, triple=triple)
    else:
        chosen = mcpu or isa.cpu
        _check_cpu(chosen, triple)
        features = llvm_lists.features_of(triple, chosen) & frozenset(isa.features)
        base = Profile(HOST if not foreign else name, triple, chosen, (), host.cores)
    changed = _apply(features, changes, isa, triple, base.cpu)
    return replace(base, name=f"{machine_name(triple)}/{base.cpu}", features=tuple(sorted(changed)))


def named(profile: Profile) -> Profile:
    """Return the profile with LLVM's name of this machine's CPU in place of `NATIVE`."""
    if profile.cpu != NATIVE:
        return profile
    return replace(profile, cpu=llvm_lists.host_cpu_name() or _isa(profile.triple).cpu)


def _host_profile() -> Profile:
    """Describe this machine, with only the features that it really offers, by the kernel's word alone.

    A virtual machine may hide features that its CPU's name implies. That name takes LLVM, which takes seconds to load;
    it is looked up when something is built.
    """
    found = cpu.host_cpu()
    isa = isa_of_machine(found.machine)
    if isa is None:
        raise TargetUnavailable(
            f"engines are not built for {found.machine}, this machine's architecture",
            hint=f"cross-compile with --mtriple; known: {', '.join(isa.triple for isa in ISAS)}",
        )
    features = tuple(sorted(found.features & frozenset(isa.features)))
    return Profile(HOST, isa.triple, NATIVE, features, found.cores)


def _isa(triple: str) -> Isa:
    isa = isa_of(triple)
    if isa is None:
        raise _unknown("target triple", triple, [isa.triple for isa in ISAS])
    if "linux" not in triple:
        raise UsageError(
            f"engines are built for Linux; the triple '{triple}' is not",
            hint=f"take {isa.triple}",
        )
    return isa


def _check_cpu(name: str, triple: str) -> None:
    known = llvm_lists.cpus_of(triple)
    if name not in known:
        raise _unknown(f"CPU of {machine_name(triple)}", name, known)


def _apply(features: frozenset[str], changes: Iterable[str], isa: Isa, triple: str, cpu_name: str) -> frozenset[str]:
    for change in changes:
        feature = change.lstrip("+-")
        if feature not in isa.features:
            raise _unknown(f"feature of {isa.machine}", feature, isa.features)
        features = features - {feature} if change.startswith("-") else features | {feature}
    if wanted := [change if change[0] in "+-" else f"+{change}" for change in changes]:
        return llvm_lists.closure(triple, cpu_name, features, tuple(wanted)) & frozenset(isa.features)
    return features


def _unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 4, 0.5)
    shown = near or names[:12]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(shown)}"
    return UsageError(f"unknown {kind} '{name}'", hint=hint)


__all__ = ["HOST", "NATIVE", "host_machine", "machine_name", "named", "profile_names", "resolve_profile"]
