"""A board's CPU from sysfs: recorded boards, and this machine, whose own runtime reads ``/proc/cpuinfo``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cnncc.compiler.remote.board_cpu import BOARD, EXECUTABLE, MIDR, MODALIAS, ONLINE, Read, board_cpu
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.errors import EngineMismatch

PAGE = 4096
AARCH64 = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + (183).to_bytes(2, "little") + bytes(44)


def board(files: Mapping[str, str]) -> Read:
    """Read recorded files as a server hands them out: in whole pages."""

    def read(path: str) -> bytes:
        if path == EXECUTABLE:
            return AARCH64
        if path not in files:
            raise FileNotFoundError(path)
        return files[path].encode().ljust(PAGE, b"\0")

    return read


RASPBERRY_PI_5 = {
    MODALIAS: "cpu:type:aarch64:feature:,0000,0001,0002,0003,0004,0005,0006,0007,0008,0009,000A,000B,000C,000F,0010,"
    "0014,001C\n",
    ONLINE: "0-3\n",
    BOARD: "Raspberry Pi 5 Model B Rev 1.0",
    **{MIDR % number: "0x00000000414fd0b1\n" for number in range(4)},
}


@pytest.mark.skipif(not Path(MODALIAS).exists(), reason="this kernel has no modalias of its CPUs")
def test_this_machine_is_described_as_its_own_runtime_describes_it() -> None:
    found, own = board_cpu(lambda path: Path(path).read_bytes()), host_cpu()
    assert (found.machine, found.features) == (own.machine, own.features)


def test_a_raspberry_pi() -> None:
    found = board_cpu(board(RASPBERRY_PI_5))
    assert found.model == "Raspberry Pi 5 Model B Rev 1.0 (4 × Cortex-A76)"
    assert (found.machine, found.cores) == ("aarch64", 4)
    assert {"neon", "dotprod", "fullfp16", "lse", "crc"} <= found.features
    assert not {"i8mm", "bf16", "sve"} & found.features


def test_the_second_word_of_hwcaps_lies_64_bits_on() -> None:
    text = RASPBERRY_PI_5[MODALIAS].strip() + ",004D,004E\n"
    assert {"i8mm", "bf16"} <= board_cpu(board({**RASPBERRY_PI_5, MODALIAS: text})).features


@pytest.mark.parametrize(
    "files",
    [
        {},
        {MODALIAS: "cpu:type:x86,ven0002fam0019mod0011:feature:,0000\n"},
        {MODALIAS: "\n"},
        {MODALIAS: "cpu:type:aarch64:feature:,zz"[:10]},
    ],
    ids=["no modalias", "another machine's", "empty", "cut short"],
)
def test_a_board_that_does_not_say_is_refused(files: Mapping[str, str]) -> None:
    with pytest.raises(EngineMismatch, match="does not say what its CPU can execute"):
        board_cpu(board(files))


def test_a_server_that_is_no_program_is_refused() -> None:
    with pytest.raises(EngineMismatch, match="does not say"):
        board_cpu(lambda _path: b"#!/bin/sh")
