"""Golden inputs and outputs: what an engine must reproduce, checked with NumPy alone.

``golden.npz`` is a plain ``.npz`` (stored, not compressed) whose bytes depend on its content alone. It holds one
sample's inputs, the outputs that the model gives in float64 rounded to their dtype, and how far an engine may be off
(see `cnncc.compiler.parity`), so that a device that has only this package can check an engine after an update.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import BundleRefused
from cnncc_runtime.specs import DTYPES, Feeds, Tensors

SCHEMA = "cnncc.golden/1"

MAX_BYTES = 1 << 30
"""Larger golden files are refused: one sample of a CNN's inputs and outputs is far smaller."""

_INDEX = "golden.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can say


@dataclass(frozen=True)
class GoldenLimit:
    """How far one output may be off.

    Attributes:
        rel_l2: Bound on ‖error‖₂ / ‖golden‖₂; None where the golden output is zero.
        max_scaled: Bound on max|error| / max|golden| (on max|error| where the golden output is zero).
    """

    rel_l2: float | None
    max_scaled: float


@dataclass(frozen=True, eq=False)
class Golden:
    """One sample and what the model makes of it.

    Attributes:
        feeds: Inputs by name.
        outputs: Outputs by name.
        limits: Bounds by output name; integer outputs, which must be equal, have none.
    """

    feeds: Tensors
    outputs: Tensors
    limits: dict[str, GoldenLimit]


@dataclass(frozen=True)
class _Index:
    schema: str
    feeds: tuple[str, ...]
    outputs: tuple[str, ...]
    limits: dict[str, GoldenLimit]


class Runs(Protocol):
    """Anything that computes outputs, as a session does."""

    def run(self, feeds: Feeds) -> Tensors:
        """Return the outputs by name."""
        ...


def golden_bytes(feeds: Feeds, outputs: Mapping[str, NDArray[Any]], limits: Mapping[str, GoldenLimit]) -> bytes:
    """Write golden data; equal arrays give equal bytes.

    Args:
        feeds: Inputs by name.
        outputs: Outputs by name.
        limits: Bounds by output name.
    """
    index = _Index(SCHEMA, tuple(feeds), tuple(outputs), dict(limits))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, _INDEX, canonical_json(msgspec.to_builtins(index)))
        for role, arrays in (("feed", feeds), ("output", outputs)):
            for number, array in enumerate(arrays.values()):
                content = io.BytesIO()
                # not ascontiguousarray, which would turn a 0-d array into a 1-d one
                np.lib.format.write_array(content, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
                _add(archive, f"{role}.{number}.npy", content.getvalue())
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # the same on every system that writes one
    info.external_attr = 0o644 << 16
    archive.writestr(info, content)


def read_golden(path: Path) -> Golden:
    """Read golden data from a file that may be damaged or hostile; nothing in it is executed.

    Raises:
        BundleRefused: Missing, truncated, too large, compressed, of unknown schema, or inconsistent.
    """
    hint = "build the bundle again"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BundleRefused(f"the golden data is larger than {MAX_BYTES >> 20} MiB", where=[str(path)], hint=hint)
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise BundleRefused(f"the golden data cannot be read: {exc}", where=[str(path)], hint=hint) from exc


def _read(archive: zipfile.ZipFile) -> Golden:
    """Read an open archive.

    Raises:
        ValueError: It is not what `golden_bytes` writes.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, which golden data never is")
    if sum(member.file_size for member in members) > MAX_BYTES:
        raise ValueError("it says that it holds more than it may")
    if _INDEX not in archive.namelist():
        raise ValueError(f"it holds no {_INDEX}")
    index = msgspec.json.decode(archive.read(_INDEX), type=_Index)
    if index.schema != SCHEMA:
        raise ValueError(f"its schema is '{index.schema}', this cnncc reads '{SCHEMA}'")
    roles = {"feed": index.feeds, "output": index.outputs}
    wanted = {f"{role}.{number}.npy" for role, names in roles.items() for number in range(len(names))}
    if sorted(archive.namelist()) != sorted({_INDEX, *wanted}):
        raise ValueError("its members are not those that its index names")
    if any(len(set(names)) != len(names) for names in roles.values()):
        raise ValueError("its index names an array twice")
    arrays = {
        role: {name: _array(archive.read(f"{role}.{number}.npy")) for number, name in enumerate(names)}
        for role, names in roles.items()
    }
    return Golden(arrays["feed"], arrays["output"], index.limits)


def _array(content: bytes) -> NDArray[Any]:
    """Read one ``.npy`` whose header may lie about its size; NumPy's own reader would allocate what it says.

    Raises:
        ValueError: Not a plain array of a known dtype, or of another size than it says.
    """
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array is of an unknown .npy version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran or dtype.name not in DTYPES or not dtype.isnative:
        raise ValueError(f"an array is of dtype {dtype}, or not in row-major order")
    data = content[stream.tell() :]
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array's size is not what its header says")
    return np.frombuffer(data, dtype).reshape(shape)


def check_golden(session: Runs, golden: Golden) -> tuple[str, ...]:
    """Run an engine on the golden inputs and say where it leaves the allowed error.

    Args:
        session: An open engine.
        golden: From `read_golden`.

    Returns:
        Sentences, one per failing output; empty when the engine is right.

    Raises:
        RunFailed: The engine failed.
    """
    found = session.run(golden.feeds)
    return tuple(
        problem
        for name, wanted in golden.outputs.items()
        if (problem := _difference(name, wanted, found.get(name), golden.limits.get(name)))
    )


def _difference(name: str, wanted: NDArray[Any], found: NDArray[Any] | None, limit: GoldenLimit | None) -> str:
    if found is None:
        return f"output '{name}' is missing"
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return f"output '{name}' is {found.dtype}{list(found.shape)}, not {wanted.dtype}{list(wanted.shape)}"
    if wanted.dtype.kind != "f" or limit is None:
        return "" if np.array_equal(found, wanted) else f"output '{name}' differs from the golden one"
    finite = np.isfinite(wanted)
    same = np.array_equal(wanted[~finite], found[~finite], equal_nan=True)
    if not same or not np.isfinite(found[finite]).all():
        return f"output '{name}' is NaN or Inf where the golden one is not, or the other way round"
    exact = wanted[finite].astype(np.float64)
    error = found[finite].astype(np.float64) - exact
    peak = float(np.max(np.abs(exact), initial=0.0)) or 1.0
    scaled = float(np.max(np.abs(error), initial=0.0)) / peak
    norm = float(np.linalg.norm(exact / peak))
    relative = float(np.linalg.norm(error / peak)) / norm if norm else 0.0
    if scaled > limit.max_scaled or (limit.rel_l2 is not None and relative > limit.rel_l2):
        return (
            f"output '{name}' is off by {relative:.1e} relative L2 and {scaled:.1e} of its largest value; allowed are "
            f"{0.0 if limit.rel_l2 is None else limit.rel_l2:.1e} and {limit.max_scaled:.1e}"
        )
    return ""
