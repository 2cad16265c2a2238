"""What a method tells the viewer about itself: thresholds that can be moved, and pictures of its inside.

A method that has any says so in a module ``convmask.projects.<method>.viewer``, with one or both of

``thresholds(cfg) -> Sequence[Threshold]``
    those of its post-processing that make sense for a model of this config;
``inner_pictures(model, inputs, metadata, chosen) -> Mapping[str, np.ndarray]``
    pictures (H, W, 3) uint8 RGB by their captions, for Detectron2's dict of one image. ``chosen`` is the number of the
    detection, in descending order of score and from 0, for pictures of a single one; it may be too large.

So ``convmask`` imports no method, and one without such a module is shown without inner pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from convmask import projects
from convmask.engine.errors import errors_of_config


class Threshold(NamedTuple):
    """A number that decides about results and that a built model can change.

    Attributes:
        label: what is shown beside it.
        key: of the config, ``"MODEL.KNET.INFERENCE.MASK_THRESH"``.
        path: where the model has it, ``"inference_options.mask_threshold"``: attributes, fields of a frozen dataclass,
            or keys of a dict.
        low: least value that can be chosen.
        high: greatest value that can be chosen.
    """

    label: str
    key: str
    path: str
    low: float = 0.0
    high: float = 1.0

    def read(self, cfg: CfgNode) -> float:
        """The value by the config, cut to the range that can be chosen."""
        value = reduce(lambda node, name: node[name], self.key.split("."), cfg)
        return min(max(float(value), self.low), self.high)

    def write(self, model: nn.Module, value: float) -> None:
        """Lets the model decide by ``value`` from now on.

        Raises:
            ValueError: the value is not in the range that can be chosen.
        """
        if not self.low <= value <= self.high:
            raise ValueError(f"{self.label} is {value}, not between {self.low:g} and {self.high:g}")
        _set(model, self.path.split("."), value)


def _set(owner: Any, path: Sequence[str], value: float) -> Any:
    """Sets what ``path`` leads to; returns the owner, a new one where it cannot be changed in place."""
    name = path[0]
    if len(path) > 1:
        value = _set(owner[name] if isinstance(owner, dict) else getattr(owner, name), path[1:], value)
    if isinstance(owner, dict):
        owner[name] = value
    elif is_dataclass(owner) and not isinstance(owner, type):
        return replace(owner, **{name: value})
    else:
        setattr(owner, name, value)
    return owner


def architecture_of(cfg: CfgNode) -> type[nn.Module]:
    """The class that ``MODEL.META_ARCHITECTURE`` names.

    Raises:
        ConfigError: there is none of that name.
    """
    with errors_of_config("the model"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)


def thresholds_of(cfg: CfgNode) -> list[Threshold]:
    """The thresholds of the method of a config; empty where it tells none.

    Raises:
        ConfigError: an unknown ``MODEL.META_ARCHITECTURE``.
    """
    part = projects.part_of(architecture_of(cfg), "viewer")
    return list(part.thresholds(cfg)) if part is not None and hasattr(part, "thresholds") else []


@torch.no_grad()
def inner_pictures_of(
    model: nn.Module, inputs: Mapping[str, Any], metadata: Metadata, chosen: int = 0
) -> dict[str, np.ndarray]:
    """The inner pictures of a model for one image; empty where its method has none.

    Args:
        model: in evaluation mode.
        inputs: Detectron2's dict of the image.
        metadata: names and colours.
        chosen: number of a detection, see the module.
    """
    part = projects.part_of(type(model), "viewer")
    if part is None or not hasattr(part, "inner_pictures"):
        return {}
    return dict(part.inner_pictures(model, inputs, metadata, chosen))
