"""The ELF reader: real files, files cut anywhere, files with any header."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnncc_runtime.elf import Elf, parse_elf, read_elf
from cnncc_runtime.errors import BundleRefused


def image(machine: int = 62, bits: int = 64, order: str = "<", kind: int = 3, **fields: int) -> bytes:
    """A file of a header alone, or with header tables where ``fields`` say so."""
    layout = "HHIIIIIHHHHHH" if bits == 32 else "HHIQQQIHHHHHH"
    values = {"phoff": 0, "shoff": 0, "phentsize": 0, "phnum": 0, "shentsize": 0, "shnum": 0, **fields}
    rest = struct.pack(
        order + layout, kind, machine, 1, 0, values["phoff"], values["shoff"], 0, 64,
        values["phentsize"], values["phnum"], values["shentsize"], values["shnum"], 0,
    )  # fmt: skip
    return b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9) + rest


@pytest.mark.parametrize(
    ("machine", "bits", "order", "name"),
    [
        (62, 64, "<", "x86_64"),
        (183, 64, "<", "aarch64"),
        (40, 32, "<", "arm"),
        (243, 64, "<", "riscv64"),
        (243, 32, "<", "riscv32"),
        (21, 64, ">", "ppc64"),
        (999, 64, "<", "machine-999"),
    ],
)
def test_machines_are_told_apart(machine: int, bits: int, order: str, name: str) -> None:
    assert parse_elf(image(machine, bits, order)) == Elf(bits, order == "<", name, "shared", (), ())


def test_a_real_library_is_read(engines: Path) -> None:
    found = read_elf(engines / "conv.so")
    assert found.kind == "shared"
    assert found.machine == read_elf(Path(sys.executable)).machine
    assert any(segment.executable for segment in found.segments)
    assert not any(segment.writable and segment.executable for segment in found.segments)


def test_the_libraries_that_a_file_needs_are_listed() -> None:
    needed = read_elf(Path(sys.executable)).needed
    assert any(name.startswith("libc.so") for name in needed)


def test_a_file_cut_anywhere_is_refused(engines: Path) -> None:
    whole = (engines / "conv.so").read_bytes()
    parse_elf(whole)
    for length in [*range(200), *range(200, len(whole), 97), len(whole) - 1]:
        with pytest.raises(BundleRefused, match="conv"):
            parse_elf(whole[:length], "conv.so")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_never_worse(engines: Path, data: st.DataObject) -> None:
    whole = bytearray((engines / "conv.so").read_bytes())
    tables = struct.unpack_from("<QQ", whole, 32)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.sampled_from([0, *tables]))
        position = min(start + data.draw(st.integers(0, 600)), len(whole) - 1)
        whole[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    try:
        parse_elf(bytes(whole))
    except BundleRefused:
        return


@given(st.binary(max_size=300))
def test_any_bytes_after_a_good_start_are_read_or_refused(data: bytes) -> None:
    try:
        parse_elf(b"\x7fELF\x02\x01\x01" + data)
    except BundleRefused:
        return


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin"),
        (b"#!/bin/sh\n" * 10, "does not begin"),
        (b"\x7fELF" + bytes(60), "unknown class"),
        (image(phoff=64, phentsize=56, phnum=1), "truncated"),
        (image(phoff=64, phentsize=7, phnum=1), "program headers of 7 bytes"),
        (image(shoff=64, shentsize=1, shnum=1), "section headers of 1 bytes"),
        (image(shoff=(1 << 64) - 1, shentsize=64, shnum=3), "truncated"),
        (image(phoff=64, phentsize=56, phnum=1) + struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, 1 << 60, 0, 0), "truncated"),
        (
            image(phoff=64, phentsize=56, phnum=1)
            + struct.pack("<IIQQQQQQ", 2, 4, 120, 0, 0, 32, 0, 0)
            + struct.pack("<QQQQ", 1, 5, 5, 1 << 40),
            "outside its segments",
        ),
    ],
    ids=["empty", "script", "class", "table", "entry", "section entry", "far table", "far segment", "far strings"],
)
def test_what_is_wrong_is_said(content: bytes, message: str) -> None:
    with pytest.raises(BundleRefused, match=message) as caught:
        parse_elf(content)
    assert caught.value.hint
