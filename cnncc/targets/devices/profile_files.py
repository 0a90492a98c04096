"""Devices as data: a TOML file each, ours in ``profiles/``, users' wherever they keep them.

Reading a file asks LLVM nothing, so that listing devices is quick; `check` asks it, before something is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import platformdirs

from cnncc.targets.base import Profile
from cnncc.targets.devices import llvm_lists
from cnncc.targets.devices.isa import isa_of_triple
from cnncc.targets.devices.names import unknown
from cnncc_runtime.errors import UsageError

OURS = Path(__file__).with_name("profiles")
FOLDER_VARIABLE = "CNNCC_DEVICES"
"""Environment variable that names the folder of a user's files."""

SUFFIX = ".toml"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Emulator:
    """What runs a device's engines where the device is not.

    Attributes:
        binary: Of qemu: ``qemu-aarch64``.
        cpu: Its ``-cpu``, which has no feature that the device lacks, wherever qemu knows such a one.
    """

    binary: str
    cpu: str


@dataclass(frozen=True)
class Device:
    """A device as its file describes it.

    Attributes:
        profile: What engines for it are made of.
        description: A line for people.
        glibc: The oldest C library that it may have.
        memory: MiB; 0 where the file does not say.
        emulator: What emulates it; None where nothing does.
        file: Where it was read.
    """

    profile: Profile
    description: str
    glibc: str
    memory: int
    emulator: Emulator | None
    file: Path


_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\n]*$")]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class _Emulator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    binary: Annotated[str, msgspec.Meta(pattern=r"^qemu-[a-z0-9_]+$")]
    cpu: _Text


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    description: _Text
    triple: _Text
    cpu: _Text
    features: list[str]
    cores: _Count
    glibc: Annotated[str, msgspec.Meta(pattern=r"^2\.\d+$")]
    memory: _Count = 0
    qemu: _Emulator | None = None


FIELDS = tuple(field.name for field in msgspec.structs.fields(_File))


def read_device(path: Path) -> Device:
    """Read a device's file.

    Args:
        path: ``NAME.toml``.

    Raises:
        UsageError: Not such a file; says which field, and what is wrong with it.
    """
    if not _NAME.fullmatch(path.stem) or path.suffix != SUFFIX:
        raise UsageError(
            f"'{path.name}' is no name of a device's file",
            where=[str(path)],
            hint="NAME.toml, NAME of small letters, digits, '.', '_' and '-'",
        )
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=_File)
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}", hint="check the path") from exc
    except ValueError as exc:  # tomllib's and msgspec's errors
        raise UsageError(f"{path.name} is no device: {exc}", where=[str(path)], hint=_FORM) from exc
    isa = isa_of_triple(found.triple, f"{path}: triple")
    for feature in found.features:
        if feature not in isa.features:
            raise unknown(f"feature of {isa.machine}", feature, isa.features, f"{path}: features")
    features = tuple(sorted(set(found.features)))
    emulator = Emulator(found.qemu.binary, found.qemu.cpu) if found.qemu else None
    profile = Profile(path.stem, found.triple, found.cpu, features, found.cores)
    return Device(profile, found.description, found.glibc, found.memory, emulator, path)


_FORM = f"its fields are {', '.join(FIELDS)}; `cnncc targets` shows those of known devices"


def check(device: Device) -> None:
    """Hold a device's CPU and features against LLVM's.

    Raises:
        UsageError: LLVM does not know the CPU, or would use features that the file does not list: nothing would keep
            such an engine from a device that lacks them.
        TargetUnavailable: LLVM is not here.
    """
    profile, where = device.profile, str(device.file)
    isa = isa_of_triple(profile.triple, where)
    known = llvm_lists.cpus_of(profile.triple)
    if profile.cpu not in known:
        raise unknown(f"CPU of {isa.machine}", profile.cpu, known, f"{where}: cpu")
    # What is taken away comes first, so that what is added brings back all that it implies.
    changes = sorted(llvm_lists.attributes(profile), key=lambda change: change.startswith("+"))
    used = llvm_lists.features_of(profile.triple, profile.cpu, tuple(changes)) & frozenset(isa.features)
    if implied := sorted(used - frozenset(profile.features)):
        raise UsageError(
            f"the features of {device.file.name} imply {', '.join(implied)}",
            where=[f"{where}: features"],
            hint="list those, too: a device is refused what it lacks by this list",
        )


@cache
def our_devices() -> Mapping[str, Device]:
    """Return the devices that cnncc knows, by name."""
    return {path.stem: read_device(path) for path in sorted(OURS.glob(f"*{SUFFIX}"))}


def user_files(others: frozenset[str]) -> Mapping[str, Path]:
    """Return the files in the user's folder by their device's name, unread.

    Args:
        others: Names of other devices.

    Raises:
        UsageError: A file has a name that is taken, or ``$CNNCC_DEVICES`` is no folder.
    """
    named = os.environ.get(FOLDER_VARIABLE, "")
    folder = Path(named) if named else Path(platformdirs.user_config_dir("cnncc")) / "devices"
    if named and not folder.is_dir():
        raise UsageError(f"{FOLDER_VARIABLE} is '{named}', which is no folder", hint="name one with NAME.toml files")
    files = {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    for name, path in files.items():
        if name in others:
            raise taken(path)
    return files


def taken(path: Path) -> UsageError:
    """Return the error of a file that has another device's name."""
    return UsageError(f"there is a device '{path.stem}' already", where=[str(path)], hint="give the file another name")
