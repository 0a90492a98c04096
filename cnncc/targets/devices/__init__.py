"""Device profiles: which processor an engine is built for.

``host`` is this machine; other CPUs are files (`cnncc.targets.devices.profile_files`), ours and the user's; GPUs go by
their names (`cnncc.targets.devices.gpus`). ``mtriple``, ``mcpu`` and ``mattr`` override parts of a CPU's profile, as
LLVM's own tools take them; LLVM itself would only warn about a name that it does not know, so every name is checked
here first.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cnncc.targets.base import Profile
from cnncc.targets.devices import llvm_lists
from cnncc.targets.devices.gpus import GPUS, gpu_profile
from cnncc.targets.devices.isa import ISAS, Isa, isa_of_machine, isa_of_triple
from cnncc.targets.devices.names import unknown
from cnncc.targets.devices.profile_files import OURS, SUFFIX, Device, check, our_devices, read_device, taken, user_files
from cnncc_runtime import cpu
from cnncc_runtime.errors import TargetUnavailable, UsageError

NATIVE = "native"
"""CPU of the host's profile until something is built: see `named`."""

HOST = "host"
_OTHERS = frozenset({HOST, *GPUS})
"""Devices that no file describes."""


def host_machine() -> str:
    """Return this computer's machine as ELF files name it."""
    return cpu.host_machine()


def machine_name(triple: str) -> str:
    """Return the ELF machine of a triple.

    Raises:
        UsageError: Engines are not built for it.
    """
    return isa_of_triple(triple).machine


def profile_names() -> tuple[str, ...]:
    """Return the names that `resolve_profile` takes, those in the user's folder included.

    Raises:
        UsageError: A file in the user's folder has another device's name.
    """
    return (HOST, *our_devices(), *user_files(_OTHERS | our_devices().keys()), *GPUS)


def file_devices() -> tuple[Device, ...]:
    """Return the devices that files describe, ours and those of the user's folder; LLVM is not asked.

    Raises:
        UsageError: A file in the user's folder is not what it should be.
    """
    files = user_files(_OTHERS | our_devices().keys())
    return (*our_devices().values(), *(read_device(path) for path in files.values()))


def find_device(name: str) -> Device:
    """Return a device that a file describes.

    Args:
        name: One of ours, of the user's folder, or a path that ends in ``.toml``.

    Raises:
        UsageError: No such device; near matches are suggested. Or its file is not what it should be.
    """
    if name.endswith(SUFFIX):
        device = read_device(Path(name))
        if device.profile.name in _OTHERS | our_devices().keys():
            raise taken(device.file)
        return device
    files = user_files(_OTHERS | our_devices().keys())
    if name in our_devices():
        return our_devices()[name]
    if name not in files:
        raise unknown("device", name, profile_names())
    return read_device(files[name])


def oldest_glibc(name: str, *, foreign: bool = False) -> str:
    """Return the oldest C library that a device may have (``2.31``); empty where nobody knows.

    Args:
        name: As `resolve_profile` takes it.
        foreign: Whether another triple is taken than the device's.

    Raises:
        UsageError: An unknown device.
    """
    if foreign or name in GPUS:
        return ""
    if name == HOST:
        library, version = platform.libc_ver()
        return version if library == "glibc" else ""
    return find_device(name).glibc


def resolve_profile(
    name: str = HOST,
    mtriple: str | None = None,
    mcpu: str | None = None,
    mattr: Iterable[str] = (),
) -> Profile:
    """Return the profile of a device, with overrides.

    Args:
        name: A device's name, or its file; ``host`` is this machine, whichever of its processors the target is for.
        mtriple: LLVM target triple (``aarch64-linux-gnu``).
        mcpu: LLVM CPU name (``cortex-a76``); ``native`` is this machine's.
        mattr: LLVM features, each with ``+`` or ``-`` (``+dotprod``); without a sign it is added.

    Returns:
        The profile; its features are all that an engine may execute, those of the CPU included.

    Raises:
        UsageError: An unknown device, triple, CPU or feature; near matches are suggested.
        TargetUnavailable: LLVM is needed to check a name, and is not here.
    """
    changes = tuple(mattr)
    if name in GPUS:
        if mtriple or mcpu or changes:
            raise UsageError(f"--mtriple, --mcpu and --mattr are for CPUs; '{name}' is a GPU", hint="leave them out")
        return gpu_profile(name)
    if name == HOST:
        base = _host_profile()
    else:
        device = find_device(name)
        if device.file.parent != OURS:
            check(device)
        base = device.profile
    if not (mtriple or mcpu or changes):
        return base
    return _overridden(named(base), mtriple, mcpu, changes)


def _overridden(base: Profile, mtriple: str | None, mcpu: str | None, changes: tuple[str, ...]) -> Profile:
    isa = isa_of_triple(mtriple or base.triple)
    foreign = isa.machine != machine_name(base.triple)
    if foreign and base.name != HOST:
        raise UsageError(
            f"{base.name} is no {isa.machine} machine", hint="leave --device or --mtriple out, they name two machines"
        )
    if mcpu == NATIVE:
        if isa.machine != host_machine():
            raise UsageError(f"'{NATIVE}' is no CPU of {isa.machine}", hint="name the CPU, as in --mcpu cortex-a76")
        mcpu = None if base.name == HOST else named(_host_profile()).cpu
    triple = mtriple or base.triple
    if mcpu is None and not foreign:
        cpu_name, features = base.cpu, frozenset(base.features)
    else:
        cpu_name = mcpu or isa.cpu
        features = cpu_features(triple, cpu_name)
    changed = _apply(features, changes, isa, triple, cpu_name)
    return Profile(f"{isa.machine}/{cpu_name}", triple, cpu_name, tuple(sorted(changed)), base.cores)


def cpu_features(triple: str, cpu_name: str) -> frozenset[str]:
    """Return the features that a CPU has, of those that code generation may use.

    Args:
        triple: LLVM target triple.
        cpu_name: LLVM's name of the CPU.

    Raises:
        UsageError: An unknown triple or CPU; near matches are suggested.
        TargetUnavailable: LLVM is needed to check a name, and is not here.
    """
    isa = isa_of_triple(triple)
    known = llvm_lists.cpus_of(triple)
    if cpu_name not in known:
        raise unknown(f"CPU of {isa.machine}", cpu_name, known)
    return llvm_lists.features_of(triple, cpu_name) & frozenset(isa.features)


def named(profile: Profile) -> Profile:
    """Return the profile with LLVM's name of this machine's CPU in place of `NATIVE`."""
    if profile.cpu != NATIVE:
        return profile
    return replace(profile, cpu=llvm_lists.host_cpu_name() or isa_of_triple(profile.triple).cpu)


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


def _apply(features: frozenset[str], changes: Iterable[str], isa: Isa, triple: str, cpu_name: str) -> frozenset[str]:
    for change in changes:
        feature = change.lstrip("+-")
        if feature not in isa.features:
            raise unknown(f"feature of {isa.machine}", feature, isa.features)
        features = features - {feature} if change.startswith("-") else features | {feature}
    if wanted := [change if change[0] in "+-" else f"+{change}" for change in changes]:
        return llvm_lists.closure(triple, cpu_name, features, tuple(wanted)) & frozenset(isa.features)
    return features


__all__ = [
    "HOST",
    "NATIVE",
    "Device",
    "cpu_features",
    "file_devices",
    "find_device",
    "host_machine",
    "machine_name",
    "named",
    "profile_names",
    "resolve_profile",
]
