"""The kernel database: which knobs were fastest, where they were measured, and against what.

One JSON file, a line for each convolution, sorted, so that it can be reviewed and merged like source. Measurements hold
for one instruction set, number of cores, TVM version and version of our kernels; those of others stay in the file and
are not used. Files come from other machines: everything is checked, and knobs once more against the shape they are for
(`knobs`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from cnncc.targets.base import Profile
from cnncc.targets.devices import machine_name
from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.rules import ConvShape
from cnncc_runtime.digests import digest_file, digest_json
from cnncc_runtime.errors import DataRefused

SCHEMA = "cnncc.kernel-database/1"

_KERNEL_SOURCES = (
    "schedule/*.py",
    "blocked/convolution.py",
    "blocked/geometry.py",
    "blocked/transforms.py",
    "blocked/window.py",
    "blocked/winograd.py",
    "codegen.py",
    "machine.py",
    "stack.py",
    "threads/pool.c",
    "threads/regions.py",
    "tiling.py",
)
"""What decides how fast a kernel with given knobs is."""

_VECTOR_FEATURES = frozenset({"avx", "avx2", "avx512f", "avx512vl", "fma", "neon", "sve", "v"})
"""Features that fp32 kernels depend on. Others may differ between the device and a machine that builds for it."""

_MOST_BYTES = 64 << 20

Seconds = Annotated[float, msgspec.Meta(gt=0, lt=3600)]
Knobs = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)], ...], msgspec.Meta(max_length=16)]
Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what the file holds."""


class Timed(Record, frozen=True):
    """Knobs and how long a call took.

    Attributes:
        knobs: As the plans' ``numbers``.
        seconds: A call; the median.
    """

    knobs: Knobs
    seconds: Seconds


class MethodTimes(Record, frozen=True):
    """One way to compute a convolution.

    Attributes:
        method: One of `knobs.METHODS`.
        rule: What the rule chose.
        best: The fastest; the rule's own unless another was faster beyond doubt.
    """

    method: Literal["direct", "depthwise", "winograd-2", "winograd-4"]
    rule: Timed
    best: Timed


class Measurement(Record, frozen=True):
    """A convolution that was measured.

    Attributes:
        shape: The convolution.
        methods: Ways to compute it, by name.
    """

    shape: ConvShape
    methods: tuple[MethodTimes, ...]

    def method(self, name: str) -> MethodTimes | None:
        """Return the times of a method, or None where it was not measured."""
        return next((times for times in self.methods if times.method == name), None)


class Conditions(Record, frozen=True, order=True):
    """What measurements hold for.

    Attributes:
        architecture: As ELF files name it.
        cpu: LLVM's name.
        features: Vector extensions, sorted.
        cores: That shared the work.
        lanes: fp32 values in a vector register.
        block: Channels side by side.
        registers: Vector registers.
        l1: Bytes of first-level cache that kernels plan with.
        l2: Bytes of second-level cache that kernels plan with.
        tvm: Version.
        kernels: Digest of the source of our kernels.
    """

    architecture: str
    cpu: str
    features: tuple[str, ...]
    cores: Size
    lanes: Size
    block: Size
    registers: Size
    l1: Size
    l2: Size
    tvm: str
    kernels: str

    @staticmethod
    def of(profile: Profile, machine: Machine) -> Conditions:
        """Return what measurements on a machine hold for, made by this version."""
        return Conditions(
            machine_name(profile.triple), profile.cpu, tuple(sorted(_VECTOR_FEATURES & set(profile.features))),
            machine.cores, machine.lanes, machine.block, machine.registers, machine.l1, machine.l2,
            version("apache-tvm"), kernel_digest(),
        )  # fmt: skip

    def is_older(self, other: Conditions) -> bool:
        """Whether these are the same machine's, but another compiler's or of other kernels."""
        return self != other and msgspec.structs.replace(self, tvm=other.tvm, kernels=other.kernels) == other


class Section(Record, frozen=True):
    """Measurements of one machine and version."""

    conditions: Conditions
    convolutions: tuple[Measurement, ...]


class _Document(Record, frozen=True):
    schema: Literal["cnncc.kernel-database/1"]
    sections: tuple[Section, ...]


class KernelDatabase:
    """Measurements by conditions and shape.

    Args:
        sections: At most one for the same conditions.
    """

    def __init__(self, sections: Iterable[Section] = ()) -> None:
        self._sections = {
            section.conditions: {measurement.shape: measurement for measurement in section.convolutions}
            for section in sections
        }

    @staticmethod
    def parse(text: bytes, name: str) -> KernelDatabase:
        """Read a database.

        Args:
            text: The file's content.
            name: What errors call the file.

        Raises:
            DataRefused: It is no kernel database of this schema, or says something twice.
        """
        if len(text) > _MOST_BYTES:
            raise _refusal(name, f"it is larger than {_MOST_BYTES >> 20} MB")
        try:
            document = msgspec.json.decode(text, type=_Document)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
            raise _refusal(name, str(exc)) from exc
        database = KernelDatabase(document.sections)
        if database._counts() != _counts_in(document.sections):
            raise _refusal(name, "it lists a convolution twice")
        return database

    def text(self) -> bytes:
        """Return the file's content: a line for each convolution, sorted; equal data, equal bytes."""
        sections = ",\n".join(
            f'{{"conditions":{_line(conditions)},"convolutions":[\n'
            + ",\n".join(sorted(_line(measurement) for measurement in found.values()))
            + "\n]}"
            for conditions, found in sorted(self._sections.items(), key=lambda item: item[0])
        )
        return f'{{"schema":"{SCHEMA}","sections":[\n{sections}\n]}}\n'.encode()

    def of(self, conditions: Conditions) -> dict[ConvShape, Measurement]:
        """Return the measurements that hold under some conditions."""
        return dict(self._sections.get(conditions, {}))

    def older(self, conditions: Conditions) -> int:
        """Return how many measurements of the same machine were made with another TVM or other kernels."""
        return sum(len(found) for held, found in self._sections.items() if held.is_older(conditions))

    def machines(self) -> list[str]:
        """Return which processors were measured, for people."""
        return sorted({f"{held.cpu}, {held.cores} core{'s' * (held.cores > 1)}" for held in self._sections})

    def put(self, conditions: Conditions, measurement: Measurement) -> None:
        """Add a measurement; one of the same shape and conditions is replaced."""
        self._sections.setdefault(conditions, {})[measurement.shape] = measurement

    def _counts(self) -> list[int]:
        return sorted(len(found) for found in self._sections.values())


def _counts_in(sections: Iterable[Section]) -> list[int]:
    return sorted(len(section.convolutions) for section in sections)


def _line(record: Record) -> str:
    plain = msgspec.to_builtins(record)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refusal(name: str, why: str) -> DataRefused:
    return DataRefused(
        f"{name} is not a kernel database: {why}",
        hint="give a file that `cnncc compile --optimize measured --kernel-database FILE` wrote, or a new name",
    )


@functools.cache
def kernel_digest() -> str:
    """Return the digest of the source that decides how fast a kernel with given knobs is."""
    root = Path(__file__).parent
    files = sorted(path for pattern in _KERNEL_SOURCES for path in root.glob(pattern))
    return digest_json([[str(path.relative_to(root)), digest_file(path)] for path in files])


__all__ = ["SCHEMA", "Conditions", "KernelDatabase", "Measurement", "MethodTimes", "Section", "Timed"]
