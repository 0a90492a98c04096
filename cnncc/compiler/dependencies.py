"""Which files determined a model: recorded while the user's code runs, for the compile cache's key.

Python's audit hooks (PEP 578) see every ``open``; a hook cannot be removed, so one is installed for the process
and sleeps outside the context.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cnncc
import cnncc_runtime

_SOURCE_READERS = ("tokenize", "linecache", "inspect")
"""Who reads source files to show them: torch looks up its callers' lines, which determine nothing."""

_VIRTUAL = ("/proc", "/sys", "/dev")


class Dependencies:
    """Files read while the recording ran."""

    def __init__(self) -> None:
        self._opened: set[str] = set()
        self._modules_before = set(sys.modules)

    def add(self, path: Path) -> None:
        """Add a file by hand: weights, a model file."""
        self._opened.add(str(path))

    def saw(self, path: str) -> None:
        """Take note of an opened file; called by the audit hook, so it must stay cheap."""
        self._opened.add(path)

    def collect_modules(self, package: str = "") -> None:
        """Add the sources of modules imported since the start, and of a package that was there before."""
        for name, module in list(sys.modules.items()):
            own = bool(package) and (name == package or name.startswith(package + "."))
            file = getattr(module, "__file__", None)
            if file and (own or name not in self._modules_before):
                self._opened.add(file)

    def paths(self) -> tuple[Path, ...]:
        """Return the user's files, resolved and sorted: none from Python, site-packages or cnncc itself."""
        resolved = {Path(os.path.realpath(path)) for path in self._opened}
        return tuple(sorted(path for path in resolved if is_users(path)))


def is_users(path: Path) -> bool:
    """Say whether a resolved path is a regular file that neither Python nor an installed package owns."""
    if "__pycache__" in path.parts or not path.is_file():
        return False
    return not any(path.is_relative_to(root) for root in _installed())


@cache
def _installed() -> tuple[Path, ...]:
    roots = {*_VIRTUAL, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()}
    roots |= {site.getusersitepackages()}
    roots |= {str(Path(package.__file__).parent) for package in (cnncc, cnncc_runtime) if package.__file__}
    resolved = {Path(root).resolve() for root in roots if root}
    return tuple(sorted(root for root in resolved if len(root.parts) > 2 or str(root) in _VIRTUAL))


_active = threading.local()
_installed_hook = threading.Lock()
_hooked = False


def _hook(event: str, args: tuple[object, ...]) -> None:
    if event != "open":
        return
    recorder = getattr(_active, "recorder", None)
    if recorder is None or not isinstance(args[0], str | bytes) or _writes(args[1], args[2]):
        return
    if sys._getframe(1).f_globals.get("__name__") not in _SOURCE_READERS:
        recorder.saw(os.fsdecode(args[0]))


def _writes(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


@contextlib.contextmanager
def record_dependencies() -> Iterator[Dependencies]:
    """Record which files this thread opens for reading and which modules it imports.

    Files that native code opens by itself (safetensors) are not seen.

    Yields:
        The record; ask it for ``paths()`` after ``collect_modules()``.
    """
    global _hooked
    with _installed_hook:
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked = True
    recorder = Dependencies()
    outer = getattr(_active, "recorder", None)
    _active.recorder = recorder
    try:
        yield recorder
    finally:
        _active.recorder = outer
