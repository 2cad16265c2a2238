"""FCOS as a dense head: classes, distances to the four sides, and centerness, at every location (arXiv 1904.01355).

Shapes: N images, C classes, level l of H_l x W_l locations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.nn import functional as F


class FCOSOutputs(NamedTuple):
    """What the head predicts for a batch; lists have one entry a level.

    Attributes:
        logits: (N, C, H_l, W_l) of the classes.
        distances: (N, 4, H_l, W_l) left, top, right, bottom; at least 0, in pixels divided by ``units``.
        centerness: (N, 1, H_l, W_l) logits.
        box_features: (N, width, H_l, W_l) of the box tower, for heads beside this one.
        units: pixels in a unit of the distances, of each level.
    """

    logits: list[torch.Tensor]
    distances: list[torch.Tensor]
    centerness: list[torch.Tensor]
    box_features: list[torch.Tensor]
    units: tuple[float, ...]

    def float(self) -> FCOSOutputs:
        """The same with predictions in single precision; the features, which only heads read, stay as they are."""
        logits, distances, centerness = ([x.float() for x in level] for level in self[:3])
        return FCOSOutputs(logits, distances, centerness, self.box_features, self.units)

    def sizes(self) -> list[tuple[int, int]]:
        """(H_l, W_l) of each level."""
        return [(x.shape[2], x.shape[3]) for x in self.logits]

    def pixel_distances(self) -> torch.Tensor:
        """(N, L, 4) distances of all levels, in pixels."""
        return flatten_levels([x * unit for x, unit in zip(self.distances, self.units, strict=True)])


def flatten_levels(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, channels, H_l, W_l) of each level to (N, L, channels): level after level, row by row."""
    return torch.cat([x.flatten(2) for x in levels], dim=2).transpose(1, 2)


class Scale(nn.Module):
    """A learnt factor."""

    def __init__(self) -> None:
        """Starts at 1."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` times the factor."""
        return x * self.scale


def prediction(in_channels: int, out_channels: int, kernel_size: int = 3, bias: float = 0.0) -> nn.Conv2d:
    """A convolution whose weights start small."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def tower(channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """``num_convs`` 3x3 convolutions with bias, normalisation and ReLU."""
    layers = []
    for _ in range(num_convs):
        layer = Conv2d(channels, channels, 3, padding=1, norm=get_norm(norm, channels), activation=F.relu)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
    return nn.Sequential(*layers)


class FCOSHead(nn.Module):
    """The head of FCOS; one set of weights for all levels, but for a scale of the distances."""

    @configurable
    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        num_convs: int = 4,
        norm: str = "GN",
        prior_prob: float = 0.01,
        centerness_on_boxes: bool = True,
        normalized_distances: bool = True,
    ) -> None:
        """Builds the head.

        Args:
            in_channels: of each level.
            strides: of each level, in pixels.
            num_classes: C.
            num_convs: of each tower.
            norm: of the towers.
            prior_prob: initial probability of each class.
            centerness_on_boxes: centerness comes from the box tower.
            normalized_distances: distances are rectified, in strides; otherwise exponentials, in pixels.
        """
        super().__init__()
        self.cls_tower = tower(in_channels, num_convs, norm)
        self.bbox_tower = tower(in_channels, num_convs, norm)
        self.cls_logits = prediction(in_channels, num_classes, bias=-math.log((1 - prior_prob) / prior_prob))
        self.bbox_pred = prediction(in_channels, 4)
        self.centerness = prediction(in_channels, 1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.strides = tuple(strides)
        self.centerness_on_boxes = centerness_on_boxes
        self.normalized_distances = normalized_distances

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, strides: Sequence[int]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        fcos = cfg.MODEL.EMBED_MASK.FCOS
        return {
            "in_channels": in_channels,
            "strides": strides,
            "num_classes": cfg.MODEL.EMBED_MASK.NUM_CLASSES,
            "num_convs": fcos.NUM_CONVS,
            "norm": fcos.NORM,
            "prior_prob": fcos.PRIOR_PROB,
            "centerness_on_boxes": fcos.CENTERNESS_ON_BOXES,
            "normalized_distances": fcos.NORMALIZED_DISTANCES,
        }

    def forward(self, levels: Sequence[torch.Tensor]) -> FCOSOutputs:
        """(N, in_channels, H_l, W_l) levels to predictions."""
        logits, distances, centerness, box_features = [], [], [], []
        for x, scale in zip(levels, self.scales, strict=True):
            classes, boxes = self.cls_tower(x), self.bbox_tower(x)
            logits.append(self.cls_logits(classes))
            scaled = scale(self.bbox_pred(boxes))
            distances.append(F.relu(scaled) if self.normalized_distances else scaled.exp())
            centerness.append(self.centerness(boxes if self.centerness_on_boxes else classes))
            box_features.append(boxes)
        units = tuple(float(s) for s in self.strides) if self.normalized_distances else (1.0,) * len(self.strides)
        return FCOSOutputs(logits, distances, centerness, box_features, units)
