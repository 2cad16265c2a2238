"""Tells by its keys what kind of checkpoint a file is, and converts it to the names of the models here."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from convmask.checkpoint.errors import CheckpointError
from convmask.checkpoint.loading import load_file

State = dict[str, torch.Tensor]

# A model has a few thousand parameters at most. Matching names takes a time that grows with their number.
_MAX_TENSORS = 50_000
# entries that hold the weights, in order of preference: raw weights, their average, other libraries' names
_WEIGHT_ENTRIES = ("model", "state_dict", "ema_model", "model_state", "blobs")
# what DataParallel, DistributedDataParallel and torch.compile put in front of every name
_WRAPPERS = ("module.", "_orig_mod.")
# MXNet's learned arguments and running statistics
_MXNET_PREFIXES = ("arg:", "aux:")


@dataclass(frozen=True)
class Converter:
    """How one kind of checkpoint becomes a state dict of ours. See :func:`register_converter`."""

    name: str
    matches: Callable[[Mapping[str, torch.Tensor]], bool]
    convert: Callable[[State], State]
    hint: str = ""
    config: Callable[[Mapping[str, torch.Tensor]], str] | None = None
    relative: bool = False


@dataclass
class Checkpoint:
    """A checkpoint that has been read, recognised and converted.

    Attributes:
        path: where it came from.
        kind: what it was recognised as, for messages.
        state: weights by their names here, on the CPU.
        rest: everything else in the file (optimizer, scheduler, iteration, ...).
        relative: names are relative to some part of the model, which is found by their endings.
        unused: weights that the converter knows no place for, by their names in the file.
        ignored: entries among the weights that are no arrays.
        hint: the conventions (channel order, pixel mean, strides) that the weights expect.
        config: the config that fits the file, "" if unknown.
        averaged: the weights are the moving average (``ema_model``).
    """

    path: str
    kind: str
    state: State
    rest: dict[str, Any] = field(default_factory=dict)
    relative: bool = False
    unused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    hint: str = ""
    config: str = ""
    averaged: bool = False


_CONVERTERS: dict[str, Converter] = {}


def register_converter(
    name: str,
    *,
    matches: Callable[[Mapping[str, torch.Tensor]], bool],
    hint: str = "",
    config: Callable[[Mapping[str, torch.Tensor]], str] | None = None,
    relative: bool = False,
) -> Callable[[Callable[[State], State]], Callable[[State], State]]:
    """Registers the decorated function as the converter of one kind of checkpoint.

    The function gets the file's weights (name -> tensor on the CPU; prefixes such as ``module.`` and ``arg:`` are gone)
    and returns them by the names, and in the layout, of the model here. It takes what it knows *out of* its argument
    (:func:`rename_keys` and ``pop`` do), including what is known to be of no use. What it leaves is reported as
    unmatched.

    Args:
        name: the kind of file, as messages call it ("torchvision ResNet").
        matches: whether these weights are of this kind. Must not change them. Converters registered later are asked
            first, so one of a whole model, registered by its method, comes before those of backbones.
        hint: conventions of the weights, logged when they are loaded: channel order, pixel mean, place of the stride.
        config: gives the config file that fits these weights, for the message when the model is another one.
        relative: the returned names are those of a part of the model ("res2.0.conv1.weight"). Detectron2's matching by
            the endings of names finds that part.

    Raises:
        ValueError: the name is taken.
    """

    def register(convert: Callable[[State], State]) -> Callable[[State], State]:
        if name in _CONVERTERS:
            raise ValueError(f"a checkpoint converter named {name!r} exists")
        _CONVERTERS[name] = Converter(name, matches, convert, hint, config, relative)
        return convert

    return register


def rename_keys(state: State, rules: list[tuple[str, str]]) -> State:
    """Takes every entry of ``state`` whose name a rule matches out of it and returns them by their new names.

    Args:
        state: changed in place.
        rules: (regular expression for the whole name, replacement as of :func:`re.sub`). The first that matches counts.

    Raises:
        ValueError: two entries would get the same name.
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: State = {}
    for name in list(state):
        for pattern, replacement in patterns:
            match = pattern.fullmatch(name)
            if match:
                target = match.expand(replacement)
                if target in renamed:
                    raise ValueError(f"two of its entries stand for {target}")
                renamed[target] = state.pop(name)
                break
    return renamed


def read_checkpoint(path: str, *, average: bool = False) -> Checkpoint:
    """Reads, recognises and converts a file.

    Args:
        path: as of :func:`load_file`. An appended ``?matching_heuristics=True`` has Detectron2's meaning: names are
            relative.
        average: prefer the moving average of the weights, ``ema_model``, where the file has both.

    Raises:
        CheckpointError: the file cannot be read, or holds no weights.
    """
    path, question, query = path.partition("?matching_heuristics=")
    contents = load_file(path)
    averaged = average and isinstance(contents.get("ema_model"), dict) and bool(contents["ema_model"])
    if averaged:
        contents["model"] = contents.pop("ema_model")
    checkpoint = recognise(contents, path)
    checkpoint.averaged = averaged
    if question:
        checkpoint.relative = query == "True"
    return checkpoint


def recognise(contents: dict[str, Any], path: str) -> Checkpoint:
    """Finds the weights in the contents of a file, tells what kind they are, and converts them.

    Args:
        contents: what :func:`load_file` returns.
        path: for messages.

    Raises:
        CheckpointError: there are no weights, or those of a known kind cannot be converted.
    """
    entry, weights, rest = _unwrap(contents)
    state, ignored = _tensors(weights)
    if not state:
        raise CheckpointError(f"{path}: holds no weights, only {sorted(map(str, contents))[:10]}")
    if len(state) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: holds {len(state)} tensors, more than the {_MAX_TENSORS} that are admitted")
    relative = bool(rest.pop("matching_heuristics", False)) or entry == "model_state"
    converter = converter_for(state)
    if converter is not None:
        return _convert(converter, path, state, rest, ignored)
    return Checkpoint(path, _kind(rest, entry), state, rest, relative, ignored=ignored)


def converter_for(state: Mapping[str, torch.Tensor]) -> Converter | None:
    """The converter of weights by their names in the file; None for those that are ours, or of an unknown kind."""
    return next((converter for converter in reversed(_CONVERTERS.values()) if converter.matches(state)), None)


def weights_of(contents: dict[str, Any]) -> State:
    """The weights in the contents of a file, by their names in it; prefixes such as ``module.`` are gone."""
    return _tensors(_unwrap(contents)[1])[0]


def _convert(converter: Converter, path: str, state: State, rest: dict[str, Any], ignored: list[str]) -> Checkpoint:
    remaining = dict(state)
    try:
        converted = converter.convert(remaining)
        config = converter.config(state) if converter.config else ""
    except Exception as error:
        # its names are of this kind, its values are not
        raise CheckpointError(f"{path}: looks like {converter.name}, but cannot be converted: {error!r}") from error
    return Checkpoint(
        path,
        f"{converter.name} weights",
        converted,
        rest,
        converter.relative,
        list(remaining),
        ignored,
        converter.hint,
        config,
    )


def _unwrap(contents: dict[str, Any]) -> tuple[str, dict[Any, Any], dict[str, Any]]:
    """(the entry that holds the weights or "", the weights, everything else)."""
    for entry in _WEIGHT_ENTRIES:
        if isinstance(contents.get(entry), dict):
            rest = {key: value for key, value in contents.items() if key != entry}
            return entry, contents[entry], rest
    # the file is the state dict itself
    weights = {key: value for key, value in contents.items() if _is_array(value)}
    rest = {key: value for key, value in contents.items() if not _is_array(value)}
    if isinstance(contents, OrderedDict):
        return "", _with_metadata(weights, getattr(contents, "_metadata", None)), rest
    return "", weights, rest


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        # PyTorch has no long double
        return value.dtype.kind in "biufc" and value.dtype.itemsize <= (16 if value.dtype.kind == "c" else 8)
    return isinstance(value, torch.Tensor)


def _to_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    # PyTorch takes arrays in the machine's byte order only
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))


def _tensors(weights: dict[Any, Any]) -> tuple[State, list[str]]:
    """The tensors by their names without wrappers, and the names of what is no tensor."""
    ignored = [str(key) for key, value in weights.items() if not (isinstance(key, str) and _is_array(value))]
    state = {key: _to_tensor(value) for key, value in weights.items() if isinstance(key, str) and _is_array(value)}
    metadata = getattr(weights, "_metadata", None)
    for prefix in _WRAPPERS * 2:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
            metadata = {key.removeprefix(prefix): value for key, value in metadata.items() if key} if metadata else None
    if state and all(key.startswith(_MXNET_PREFIXES) for key in state):
        state = {key[len("arg:") :]: value for key, value in state.items()}
    return _with_metadata(state, metadata), ignored


def _with_metadata(state: State, metadata: Any) -> State:
    """Keeps the versions of modules that PyTorch stores with a state dict: modules use them to load old weights."""
    if not isinstance(metadata, dict):
        return state
    versioned = OrderedDict(state)
    versioned._metadata = metadata  # type: ignore[attr-defined]
    return versioned


def _kind(rest: dict[str, Any], entry: str) -> str:
    author, architecture = rest.get("__author__"), rest.get("meta_architecture")
    if isinstance(architecture, str):
        return f"a checkpoint of {architecture}"
    if isinstance(author, str):
        return f"a Detectron2 checkpoint by {author}"
    return {"state_dict": "a checkpoint of another library", "model_state": "a pycls checkpoint"}.get(
        entry, "a Detectron2 checkpoint or plain state dict"
    )
