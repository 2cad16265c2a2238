"""Files of any supported source to clean files of ours, and back to an original's names."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import convmask
from convmask.checkpoint.errors import CheckpointError
from convmask.checkpoint.inversion import find_inverter, invert
from convmask.checkpoint.loading import load_file
from convmask.checkpoint.provenance import Row, trace
from convmask.checkpoint.recognition import State, converter_for, read_checkpoint, recognise, weights_of
from convmask.utils.files import write_atomically

SUFFIXES = (".pth", ".safetensors")

# Buffers that older files store and every model makes from its config.
_FROM_CONFIG = ("pixel_mean", "pixel_std")


@dataclass
class Conversion:
    """A converted checkpoint.

    Attributes:
        source: what the file was recognised as.
        state: weights by their new names.
        rows: what became of each tensor.
        config: that fits, "" if unknown.
        hint: conventions that the weights expect.
        relative: names are relative to a part of a model, as those of backbones are.
        entry: of the file that holds the weights; "" for our own files.
    """

    source: str
    state: State
    rows: list[Row] = field(default_factory=list)
    config: str = ""
    hint: str = ""
    relative: bool = False
    entry: str = ""


def convert(path: str, *, average: bool = False) -> Conversion:
    """Reads a file and converts its weights to our names and layout.

    Args:
        path: as of :func:`convmask.checkpoint.load_file`.
        average: take the moving average of the weights, ``ema_model``, where the file has one.

    Raises:
        CheckpointError: the file cannot be read or holds no weights.
    """
    checkpoint = read_checkpoint(path, average=average)
    contents = load_file(path.partition("?matching_heuristics=")[0])
    if checkpoint.averaged:
        contents["model"] = contents.pop("ema_model")
    raw = weights_of(contents)
    converter = converter_for(raw)
    known = converter.convert if converter else _taken_whole
    rows = trace(raw, lambda state: _without_config_buffers(known(state)))
    state = _without_config_buffers(dict(checkpoint.state))
    return Conversion(checkpoint.kind, state, rows, checkpoint.config, checkpoint.hint, relative=checkpoint.relative)


def _taken_whole(state: State) -> State:
    whole = dict(state)
    state.clear()
    return whole


def _without_config_buffers(state: State) -> State:
    return {
        name: value
        for name, value in state.items()
        if name not in _FROM_CONFIG and ".anchor_generator.cell_anchors." not in f".{name}"
    }


def convert_to_original(path: str, *, average: bool = False) -> Conversion:
    """Reads weights by our names, or any that are converted to them, and gives them an original's names and layout.

    Raises:
        CheckpointError: the file cannot be read; there is no original with a way back; or something would be lost.
    """
    ours = convert(path, average=average)
    inverter = find_inverter(ours.state, path)
    contents = invert(inverter, ours.state, path)
    inverse = inverter.invert
    assert inverse is not None
    return Conversion(
        inverter.name,
        contents[inverter.entry],
        trace(ours.state, inverse),
        recognise(dict(contents), path).config,
        entry=inverter.entry,
    )


def check_target(path: str, force: bool) -> None:
    """Makes sure that a result can be written, before work starts.

    Raises:
        CheckpointError: another ending than ``SUFFIXES``, no such folder, or an existing file without ``force``.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: the ending is {target.suffix!r}, not one of {', '.join(SUFFIXES)}")
    if target.suffix == ".safetensors":
        _safetensors()
    if not target.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {target.parent}")
    if target.is_dir() or (target.exists() and not force):
        raise CheckpointError(f"{path}: exists (--force replaces a file)")


def metadata_of(conversion: Conversion, path: str) -> dict[str, str]:
    """What a file of ours says about itself."""
    entries = {
        "__author__": "ConvMask",
        "convmask_version": convmask.__version__,
        "config": conversion.config,
        "source": conversion.source,
        "source_file": os.path.basename(path),
        "conventions": conversion.hint,
        "matching_heuristics": "True" if conversion.relative else "",
    }
    return {key: value for key, value in entries.items() if value}


def save_weights(path: str, conversion: Conversion, metadata: Mapping[str, str]) -> None:
    """Writes the weights, and for files of ours the metadata, under a temporary name; then renames it.

    Raises:
        OSError: the file cannot be written.
    """
    # Files hold each tensor by itself: views of one memory would be written as a whole each, or refused.
    state = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in conversion.state.items()
    }
    if path.endswith(".safetensors"):
        content = _safetensors().save(state, {"format": "pt", **metadata})
    else:
        buffer = io.BytesIO()
        torch.save({conversion.entry or "model": state, **metadata}, buffer)
        content = buffer.getvalue()
    write_atomically(path, content)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("safetensors files need the package `safetensors`: pip install safetensors") from error
    return safetensors.torch


def as_json(conversion: Conversion, metadata: Mapping[str, str]) -> bytes:
    """The metadata and what became of each tensor."""
    rows = [
        {"what": row.status, "sources": row.sources, "target": row.target, "shape": row.shape}
        for row in conversion.rows
    ]
    return json.dumps({**metadata, "tensors": rows}, indent=1).encode()
