"""A stage of the pipeline: a cached computation that is made when its result is first asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnncc.compiler.cache import Cache, Entry
from cnncc.compiler.reporting import Reporter
from cnncc_runtime.files import scratch_folder

Compute = Callable[[Path], tuple[dict[str, Any], dict[str, Path], str]]
"""Takes a scratch folder; returns plain values, files by name, and a line for the user."""


@dataclass
class Stage:
    """One cached computation.

    Asking for the values alone reads no file of the cache; a file is checked against its digest when it is asked
    for, and the stage is made again when it is damaged. So a rerun touches only what it needs.

    Attributes:
        name: As the user sees it.
        key: Digest of all that determines the result.
        compute: Makes it.
        cache: Where results are kept.
        reporter: Told of it.
    """

    name: str
    key: str
    compute: Compute
    cache: Cache
    reporter: Reporter
    _entry: Entry | None = field(default=None, init=False)

    @property
    def value(self) -> dict[str, Any]:
        """The plain values."""
        if self._entry is None:
            self._entry = self.cache.get(self.name, self.key)
            if self._entry is not None:
                self.reporter.done(self.name, 0.0, self._entry.value["detail"], reused=True)
        if self._entry is None:
            self._entry = self._make()
        return self._entry.value

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the files by name."""
        _ = self.value
        assert self._entry is not None
        return self._entry.digests

    def file(self, name: str) -> Path:
        """Return the path of an intact file of the result, to read and never to write."""
        _ = self.value
        intact = self.cache.get(self.name, self.key, need=(name,))
        if intact is None:
            intact = self._entry = self._make()
        return intact.files[name]

    def _make(self) -> Entry:
        self.reporter.stage(self.name)
        start = time.monotonic()
        with scratch_folder(self.cache.folder) as folder:
            value, files, detail = self.compute(folder)
            entry = self.cache.put(self.name, self.key, {**value, "detail": detail}, files)
        self.reporter.done(self.name, time.monotonic() - start, detail, reused=False)
        return entry
