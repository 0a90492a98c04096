"""Machine code of an engine as instructions, by llvm-objdump."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

_HEADING = re.compile(r"[0-9a-f]+ <(.+)>:")
_LOCAL = ".L"
"""How labels inside of functions begin: RISC-V's objects keep them."""
_LINE = re.compile(r"\s*([0-9a-f]+):\s+(\S.*)")
_PREFIXED = re.compile(r"(?:\{\w+\}|lock|notrack|rep\w*|data16)\s+(?=\S)")
_TARGET = re.compile(r"(?<![\w#$])(?:0x)?([0-9a-f]+) <[^>]*>")
_COMMENT = re.compile(r"\s+(?://|@ |# ).*")

_CONDITIONS = ("eq", "ne", "hs", "lo", "mi", "pl", "vs", "vc", "hi", "ls", "ge", "lt", "gt", "le")
_CALLS = frozenset({"bl", "blr", "blx", "call", "callq", "jal", "jalr", *(f"bl{one}" for one in _CONDITIONS)})
_JUMPS = frozenset({"b", "j", "jmp", "jmpq"})
_ENDS = frozenset({"ret", "retq", "br", "jr", "bx", "ud2", "udf", "brk", "hlt", "ebreak", "unimp"})
_BRANCH = re.compile(r"j\w+|b(?:\.\w+|[a-z]{2,4})|[ct]bn?z")


class Flow(Enum):
    """Where an instruction leads."""

    NEXT = "to the next"
    BRANCH = "to its target, or to the next"
    JUMP = "to its target"
    END = "elsewhere"


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: In its section.
        mnemonic: Without prefixes.
        operands: As an assembler takes them; a target is a label.
        text: All of it, as an assembler takes it.
        flow: Where it leads.
        target: Address that it may jump to.
    """

    address: int
    mnemonic: str
    operands: str
    text: str
    flow: Flow = Flow.NEXT
    target: int | None = None


def parse(listing: str) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
    """Yield each symbol of a listing with its instructions, those behind it that have no symbol among them.

    Args:
        listing: What ``llvm-objdump --disassemble --no-show-raw-insn`` prints.
    """
    name, found = "", list[Instruction]()
    for line in listing.splitlines():
        if heading := _HEADING.fullmatch(line):
            if heading[1].startswith(_LOCAL):
                continue
            if found:
                yield name, tuple(found)
            name, found = heading[1], []
        elif name and (match := _LINE.fullmatch(line)):
            found.append(instruction(int(match[1], 16), match[2]))
    if found:
        yield name, tuple(found)


def instruction(address: int, text: str) -> Instruction:
    """Return an instruction by its text in a listing; a target stands before its symbol: ``0x40 <kernel+0x20>``."""
    text = " ".join(_COMMENT.sub("", f"{text} ").split())
    found = _TARGET.search(text)
    text = _TARGET.sub(".Ltarget", text)
    mnemonic, _, operands = _PREFIXED.sub("", text).partition(" ")
    target = int(found[1], 16) if found else None
    flow = _flow(mnemonic, operands, target)
    jumps = flow in (Flow.BRANCH, Flow.JUMP)
    return Instruction(address, mnemonic, operands, text, flow, target if jumps else None)


def _flow(mnemonic: str, operands: str, target: int | None) -> Flow:
    if mnemonic in _CALLS:
        return Flow.NEXT
    if mnemonic in _JUMPS:
        return Flow.END if target is None else Flow.JUMP
    # 32-bit ARM returns by any write to pc, and goes on where that has a condition
    if mnemonic in _ENDS or (mnemonic in ("pop", "ldm", "mov") and re.search(r"\bpc\}|^pc,", operands)):
        return Flow.END
    if target is not None and _BRANCH.fullmatch(mnemonic):
        return Flow.BRANCH
    return Flow.NEXT


@dataclass(frozen=True)
class Blocks:
    """Code cut where control flow forks or joins.

    Attributes:
        code: Instructions of each block.
        successors: Block → blocks that may follow it; jumps to other functions lead nowhere.
    """

    code: tuple[tuple[Instruction, ...], ...]
    successors: tuple[tuple[int, ...], ...]


def blocks_of(code: tuple[Instruction, ...]) -> Blocks:
    """Return the basic blocks of some code, in its order."""
    places = {one.address for one in code}
    starts = {one.target for one in code if one.target in places}
    cut: list[list[Instruction]] = []
    fresh = True
    for one in code:
        if fresh or one.address in starts:
            cut.append([])
        cut[-1].append(one)
        fresh = one.flow is not Flow.NEXT
    first = {block[0].address: index for index, block in enumerate(cut)}
    successors = []
    for index, block in enumerate(cut):
        last = block[-1]
        followers = [first[last.target]] if last.target in first else []
        if last.flow in (Flow.NEXT, Flow.BRANCH) and index + 1 < len(cut):
            followers.append(index + 1)
        successors.append(tuple(dict.fromkeys(followers)))
    return Blocks(tuple(tuple(block) for block in cut), tuple(successors))
