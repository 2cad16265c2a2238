"""Reads the pickles of the Detectron2 and Caffe2 model zoos without running anything that they name."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

from convmask.checkpoint.plain import encode_latin1, numpy_stand_ins, to_plain


class _Dict(dict):
    """Stands for OrderedDict. Attributes that the file gives it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Admits numpy's arrays (as records), OrderedDict and bytes; refuses every other name."""

    def __init__(self, data: bytes) -> None:
        # strings of Python 2 are bytes; latin1 keeps each of them
        super().__init__(io.BytesIO(data), encoding="latin1")
        # One small object can be given to these functions again and again: what they may build in all is bounded.
        self.budget = len(data)
        self.admitted = {
            **numpy_stand_ins(),
            ("_codecs", "encode"): self._encode,
            ("collections", "OrderedDict"): self._ordered_dict,
            ("__builtin__", "bytes"): self._no_bytes,
            ("builtins", "bytes"): self._no_bytes,
        }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for ``module.name``."""
        try:
            return self.admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; a pickle may hold numpy arrays, numbers, strings and containers only"
            ) from None

    def _spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise pickle.UnpicklingError("its contents are larger than the file")

    def _encode(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes in protocol 2."""
        self._spend(len(text))
        return encode_latin1(text, encoding)

    def _ordered_dict(self, pairs: Any = ()) -> _Dict:
        self._spend(len(pairs))
        return _Dict(pairs)

    def _no_bytes(self) -> bytes:
        """How Python 3 writes empty bytes in protocol 2."""
        return b""


def load_pickle(data: bytes) -> Any:
    """The contents of a pickle of plain values: numpy arrays, numbers, strings, dicts, lists, tuples.

    Strings of Python 2 are read as latin1, as Detectron2 does. Any exception may be raised for a malformed or forbidden
    pickle; nothing it names is imported or called.
    """
    _check_memo(data)
    return to_plain(_PlainUnpickler(data).load(), budget=len(data))


def _check_memo(data: bytes) -> None:
    # The unpickler keeps a table of shared objects, as long as the largest index that the pickle uses: 4 bytes could
    # make it 32 GB. An honest pickle numbers the objects one by one. Reading the opcodes also finds every truncation.
    for position, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > position + 1:
            raise pickle.UnpicklingError(f"it numbers an object {argument} among its first {position + 1}")
