"""Rows of an array inside a ``.npz``, read one at a time, without the array in memory.

The format of the header is NumPy's (numpy.lib.format, NEP 1), that of the container PKWARE's APPNOTE.TXT 6.3, 4.3.
"""

from __future__ import annotations

import bisect
import copy
import io
import math
import os
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cnncc_runtime.errors import DataRefused

_MAX_HEADER = 1 << 16
"""More than NumPy reads of a header that it does not trust (10,000 bytes), and all that is unpacked to look at it."""

_SHOWN = 200
_PACKED_PIECE = 1 << 14
_PIECE = 1 << 18
_POINTS = 128
_MIN_SPACING = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, lengths of the file name and of the extra field (APPNOTE 4.3.7)."""


class _Stored:
    """Reads a member that is not compressed."""

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self.offset = 0

    def read(self, handle: int, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end."""
        at = self._start + self.offset
        data = os.pread(handle, min(size, self._end - at), at)
        self.offset += len(data)
        return data

    def forward(self, handle: int, size: int) -> None:
        """Leave out bytes."""
        self.offset += size

    def copy(self) -> _Stored:
        """Return a reader that goes on from here."""
        return copy.copy(self)


class _Deflated:
    """Inflates a member, forwards only."""

    def __init__(self, start: int, end: int) -> None:
        self._at, self._end = start, end
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self.offset = 0

    def read(self, handle: int, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end.

        Raises:
            zlib.error: Damaged.
        """
        while not self._inflater.eof:
            packed = self._inflater.unconsumed_tail
            if not packed:
                packed = os.pread(handle, min(_PACKED_PIECE, self._end - self._at), self._at)
                self._at += len(packed)
            if data := self._inflater.decompress(packed, size):
                self.offset += len(data)
                return data
            if not packed:
                break
        return b""

    def forward(self, handle: int, size: int) -> None:
        """Leave out bytes."""
        while size > 0 and (data := self.read(handle, min(size, _PIECE))):
            size -= len(data)

    def copy(self) -> _Deflated:
        """Return a reader that goes on from here."""
        other = copy.copy(self)
        other._inflater = self._inflater.copy()
        return other


_Reader: TypeAlias = "_Stored | _Deflated"
_READERS: dict[int, type[_Stored] | type[_Deflated]] = {
    zipfile.ZIP_STORED: _Stored,
    zipfile.ZIP_DEFLATED: _Deflated,
}
_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
"""How much larger data may be than what it is packed in: deflate's bound (zlib, *Technical Details*)."""


class NpyRows:
    """The rows of one array.

    The first row asked for costs a pass over the whole member, which checks its CRC-32. Deflate can be read forwards
    only, so that pass leaves copies of the inflater behind (40 KB each, 128 at most), and any row is inflated from
    the nearest one before it, at most 1/128 of the member away, or 1 MiB.

    Attributes:
        shape: Sizes, rows first.
        dtype: Element type, anything but Python objects.
    """

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, member: str) -> None:
        """Read the header.

        Args:
            file: The open archive.
            archive: Its directory.
            member: Name in it.

        Raises:
            DataRefused: A form that cannot be read by rows; says how to save it.
            ValueError: Damaged, or the header does not fit the data. Also the errors of ``zipfile``.
        """
        info = archive.getinfo(member)
        self._name = member.removesuffix(".npy")
        if info.compress_type not in _READERS:
            raise DataRefused(
                f"'{self._name}' in {file.name} is compressed in a way that NumPy does not write",
                hint="save it with numpy.savez or numpy.savez_compressed",
            )
        start = _start(file, info)
        end = start + info.compress_size
        if end > os.fstat(file.fileno()).st_size or info.file_size > info.compress_size * _RATIO[info.compress_type]:
            raise ValueError(f"'{self._name}' is not as large as the archive says")
        with archive.open(info) as stream:
            head = io.BytesIO(stream.read(_MAX_HEADER))
        self.shape, self.dtype = self._described(file.name, head)
        self._header = head.tell()
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self.shape and self._row_bytes * self.shape[0] != info.file_size - self._header:
            raise ValueError(f"'{self._name}' is not as large as its header says")
        self._size, self._sum = info.file_size, info.CRC
        self._points: list[_Reader] = [_READERS[info.compress_type](start, end)]
        self._checked = False

    def _described(self, path: str, head: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of a header, and leave the stream behind it."""
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            shape, fortran, dtype = readers[np.lib.format.read_magic(head)](head)
        except Exception as exc:  # NumPy parses Python here, and whatever its parsers raise comes out
            raise ValueError(f"'{self._name}' is no .npy of version 1 or 2: {str(exc)[:_SHOWN]}") from exc
        if dtype.hasobject:
            raise DataRefused(
                f"{path} is not a .npz file that can be read: '{self._name}' holds pickled Python objects",
                hint=f"save numbers: {self._name}.astype('float32')",
            )
        if fortran and len(shape) > 1:
            raise DataRefused(
                f"'{self._name}' in {path} is stored by columns (Fortran order), so no row can be read by itself",
                hint=f"save numpy.ascontiguousarray({self._name})",
            )
        if any(size < 0 for size in shape):
            raise ValueError(f"'{self._name}' has a negative size")
        return shape, dtype

    def row(self, handle: int, index: int) -> NDArray[Any]:
        """Read one row.

        Args:
            handle: Of the archive's file, opened to read.
            index: From 0 up to ``shape[0]``.

        Returns:
            ``[1, …]``, writable.

        Raises:
            ValueError: The member is damaged.
            zlib.error: The same.
        """
        if not self._checked:
            self._check(handle)
        offset = self._header + index * self._row_bytes
        nearest = bisect.bisect_right(self._points, offset, key=lambda point: point.offset) - 1
        reader = self._points[nearest].copy()
        reader.forward(handle, offset - reader.offset)
        data = bytearray()
        while len(data) < self._row_bytes:
            piece = reader.read(handle, self._row_bytes - len(data))
            if not piece:
                raise ValueError(f"'{self._name}' ends early")
            data += piece
        return np.frombuffer(data, self.dtype).reshape(1, *self.shape[1:])

    def _check(self, handle: int) -> None:
        """Go through the member once: check its sum, leave points to start from."""
        reader = self._points[0].copy()
        points, found = self._points[:1], 0
        spacing = max(_MIN_SPACING, self._size // _POINTS)
        while reader.offset <= self._size and (data := reader.read(handle, _PIECE)):
            found = zlib.crc32(data, found)
            if reader.offset - points[-1].offset >= spacing:
                points.append(reader.copy())
        if reader.offset != self._size or found != self._sum:
            raise ValueError(f"'{self._name}' is damaged: its size or its CRC-32 is wrong")
        self._points, self._checked = points, True


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: behind its local header."""
    raw = os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
    if len(raw) != _LOCAL_HEADER.size:
        raise zipfile.BadZipFile("it ends within a member's header")
    _, name, extra = _LOCAL_HEADER.unpack(raw)
    return int(info.header_offset + _LOCAL_HEADER.size + name + extra)
