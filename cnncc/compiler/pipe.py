"""What crosses the pipes between us and a child that runs an engine: arrays by name, errors, small records.

A message is one letter for its kind, its length, and a body.
"""

from __future__ import annotations

import io
import struct
from typing import IO

import numpy as np

from cnncc_runtime import errors
from cnncc_runtime.errors import CnnccError, RunFailed
from cnncc_runtime.specs import Feeds, Tensors

ARRAYS, ERROR, RECORD = b"A", b"E", b"R"
"""Kinds of messages: names and arrays, an error of ours, JSON."""

_LENGTH = struct.Struct("<cQ")


def send(pipe: IO[bytes], kind: bytes, body: bytes) -> None:
    """Write a message."""
    pipe.write(_LENGTH.pack(kind, len(body)))
    pipe.write(body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[bytes, bytes]:
    """Return a message, or an empty kind where the pipe ended."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return b"", b""
    kind, length = _LENGTH.unpack(head)
    body = pipe.read(length)
    return (kind, body) if len(body) == length else (b"", b"")


def pack(arrays: Feeds) -> bytes:
    """Return names and arrays; the names travel as data, since `numpy.savez` has keywords of its own."""
    buffer = io.BytesIO()
    np.savez(buffer, np.array(list(arrays), dtype=np.str_), *arrays.values())
    return buffer.getvalue()


def unpack(body: bytes) -> Tensors:
    """Return the arrays that `pack` packed."""
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        names = archive["arr_0"].tolist()
        return {name: archive[f"arr_{number}"] for number, name in enumerate(names, 1)}


def pack_error(error: CnnccError) -> bytes:
    """Return an error of ours as bytes."""
    return "\0".join([type(error).__name__, error.message, error.hint, *error.where]).encode()


def unpack_error(body: bytes) -> CnnccError:
    """Return the error that `pack_error` packed."""
    kind, message, hint, *where = body.decode().split("\0")
    return getattr(errors, kind, RunFailed)(message, where=where, hint=hint)
