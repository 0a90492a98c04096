"""Runs machine code in the process that generated it: linked and loaded as an engine is, with an engine's threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from cnncc.targets.devices import host_machine
from cnncc.targets.llvm.link import find_linker, link
from cnncc_runtime.engine_threads import Launcher


@dataclass(frozen=True)
class Loaded:
    """A loaded library.

    Attributes:
        module: TVM's view of it.
        launcher: What a `cnncc_runtime.engine_threads.Pool` for it is made with; without one, loops run on one thread.
    """

    module: Any
    launcher: Launcher


def load_objects(objects: Sequence[Path]) -> Loaded:
    """Link objects of this machine and load them.

    Args:
        objects: As `cnncc.targets.llvm.codegen` writes them; their folder may go afterwards.

    Raises:
        TargetUnavailable: There is no linker.
        BuildFailed: The linker refused.
    """
    machine = host_machine()
    library = objects[0].with_name("loaded.so")
    link(find_linker(machine, machine), machine, objects, library)
    return load_library(library)


def load_library(library: Path) -> Loaded:
    """Load an engine, or a library of kernels.

    Raises:
        AttributeError: It brings no threads.
    """
    module = tvm.runtime.load_module(str(library))
    return Loaded(module, Launcher(str(library), module))
