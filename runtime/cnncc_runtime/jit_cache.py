"""The kernels that TensorRT-RTX compiles on the device, kept between runs.

A plan of TensorRT-RTX holds no machine code; the device compiles it when it opens it. What it compiled is a file per
engine and GPU in ``$CNNCC_CACHE_DIR/jit`` or the user's cache folder. Losing it costs time, and nothing else: the
library refuses what was made by another version, driver or GPU, and is believed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from tempfile import gettempdir

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import StorageFailed
from cnncc_runtime.files import atomic_file, storage_errors

_LARGEST = 1 << 30
"""Bytes of a cache that is read; a larger one is none of ours."""

_log = logging.getLogger("cnncc_runtime")


class JitCache:
    """One engine's compiled kernels on one GPU.

    Args:
        engine: Digest of the plan.
        gpu: The GPU's name.
        library: What compiles them, with its version.
    """

    def __init__(self, engine: str, gpu: str, library: str) -> None:
        key = digest_bytes("\n".join((engine, gpu, library)).encode()).partition(":")[2]
        self._file = Path(_folder(), f"{key}.bin")
        self._kept = b""

    def read(self) -> bytes:
        """Return what was kept; nothing where there is none, or it cannot be read."""
        try:
            if self._file.stat().st_size > _LARGEST:
                return b""
            self._kept = self._file.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as exc:
            _log.warning("compiled kernels are not read from %s: %s", self._file, exc.strerror)
        return self._kept

    def keep(self, compiled: bytes) -> None:
        """Keep what is compiled now, where it is new; a disk that does not take it is told and does no harm."""
        if compiled == self._kept:
            return
        try:
            with storage_errors(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._file) as partial:
                partial.write_bytes(compiled)
        except (StorageFailed, OSError) as exc:
            _log.warning("compiled kernels are not kept, the next start compiles again: %s", exc)
            return
        self._kept = compiled


def _folder() -> str:
    if named := os.environ.get("CNNCC_CACHE_DIR"):
        return f"{named}/jit"
    # a user without a home, as in many a container, has a temporary folder
    base = os.environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if (home := os.environ.get("HOME")) else gettempdir())
    return f"{base}/cnncc/jit"
