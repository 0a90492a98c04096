"""Times of kernels that TensorRT measured, kept for later builds on the same GPU with the same library.

A file is the digest of what follows it, a line feed, and TensorRT's own serialized cache: TensorRT takes a damaged one
for an empty one. What it cannot use is set aside and told, never mixed with the new; two builds side by side each write
the whole file, and the last one stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnncc.targets.cuda.vendors import Chosen
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import StorageFailed
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.gpu import host_gpus

ASIDE = ".refused"


def timings_file(folder: Path | None, chosen: Chosen, gpu: str) -> Path | None:
    """Return the file for a library and this machine's GPU of a compute capability.

    Args:
        folder: Where such files lie; None to keep none.
        chosen: The library.
        gpu: Compute capability.

    Returns:
        None, too, where the library times nothing while it builds.
    """
    if folder is None or chosen.vendor.reproducible:
        return None
    name = next((each.name for each in host_gpus() if each.capability == gpu), "gpu")
    parts = (chosen.vendor.backend, chosen.version, re.sub(r"\W+", "_", name), gpu)
    return folder / f"{'-'.join(parts)}.timings"


@contextmanager
def kept_timings(config: Any, file: Path | None, note: Callable[[str], None]) -> Iterator[None]:
    """Let a build use the times in a file, and add those that it measures; a build that fails adds none.

    Args:
        config: The builder's configuration.
        file: As `timings_file` returns it.
        note: Told what the user should know of it.
    """
    if file is None:
        yield
        return
    _attach(config, file, note)
    yield
    cache = config.get_timing_cache()
    if cache is None:
        return
    data = bytes(cache.serialize())
    try:
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            partial.write_bytes(f"{digest_bytes(data)}\n".encode() + data)
    except StorageFailed as exc:  # the engine is there all the same
        note(f"the times of kernels are not kept: {exc.message}")


def _attach(config: Any, file: Path, note: Callable[[str], None]) -> None:
    data = _read(file)
    cache = None if data is None else config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return
    aside = file.with_name(file.name + ASIDE)
    try:
        file.replace(aside)
        where = f"it was set aside as {aside}"
    except OSError as exc:
        where = f"it cannot be set aside: {(exc.strerror or str(exc)).lower()}"
    why = "is damaged" if data is None else "is of another GPU, driver or library"
    note(f"the timing cache {file} {why}; {where}, and all kernels are timed again")
    config.set_timing_cache(config.create_timing_cache(b""), False)


def _read(file: Path) -> bytes | None:
    """Return the serialized cache, empty where there is none yet; None where it is damaged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError:
        return None
    head, _, data = content.partition(b"\n")
    return data if head == digest_bytes(data).encode() else None
