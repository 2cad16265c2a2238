"""The heads: where objects are, by which kernels they are cut out, and of what feature (arXiv 2012.00720, section 3).

Shapes: N images, level l of H_l x W_l cells, C thing classes, S region classes, K channels of the kernel map, E of the
encoded feature, h x w cells at the common stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.nn import functional as F

from convmask.layers import DeformConv2d, append_coordinates


class HeadOutputs(NamedTuple):
    """What the heads predict for a batch; lists have one entry a level.

    Attributes:
        centers: (N, C, H_l, W_l) logits of thing centres.
        regions: (N, S, H_l, W_l) logits of stuff regions.
        kernels: (N, K, H_l, W_l) kernel maps.
        encoded: (N, E, h, w) feature of which the masks are cut out.
    """

    centers: list[torch.Tensor]
    regions: list[torch.Tensor]
    kernels: list[torch.Tensor]
    encoded: torch.Tensor

    def float(self) -> HeadOutputs:
        """The same in single precision: what follows the heads has long sums."""
        centers, regions, kernels = ([x.float() for x in level] for level in self[:3])
        return HeadOutputs(centers, regions, kernels, self.encoded.float())

    def of_image(self, index: int) -> HeadOutputs:
        """Those of one image, without the batch dimension."""
        centers, regions, kernels = ([x[index] for x in level] for level in self[:3])
        return HeadOutputs(centers, regions, kernels, self.encoded[index])


class Tower(nn.Sequential):
    """3x3 convolutions, each with normalisation and ReLU, perhaps with coordinates in the input."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        num_convs: int,
        norm: str,
        deform: bool,
        coordinates: bool,
        coordinate_gain: float = 1.0,
    ) -> None:
        """Builds the convolutions.

        Args:
            in_channels: of the input, without coordinates.
            width: of the result.
            num_convs: number of convolutions.
            norm: "" for none, but a bias.
            deform: modulated deformable convolutions.
            coordinates: row and column are two more channels of the input.
            coordinate_gain: factor of their initial weights.
        """
        channels = in_channels + 2 if coordinates else in_channels
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            options: dict[str, Any] = {"padding": 1, "bias": not norm, "norm": get_norm(norm, width)}
            options["activation"] = F.relu
            # the release leaves the offsets' weights as PyTorch draws them
            layers.append(
                DeformConv2d(channels, width, 3, zero_offsets=False, **options)
                if deform
                else Conv2d(channels, width, kernel_size=3, **options)
            )
            channels = width
        super().__init__(*layers)
        self.coordinates = coordinates
        self.out_channels = channels
        if coordinates and layers:
            with torch.no_grad():
                layers[0].weight[:, -2:] *= coordinate_gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, width, H, W)."""
        return super().forward(append_coordinates(x) if self.coordinates else x)


def _tower_options(node: CfgNode) -> dict[str, Any]:
    return {
        "width": node.CONVS_DIM,
        "num_convs": node.NUM_CONVS,
        "norm": node.NORM,
        "deform": node.DEFORM,
        "coordinates": node.COORD,
        "coordinate_gain": node.COORD_GAIN,
    }


def _prediction(in_channels: int, out_channels: int, *, bias: float = 0.0, std: float = 0.01) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=std)
    nn.init.constant_(conv.bias, bias)
    return conv


class PositionHead(nn.Module):
    """Thing centres and stuff regions; one set of weights for all levels."""

    @configurable
    def __init__(
        self, in_channels: int, *, num_classes: int, num_regions: int, bias_value: float = -2.19, **tower: Any
    ) -> None:
        """Builds the head.

        Args:
            in_channels: of each level.
            num_classes: C, thing classes.
            num_regions: S, region classes.
            bias_value: initial bias of all logits.
            tower: see :class:`Tower`.
        """
        super().__init__()
        self.tower = Tower(in_channels, **tower)
        self.centers = _prediction(self.tower.out_channels, num_classes, bias=bias_value)
        self.regions = _prediction(self.tower.out_channels, num_regions, bias=bias_value)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        node = cfg.MODEL.PANOPTIC_FCN
        return {
            "in_channels": in_channels,
            "num_classes": node.NUM_CLASSES,
            "num_regions": node.STUFF.NUM_CLASSES,
            "bias_value": node.POSITION_HEAD.BIAS_VALUE,
            **_tower_options(node.POSITION_HEAD),
        }

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Logits of centres (N, C, H_l, W_l) and of regions (N, S, H_l, W_l) of each level."""
        towers = [self.tower(x) for x in features]
        return [self.centers(x) for x in towers], [self.regions(x) for x in towers]


class KernelHead(nn.Module):
    """A kernel for each cell of each level; one set of weights for all levels."""

    @configurable
    def __init__(self, in_channels: int, *, kernel_std: float = 0.01, **tower: Any) -> None:
        """Builds the head.

        Args:
            in_channels: of each level.
            kernel_std: standard deviation of the prediction's initial weights.
            tower: see :class:`Tower`.
        """
        super().__init__()
        self.tower = Tower(in_channels, **tower)
        self.out_channels = tower["width"]
        self.kernels = _prediction(self.tower.out_channels, self.out_channels, std=kernel_std)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        node = cfg.MODEL.PANOPTIC_FCN
        return {"in_channels": in_channels, "kernel_std": node.KERNEL_STD, **_tower_options(node.KERNEL_HEAD)}

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Kernel maps (N, K, H_l, W_l) of each level."""
        return [self.kernels(self.tower(x)) for x in features]


class FeatureEncoder(nn.Module):
    """The feature that kernels are applied to."""

    @configurable
    def __init__(self, in_channels: int, **tower: Any) -> None:
        """Builds the convolutions; ``tower``: see :class:`Tower`."""
        super().__init__()
        self.tower = Tower(in_channels, **tower)
        self.out_channels = self.tower.out_channels

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        return {"in_channels": in_channels, **_tower_options(cfg.MODEL.PANOPTIC_FCN.FEATURE_ENCODER)}

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, h, w) to (N, E, h, w)."""
        return self.tower(feature)


def kernel_embedding(in_channels: int, out_channels: int, std: float = 0.01) -> nn.Linear:
    """From vectors of the kernel map (..., K) to kernels of the encoded feature (..., E); ``std`` of its weights."""
    linear = nn.Linear(in_channels, out_channels)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
