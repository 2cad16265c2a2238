"""Writes MXNet's ``.params`` files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_params(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """``mx.nd.save`` of float32 arrays, from its binary layout."""
    data = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for array in arrays.values():
        values = np.ascontiguousarray(array, "<f4")
        data += struct.pack("<Ii", 0xF993FAC9, 0)
        data += struct.pack(f"<I{values.ndim}q", values.ndim, *values.shape)
        data += struct.pack("<iii", 1, 0, 0) + values.tobytes()
    data += struct.pack("<Q", len(arrays))
    for name in arrays:
        data += struct.pack("<Q", len(name)) + name.encode()
    path.write_bytes(data)
