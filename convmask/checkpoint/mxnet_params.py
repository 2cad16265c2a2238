"""Reads MXNet's ``.params`` files (``mx.nd.save``) from their binary layout.

The file: uint64 magic, uint64 reserved, uint64 count, the arrays, uint64 count, the names (uint64 length, bytes).
An array: uint32 magic of its version, [int32 storage type], shape, int32 device type, int32 device, int32 dtype, data
in C order. Everything is little-endian.
"""

from __future__ import annotations

import math
import struct

import numpy as np

LIST_MAGIC = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = {
    0: "<f4",
    1: "<f8",
    2: "<f2",
    3: "u1",
    4: "<i4",
    5: "i1",
    6: "<i8",
    7: "?",
    8: "<i2",
    9: "<u2",
    10: "<u4",
    11: "<u8",
}
_BFLOAT16 = 12
_MAX_DIMENSIONS = 32


class _Reader:
    """Reads values one after the other and refuses to pass the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"it ends at byte {len(self.data)}, inside a value of {size} bytes at {self.position}")
        self.position += size
        return self.data[self.position - size : self.position]

    def values(self, layout: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def count(self, smallest: int, what: str) -> int:
        """A number of things that take ``smallest`` bytes each at least."""
        (count,) = self.values("Q")
        if count * smallest > len(self.data) - self.position:
            raise ValueError(f"it declares {count} {what}, more than fit into the file")
        return count


def load_mxnet_params(data: bytes) -> dict[str, np.ndarray]:
    """Name -> array of the bytes of a ``.params`` file. Names keep their prefixes ``arg:`` and ``aux:``.

    bfloat16 becomes float32. Raises ValueError for anything that is not a complete file of dense, named arrays.
    """
    reader = _Reader(data)
    magic, _ = reader.values("QQ")
    if magic != LIST_MAGIC:
        raise ValueError(f"it starts with {magic:#x} instead of MXNet's {LIST_MAGIC:#x}")
    arrays = [_array(reader) for _ in range(reader.count(4, "arrays"))]
    names = [reader.take(reader.count(1, "characters")).decode() for _ in range(reader.count(8, "names"))]
    if len(names) != len(arrays):
        raise ValueError(f"it holds {len(arrays)} arrays and {len(names)} names")
    if len(set(names)) != len(names):
        raise ValueError("it holds two arrays of the same name")
    if reader.position != len(data):
        raise ValueError(f"{len(data) - reader.position} bytes follow its end")
    return dict(zip(names, arrays, strict=True))


def _array(reader: _Reader) -> np.ndarray:
    shape = _shape(reader)
    if shape is None:
        return np.empty(0, np.float32)
    _device_type, _device, dtype = reader.values("iii")
    size = math.prod(shape)
    if dtype == _BFLOAT16:
        # the upper half of a float32
        halves = np.frombuffer(reader.take(2 * size), "<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise ValueError(f"it holds an array of the unknown dtype {dtype}")
    kind = np.dtype(_DTYPES[dtype])
    return np.frombuffer(reader.take(size * kind.itemsize), kind).reshape(shape).astype(kind.newbyteorder("="))


def _shape(reader: _Reader) -> tuple[int, ...] | None:
    """The shape, None for an array without data."""
    (magic,) = reader.values("I")
    if magic in (_V2, _V3):
        (storage,) = reader.values("i")
        if storage != 0:
            raise ValueError(f"it holds a sparse array (storage type {storage})")
    if magic in (_V1, _V2, _V3):
        (dimensions,) = reader.values("i")
        # numpy semantics (version 3): -1 is "unknown" and 0 a scalar. Before, 0 is "unknown".
        if dimensions < (0 if magic == _V3 else 1):
            return None
        width = "q"
    else:
        # the oldest layout has no magic: the number of dimensions comes first, and sizes have 32 bits
        dimensions, width = magic, "I"
        if dimensions == 0:
            return None
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"it holds an array of {dimensions} dimensions")
    shape = reader.values(width * dimensions)
    if any(size < 0 for size in shape):
        raise ValueError(f"it holds an array of shape {shape}")
    return shape
