"""The position-sensitive head: maps from a feature, and what RoIs read from them (arXiv 1611.07709, section 3).

Shapes: N images, R RoIs, C classes with background, the first; k x k grid cells, masks of P x P bins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import nn
from torch.nn import functional as F

from convmask.ops import inside_outside_assemble, ps_roi_pool


class Maps(NamedTuple):
    """Maps of one level.

    Attributes:
        scores: (N, k, k, 2, C, H, W), outside and inside scores of each class.
        boxes: (N, 4 k k, H, W), class-agnostic deltas.
        masks: as ``scores``, where masks are cut from maps of their own.
    """

    scores: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor | None = None


class RoiOutputs(NamedTuple):
    """What RoIs read from the maps.

    Attributes:
        scores: (R, C) class logits.
        masks: (R, 2, P, P) outside and inside logits of one class.
        classes: (R,) the classes of the masks.
        deltas: (R, 4), in units of the standard deviations.
    """

    scores: torch.Tensor
    masks: torch.Tensor
    classes: torch.Tensor
    deltas: torch.Tensor


class PositionSensitiveHead(nn.Module):
    """A 1x1 convolution that narrows the feature, and 1x1 convolutions to the maps.

    The score maps' channels are in the order (position row, position column, outside/inside, class): in channels-last
    format, which the forward sees to, the classes of a cell are neighbours, as the operator wants them.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: int = 1024,
        lr_factor: float = 1.0,
        group_size: int = 7,
        mask_size: int = 21,
        separate_maps: bool = False,
    ) -> None:
        """Takes the sizes.

        Args:
            in_channels: of the feature.
            num_classes: without background.
            channels: of the narrowed feature.
            lr_factor: of the first convolution, see ``convmask.engine.lr_factors``.
            group_size: k.
            mask_size: P.
            separate_maps: masks are cut from maps of their own.

        Raises:
            ValueError: P is less than k.
        """
        super().__init__()
        if not 1 <= group_size <= mask_size:
            raise ValueError(f"MODEL.FCIS.GROUP_SIZE is {group_size}, not from 1 to MASK_SIZE, {mask_size}")
        self.num_classes, self.group_size, self.mask_size = num_classes, group_size, mask_size
        self.reduction = nn.Conv2d(in_channels, channels, 1)
        maps = 2 * group_size**2 * (num_classes + 1)
        self.score_maps = nn.Conv2d(channels, maps, 1)
        self.mask_maps = nn.Conv2d(channels, maps, 1) if separate_maps else None
        self.box_maps = nn.Conv2d(channels, 4 * group_size**2, 1)
        for layer in (self.reduction, self.score_maps, self.mask_maps, self.box_maps):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        for parameter in self.reduction.parameters():
            parameter.lr_factor = lr_factor

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        node = cfg.MODEL.FCIS
        return {
            "in_channels": in_channels,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "channels": node.REDUCTION,
            "lr_factor": node.REDUCTION_LR_FACTOR,
            "group_size": node.GROUP_SIZE,
            "mask_size": node.MASK_SIZE,
            "separate_maps": node.SEPARATE_MAPS,
        }

    def forward(self, feature: torch.Tensor) -> Maps:
        """The maps of (N, C', H, W)."""
        reduced = F.relu(self.reduction(feature)).contiguous(memory_format=torch.channels_last)
        masks = None if self.mask_maps is None else self._by_position(self.mask_maps(reduced))
        return Maps(self._by_position(self.score_maps(reduced)), self.box_maps(reduced), masks)

    def _by_position(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.unflatten(1, (self.group_size, self.group_size, 2, self.num_classes + 1))

    def read(
        self,
        maps: Maps,
        rois: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        spatial_scale: float,
        rounded: bool,
        first_class: int,
    ) -> RoiOutputs:
        """What RoIs of one level read.

        Args:
            maps: of the level.
            rois: (R, 5) image index and box, by the convention.
            labels: (R,) classes of the masks; None: the best from ``first_class`` on.
            spatial_scale: cells a pixel.
            rounded: see :func:`ps_roi_pool`.
            first_class: see :func:`inside_outside_assemble`.
        """
        options: dict[str, Any] = {
            "output_size": self.mask_size,
            "spatial_scale": spatial_scale,
            "rounded": rounded,
        }
        assembled = inside_outside_assemble(maps.scores, rois, labels, first_class=first_class, **options)
        scores, masks, classes = assembled
        if maps.masks is not None:
            _, masks, _ = inside_outside_assemble(maps.masks, rois, classes, **options)
        deltas = ps_roi_pool(maps.boxes, rois, group_size=self.group_size, **options).mean(dim=(2, 3))
        return RoiOutputs(scores, masks, classes, deltas)
