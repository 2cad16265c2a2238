"""The semantic head: Semantic FPN, a 1x1 predictor, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from convmask.layers import SemanticFPN

from .losses import semantic_cross_entropy


@SEM_SEG_HEADS_REGISTRY.register()
class PanopticFPNSemSegHead(SemanticFPN):
    """Detectron2's ``SemSegFPNHead``, parameter names and numbers, with the variants of the paper.

    It takes that head's place in Detectron2's own meta-architectures too.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
        predictor_std: float = 0.0,
        **branch: Any,
    ) -> None:
        """Adds the predictor to the branch.

        Args:
            input_shape: see :class:`SemanticFPN`, as are the arguments in ``branch``.
            num_classes: semantic labels, "things" included where there is one.
            loss_weight: factor of the loss.
            ignore_value: label of the pixels that have no loss.
            predictor_std: standard deviation of the predictor's initial weights; 0.0: sqrt(2 / num_classes).
        """
        super().__init__(input_shape, **branch)
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        self.predictor = Conv2d(self.out_channels, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)
        if predictor_std > 0:
            nn.init.normal_(self.predictor.weight, std=predictor_std)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The constructor's arguments by the config."""
        node = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in node.IN_FEATURES},
            "num_classes": node.NUM_CLASSES,
            "loss_weight": node.LOSS_WEIGHT,
            "ignore_value": node.IGNORE_VALUE,
            "predictor_std": cfg.MODEL.PANOPTIC_FPN.PREDICTOR_STD,
            "conv_dims": node.CONVS_DIM,
            "common_stride": node.COMMON_STRIDE,
            "norm": node.NORM,
            "aggregation": cfg.MODEL.PANOPTIC_FPN.AGGREGATION,
            "convs_per_stage": cfg.MODEL.PANOPTIC_FPN.CONVS_PER_STAGE,
        }

    def layers(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (N, num_classes, h, w) at ``common_stride``."""
        return self.predictor(self.aggregate(features))

    def upsample(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits at the size of the padded images, bilinear."""
        return F.interpolate(logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False)

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """``loss_sem_seg``: see :func:`semantic_cross_entropy`; ``targets`` (N, H, W) int64 at the size of the padded
        images."""
        # bilinear upsampling and log-softmax over many classes lose too much in half precision
        loss = semantic_cross_entropy(self.upsample(logits.float()), targets, self.ignore_value)
        return {"loss_sem_seg": loss * self.loss_weight}

    # Detectron2's interface of a semantic head differs from that of a layer
    def forward(
        self, features: Mapping[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Training: ``(None, losses)``. Inference: (logits (N, num_classes, H, W) at the size of the padded images,
        {})."""
        logits = self.layers(features)
        if not self.training:
            return self.upsample(logits), {}
        if targets is None:
            raise ValueError("PanopticFPNSemSegHead: training needs targets ('sem_seg' of each image)")
        return None, self.losses(logits, targets)
