"""What cache keys are made of beside inputs: the versions of the tools, and cnncc's own source."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from pathlib import Path

import cnncc
import cnncc_runtime
from cnncc_runtime.digests import digest_file, digest_json


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of cnncc, Python and packages."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"cnncc": cnncc.__version__, "python": platform.python_version(), **found}


@functools.cache
def _own_digest() -> str:
    """Digest of cnncc's own source: a changed compiler must not reuse what another one made."""
    roots = [Path(module.__file__).parent for module in (cnncc, cnncc_runtime) if module.__file__]
    files = sorted(path for root in roots for path in root.rglob("*") if path.suffix in (".py", ".ll"))
    return digest_json([[path.name, digest_file(path)] for path in files])


def tools(*packages: str) -> dict[str, str]:
    """Return the versions that a result depends on: of packages, and of cnncc by its own source."""
    return {**versions(*packages), "source": _own_digest()}
