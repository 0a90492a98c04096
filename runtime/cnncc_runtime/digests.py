"""Digests and the canonical JSON they are taken over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Encode plain data as JSON whose bytes depend on the data alone.

    Keys are sorted, no optional whitespace, UTF-8, a final newline; NaN and Inf are refused.

    Raises:
        ValueError: The data holds NaN or Inf.
        TypeError: The data holds something that JSON cannot say.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def digest_bytes(data: bytes) -> str:
    """Return ``sha256:<hex>`` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Return the digest of data's canonical JSON: equal data, equal digest, whatever the key order."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """Return the digest of a file, read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return digest_stream(file)


def digest_stream(file: BinaryIO) -> str:
    """Return the digest of what is left of an open file, read in pieces: memory does not grow with the file.

    Raises:
        OSError: The file cannot be read.
    """
    hasher = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def digest_array(array: NDArray[Any]) -> str:
    """Return the digest of an array's dtype, shape and elements (row-major)."""
    import numpy as np  # here: whoever digests files alone does not pay for it

    hasher = hashlib.sha256(canonical_json([array.dtype.str, list(array.shape)]))
    hasher.update(np.ascontiguousarray(array).data)
    return "sha256:" + hasher.hexdigest()
