"""Finds and loads ``libtvm_runtime.so`` (3 MB: TVM's virtual machine), never the compiler.

Where it is looked for: ``CNNCC_TVM_RUNTIME`` (the file or its folder), ``cnncc_runtime/lib/``, an installed
``apache-tvm``, which is found without being imported. If the process holds a TVM runtime already, because the
compiler was imported first, that one is used: two copies would register the same functions twice and abort. The
other order cannot be helped from here: a process that imports the compiler after a session must not set
``CNNCC_TVM_RUNTIME`` to another file than the compiler's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnncc_runtime import engine_threads
from cnncc_runtime.errors import TargetUnavailable

ABI = f"tvm-ffi 0.1, tvm 0.27, threads {engine_threads.VERSION}"
"""What engines must have been built for: a virtual machine refuses another TVM release's byte code."""

_FFI = "0.1."
_TVM = "0.27."

VARIABLE = "CNNCC_TVM_RUNTIME"
_NAME = "libtvm_runtime.so"
_CLEAR_POOLS = "vm.builtin.memory_manager.clear"
_INSTALL = f"pip install 'apache-tvm=={_TVM}*', or set {VARIABLE} to {_NAME}"


@dataclass(frozen=True)
class TvmRuntime:
    """The runtime's functions.

    Attributes:
        load_library: ``(path, "so") -> Module``.
        from_dlpack: Array → tensor, without a copy.
        clear_pools: Gives memory that no session uses back to the system.
        function: Makes a function that the runtime calls.
    """

    load_library: Callable[[str, str], Any]
    from_dlpack: Callable[[Any], Any]
    clear_pools: Callable[[], None]
    function: Callable[[Callable[..., Any]], Any]


def locate() -> Path | None:
    """Return where ``libtvm_runtime.so`` is; None when there is none. Imports nothing, loads nothing.

    Raises:
        TargetUnavailable: ``CNNCC_TVM_RUNTIME`` names something that does not exist.
    """
    if value := os.environ.get(VARIABLE):
        place = Path(value)
        path = place / _NAME if place.is_dir() else place
        if not path.is_file():
            raise TargetUnavailable(f"{VARIABLE} is '{value}', which holds no {_NAME}", hint=_INSTALL)
        return path
    folders = [Path(__file__).with_name("lib")]
    with contextlib.suppress(ImportError, ValueError):  # a half-initialised or odd 'tvm' in sys.modules
        spec = importlib.util.find_spec("tvm")
        folders += [Path(folder) / "lib" for folder in (spec.submodule_search_locations if spec else None) or ()]
    return next((folder / _NAME for folder in folders if (folder / _NAME).is_file()), None)


def load() -> TvmRuntime:
    """Load the runtime into this process, once.

    Raises:
        TargetUnavailable: apache-tvm-ffi or libtvm_runtime is missing, of another release, or broken.
    """
    with _lock:
        return _load()


_lock = threading.Lock()


@functools.cache
def _load() -> TvmRuntime:
    _check_ffi()
    try:
        with _without_torch():
            import tvm_ffi
    except (ImportError, OSError, RuntimeError) as exc:
        raise TargetUnavailable(f"apache-tvm-ffi cannot be loaded: {exc}", hint="pip install cnncc-runtime") from exc
    if tvm_ffi.get_global_func(_CLEAR_POOLS, allow_missing=True) is None:
        _load_library()
    try:
        return TvmRuntime(
            load_library=tvm_ffi.get_global_func("ffi.Module.load_from_file.so"),
            from_dlpack=tvm_ffi.from_dlpack,
            clear_pools=tvm_ffi.get_global_func(_CLEAR_POOLS),
            function=tvm_ffi.convert,
        )
    except ValueError as exc:
        raise TargetUnavailable(f"{_NAME} is not of TVM {_TVM}*: {exc}", hint=_INSTALL) from exc


def _check_ffi() -> None:
    try:
        found = importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError as exc:
        raise TargetUnavailable("apache-tvm-ffi is not installed", hint="pip install cnncc-runtime") from exc
    if not found.startswith(_FFI):
        raise TargetUnavailable(
            f"apache-tvm-ffi is {found}, this runtime needs {_FFI}*", hint="pip install --force-reinstall cnncc-runtime"
        )


def _load_library() -> None:
    path = locate()
    if path is None:
        raise TargetUnavailable(f"TVM's runtime ({_NAME}) is not on this machine", hint=_INSTALL)
    try:
        ctypes.CDLL(str(path.resolve()), ctypes.RTLD_GLOBAL)
    except OSError as exc:
        raise TargetUnavailable(f"{path} cannot be loaded: {exc}", hint=_INSTALL) from exc


class _NoTorch:
    """An import hook that hides torch from one thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse torch, leave the rest to others."""
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is not needed here", name=name)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keep ``import tvm_ffi`` from importing torch (0.7 s, 200 MB) where both are installed; torch may come later."""
    hook = _NoTorch()
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        sys.meta_path.remove(hook)
