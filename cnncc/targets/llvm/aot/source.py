"""The C of a network: a header, the driver that calls its kernels, its weights, and the tables of its executable."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cnncc.targets.llvm.aot.program import Layout, Program
from cnncc_runtime.specs import TensorSpec

_TYPES = {"float32": "float", "float64": "double", "float16": "uint16_t", "bool": "uint8_t"}
_KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        "auto break case char const continue default do double else enum extern float for goto if inline int long "
        "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while",
    )
)


@dataclass(frozen=True)
class Network:
    """What the C is made of.

    Attributes:
        name: Prefix of all that it defines; a C identifier.
        title: What comments call it.
        inputs: Specs, of static shapes.
        outputs: Specs, of static shapes.
        program: Its kernel calls.
        layout: Where its buffers lie.
        places: Constant → where it lies among the weights.
        weights: Bytes of the weights.
    """

    name: str
    title: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    program: Program
    layout: Layout
    places: dict[int, int]
    weights: int


def c_name(name: str) -> str:
    """Return a C identifier that is like a name."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "network"
    return f"_{found}" if found[0].isdigit() or found in _KEYWORDS else found


def header(network: Network) -> str:
    """Return ``NAME.h``."""
    name, upper = network.name, network.name.upper()
    lines = [
        f"/* {network.title}, made by cnncc. */",
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        "/* Bytes of static memory: what is written (.bss), and what is only read (.rodata). */",
        f"#define {upper}_ARENA_BYTES {network.layout.arena}",
        f"#define {upper}_WEIGHTS_BYTES {network.weights}",
        "",
    ]
    for spec, tensor in _tensors(network):
        size = math.prod(_shape(spec))
        lines += [
            f"/* {spec} */",
            f"#define {upper}_{tensor.upper()}_ELEMENTS {size}",
            f"#define {upper}_{tensor.upper()}_BYTES {size * np.dtype(spec.dtype).itemsize}",
            f"#define {upper}_{tensor.upper()}_RANK {len(spec.shape)}",
            f"#define {upper}_{tensor.upper()}_SHAPE {{{', '.join(map(str, spec.shape)) or 1}}}",
            "",
        ]
    return "\n".join(
        [
            *lines,
            "/* What a run returns. */",
            f"#define {upper}_OK 0",
            f"#define {upper}_MISALIGNED 1 /* an address is null, or no multiple of 64 */",
            "",
            "/* Run the network once. Arrays are row-major and begin at multiples of 64 bytes; outputs overlap neither",
            " * inputs nor each other. One run at a time: the memory that it works in is static. It takes no other",
            " * memory than that and the stack, starts no thread, and calls nothing of libc but what kernels need of",
            " * memcpy, memset and the functions of math.h. */",
            f"int {name}_run({', '.join(_parameters(network))});",
            "",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "",
            "#endif",
            "",
        ]
    )


def driver(network: Network) -> str:
    """Return ``NAME.c``: one call after the other."""
    name, layout = network.name, network.layout
    kernels = {step.kernel: len(step.reads) + len(step.writes) + len(spaces)
               for step, spaces in zip(network.program.steps, layout.spaces, strict=True)}  # fmt: skip
    arguments = [tensor for _spec, tensor in _tensors(network)]
    lines = [
        f"/* {network.title}, made by cnncc. */",
        f'#include "{name}.h"',
        *(["", "#include <string.h>"] if layout.copies else []),
        "",
        *([f"extern const unsigned char {name}_weights[];"] if network.weights else []),
        *([f"static unsigned char arena[{layout.arena}] __attribute__((aligned(64)));"] if layout.arena else []),
        "",
        "/* Tensors that it reads, tensors that it writes, memory that it works in. */",
        *(f"void {kernel}({', '.join(['const void *'] * count)});" for kernel, count in kernels.items()),
        "",
        f"int {name}_run({', '.join(_parameters(network))}) {{",
        "    uintptr_t address;",
        *(f"    address = (uintptr_t){argument}; if (!address || address % 64) return {name.upper()}_MISALIGNED;"
          for argument in arguments),
    ]  # fmt: skip
    for step, spaces in zip(network.program.steps, layout.spaces, strict=True):
        places = [_place(network, buffer) for buffer in (*step.reads, *step.writes)]
        places += [f"arena + {offset}" for offset in spaces]
        lines.append(f"    {step.kernel}({', '.join(places)});")
    for output, buffer in layout.copies.items():
        target = arguments[len(network.inputs) + output]
        lines.append(f"    memcpy({target}, {_place(network, buffer)}, {network.program.sizes[buffer]});")
    return "\n".join([*lines, f"    return {name.upper()}_OK;", "}", ""])


def weights_source(network: Network, file: str) -> str:
    """Return ``NAME_weights.S``, which takes a file in where the linker finds it."""
    symbol = f"{network.name}_weights"
    return "\n".join(
        [
            f"/* {network.title}, made by cnncc: its weights. */",
            "    .section .rodata",
            f"    .globl {symbol}",
            f"    .type {symbol}, %object",
            "    .balign 64",
            f"{symbol}:",
            f'    .incbin "{file}"',
            f"    .size {symbol}, . - {symbol}",
            '    .section .note.GNU-stack, "", %progbits',
            "",
        ]
    )


def tables(network: Network) -> str:
    """Return ``NAME_main.c``: what the executable's ``main`` knows of the network; ``main.c`` follows."""
    ins, outs = len(network.inputs), len(network.outputs)
    name = network.name
    values = [f"buffers[{at}]" for at in range(ins + outs)]
    described = [_described(name, spec, tensor) for spec, tensor in _tensors(network)]
    return "\n".join(
        [
            f"/* {network.title}, made by cnncc: its executable. */",
            "#define _POSIX_C_SOURCE 200809L /* clock_gettime */",
            f'#include "{name}.h"',
            "",
            f'#define NETWORK "{name}"',
            f"#define INPUTS {ins}",
            f"#define OUTPUTS {outs}",
            f"#define ARENA {name.upper()}_ARENA_BYTES",
            f"#define WEIGHTS {name.upper()}_WEIGHTS_BYTES",
            f"#define RUN(buffers) {name}_run({', '.join(values)})",
            "#define TENSORS \\",
            ", \\\n".join(f"    {one}" for one in described),
            "",
            "",
        ]
    )


def _described(name: str, spec: TensorSpec, tensor: str) -> str:
    shape = ", ".join(map(str, spec.shape)) + ("," if len(spec.shape) == 1 else "")
    descr = np.dtype(spec.dtype).newbyteorder("<").str
    size = f"{name.upper()}_{tensor.upper()}_BYTES"
    return f'{{"{c_name(spec.name)}", "{descr}", "({shape})", {size}, {np.dtype(spec.dtype).itemsize}}}'


def _parameters(network: Network) -> list[str]:
    inputs = len(network.inputs)
    return [
        f"{'const ' if at < inputs else ''}{_c_type(spec.dtype)} *{tensor}"
        for at, (spec, tensor) in enumerate(_tensors(network))
    ]


def _tensors(network: Network) -> list[tuple[TensorSpec, str]]:
    """Return inputs and outputs, each with a name in C that no other has."""
    taken: set[str] = {"arena", "address", "memcpy", f"{network.name}_run", f"{network.name}_weights"}
    found = []
    for spec in (*network.inputs, *network.outputs):
        plain = name = c_name(spec.name)
        number = 2
        while name in taken or name.upper() in taken:
            name, number = f"{plain}_{number}", number + 1
        taken |= {name, name.upper()}
        found.append((spec, name))
    return found


def _c_type(dtype: str) -> str:
    return _TYPES.get(dtype, f"{dtype}_t")


def _shape(spec: TensorSpec) -> Sequence[int]:
    return [size for size in spec.shape if isinstance(size, int)]


def _place(network: Network, buffer: int) -> str:
    """Return a buffer's address as the driver has it."""
    program, layout = network.program, network.layout
    names = [tensor for _spec, tensor in _tensors(network)]
    if buffer in program.inputs:
        return names[program.inputs.index(buffer)]
    if buffer in network.places:
        return f"{network.name}_weights + {network.places[buffer]}"
    if buffer in layout.direct:
        return names[len(network.inputs) + layout.direct[buffer]]
    return f"arena + {layout.offsets[buffer]}"
