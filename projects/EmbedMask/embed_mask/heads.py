"""The embeddings of proposals and pixels, and the margins of proposals (arXiv 1912.01954, section 3).

Shapes: N images, level l of H_l x W_l locations, D dimensions, M margins of a proposal (1 or D), h x w pixels at the
stride of the masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import nn
from torch.nn import functional as F

from .fcos_head import FCOSOutputs, Scale, flatten_levels, prediction, tower
from .fcos_targets import make_locations

# Dimensions that know their position, and what its pixels are divided by.
POSITIONS, POSITION_UNIT = 2, 100.0


class EmbeddingOutputs(NamedTuple):
    """What the head predicts for a batch; lists have one entry a level.

    Attributes:
        proposals: (N, D, H_l, W_l) embeddings.
        margins: (N, M, H_l, W_l), above 0.
        pixels: (N, D, h / s, w / s) embeddings, before they are enlarged by the scale factor s.
    """

    proposals: list[torch.Tensor]
    margins: list[torch.Tensor]
    pixels: torch.Tensor

    def float(self) -> EmbeddingOutputs:
        """The same in single precision."""
        proposals, margins = ([x.float() for x in level] for level in self[:2])
        return EmbeddingOutputs(proposals, margins, self.pixels.float())

    def flat_proposals(self) -> torch.Tensor:
        """(N, L, D) of all levels."""
        return flatten_levels(self.proposals)

    def flat_margins(self) -> torch.Tensor:
        """(N, L, M) of all levels."""
        return flatten_levels(self.margins)


class EmbeddingHead(nn.Module):
    """Proposals on the features of FCOS's box tower, pixels on one level with a tower of their own."""

    @configurable
    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        pixel_channels: int,
        pixel_stride: int,
        *,
        embed_dim: int = 32,
        position_channels: bool = False,
        embed_reduce_factor: float = 1.0,
        num_convs: int = 4,
        norm: str = "GN",
        margin_source: Literal["boxes", "features"] = "boxes",
        margin_per_dimension: bool = False,
        margin_prior: float = 2.0,
        margin_box_scale: float = 800.0,
        margin_detach_boxes: bool = True,
        margin_reduce_factor: float = 32.0,
    ) -> None:
        """Builds the head.

        Args:
            in_channels: of the box tower.
            strides: of the levels, in pixels.
            pixel_channels: of the level of the pixel embedding.
            pixel_stride: of that level.
            embed_dim: D.
            position_channels: see ``POSITION_CHANNELS``.
            embed_reduce_factor: see ``EMBED_REDUCE_FACTOR``.
            num_convs: of the pixels' tower.
            norm: of the pixels' tower.
            margin_source: see ``MARGIN.SOURCE``, as are the others in their places.
            margin_per_dimension: see above.
            margin_prior: see above.
            margin_box_scale: see above.
            margin_detach_boxes: see above.
            margin_reduce_factor: see above.
        """
        super().__init__()
        self.mask_tower = tower(pixel_channels, num_convs, norm)
        self.pixel_embed = prediction(pixel_channels, embed_dim)
        self.proposal_embed = prediction(in_channels, embed_dim)
        margins = embed_dim if margin_per_dimension else 1
        # The probability at the distance of the prior is 1/2.
        self.prior_margin = math.log(2) / margin_prior**2
        bias = math.log(self.prior_margin)
        if margin_source == "boxes":
            self.margin = prediction(4, margins, kernel_size=1, bias=bias)
        else:
            self.margin = prediction(in_channels, margins, bias=bias)
        self.position_scale = Scale() if position_channels else None
        scaled = position_channels and margin_per_dimension and margin_source == "features"
        self.margin_scales = nn.ModuleList(Scale() for _ in strides) if scaled else None
        self.strides, self.pixel_stride = tuple(strides), pixel_stride
        self.margin_source = margin_source
        self.embed_reduce_factor, self.margin_reduce_factor = embed_reduce_factor, margin_reduce_factor
        self.margin_box_scale, self.margin_detach_boxes = margin_box_scale, margin_detach_boxes

    @classmethod
    def from_config(
        cls, cfg: CfgNode, in_channels: int, strides: Sequence[int], pixel_channels: int, pixel_stride: int
    ) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        node = cfg.MODEL.EMBED_MASK
        return {
            "in_channels": in_channels,
            "strides": strides,
            "pixel_channels": pixel_channels,
            "pixel_stride": pixel_stride,
            "embed_dim": node.EMBED_DIM,
            "position_channels": node.POSITION_CHANNELS,
            "embed_reduce_factor": node.EMBED_REDUCE_FACTOR,
            "num_convs": node.PIXELS.NUM_CONVS,
            "norm": node.FCOS.NORM,
            "margin_source": node.MARGIN.SOURCE,
            "margin_per_dimension": node.MARGIN.PER_DIMENSION,
            "margin_prior": node.MARGIN.PRIOR,
            "margin_box_scale": node.MARGIN.BOX_SCALE,
            "margin_detach_boxes": node.MARGIN.DETACH_BOXES,
            "margin_reduce_factor": node.MARGIN.REDUCE_FACTOR,
        }

    def forward(self, outputs: FCOSOutputs, pixel_level: torch.Tensor) -> EmbeddingOutputs:
        """Embeddings and margins from FCOS's outputs, and pixels from the (N, pixel_channels, H, W) level."""
        scale = self.margin_box_scale
        if scale < 0:
            scale = float(min(pixel_level.shape[2:]) * self.pixel_stride)
        proposals, margins = [], []
        for index, (features, distances) in enumerate(zip(outputs.box_features, outputs.distances, strict=True)):
            embedding = self.proposal_embed(features / self.embed_reduce_factor)
            proposals.append(self._add_position(embedding, self.strides[index]))
            if self.margin_source == "boxes":
                boxes = distances.detach() if self.margin_detach_boxes else distances
                margin = self.margin(boxes * (outputs.units[index] / scale))
            else:
                margin = self._scale_margin(self.margin(features / self.margin_reduce_factor), index)
            margins.append(margin.exp())
        pixels = self.pixel_embed(self.mask_tower(pixel_level) / self.embed_reduce_factor)
        return EmbeddingOutputs(proposals, margins, self._add_position(pixels, self.pixel_stride))

    def _add_position(self, embedding: torch.Tensor, stride: int) -> torch.Tensor:
        """Adds (x, y) to the first dimensions of (N, D, H, W)."""
        if self.position_scale is None:
            return embedding
        height, width = embedding.shape[2:]
        points = make_locations([(height, width)], [stride], embedding.device).points
        position = self.position_scale(points.T.view(1, POSITIONS, height, width) / POSITION_UNIT)
        return torch.cat([embedding[:, :POSITIONS] + position, embedding[:, POSITIONS:]], dim=1)

    def _scale_margin(self, margin: torch.Tensor, level: int) -> torch.Tensor:
        if self.margin_scales is None:
            return margin
        return torch.cat([self.margin_scales[level](margin[:, :POSITIONS]), margin[:, POSITIONS:]], dim=1)


def enlarge(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Pixel embeddings (N, D, H, W) at the stride of the masks."""
    if factor == 1:
        return pixels
    return F.interpolate(pixels, scale_factor=factor, mode="bilinear", align_corners=False)
