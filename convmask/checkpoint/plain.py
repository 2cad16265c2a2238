"""What an unpickler may build in place of numpy's objects, and how plain arrays are made from it afterwards.

numpy pickles an array as calls of its own functions, with the shape, dtype and bytes as their arguments. None of these
functions is called here: stand-ins of the same names record the arguments, and :func:`to_plain` turns the records into
arrays once their sizes have been checked. So no memory is taken for what a file declares but does not hold.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

# numbers, truth values and strings of fixed length: no objects, no records
_PLAIN_DTYPE = re.compile(r"[<>=|]?[?biufcSU]\d{0,9}")


class _DTypeRecord:
    """Stands for ``numpy.dtype``."""

    def __init__(self, spec: Any, *_: Any) -> None:
        self.spec = spec
        self.byte_order = "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, field names, fields, item size, alignment, flags, ...)
        if any(part is not None for part in state[2:5]):
            raise ValueError("it holds an array of records")
        self.byte_order = _text(state[1])

    def to_dtype(self) -> np.dtype:
        """The dtype, if it is one of plain values."""
        spec = _text(self.spec)
        if not _PLAIN_DTYPE.fullmatch(spec):
            raise ValueError(f"it holds an array of dtype {spec!r}")
        dtype = np.dtype(spec)
        return dtype if self.byte_order in "=|" else dtype.newbyteorder("<" if self.byte_order == "<" else ">")


class _ArrayRecord:
    """Stands for ``numpy.ndarray``."""

    shape: Any = None
    dtype: Any = None
    data: Any = None
    fortran: bool = False

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, fortran, self.data = state
        self.fortran = bool(fortran)


class _ScalarRecord:
    """Stands for numpy's scalars."""

    def __init__(self, dtype: Any, data: Any = b"") -> None:
        self.dtype = dtype
        self.data = data


def _reconstruct(*_: Any) -> _ArrayRecord:
    return _ArrayRecord()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _ArrayRecord:
    record = _ArrayRecord()
    record.__setstate__((1, shape, dtype, order == "F", data))
    return record


def encode_latin1(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` for the one encoding in which pickles write bytes. Raises ValueError for another."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"it names the encoding {encoding!r}")
    return text.encode("latin1")


def numpy_stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """(module, name) -> stand-in, for every name under which numpy 1 and 2 pickle arrays and scalars.

    Each stand-in bears the module and name that it stands for, as ``torch.serialization.add_safe_globals`` wants it.
    """
    table: dict[tuple[str, str], Callable[..., Any]] = {}
    for package in ("numpy.core", "numpy._core"):
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _ScalarRecord),
            ("numeric", "_frombuffer", _from_buffer),
        ):
            table[f"{package}.{module}", name] = _bear_name(_alias(function), f"{package}.{module}", name)
    # how the bytes of arrays are written in the protocol of PyTorch's files
    table["_codecs", "encode"] = _bear_name(_alias(encode_latin1), "_codecs", "encode")
    # Instances are built through the class itself, so it is the class that has to bear the name.
    table["numpy", "ndarray"] = _bear_name(_ArrayRecord, "numpy", "ndarray")
    table["numpy", "dtype"] = _bear_name(_DTypeRecord, "numpy", "dtype")
    return table


def _alias(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return call


def _bear_name(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} stands where numpy writes a string")
    return value


class _Converter:
    """Turns one unpickled value into plain containers, arrays, numbers. ``budget`` bounds the bytes of all arrays."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        # by identity, so that shared parts stay shared and cycles end
        self.done: dict[int, tuple[Any, Any]] = {}

    def convert(self, value: Any) -> Any:
        if id(value) in self.done:
            return self.done[id(value)][1]
        if isinstance(value, _ArrayRecord):
            result: Any = self._array(value.data, value.dtype, value.shape, value.fortran)
        elif isinstance(value, _ScalarRecord):
            result = self._array(value.data, value.dtype, (), False)[()]
        elif isinstance(value, dict):
            return self._dict(value)
        elif type(value) is list:
            result = []
            self.done[id(value)] = value, result
            result.extend(self.convert(item) for item in value)
            return result
        elif type(value) is tuple:
            result = tuple(self.convert(item) for item in value)
        else:
            return value
        self.done[id(value)] = value, result
        return result

    def _dict(self, value: dict) -> dict:
        # A file may give an OrderedDict attributes named like its methods: dict's own are called, and the result has no
        # attribute but the versions of modules that PyTorch stores with a state dict.
        kinds = (Counter, OrderedDict)
        result: dict = next((kind() for kind in kinds if isinstance(value, kind)), {})
        self.done[id(value)] = value, result
        for key, item in dict.items(value):
            result[self.convert(key)] = self.convert(item)
        metadata = getattr(value, "_metadata", None)
        if isinstance(result, OrderedDict) and isinstance(metadata, dict):
            result._metadata = self.convert(metadata)  # type: ignore[attr-defined]
        return result

    def _array(self, data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
        if not isinstance(dtype, _DTypeRecord):
            raise ValueError("it holds an array without a dtype")
        # pickles of Python 2 hold the bytes as a string
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(raw, bytes | bytearray):
            raise ValueError("it holds an array of objects")
        shape = (shape,) if isinstance(shape, int) else shape
        if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"it holds an array of shape {str(shape)[:100]}")
        plain = dtype.to_dtype()
        if math.prod(shape) * plain.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} and dtype {plain} has {len(raw)} bytes")
        self.budget -= len(raw)
        if self.budget < 0:
            raise ValueError("its arrays are larger than the file")
        array = np.frombuffer(raw, plain) if raw else np.empty(0, plain)
        # a copy in the machine's byte order: the bytes themselves cannot be written to
        return array.reshape(shape, order="F" if fortran else "C").astype(plain.newbyteorder("="))


def to_plain(value: Any, budget: int) -> Any:
    """A copy of an unpickled ``value`` in which every record is a numpy array or scalar, and every dict a plain one.

    Args:
        value: what the unpickler built. Values of other kinds (tensors, strings, numbers) are kept as they are.
        budget: bytes that all arrays together may take.

    Raises:
        ValueError: a record does not describe an array of plain values. RecursionError: containers nested too deeply.
    """
    return _Converter(budget).convert(value)
