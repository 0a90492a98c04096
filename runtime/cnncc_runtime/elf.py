"""Reads as much of an ELF file as it takes to know which machine it is for and that it is whole.

The loader (``dlopen``) says "cannot open shared object file" for a wrong machine and dies by SIGBUS on a truncated
file, so both are found out here first. Nothing that the file says is trusted: every offset is checked.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cnncc_runtime.errors import BundleRefused

_MACHINES = {3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 40: "arm", 62: "x86_64", 183: "aarch64", 258: "loongarch"}
_RISCV = 243  # its word size is in the class, not in the machine
_KINDS = {1: "relocatable", 2: "executable", 3: "shared", 4: "core"}

_PT_LOAD, _PT_DYNAMIC = 1, 2
_PF_X, _PF_W = 1, 2
_SHT_NOBITS = 8
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 0, 1, 5, 10
_MAX_DYNAMIC = 1 << 20
_MAX_STRINGS = 64 << 20
_MAX_NEEDED = 4096


@dataclass(frozen=True)
class Segment:
    """A part of the file that the loader maps (``PT_LOAD``).

    Attributes:
        offset: Where it begins in the file.
        address: Where it is mapped, relative to the base.
        size: Bytes in the file.
        writable: Mapped writable (then it holds relocated data).
        executable: Holds code.
    """

    offset: int
    address: int
    size: int
    writable: bool
    executable: bool


@dataclass(frozen=True)
class Elf:
    """What an ELF file says of itself.

    Attributes:
        bits: 32 or 64.
        little: Little-endian.
        machine: ``x86_64``, ``aarch64``, ``arm``, ``riscv64``, …, or ``machine-<number>``.
        kind: ``shared``, ``executable``, ``relocatable``, ``core``, or ``type-<number>``.
        segments: What is mapped.
        needed: Libraries that it links against (``DT_NEEDED``).
    """

    bits: int
    little: bool
    machine: str
    kind: str
    segments: tuple[Segment, ...]
    needed: tuple[str, ...]


@dataclass(frozen=True)
class _Program:
    kind: int
    flags: int
    offset: int
    address: int
    size: int


class _Reader:
    """A file's bytes by offset; a read past the end is a refusal, never a short result."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.size = file.seek(0, os.SEEK_END)
        self.order = "<"

    def refuse(self, why: str) -> BundleRefused:
        return BundleRefused(
            f"{self._name} is not a usable ELF file: {why}", hint="copy the bundle again, or build it again"
        )

    def inside(self, offset: int, size: int, what: str) -> None:
        if offset + size > self.size:  # both come from unsigned fields
            raise self.refuse(f"{what} ends at byte {offset + size}, the file has {self.size} (truncated)")

    def read(self, offset: int, size: int, what: str) -> bytes:
        self.inside(offset, size, what)
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise self.refuse(f"{what} cannot be read (truncated)")
        return data

    def unpack(self, layout: str, offset: int, what: str) -> tuple[int, ...]:
        return struct.unpack(self.order + layout, self.read(offset, struct.calcsize(self.order + layout), what))


def read_elf(path: Path) -> Elf:
    """Read an ELF file's headers.

    Raises:
        BundleRefused: Not ELF, truncated, or its headers contradict the file.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return parse_elf(file, path.name)


def parse_elf(file: BinaryIO | bytes, name: str = "the file") -> Elf:
    """Read the headers of an ELF image.

    Args:
        file: Bytes, or a seekable file.
        name: How messages call it.

    Raises:
        BundleRefused: Not ELF, truncated, or its headers contradict the file.
    """
    reader = _Reader(io.BytesIO(file) if isinstance(file, bytes) else file, name)
    ident = reader.read(0, 16, "the header") if reader.size >= 16 else b""
    if ident[:4] != b"\x7fELF":
        raise reader.refuse("it does not begin with an ELF header")
    if ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise reader.refuse(f"unknown class {ident[4]} or byte order {ident[5]}")
    bits, reader.order = 32 * ident[4], "<" if ident[5] == 1 else ">"
    word = "I" if bits == 32 else "Q"
    kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = reader.unpack(
        f"HHI{word}{word}{word}IHHHHHH", 16, "the header"
    )
    programs = _programs(reader, bits, phoff, phentsize, phnum)
    _check_sections(reader, bits, shoff, shentsize, shnum)
    names, tags = _dynamic(reader, word, programs)
    loads = [program for program in programs if program.kind == _PT_LOAD]
    return Elf(
        bits=bits,
        little=reader.order == "<",
        machine=f"riscv{bits}" if machine == _RISCV else _MACHINES.get(machine, f"machine-{machine}"),
        kind=_KINDS.get(kind, f"type-{kind}"),
        segments=tuple(
            Segment(p.offset, p.address, p.size, bool(p.flags & _PF_W), bool(p.flags & _PF_X)) for p in loads
        ),
        needed=_needed(reader, programs, names, tags),
    )


def _programs(reader: _Reader, bits: int, offset: int, entry: int, count: int) -> list[_Program]:
    layout = "IIIIIIII" if bits == 32 else "IIQQQQQQ"
    size = struct.calcsize("<" + layout)
    if count and entry != size:
        raise reader.refuse(f"program headers of {entry} bytes, {size} expected")
    table = reader.read(offset, size * count, "the program header table") if count else b""
    programs = []
    for fields in struct.iter_unpack(reader.order + layout, table):
        if bits == 32:  # the flags come later in the 32-bit layout
            kind, where, address, _, filesz, _, flags, _ = fields
        else:
            kind, flags, where, address, _, filesz, _, _ = fields
        if kind == _PT_LOAD:
            reader.inside(where, filesz, "a segment")
        programs.append(_Program(kind, flags, where, address, filesz))
    return programs


def _check_sections(reader: _Reader, bits: int, offset: int, entry: int, count: int) -> None:
    """Sections are not needed to run, but linkers put them last: they tell a truncated file."""
    layout = "IIIIIIIIII" if bits == 32 else "IIQQQQIIQQ"
    size = struct.calcsize("<" + layout)
    if count and entry != size:
        raise reader.refuse(f"section headers of {entry} bytes, {size} expected")
    table = reader.read(offset, size * count, "the section header table") if count else b""
    for _, kind, _, _, where, length, *_ in struct.iter_unpack(reader.order + layout, table):
        if kind != _SHT_NOBITS:
            reader.inside(where, length, "a section")


def _dynamic(reader: _Reader, word: str, programs: list[_Program]) -> tuple[list[int], dict[int, int]]:
    """Return the offsets of needed libraries' names, and the last value of every tag."""
    names: list[int] = []
    tags: dict[int, int] = {}
    for program in (p for p in programs if p.kind == _PT_DYNAMIC):
        if program.size > _MAX_DYNAMIC:
            raise reader.refuse("its dynamic section is absurdly large")
        size = struct.calcsize("<" + word * 2)
        table = reader.read(program.offset, program.size - program.size % size, "the dynamic section")
        for tag, value in struct.iter_unpack(reader.order + word * 2, table):
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                names.append(value)
            tags[tag] = value
    return names, tags


def _needed(reader: _Reader, programs: list[_Program], names: list[int], tags: dict[int, int]) -> tuple[str, ...]:
    if not names:
        return ()
    if len(names) > _MAX_NEEDED or tags.get(_DT_STRSZ, 0) > _MAX_STRINGS:
        raise reader.refuse("its dynamic section is absurdly large")
    strings = _mapped(reader, programs, tags.get(_DT_STRTAB, 0), tags.get(_DT_STRSZ, 0))
    return tuple(_string(reader, strings, name) for name in names)


def _mapped(reader: _Reader, programs: list[_Program], address: int, size: int) -> bytes:
    for program in programs:
        if program.kind == _PT_LOAD and program.address <= address < program.address + program.size:
            return reader.read(program.offset + address - program.address, size, "the string table")
    raise reader.refuse("its string table lies outside its segments")


def _string(reader: _Reader, strings: bytes, offset: int) -> str:
    end = strings.find(b"\0", offset)
    if offset >= len(strings) or end < 0:
        raise reader.refuse("a library name lies outside its string table")
    return strings[offset:end].decode("utf-8", "replace")
