"""Small semantic heads, each with a 1x1 ``predictor`` at its end, for K-Net to refine or to be used by themselves.

Shapes: N images, K classes, C channels, h x w cells of the finest input.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from convmask.utils.exporting import exporting

Features = Mapping[str, torch.Tensor]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, ignore_value: int) -> torch.Tensor:
    """Cross-entropy of (N, K, h, w) logits, enlarged to the (N, H, W) targets, summed over labelled pixels and divided
    by all pixels, ignored ones included (as the released models are trained)."""
    logits = F.interpolate(logits.float(), size=targets.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_value).mean()


class Predictor(Conv2d):
    """A 1x1 convolution with dropout of whole channels before it."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        """Builds the convolution."""
        super().__init__(in_channels, num_classes, kernel_size=1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, h, w) to (N, K, h, w)."""
        return super().forward(F.dropout2d(x, self.dropout, self.training))


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, norm: str, dilation: int = 1) -> Conv2d:
    """A convolution that keeps the size, its normalisation, and ReLU."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv


class SegmentationHead(nn.Module):
    """What the heads have in common: the predictor, the loss, and Detectron2's interface.

    A head gives its map by :meth:`encode`.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        channels: int = 512,
        norm: str = "SyncBN",
        dropout: float = 0.1,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        """Builds the predictor.

        Args:
            input_shape: the inputs, in any order.
            num_classes: K.
            channels: C.
            norm: Detectron2's name of the normalisation.
            dropout: probability with which a channel is left out before the predictor in training.
            loss_weight: factor of the loss.
            ignore_value: label of pixels without loss.

        Raises:
            ValueError: there is no input.
        """
        super().__init__()
        if not input_shape:
            raise ValueError(f"{type(self).__name__}: no input: check MODEL.SEM_SEG_HEAD.IN_FEATURES")
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in levels]
        self.in_channels = [shape.channels for _, shape in levels]
        self.common_stride = levels[0][1].stride
        self.channels, self.norm = channels, norm
        self.loss_weight, self.ignore_value = loss_weight, ignore_value
        self.predictor = Predictor(channels, num_classes, dropout)

    def encode(self, features: Features) -> torch.Tensor:
        """The map (N, C, h, w) that the predictor takes."""
        raise NotImplementedError

    def layers(self, features: Features) -> torch.Tensor:
        """Logits (N, K, h, w)."""
        return self.predictor(self.encode(features))

    def forward(
        self, features: Features, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Training: (None, losses). Inference: (logits enlarged by the stride of the finest input, {})."""
        logits = self.layers(features)
        if self.training:
            if targets is None:
                raise ValueError(f"{type(self).__name__}: training needs targets ('sem_seg' of each image)")
            loss = cross_entropy(logits, targets, self.ignore_value)
            return None, {"loss_sem_seg": loss * self.loss_weight}
        return F.interpolate(logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False), {}


def _common_arguments(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    node = cfg.MODEL.SEM_SEG_HEAD
    return {
        "input_shape": {name: shape for name, shape in input_shape.items() if name in node.IN_FEATURES},
        "num_classes": node.NUM_CLASSES,
        "channels": node.CONVS_DIM,
        "norm": node.NORM,
        "dropout": cfg.MODEL.KNET.SEMANTIC.DROPOUT,
        "loss_weight": node.LOSS_WEIGHT,
        "ignore_value": node.IGNORE_VALUE,
    }


@SEM_SEG_HEADS_REGISTRY.register()
class FCNHead(SegmentationHead):
    """3x3 convolutions of the coarsest input (FCN, arXiv 1411.4038)."""

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, num_convs: int = 2, concat_input: bool = True, **common: Any
    ) -> None:
        """Builds the convolutions.

        Args:
            input_shape: see :class:`SegmentationHead`, as are the arguments in ``common``.
            num_convs: convolutions before the predictor.
            concat_input: one more convolution joins their result with the input.
        """
        super().__init__(input_shape, **common)
        self.common_stride = max(shape.stride for shape in input_shape.values())
        width = self.in_channels[-1]
        widths = [width, *([self.channels] * num_convs)]
        self.convs = nn.Sequential(*(conv_norm_relu(a, b, 3, self.norm) for a, b in itertools.pairwise(widths)))
        self.conv_cat = conv_norm_relu(width + widths[-1], self.channels, 3, self.norm) if concat_input else None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        return {"num_convs": cfg.MODEL.KNET.SEMANTIC.NUM_CONVS, **_common_arguments(cfg, input_shape)}

    def encode(self, features: Features) -> torch.Tensor:
        """See :meth:`SegmentationHead.encode`."""
        x = features[self.in_features[-1]]
        y = self.convs(x)
        return y if self.conv_cat is None else self.conv_cat(torch.cat([x, y], dim=1))


def _average_by_product(x: torch.Tensor, cells: int) -> torch.Tensor:
    """``F.adaptive_avg_pool2d`` of (N, C, h, w) to ``cells`` x ``cells``, of any size in ONNX too."""
    shares = []
    for length in x.shape[2:]:
        cell = torch.arange(cells, device=x.device)[:, None]
        first = torch.div(cell * length, cells, rounding_mode="floor")
        last = torch.div((cell + 1) * length + cells - 1, cells, rounding_mode="floor")
        place = torch.arange(length, device=x.device)
        inside = ((place >= first) & (place < last)).to(x.dtype)
        shares.append(inside / inside.sum(dim=1, keepdim=True))
    return shares[0] @ x @ shares[1].T


class PyramidPooling(nn.ModuleList):
    """Averages of the map over grids of several sizes (PSPNet, arXiv 1612.01105)."""

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int], norm: str) -> None:
        """Builds a 1x1 convolution for each grid of ``scales`` x ``scales`` cells."""
        super().__init__(conv_norm_relu(in_channels, channels, 1, norm) for _ in scales)
        self.scales = list(scales)
        self.out_channels = in_channels + channels * len(self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, h, w) to (N, out_channels, h, w): the input, then each grid at its size."""
        pool = _average_by_product if exporting() else F.adaptive_avg_pool2d
        pooled = [conv(pool(x, scale)) for conv, scale in zip(self, self.scales, strict=True)]
        size = x.shape[2:]
        return torch.cat(
            [x, *(F.interpolate(y, size=size, mode="bilinear", align_corners=False) for y in pooled)], dim=1
        )


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(SegmentationHead):
    """Pyramid pooling of the coarsest input (PSPNet, arXiv 1612.01105)."""

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, pool_scales: Sequence[int] = (1, 2, 3, 6), **common: Any
    ) -> None:
        """Builds the layers; ``common``: see :class:`SegmentationHead`."""
        super().__init__(input_shape, **common)
        self.common_stride = max(shape.stride for shape in input_shape.values())
        self.psp_modules = PyramidPooling(self.in_channels[-1], self.channels, pool_scales, self.norm)
        self.bottleneck = conv_norm_relu(self.psp_modules.out_channels, self.channels, 3, self.norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        return {"pool_scales": cfg.MODEL.KNET.SEMANTIC.POOL_SCALES, **_common_arguments(cfg, input_shape)}

    def encode(self, features: Features) -> torch.Tensor:
        """See :meth:`SegmentationHead.encode`."""
        return self.bottleneck(self.psp_modules(features[self.in_features[-1]]))


@SEM_SEG_HEADS_REGISTRY.register()
class ASPPHead(SegmentationHead):
    """Atrous spatial pyramid pooling of the coarsest input (DeepLabV3, arXiv 1706.05587)."""

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, dilations: Sequence[int] = (1, 12, 24, 36), **common: Any
    ) -> None:
        """Builds the layers.

        Args:
            input_shape: see :class:`SegmentationHead`, as are the arguments in ``common``.
            dilations: of the parallel convolutions; the one of dilation 1 is 1x1.
        """
        super().__init__(input_shape, **common)
        self.common_stride = max(shape.stride for shape in input_shape.values())
        width = self.in_channels[-1]
        self.image_pool = conv_norm_relu(width, self.channels, 1, self.norm)
        self.aspp_modules = nn.ModuleList(
            conv_norm_relu(width, self.channels, 1 if dilation == 1 else 3, self.norm, dilation)
            for dilation in dilations
        )
        self.bottleneck = conv_norm_relu((len(dilations) + 1) * self.channels, self.channels, 3, self.norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        return {"dilations": cfg.MODEL.KNET.SEMANTIC.ASPP_DILATIONS, **_common_arguments(cfg, input_shape)}

    def encode(self, features: Features) -> torch.Tensor:
        """See :meth:`SegmentationHead.encode`."""
        x = features[self.in_features[-1]]
        pooled = self.image_pool(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
        return self.bottleneck(torch.cat([pooled, *(conv(x) for conv in self.aspp_modules)], dim=1))


@SEM_SEG_HEADS_REGISTRY.register()
class UPerHead(SegmentationHead):
    """A feature pyramid with pyramid pooling at its top (UPerNet, arXiv 1807.10221)."""

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, pool_scales: Sequence[int] = (1, 2, 3, 6), **common: Any
    ) -> None:
        """Builds the layers; ``common``: see :class:`SegmentationHead`."""
        super().__init__(input_shape, **common)
        channels, norm = self.channels, self.norm
        *finer, coarsest = self.in_channels
        self.psp_modules = PyramidPooling(coarsest, channels, pool_scales, norm)
        self.bottleneck = conv_norm_relu(self.psp_modules.out_channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(conv_norm_relu(width, channels, 1, norm) for width in finer)
        self.fpn_convs = nn.ModuleList(conv_norm_relu(channels, channels, 3, norm) for _ in finer)
        self.fpn_bottleneck = conv_norm_relu(len(self.in_channels) * channels, channels, 3, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        return {"pool_scales": cfg.MODEL.KNET.SEMANTIC.POOL_SCALES, **_common_arguments(cfg, input_shape)}

    def encode(self, features: Features) -> torch.Tensor:
        """See :meth:`SegmentationHead.encode`."""
        *finer, coarsest = (features[name] for name in self.in_features)
        top = self.bottleneck(self.psp_modules(coarsest))
        levels = [top]
        for lateral, x in zip(reversed(self.lateral_convs), reversed(finer), strict=True):
            top = lateral(x) + F.interpolate(top, size=x.shape[2:], mode="bilinear", align_corners=False)
            levels.insert(0, top)
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        size = outputs[0].shape[2:]
        resized = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in outputs[1:]]
        return self.fpn_bottleneck(torch.cat([outputs[0], *resized], dim=1))
