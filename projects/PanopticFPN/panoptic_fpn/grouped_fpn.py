"""FPN channels split between the two branches (arXiv 1901.02446, section 5.3, "grouped FPN")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import FPN, Backbone
from fvcore.nn import weight_init


def group_output_convs(backbone: Backbone) -> None:
    """Replaces the FPN's 3x3 output convolutions by ones with two groups, in place; names stay.

    Raises:
        ValueError: the backbone is no FPN, its width is odd, or its extra levels have convolutions that mix the groups.
    """
    if not isinstance(backbone, FPN):
        raise ValueError(f"MODEL.PANOPTIC_FPN.GROUPED_FPN needs an FPN backbone, not {type(backbone).__name__}")
    if backbone.top_block is not None and any(True for _ in backbone.top_block.parameters()):
        raise ValueError(
            "MODEL.PANOPTIC_FPN.GROUPED_FPN needs an FPN whose extra levels are pooled: the convolutions of "
            f"{type(backbone.top_block).__name__} mix the channels of both branches"
        )
    for index, dense in enumerate(backbone.output_convs):
        if dense.out_channels % 2:
            raise ValueError(f"MODEL.PANOPTIC_FPN.GROUPED_FPN: {dense.out_channels} FPN channels cannot be halved")
        grouped = Conv2d(
            dense.in_channels,
            dense.out_channels,
            kernel_size=3,
            padding=1,
            groups=2,
            bias=dense.bias is not None,
            norm=dense.norm,
        )
        weight_init.c2_xavier_fill(grouped)
        name = next(name for name, module in backbone.named_children() if module is dense)
        setattr(backbone, name, grouped)
        backbone.output_convs[index] = grouped


def half_shapes(shapes: Mapping[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """Shapes of one branch's half of the features."""
    return {name: ShapeSpec(channels=shape.channels // 2, stride=shape.stride) for name, shape in shapes.items()}


def split_features(
    features: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Halves of the channels of (N, C, h, w) features: for the instance branch and for the semantic branch."""
    halves = {name: x.chunk(2, dim=1) for name, x in features.items()}
    return {name: x[0] for name, x in halves.items()}, {name: x[1] for name, x in halves.items()}
