"""The semantic branch of Panoptic FPN (arXiv 1901.02446, Fig. 3): from pyramid levels to one map.

Shapes: N images, C channels, h x w cells of the map at ``common_stride``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

AGGREGATIONS = ("sum", "concat")


class SemanticFPN(nn.Module):
    """Brings every level to ``common_stride`` by [3x3 convolution, norm, ReLU, bilinear x2] stages and joins the
    levels.

    A level at ``common_stride`` has one stage without upsampling; a finer one is reduced by convolutions of stride 2.
    With the default options the parameters have the names of Detectron2's ``SemSegFPNHead`` (``p2.0.weight``,
    ``p4.2.norm.bias``) and are drawn in the same order.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        conv_dims: int = 128,
        common_stride: int = 4,
        norm: str = "GN",
        aggregation: str = "sum",
        convs_per_stage: int = 1,
        conv_after_upsampling: bool = False,
    ) -> None:
        """Builds the stages of each level.

        Args:
            input_shape: channels and stride of each input feature; strides are powers of two.
            conv_dims: width of the convolutions.
            common_stride: stride of the result, a power of two.
            norm: Detectron2's name of the normalisation ("GN", "BN", ...); "" for none, then the convolutions have a
                bias.
            aggregation: "sum" adds the levels, "concat" puts their channels one after the other, finest level first.
            convs_per_stage: 3x3 convolutions before each upsampling: 1, or 2 as in the paper's COCO-Stuff entry.
            conv_after_upsampling: one more stage after the last upsampling of a level (K-Net's localisation FPN).

        Raises:
            ValueError: no input, an unknown aggregation, a width, stride or number of convolutions that cannot be.
        """
        super().__init__()
        if not input_shape:
            raise ValueError("SemanticFPN: no input feature: check IN_FEATURES against what the backbone gives")
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"SemanticFPN: aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
        if convs_per_stage < 1 or conv_dims < 1:
            raise ValueError(
                f"SemanticFPN: convs_per_stage ({convs_per_stage}) and conv_dims ({conv_dims}) must be 1 or more"
            )
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in levels]
        self.common_stride = common_stride
        self.aggregation = aggregation
        self.convs_per_stage = convs_per_stage
        self.out_channels = conv_dims * (len(levels) if aggregation == "concat" else 1)
        for name, shape in levels:
            doublings = _log2_ratio(name, shape.stride, common_stride)
            stages = max(1, abs(doublings)) + (conv_after_upsampling and doublings > 0)
            self.add_module(name, self._level(shape.channels, conv_dims, norm, stages, doublings))

    def _level(self, in_channels: int, width: int, norm: str, stages: int, doublings: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for stage in range(stages):
            for index in range(self.convs_per_stage):
                conv = Conv2d(
                    width if layers else in_channels,
                    width,
                    kernel_size=3,
                    stride=2 if doublings < 0 and index == 0 else 1,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, width),
                    activation=F.relu,
                )
                weight_init.c2_msra_fill(conv)
                layers.append(conv)
            if stage < doublings:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        return nn.Sequential(*layers)

    def aggregate(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The joined map (N, out_channels, h, w) from levels (N, C, H_l, W_l).

        Coarse levels of sizes that were rounded up are cut at the right and bottom to the size that the finest one
        gives.
        """
        maps = [self.get_submodule(name)(features[name]) for name in self.in_features]
        height, width = maps[0].shape[-2:]
        maps = [x[..., :height, :width] for x in maps]
        if self.aggregation == "concat":
            return torch.cat(maps, dim=1)
        total = maps[0]
        for x in maps[1:]:
            total = total + x
        return total

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :meth:`aggregate`."""
        return self.aggregate(features)


def _log2_ratio(name: str, stride: int, common_stride: int) -> int:
    exponent = math.log2(stride / common_stride)
    if not exponent.is_integer():
        raise ValueError(
            f"SemanticFPN: the stride of {name} ({stride}) over common_stride ({common_stride}) is no power of two"
        )
    return int(exponent)
