"""Reads checkpoint files of every format that the methods and their backbones come in, and never runs their code."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from convmask.checkpoint.errors import CheckpointError
from convmask.checkpoint.mxnet_params import LIST_MAGIC, load_mxnet_params
from convmask.checkpoint.pickles import load_pickle
from convmask.checkpoint.plain import numpy_stand_ins, to_plain

# what torch.save wrote before its zip format: the pickle of PyTorch's magic number
_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# Weights hardly compress. An archive that unpacks to more than this many times its size is made to fill the memory.
_MAX_COMPRESSION = 20
_HARMLESS_SIZE = 1 << 30


def load_file(path: str) -> dict[str, Any]:
    """The contents of a checkpoint, whatever its format.

    The format is told by the file's first bytes: PyTorch's zip and legacy files, pickles of plain values (Detectron2's
    and Caffe2's zoo), ``.npz``, safetensors, MXNet's ``.params``. Nothing that the file names is imported or executed.

    Args:
        path: any path that Detectron2's PathManager resolves (``http://``, ``detectron2://``, ``catalog://``, local).

    Returns:
        The top level of the file. Weights are tensors on the CPU, or numpy arrays, as the file holds them.

    Raises:
        CheckpointError: there is no such file, or it is empty, damaged, of an unknown format, or refers to code.
    """
    path = os.fspath(path)
    local = local_path(path)
    try:
        contents = _read(local)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read: its containers are nested too deeply") from error
    except Exception as error:
        # The readers of five libraries raise what they like for damaged input: each means the same here.
        raise CheckpointError(f"{path}: cannot be read (damaged, cut off or refused): {_reason(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: holds a {type(contents).__name__}, not a dictionary of weights")
    return contents


def local_path(path: str) -> str:
    """The local file for ``path``, downloaded by Detectron2's PathManager if need be.

    Raises:
        CheckpointError: it cannot be fetched, does not exist, or is a folder.
    """
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be fetched: {_reason(error)}") from error
    if not os.path.exists(local):
        raise CheckpointError(f"{path}: there is no such file")
    if not os.path.isfile(local):
        raise CheckpointError(f"{path}: is a folder, not a checkpoint")
    return local


def _read(path: str) -> Any:
    size = os.path.getsize(path)
    if size == 0:
        raise CheckpointError("is empty")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, size)
    if head.startswith(_LEGACY_TORCH):
        # From memory: of a real file PyTorch < 2.6 asks first whether it is a tar archive as well, and then reads that
        # without its restricted unpickler (CVE-2025-32434).
        return _read_torch(io.BytesIO(_read_bytes(path)), size)
    if len(head) > 8 and head[:8] == struct.pack("<Q", LIST_MAGIC):
        return load_mxnet_params(_read_bytes(path))
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < size:
        return _read_safetensors(path)
    if head.startswith(b"\x80") or path.endswith((".pkl", ".pickle")):
        return load_pickle(_read_bytes(path))
    raise CheckpointError(_unknown_format(head))


def _read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _unknown_format(head: bytes) -> str:
    if head.lstrip()[:1] == b"<":
        return "is a web page, not a checkpoint: its download failed"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`"
    return f"is of no known checkpoint format (it starts with {head[:8]!r})"


def _read_zip(path: str, size: int) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(_HARMLESS_SIZE, _MAX_COMPRESSION * size):
        raise CheckpointError(f"is refused: its {size} bytes unpack to {unpacked}")
    if all(member.filename.endswith(".npy") for member in members):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    if any(member.filename.endswith("constants.pkl") for member in members):
        raise CheckpointError("is a TorchScript program, not a checkpoint")
    with open(path, "rb") as file:
        return _read_torch(file, size)


def _read_torch(file: IO[bytes], size: int) -> Any:
    with warnings.catch_warnings(), _safe_globals():
        warnings.simplefilter("ignore")
        contents = torch.load(file, map_location="cpu", weights_only=True)
    contents = to_plain(contents, budget=size)
    _check_tensors(contents, size)
    return contents


@contextmanager
def _safe_globals() -> Iterator[None]:
    """Admits the stand-ins for numpy, and nothing that others have declared safe, while a file is read."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(numpy_stand_ins().values()))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_tensors(contents: Any, size: int) -> None:
    """Refuses tensors that are larger than the file: views that repeat a few bytes, and tensors without data."""
    pending, seen = [contents], set()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise CheckpointError(f"holds a tensor that is not a dense array ({value.layout}, {value.device})")
            if value.numel() * value.element_size() > size:
                raise CheckpointError(f"is refused: it declares a tensor of shape {tuple(value.shape)} in {size} bytes")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


def _read_safetensors(path: str) -> dict[str, Any]:
    """The tensors, and of the file's metadata what a ``.pth`` file of ours says too."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(
            "is a safetensors file, which the package `safetensors` reads: pip install safetensors"
        ) from error
    with safe_open(path, framework="pt", device="cpu") as file:
        contents: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if metadata.get("__author__") == "ConvMask":
        contents |= {key: value for key, value in metadata.items() if key not in contents}
    return contents


def _reason(error: Exception) -> str:
    """The message of another library's exception in one line, without its advice to switch the protection off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if "Unsupported global" in line or "whose module" in line]
    if refused:
        name = refused[0].split("GLOBAL ")[-1].split(" ")[0]
        return f"it names {name}, and only weights and plain values are loaded"
    if not lines:
        return type(error).__name__
    message = lines[0][:300]
    return (
        message
        if isinstance(error, ValueError | RuntimeError | pickle.PickleError)
        else f"{type(error).__name__}: {message}"
    )
